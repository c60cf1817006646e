"""What a coordinator knows of a site's spends, and how a site with a restored ledger catches up on it.

The coordinator keeps each site's signed words and every run's configuration and noise. From these a site charges what
its ledger may lack at its worst: every round of every run that is not known to lie before the backup.
"""

import tomllib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import msgspec

from privfed import config_io, folder
from privfed.architecture import parameter_count, update_size
from privfed.cohort import Cohort, cohort_of, held_out
from privfed.config import Config, SideNoise
from privfed.crypto import keys
from privfed.crypto.digest import digest
from privfed.crypto.errors import RemoteProtocolError
from privfed.crypto.roster import Roster, load_roster
from privfed.data.tables import Table
from privfed.errors import PrivfedError
from privfed.folder import RunFolder
from privfed.keyring import ledger_key, site_key
from privfed.noise_levels import side_plan
from privfed.privacy import noise
from privfed.privacy.accountant import Accountant
from privfed.privacy.events import Charge, Gaussian, NoiseSite, PrivacyUnit, to_canonical_json
from privfed.privacy.ledger import Entry, Ledger, Recorded, utc_now
from privfed.schedule import ahead
from privfed.seals import Seal, SealError
from privfed.site_book import terms_digest
from privfed.terms import deployment_of

from . import durable, files, history, papers, runs
from .consortium import LEDGER as BOOK
from .consortium import RUNS, Consortium
from .files import DeploymentError
from .hospital import ACCOUNTS, LEDGER, LOCK, RESTORED, STATES, Hospital, Restored
from .signed import coordinator_key


