"""A site's folder: its keys, its data, its policy, its ledger. All of it stays there."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from privfed.config import Policy
from privfed.crypto.journal import JournalFile, SQLiteJournal
from privfed.crypto.roster import Identity, Roster, accept, load_roster
from privfed.data.queries import at_site
from privfed.data.records import SiteData, public_split_key
from privfed.errors import DataError
from privfed.key_holder import KeyHolder
from privfed.keyring import ledger_key, site_key
from privfed.privacy import noise
from privfed.privacy.accountant import Accountant
from privfed.privacy.ledger import Ledger
from privfed.site import Site

from . import files, kits, papers
from .durable import DurableSite
from .files import DeploymentError
from .papers import EngineName, Hex32, Name, Terms

SITE, POLICY, KEYS, KIT, REQUEST, LEDGER, JOURNAL, STATES, LOCK, RESTORED, ACCOUNTS = (
    "site.toml",
    "policy.toml",
    "keys.json",
    "kit",
    "request",
    "ledger.db",
    "journal.db",
    "states",
    ".lock",
    "restored.json",
    "accounts",
)
NEXT = "next"
"""A folder in a site's: the keys that it means to have, until they stand in a roster that it accepts."""

Strict = Policy(
    max_epsilon=4.0,
    minimum_cohort=3,
    refuse_central_noise=True,
    release_figures=False,
    require_privacy=True,
    require_secure_aggregation=True,
    key_holders=(),
)
"""What a site demands unless it decides otherwise."""


