"""The coordinator's folder: who may take part, under whose signature, and the kits that go out."""

import secrets
import tempfile
from pathlib import Path

import msgspec

from privfed.config import Config
from privfed.crypto import keys
from privfed.crypto.roster import FIRST_PREVIOUS, Roster, load_roster, sign_roster
from privfed.data.tables import Table
from privfed.keyring import ledger_key, site_key
from privfed.privacy.ledger import Ledger
from privfed.seals import COORDINATOR

from . import files, kits, papers
from .files import DeploymentError
from .papers import Applicant, EngineName, Terms

AUTHORITY, LEDGER, SERVER, ADMIN, MEMBERS, ROSTERS, RUNS = (
    "authority.key",
    "ledger.db",
    "server",
    "admin",
    "members",
    "rosters",
    "runs",
)
SUSPENDED, LAST, JOB, NODES = "suspended.json", "last-block.txt", "job", "nodes.json"
ORGANISATION = "coordinator"


class Consortium:
    """A coordinator's folder.

    Guarantees:
        The CA's key, the roster authority's key and the coordinator's own are made here, mode 0600. No site's key is
        ever here. A member enters a roster only by a request that it signed with both keys that the roster then names.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.terms = papers_terms(home)

    @classmethod
    def create(
        cls,
        home: Path,
        config: Config,
        *,
        name: str,
        contact: str,
        host: str,
        port: int,
        engine: EngineName = "nvflare",
    ) -> "Consortium":
        """A new consortium around the table and the task of an experiment.

        Raises:
            DeploymentError: the folder is not empty, FLARE is missing, the experiment has no table of its own, or no
                consortium can have the name.
        """
        papers.require_name(name, "a consortium")
        if engine == "nvflare":
            kits.require_flare()
        if not isinstance(config.data, Table):
            raise DeploymentError("a consortium needs data.source = 'csv': a table that the sites have, each its own")
        if home.exists() and any(home.iterdir()):
            raise DeploymentError(f"{home} is not empty: nothing was changed; give a new folder")
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        home = home.absolute()
        authority = secrets.token_bytes(keys.KEY_BYTES)
        files.write(home / AUTHORITY, authority.hex().encode(), private=True)
        mark = kits.new_authority(home, name, host, port) if engine == "nvflare" else ""
        book = site_key(ledger_key(home / LEDGER), COORDINATOR, "ledger")
        Ledger(home / LEDGER).close()
        terms = Terms(
            name=name,
            contact=contact,
            host=host,
            port=port,
            authority=keys.verification_key(authority).hex(),
            coordinator=keys.verification_key(book).hex(),
            ca=mark,
            engine=engine,
            data=papers.agreed(config.data),
            task=config.task,
        )
        files.write_toml(home / papers.TERMS, terms, comment="The terms of a privfed consortium; signed beside it.")
        text = files.read(home / papers.TERMS)
        files.parse_toml(text, Terms, home / papers.TERMS)
        files.write(home / papers.SIGNATURE, papers.sign_terms(text, authority))
        consortium = cls(home)
        if engine == "flower":
            return consortium
        server = {"type": "server", "name": host, "org": ORGANISATION, "fed_learn_port": port, "admin_port": port}
        person = {"type": "admin", "name": f"coordinator@{name}.org", "org": ORGANISATION, "role": "lead"}
        kits.own_kits(home, name, mark, {SERVER: server, ADMIN: person})
        kits.harden(home / SERVER, "server", home)
        return consortium

    def approve(self, request: bytes, *, replace: bool = False) -> Applicant:
        """Take a site in: sign its certificate and remember its keys. The next roster has it.

        Args:
            replace: a known site changes its keys; if it was suspended, it no longer is.

        Raises:
            DeploymentError: the request does not hold, the name is taken by other keys, or these keys were replaced.
        """
        applicant, flare_request = papers.read_application(request)
        if applicant.name in (COORDINATOR, self.terms.host):
            raise DeploymentError(f"a site can not be named {applicant.name!r}: that is the coordinator's")
        if bool(flare_request) != (self.terms.engine == "nvflare"):
            raise DeploymentError(
                f"the site asked to take part over another engine: let it ask again, with --engine {self.terms.engine}"
            )
        path = self.home / MEMBERS / f"{applicant.name}.json"
        known = msgspec.json.decode(files.read(path), type=Applicant) if path.exists() else None
        if known is not None and known != applicant and not replace:
            raise DeploymentError(
                f"there is a site {applicant.name!r} with other keys: if it changes its keys, say --replace; else "
                "suspend it, or take another name"
            )
        if known is not None and known.member != applicant.member and self._stood_in_a_roster(applicant):
            raise DeploymentError(f"{applicant.name!r} has had these keys and replaced them: they do not come back")
        if self.terms.engine == "nvflare":
            self._certify(applicant.name, flare_request)
        files.write(path, msgspec.json.format(msgspec.json.encode(applicant), indent=1))
        if replace:
            files.write(self.home / SUSPENDED, msgspec.json.encode([*(set(self.suspended) - {applicant.name})]))
        return applicant

    def _certify(self, name: str, flare_request: bytes) -> None:
        with tempfile.TemporaryDirectory(dir=self.home) as work:
            # FLARE compares a request's name with its file's
            asked, signed = Path(work) / f"{name}.request.zip", Path(work) / papers.CERTIFICATE
            asked.write_bytes(flare_request)
            kits.approve(self.home, asked, signed)
            kits.require_site(signed, name)
            files.write(self.home / MEMBERS / f"{name}.signed.zip", signed.read_bytes())

    @property
    def nodes(self) -> dict[str, int]:
        """Site → its Flower node, of a consortium over Flower."""
        path = self.home / NODES
        return msgspec.json.decode(files.read(path), type=dict[str, int]) if path.exists() else {}

    def set_node(self, name: str, node: int) -> None:
        """Say which Flower node is a site's: the number that ``flwr supernode register`` gave to its key.

        Raises:
            DeploymentError: there is no such site, or another site has this node.
        """
        papers.require_engine(self.terms.engine, "flower")
        if name not in {member.name for member in self.members}:
            raise DeploymentError(f"there is no approved site {name!r}")
        others = {site: number for site, number in self.nodes.items() if site != name}
        if node in others.values():
            raise DeploymentError(f"node {node} is another site's: each has one of its own")
        files.write(self.home / NODES, msgspec.json.encode({**others, name: node}))

    def _stood_in_a_roster(self, applicant: Applicant) -> bool:
        """Whether one of these keys stood in any roster so far."""
        authority, asked = bytes.fromhex(self.terms.authority), applicant.member
        rosters = (
            load_roster(files.read(path), authority) for path in (self.home / ROSTERS).glob(f"*.{papers.ROSTER}")
        )
        stood = {
            key for roster in rosters for member in roster.members for key in (member.secagg_key, member.ledger_key)
        }
        return not stood.isdisjoint((asked.secagg_key, asked.ledger_key))

    @property
    def members(self) -> tuple[Applicant, ...]:
        """Approved and not suspended, by name."""
        paths = sorted((self.home / MEMBERS).glob("*.json"))
        everyone = (msgspec.json.decode(files.read(path), type=Applicant) for path in paths)
        return tuple(member for member in everyone if member.name not in self.suspended)

    @property
    def suspended(self) -> tuple[str, ...]:
        path = self.home / SUSPENDED
        return msgspec.json.decode(files.read(path), type=tuple[str, ...]) if path.exists() else ()

    def suspend(self, name: str) -> None:
        """Leave a site out of all rosters to come. Its certificate stays valid; it is asked for nothing any more."""
        if not (self.home / MEMBERS / f"{name}.json").exists():
            raise DeploymentError(f"there is no site {name!r} in {self.home}")
        files.write(self.home / SUSPENDED, msgspec.json.encode(sorted({*self.suspended, name})))

    def next_roster(self, authority: Path | None = None) -> Roster:
        """Sign the members as they are now as the next version; the same one if nothing changed.

        Args:
            authority: where the offline key is, if it was moved away from this machine, as it should be.
        """
        if len(self.members) < 3:
            raise DeploymentError(f"a roster needs 3 sites, there are {len(self.members)}: approve more requests")
        latest = self.roster()
        members = tuple(member.member for member in self.members)
        if latest is not None and latest.members == members:
            return latest
        previous = FIRST_PREVIOUS if latest is None else latest.hash
        roster = Roster(version=1 if latest is None else latest.version + 1, previous=previous, members=members)
        private = bytes.fromhex(files.read(authority or self.home / AUTHORITY, private=True).decode())
        if keys.verification_key(private).hex() != self.terms.authority:
            raise DeploymentError("this is not the key of this consortium's authority")
        files.write(self.home / ROSTERS / f"{roster.version}.{papers.ROSTER}", sign_roster(roster, private))
        return roster

    def roster_files(self) -> list[Path]:
        """Every version's file, the newest last."""
        return sorted((self.home / ROSTERS).glob(f"*.{papers.ROSTER}"), key=lambda path: int(path.stem))

    def roster_file(self) -> Path | None:
        """The newest roster's file."""
        found = self.roster_files()
        return found[-1] if found else None

    def roster(self) -> Roster | None:
        """The newest roster."""
        path = self.roster_file()
        return load_roster(files.read(path), bytes.fromhex(self.terms.authority)) if path else None

    def kit(self, name: str) -> bytes:
        """What goes back to a site: its certificate, the CA's, the terms and the roster. No secret is in it."""
        roster = self.roster_file()
        signed = self.home / MEMBERS / f"{name}.signed.zip"
        if name not in {member.name for member in self.members}:
            raise DeploymentError(f"there is no approved site {name!r}")
        if roster is None or all(member.name != name for member in self.roster().members):  # type: ignore[union-attr]
            raise DeploymentError(f"no roster has {name!r} yet: privfed consortium roster {self.home}")
        parts = {papers.ROSTER: roster}
        if self.terms.engine == "nvflare":
            parts[papers.CERTIFICATE] = signed
        parts |= {part: self.home / part for part in (papers.TERMS, papers.SIGNATURE)}
        return papers.pack({part: files.read(path) for part, path in parts.items()})


def papers_terms(home: Path) -> Terms:
    """The terms in a folder."""
    path = home / papers.TERMS
    return files.parse_toml(files.read(path), Terms, path)