class Ran(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A run, as it was promised.

    Args:
        run: its id.
        config: its configuration, TOML.
        noise_multiplier, side_noise: σ/C.
        over: it has ended: no round of it comes any more.
        rounds: how many it has done.
    """

    run: str
    config: str
    noise_multiplier: float
    side_noise: SideNoise
    over: bool
    rounds: int


class Account(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a coordinator hands to one site.

    Args:
        words: the site's own signed words, in the order in which they came.
        runs: all runs of the consortium.
        rosters: every version, hex, each signed by the offline authority: which keys were the site's.
        signature: the coordinator's, over everything else, hex.
    """

    site: str
    made: str
    words: tuple[str, ...]
    runs: tuple[Ran, ...]
    rosters: tuple[str, ...] = ()
    signature: str = ""

    @property
    def statement(self) -> bytes:
        return digest("privfed/account/1", to_canonical_json(msgspec.structs.replace(self, signature="")))


def account(consortium: Consortium, site: str) -> bytes:
    """What the coordinator knows of a site's spends, signed. Nothing in it is secret from that site."""
    if all(member.name != site for member in consortium.members):
        raise DeploymentError(f"there is no approved site {site!r}")
    with Ledger(consortium.home / BOOK) as book:
        words = tuple(body.decode() for body in book.statements(site))
    ran = tuple(_ran(RunFolder.open(path.parent)) for path in sorted((consortium.home / RUNS).glob("*/run.json")))
    rosters = tuple(files.read(path).hex() for path in consortium.roster_files())
    bare = Account(site=site, made=utc_now().isoformat(), words=words, runs=ran, rosters=rosters)
    signature = keys.sign(coordinator_key(consortium.home), bare.statement).hex()
    return msgspec.json.encode(msgspec.structs.replace(bare, signature=signature))


def _ran(home: RunFolder) -> Ran:
    facts = home.facts()
    return Ran(
        run=facts.run,
        config=(home.path / folder.CONFIG).read_text(),
        noise_multiplier=facts.noise_multiplier,
        side_noise=facts.side_noise,
        over=(home.path / folder.SUMMARY).exists(),
        rounds=len(runs.progress(home)),
    )


class CaughtUp(msgspec.Struct, frozen=True):
    """What catching up came to.

    Args:
        charged: the runs that were charged, all their rounds.
        epsilon: what the ledger now has, at ``delta``.
        outdated: the site's keys are of before it changed them: it needs new ones before it takes part.
    """

    charged: tuple[str, ...]
    epsilon: float
    delta: float
    outdated: bool = False


def catch_up(hospital: Hospital, body: bytes) -> CaughtUp:
    """Charge a restored ledger for what it may lack, and take its mark away.

    A ledger without a mark is taken for restored if one of the site's own words is about an entry that it lacks, about
    another entry in its place, or about another ledger: a whole disk was put back, and may have gone on since. It gets
    its mark then. Where there is no ledger a new one is begun, with a mark.

    Words under keys that the site had after its backup count by the rosters that name them. The site does not have
    these keys any more: it then holds to the newest roster, in which it can not take part, and needs new ones.

    With two histories, an older copy that has gone on and the ledger that the words are about, both count: what the
    chain holds stays as it is, and what the other one holds beside it is charged at its worst.

    Guarantees:
        Every run of the account is charged for all its rounds at their worst, unless it has ended and the site's word
        after its last round is about this very chain. The site's own signed words are held against the result: none may
        say more ε than the ledger then has. What it says of a run that the chain has begun is what the chain has: the
        configuration and the noise, by their digest. Runs that were charged are not gone on with. A mark is not taken
        away by an account that is older than it. The account stays in the site's folder, and its digest, its signature
        and the digest of what it says of each run stand in the chain.

    Not guaranteed: that the account is complete and true where the chain knows nothing. A coordinator that leaves out
    words and hides a run, calls it over, or says of a run that began after the backup that its noise was larger or that
    no round was repeated, is not found out by this site alone. It has signed it: the chain of any other site of the run
    has the digest of its true configuration and noise, and shows the lie.

    Raises:
        DeploymentError: the ledger lacks nothing, the account is not this coordinator's for this site, or is older than
            the mark, or something is missing from it. Nothing was written but the mark of a ledger that had none.
    """
    name, given = hospital.file.name, _read(body, hospital)
    accountant, delta = Accountant(), hospital.policy.delta
    with ExitStack() as held:
        held.enter_context(files.locked(hospital.home / LOCK, str(hospital.home)))
        _mark_if_lost(hospital)
        key = site_key(ledger_key(hospital.home / LEDGER), name, "fingerprint")
        dataset = noise.derive_key(key, b"ledger", name.encode()).hex()
        book = held.enter_context(Ledger(hospital.home / LEDGER))
        chain = book.entries(name)
        rosters = _rosters(hospital, given)
        own = history.own_keys(hospital) | {key for roster in rosters for key in _keys_in(roster, name)}
        words = _words(name, given, own)
        kept = [word for word in words if history.on_chain(word, book.id, chain)]
        lost = history.lost_words(words, book.id, chain)
        mark = hospital.restored
        if mark is None:
            if not lost:
                raise DeploymentError(
                    f"{hospital.home / LEDGER} lacks nothing that this site has signed: nothing to catch up on"
                )
            mark = history.as_it_is(book, chain)
            hospital.mark(mark)
        if given.made < mark.restored:
            raise DeploymentError(
                f"the account is of {given.made}; that the ledger lacks spends is known since {mark.restored}, and the "
                "account may lack some of them too. The site waits; have the coordinator send a new one"
            )
        open_runs = [ran for ran in given.runs if not _is_settled(ran, kept, lost, chain)]
        with book.together():
            if all(line.entry.metadata.get("account") != given.statement.hex() for line in chain):
                book.begin_run(_caught_up(given, mark, dataset, lost))
            for ran in open_runs:
                for entry in _worst(hospital, ran, dataset, mark, chain):
                    (book.charge if entry.charges else book.begin_run)(entry)
            charges = book.charges(name, dataset)
            for word in lost:
                spent = accountant.epsilon(charges, word.delta).value if charges else 0.0
                said = float("inf") if word.epsilon is None else word.epsilon
                if spent < said * (1 - 1e-9):
                    raise DeploymentError(
                        f"this site's own word after round {word.round + 1} of {word.run} says that ε = {said:.4g} was "
                        f"spent; with all runs of the account the ledger has {spent:.4g}: a run is missing from it. "
                        "Nothing was written; call the coordinator"
                    )
            files.write(hospital.home / ACCOUNTS / f"{given.statement.hex()}.json", body)
        total = accountant.epsilon(charges, delta).value if charges else 0.0
        for run in _charged(book.entries(name)):
            durable.forget(hospital.home / STATES, run)
        hospital.remember(own)
        outdated = bool(rosters) and hospital.identity.member not in rosters[-1].members
        if outdated:
            hospital.follow(bytes.fromhex(body) for body in given.rosters)
        (hospital.home / RESTORED).unlink(missing_ok=True)
    return CaughtUp(tuple(ran.run for ran in open_runs), total, delta, outdated)


def _mark_if_lost(hospital: Hospital) -> None:
    """Mark a site whose ledger is gone, before a new one stands in its place."""
    if not (hospital.home / LEDGER).exists() and hospital.restored is None:
        now = utc_now().isoformat()
        hospital.mark(Restored(ledger="", sequence=0, head="", made=now, restored=now))


def _read(body: bytes, hospital: Hospital) -> Account:
    try:
        given = msgspec.json.decode(body, type=Account)
        keys.verify(bytes.fromhex(hospital.terms.coordinator), bytes.fromhex(given.signature), given.statement)
    except (ValueError, msgspec.MsgspecError, RemoteProtocolError):
        raise DeploymentError("this is no account of this consortium's coordinator: ask for it again") from None
    if given.site != hospital.file.name:
        raise DeploymentError(f"the account is for the site {given.site!r}")
    return given


def _rosters(hospital: Hospital, given: Account) -> list[Roster]:
    """Every version, by the authority's own signature."""
    authority = bytes.fromhex(hospital.terms.authority)
    try:
        rosters = [load_roster(bytes.fromhex(text), authority) for text in given.rosters]
    except (ValueError, RemoteProtocolError):
        raise DeploymentError("the account has a roster that the consortium's authority has not signed") from None
    return sorted(rosters, key=lambda roster: roster.version)


def _keys_in(roster: Roster, site: str) -> Iterator[str]:
    """The key that a roster names for a site's words, hex."""
    return (member.ledger_key.hex() for member in roster.members if member.name == site)


def _words(site: str, given: Account, own: frozenset[str]) -> list[Seal]:
    """The site's own words."""
    try:
        return [history.own_word(text.encode(), site, own) for text in given.words]
    except SealError as error:
        raise DeploymentError(f"the account has {error}") from None


def _is_settled(ran: Ran, kept: Iterable[Seal], lost: Iterable[Seal], chain: Iterable[Recorded]) -> bool:
    """Whether all that a run spent stands in the chain.

    Args:
        kept, lost: the site's words that are about this chain, and those that are not.
    """
    if any(word.run == ran.run for word in lost):
        return False
    done = ran.over and any(word.run == ran.run and word.round >= ran.rounds - 1 for word in kept)
    return done or ran.run in _charged(chain)


def _charged(chain: Iterable[Recorded]) -> set[str]:
    """The runs that were charged when a ledger had caught up, all their rounds: none of them is gone on with."""
    return {run for line in chain if (run := line.entry.metadata.get("charged")) is not None}


def _caught_up(given: Account, mark: Restored, dataset: str, lost: Iterable[Seal]) -> Entry:
    """That a ledger was charged for what it lacked, also where that came to nothing, and on whose words."""
    return Entry(
        kind="run",
        site=given.site,
        dataset=dataset,
        run=f"caught up {given.made}",
        round=0,
        unit=PrivacyUnit.NONE,
        noise=NoiseSite.LOCAL,
        metadata={
            "restored": mark.made,
            "account": given.statement.hex(),
            "signature": given.signature,
            "words": ",".join(map(history.name_of, lost)),
        },
    )


def _worst(hospital: Hospital, ran: Ran, dataset: str, mark: Restored, chain: tuple[Recorded, ...]) -> Iterator[Entry]:
    """Entries for a whole run, and for that it has begun: then it is not gone on with.

    Raises:
        DeploymentError: no bound is known for what it spent.
    """
    try:
        config = config_io.decode(tomllib.loads(ran.config))
        terms = terms_digest(config, ran.noise_multiplier, ran.side_noise)
        _require_same_terms(ran, terms, chain)
        names = [member.name for member in hospital.roster.members]
        cohort = cohort_of(config, len(names) - len(held_out(config, names)))
        spends = _charges(hospital, config, ran, cohort)
    except (PrivfedError, ValueError) as error:
        raise DeploymentError(f"what {ran.run} may have spent can not be told: {error}") from None
    about: dict[str, Any] = {
        "site": hospital.file.name,
        "dataset": dataset,
        "round": 0,
        "unit": config.privacy.unit,
        "insecure_seed": hospital.file.study is not None,
    }
    restored = {
        "restored": mark.made,
        "charged": ran.run,
        "terms": terms,
    }
    if all(line.entry.run != ran.run for line in chain):
        yield Entry(kind="run", run=ran.run, noise=config.privacy.noise, metadata=restored, **about)
    for number, (noise_site, charges) in enumerate(spends):
        if charges:
            how = to_canonical_json(deployment_of(config, cohort, noise_site)).decode()
            yield Entry(
                run=f"{ran.run}/restored {mark.restored}",
                attempt=number,
                noise=noise_site,
                charges=charges,
                metadata={**restored, "deployment": how},
                **about,
            )


def _require_same_terms(ran: Ran, terms: str, chain: Iterable[Recorded]) -> None:
    """Return unless the chain has begun the run with something else. Raises `DeploymentError`."""
    lines = (line.entry for line in chain if (line.entry.kind, line.entry.run) == ("run", ran.run))
    if any(entry.metadata.get("terms") != terms for entry in lines):
        raise DeploymentError(
            "the account has another configuration or other noise than this site's own ledger, or privfed was updated "
            "since the run began: catch up with the version that began it, or call the coordinator"
        )


def _charges(
    hospital: Hospital, config: Config, ran: Ran, cohort: Cohort
) -> tuple[tuple[NoiseSite, tuple[Charge, ...]], ...]:
    """What all rounds of a run cost one site at their worst: its updates, and what it released beside them."""
    if not config.method.sends:
        return ()
    if config.privacy.unit is PrivacyUnit.NONE:  # its updates are booked as what they are: without noise
        refused = hospital.policy.require_privacy  # this site's own policy; a word that says otherwise is found out
        return () if refused else ((config.privacy.noise, (Charge(Gaussian(noise_multiplier=0.0)),)),)
    fixed = config.privacy.noise_multiplier
    if fixed is not None and fixed != ran.noise_multiplier:
        raise DeploymentError("its noise is not what its configuration says: no site would have taken part")
    if config.privacy.schedule != "constant":
        raise DeploymentError("its noise follows a schedule, and no bound is known without the rounds themselves")
    if not isinstance(config.data, Table) or papers.agreed(config.data) != hospital.terms.data:
        raise DeploymentError("it reads another table than this site agreed to")
    schema = papers.schema_of(hospital.terms)
    size = update_size(config, schema.features, parameter_count(config, schema))
    return (
        (config.privacy.noise, ahead(config, cohort, size, ran.noise_multiplier, config.rounds)),
        (NoiseSite.DISTRIBUTED, side_plan(config, cohort, schema, ran.side_noise)),
    )