class Study(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """For reproducing a simulation on real processes: everything a privacy claim rests on is then public.

    Args:
        insecure_seed: noise that anyone can recompute.
        split_seed: the public split of a simulation with this seed.
    """

    insecure_seed: Annotated[int, Meta(ge=0)]
    split_seed: Annotated[int, Meta(ge=0)] = 0


class SiteFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """site.toml: what only this site decides beside its policy.

    Args:
        data: path of its own table, or of its database file.
        engine: that its consortium has.
        study: never set at a hospital.
    """

    name: Name
    organisation: Name
    data: str = ""
    engine: EngineName = "nvflare"
    study: Study | None = None


class Restored(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """restored.json: the ledger is a backup's, an older copy, or a new one for one that was lost: it may lack spends.

    Args:
        ledger: its id; empty where it was lost.
        sequence, head: its last entry, and that entry's hash in hex.
        made, restored: when the backup was made, and put back; both when it was found, for a ledger that no `restore`
            put there. UTC, ISO 8601.
    """

    ledger: str
    sequence: int
    head: str
    made: str
    restored: str


class _Keys(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    secagg: Hex32
    ledger: Hex32
    former: tuple[Hex32, ...] = ()  # public ledger keys that this site had before: they signed its earlier words


def given_policy(path: Path) -> Policy:
    """A policy file that a person wrote; what it leaves out is as strict as without one. Raises `DeploymentError`."""
    text = files.read(path)
    said = files.parse_toml(text, Policy, path)
    return msgspec.structs.replace(Strict, **{name: getattr(said, name) for name in files.toml_keys(text)})


def _always() -> list[str]:
    """The lines that every policy has, as the strict one has them; the others may be left away."""
    names = [field.name for field in msgspec.structs.fields(Policy) if field.default is not None]
    lines = files.toml_text(msgspec.to_builtins(Strict)).splitlines()
    return [line for line in lines if line.split(" = ")[0] in names]


@dataclass(frozen=True)
class Hospital:
    """A site's folder, read."""

    home: Path
    file: SiteFile

    @classmethod
    def request(
        cls,
        home: Path,
        *,
        consortium: str,
        name: str,
        organisation: str,
        contact: str,
        engine: EngineName = "nvflare",
    ) -> bytes:
        """Make a site's keys, in a new folder of mode 0700, and the request that may leave it.

        Raises:
            DeploymentError: the folder is not empty, FLARE is missing, or no site can have the name.
        """
        papers.require_name(name, "a site")
        if engine == "nvflare":
            kits.require_flare()
        if home.exists() and any(home.iterdir()):
            raise DeploymentError(f"{home} is not empty: nothing was changed; give a new folder")
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        home = home.absolute()
        site = SiteFile(name=name, organisation=organisation, engine=engine)
        files.write_toml(home / SITE, site, comment="A site of a privfed consortium. Yours alone.")
        files.parse_toml(files.read(home / SITE), SiteFile, home / SITE)
        body = _ask(home, site, consortium=consortium, contact=contact)
        files.write(home / f"{name}.request", body)
        return body

    def rotate(self, *, contact: str) -> bytes:
        """Make new keys beside the ones in use, and the request for them. Nothing changes until `renew`.

        Raises:
            DeploymentError: that was done before and its kit has not come.
        """
        if self.file.engine == "nvflare":
            kits.require_flare()
        place = self.home / NEXT
        if place.exists():
            raise DeploymentError(
                f"{place} has new keys already: send its {self.file.name}.request, or delete the folder and begin anew"
            )
        old = self._keys
        former = (*old.former, self.identity.member.ledger_key.hex())
        place.mkdir(mode=0o700)
        body = _ask(place, self.file, consortium=self.terms.name, contact=contact, former=former)
        files.write(place / f"{self.file.name}.request", body)
        return body

    def renew(self, kit: bytes) -> Roster:
        """Go over to the keys of `rotate`, with the kit that came for them. The old ones are deleted.

        Raises:
            DeploymentError: the kit is not of this consortium's authority, or its roster does not follow the accepted
                one, or does not have the new keys. The old ones stay in use.
        """
        place, name = self.home / NEXT, self.file.name
        if not (place / KEYS).exists():
            raise DeploymentError(f"{self.home} has no new keys: privfed site rotate {self.home}")
        parts, authority = self._unpacked(kit), bytes.fromhex(self.terms.authority)
        papers.check_terms(parts[papers.TERMS], parts[papers.SIGNATURE], authority)
        if parts[papers.TERMS] != files.read(self.home / papers.TERMS):
            raise DeploymentError("the kit has other terms than this site agreed to: call the coordinator")
        new = _identity(place / KEYS, name)
        with files.locked(self.home / LOCK, str(self.home)):
            roster = self._accept(parts[papers.ROSTER], authority, new)
            # The keys last: cut short anywhere before, the same command does it all again
            if self.file.engine == "nvflare":
                self._package(place, parts[papers.CERTIFICATE], self.terms.ca)
                for folder in (f"{KIT}/startup", REQUEST):
                    shutil.rmtree(self.home / folder, ignore_errors=True)
                    shutil.copytree(place / folder, self.home / folder)
            files.write(self.home / papers.ROSTER, parts[papers.ROSTER])
            files.write(self.home / KEYS, files.read(place / KEYS, private=True), private=True)
            shutil.rmtree(place)
        return roster

    @classmethod
    def open(cls, home: Path) -> "Hospital":
        """The site in ``home``. Raises `DeploymentError` if there is none."""
        home = home.absolute()
        return cls(home, files.parse_toml(files.read(home / SITE), SiteFile, home / SITE))

    def install(self, kit: bytes, *, authority: str, data: Path, policy: Policy | None) -> Terms:
        """Take a kit: check it against the authority that the site was told of, and set the site up.

        Args:
            authority: hex key, or its fingerprint, learnt from a person and not from the kit.
            data: the site's table, or its database file.
            policy: written if the site has none yet.

        Raises:
            DeploymentError: something does not hold; nothing is installed.
        """
        parts = self._unpacked(kit)
        terms = files.parse_toml(parts[papers.TERMS], Terms, papers.TERMS)
        papers.require_engine(terms.engine, self.file.engine)
        key = bytes.fromhex(terms.authority)
        said = authority.replace(" ", "").lower()
        if said not in (terms.authority, papers.fingerprint(key).replace(" ", "")):
            raise DeploymentError(
                f"the kit is of an authority with the fingerprint {papers.fingerprint(key)}, you were told "
                f"{authority}: do not go on; call the coordinator"
            )
        papers.check_terms(parts[papers.TERMS], parts[papers.SIGNATURE], key)
        if not data.is_file():
            raise DeploymentError(f"there is no table at {data}")
        self._accept(parts[papers.ROSTER], key)
        if terms.engine == "nvflare":
            kits.harden(self._package(self.home, parts[papers.CERTIFICATE], terms.ca), "site", self.home)
        files.write(self.home / papers.TERMS, parts[papers.TERMS])
        files.write(self.home / papers.ROSTER, parts[papers.ROSTER])
        site = msgspec.structs.replace(self.file, data=str(data.absolute()))
        files.write_toml(self.home / SITE, site, comment="A site of a privfed consortium. Yours alone.")
        if not (self.home / POLICY).exists():
            files.write_toml(
                self.home / POLICY,
                policy or Strict,
                comment="What this site demands, whatever a run asks for. No job and no coordinator can change it.",
            )
        ledger_key(self.home / LEDGER)
        Ledger(self.home / LEDGER).close()
        return terms

    def _unpacked(self, kit: bytes) -> dict[str, bytes]:
        own = (papers.CERTIFICATE,) if self.file.engine == "nvflare" else ()
        return papers.unpack(kit, (*own, papers.ROSTER, papers.TERMS, papers.SIGNATURE))

    def _package(self, place: Path, certificate: bytes, ca: str) -> Path:
        """FLARE's kit, in ``place``, of the key there and what the CA signed."""
        signed = place / f"{self.file.name}.signed.zip"  # FLARE goes by the ending
        files.write(signed, certificate)
        shutil.rmtree(place / KIT, ignore_errors=True)
        made = kits.package(
            signed,
            place / REQUEST,
            fingerprint=ca,
            out=place / KIT,
            name=self.file.name,
            home=self.home / ".flare",
        )
        signed.unlink()
        return made

    def accept_roster(self, body: bytes) -> Roster:
        """Move to a roster's next version, signed by the consortium's authority.

        Raises:
            DeploymentError: it is not the next one after the one accepted last, or not signed.
        """
        roster = self._accept(body, bytes.fromhex(self.terms.authority))
        files.write(self.home / papers.ROSTER, body)
        return roster

    @property
    def terms(self) -> Terms:
        path = self.home / papers.TERMS
        if not path.exists():
            raise DeploymentError(f"{self.home} has no kit yet: privfed site init {self.home} --kit FILE ...")
        return files.parse_toml(files.read(path), Terms, path)

    @property
    def policy(self) -> Policy:
        """The site's own demands. Read anew each time: an edit counts from the next job on.

        Raises:
            DeploymentError: it has an unknown line, or lacks one: a file that was cut short must not demand less. Or
                the site is not set up.
        """
        path = self.home / POLICY
        if not path.exists():
            _ = self.terms  # a site that has no kit is told so
        text = files.read(path)
        found, there = files.parse_toml(text, Policy, path), files.toml_keys(text)
        if lines := [line for line in _always() if line.split(" = ")[0] not in there]:
            raise DeploymentError(f"{path}: it was cut short, or edited: add {', '.join(lines)}, or what you demand")
        return found

    @property
    def roster(self) -> Roster:
        """The roster that this site has accepted."""
        return load_roster(files.read(self.home / papers.ROSTER), bytes.fromhex(self.terms.authority))

    @property
    def identity(self) -> Identity:
        return _identity(self.home / KEYS, self.file.name)

    @property
    def former_keys(self) -> tuple[str, ...]:
        """Public keys, hex, that this site signed its words with before it changed keys."""
        return self._keys.former

    @property
    def _keys(self) -> _Keys:
        return _read_keys(self.home / KEYS)

    @property
    def restored(self) -> Restored | None:
        """The mark of a ledger that was restored and may lack spends; None without one."""
        path = self.home / RESTORED
        return msgspec.json.decode(files.read(path), type=Restored) if path.exists() else None

    def mark(self, mark: Restored) -> None:
        """From now on the site takes part in nothing, until `account.catch_up` takes the mark away."""
        files.write(self.home / RESTORED, msgspec.json.encode(mark))

    def remember(self, keys: Iterable[str]) -> None:
        """Keep public keys, hex, under which this site gave words and which it does not have any more."""
        old = self._keys
        former = {*old.former, *keys} - {self.identity.member.ledger_key.hex()}
        if former != set(old.former):
            kept = msgspec.structs.replace(old, former=tuple(sorted(former)))
            files.write(self.home / KEYS, msgspec.json.encode(kept), private=True)

    def follow(self, rosters: Iterable[bytes]) -> None:
        """Hold to the newest of the rosters that follow the accepted one, each on the one before it.

        For a site whose keys are of before the newest: it can not take part with it, and asks for new ones.

        Raises:
            RemoteProtocolError: one is not signed by the authority.
        """
        authority = bytes.fromhex(self.terms.authority)
        for body in sorted(rosters, key=lambda body: load_roster(body, authority).version):
            if load_roster(body, authority).version == self.roster.version + 1:
                accept(body, authority=authority, pinned=self.roster)
                files.write(self.home / papers.ROSTER, body)

    def require_ledger(self) -> None:
        """Return if the ledger is there. A new one in its place would know of no spend. Raises `DeploymentError`."""
        if not (self.home / LEDGER).exists():
            raise DeploymentError(
                f"{self.home / LEDGER} is gone: what was spent is not known. Put a backup back (privfed site restore); "
                f"without one, have the coordinator send an account, then privfed site catch-up {self.home} FILE"
            )

    def require_current(self) -> None:
        """Return if the ledger is there, has all that was spent as far as is known, and the keys are in the roster.

        Raises:
            DeploymentError: it is not so; says what to do.
        """
        self.require_ledger()
        if (mark := self.restored) is not None:
            raise DeploymentError(
                f"{self.home / LEDGER} was restored from a backup, or is a copy that was put back: what was spent "
                f"beside its {mark.sequence} entries of {mark.made} is not in it. Have the coordinator send an account "
                f"(privfed consortium account), then privfed site catch-up {self.home} FILE"
            )
        if self.identity.member not in self.roster.members:
            raise DeploymentError(
                f"this site's keys are not in the roster that it has accepted: {self.home} is from before they were "
                f"changed. Make new ones: privfed site rotate {self.home}"
            )

    def records(self) -> SiteData:
        """The site's own records, as the consortium agreed to read them. Raises `DataError`."""
        sites = at_site(self.terms.data, self.file.name, self.file.data).load(seed=0, task=self.terms.task).sites
        if set(sites) != {self.file.name}:
            raise DataError(f"{self.file.data} has no usable record")
        return sites[self.file.name]

    @contextmanager
    def opened(self, *, wait_seconds: float = 0.0) -> Iterator[DurableSite]:
        """The site at work, alone in its folder; an earlier process has so long to leave it.

        Raises:
            DeploymentError, DataError, PrivfedError: why it can not work.
        """
        terms, study, name = self.terms, self.file.study, self.file.name
        with ExitStack() as stack:
            stack.enter_context(files.locked(self.home / LOCK, str(self.home), wait_seconds))
            self.require_current()
            key = ledger_key(self.home / LEDGER)
            book = stack.enter_context(Ledger(self.home / LEDGER))
            journal, policy = JournalFile(self.home / JOURNAL), self.policy
            identity, roster = self.identity, self.roster
            site = Site(
                identity=identity,
                roster=roster,
                data=self.records(),
                schema=papers.schema_of(terms),
                ledger=book,
                journal=SQLiteJournal(journal, name),
                fingerprint_key=site_key(key, name, "fingerprint"),
                noise_key=site_key(key, name, "noise")
                if study is None
                else noise.insecure_key(study.insecure_seed, name.encode()),
                split_key=site_key(key, name, "split") if study is None else public_split_key(study.split_seed),
                insecure=study is not None,
                policy=policy,
                accountant=Accountant(),
            )
            key_holder = KeyHolder(
                identity=identity,
                roster=roster,
                journal=SQLiteJournal(journal, f"{name}, as key holder"),
                policy=policy,
            )
            yield DurableSite(site, key_holder, self.home / STATES, data=terms.data, task=terms.task)

    def _accept(self, body: bytes, authority: bytes, identity: Identity | None = None) -> Roster:
        """The roster in ``body``, if it follows the accepted one and has this site, with these keys."""
        path = self.home / papers.ROSTER
        pinned = load_roster(path.read_bytes(), authority) if path.exists() else None
        roster = accept(body, authority=authority, pinned=pinned)
        if (identity or self.identity).member not in roster.members:
            raise DeploymentError(
                f"roster version {roster.version} does not have {self.file.name} with its keys: it was left out, or "
                "another has its name. Call the coordinator"
            )
        return roster


def _ask(home: Path, site: SiteFile, *, consortium: str, contact: str, former: tuple[str, ...] = ()) -> bytes:
    """New keys in ``home``, and the request that may leave it; over FLARE with one for a certificate."""
    identity = Identity.generate(site.name)
    secret = _Keys(identity.secagg_private.hex(), identity.ledger_private.hex(), former)
    files.write(home / KEYS, msgspec.json.encode(secret), private=True)
    asked = b""
    if site.engine == "nvflare":
        org = kits.flare_name(site.organisation)
        asked = files.read(kits.request(home / REQUEST, consortium, name=site.name, type="client", org=org))
    return papers.application(identity, organisation=site.organisation, contact=contact, flare_request=asked)


def _identity(path: Path, name: str) -> Identity:
    keys = _read_keys(path)
    return Identity(name=name, secagg_private=bytes.fromhex(keys.secagg), ledger_private=bytes.fromhex(keys.ledger))


def _read_keys(path: Path) -> _Keys:
    try:
        return msgspec.json.decode(files.read(path, private=True), type=_Keys)
    except msgspec.MsgspecError:
        raise DeploymentError(f"{path} is damaged: restore it from your copy") from None
