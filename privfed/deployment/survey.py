"""The coordinator's questions to all sites before a run, and what their answers come to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from privfed import seals
from privfed.architecture import parameter_count, update_size
from privfed.cohort import cohort_of, held_out
from privfed.config import Config
from privfed.crypto.aggregation import AggregationServer, default_parameters, run_round
from privfed.crypto.errors import AggregationError, RemoteProtocolError
from privfed.crypto.homomorphic.messages import KEY_HOLDER_STEPS
from privfed.crypto.homomorphic.server import HomomorphicServer
from privfed.crypto.masking.server import MaskedServer
from privfed.crypto.roster import Roster
from privfed.engines.contract import Engine
from privfed.errors import PrivfedError
from privfed.privacy.errors import PrivacyError
from privfed.privacy.ledger import Ledger, utc_now
from privfed.terms import checked_encoding, key_holder_of, needs_key_holder

from . import runs
from .consortium import LEDGER, Consortium
from .history import CLOCK_SECONDS, name_of
from .inspection import COMPARED, About, Dry, Look, Order, Said, agreement_faults, decode_reply, versions

ANSWER_SECONDS = 120.0
SAMPLE = {"dim": 16, "bound": 1000}
"""The sum over zeros where no experiment says how long a vector is."""

HERE = "the coordinator"


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at.

    Args:
        found: in words.
        next: what to do; empty where nothing is wrong.
    """

    what: str
    ok: bool
    found: str
    next: str = ""


def survey(
    consortium: Consortium,
    config: Config | None,
    order: Order,
    engine: Engine,
    present: Callable[[set[str]], set[str]],
    *,
    clock: Callable[[], datetime] = utc_now,
) -> tuple[Finding, ...]:
    """Ask all sites of the roster what they are, and have them add up zeros.

    Args:
        present: waits for sites; those that came.

    Guarantees:
        Nothing is spent, and no site is asked for anything about its records; see `Inspector`.
    """
    roster = runs.roster_of(consortium)
    names = {member.name for member in roster.members}
    here = present(names)
    words = _words(consortium, names)
    experiment = b"" if config is None else msgspec.msgpack.encode(config)
    asked = {name: Look(experiment, tuple(sorted({word.sequence for word in words[name]}))) for name in sorted(here)}
    before = clock().timestamp()
    raw = engine.exchange({name: msgspec.msgpack.encode(look) for name, look in asked.items()}, ANSWER_SECONDS)
    after = clock().timestamp()
    found: dict[str, About] = {}
    for name, body in sorted(raw.items()):
        try:
            reply = decode_reply(body)
        except ValueError:
            continue
        if isinstance(reply, About):
            found[name] = reply
    silent = sorted(names - set(found))
    return (
        _site_by_site(
            "answers",
            {name: "no answer" for name in silent},
            f"all {len(names)} sites",
            "start it there (privfed site start); its log.txt says what is wrong. An older version has no preflight",
        ),
        *_clocks(found, before, after),
        _versions(found),
        _rosters(found, roster, consortium),
        *_tables(found, consortium),
        _ledgers(found, words, consortium),
        _ready(found),
        *_experiment(found, config),
        _dry_sum(consortium, config, order, engine, roster, set(found)),
    )


def _site_by_site(what: str, wrong: Mapping[str, str], fine: str, then: str) -> Finding:
    """One finding over all sites: who is wrong, and in what."""
    if not wrong:
        return Finding(what, True, fine)
    return Finding(what, False, "; ".join(f"{site}: {reason}" for site, reason in sorted(wrong.items())), then)


def _clocks(found: Mapping[str, About], before: float, after: float) -> Iterable[Finding]:
    wrong, expired = {}, {}
    for site, about in found.items():
        ahead, behind = about.clock - after, before - about.clock
        if max(ahead, behind) > CLOCK_SECONDS:
            wrong[site] = f"{max(ahead, behind):.0f} s {'ahead' if ahead > 0 else 'behind'}"
        if about.certificate is not None and not about.certificate[0] <= about.clock <= about.certificate[1]:
            early = about.clock < about.certificate[0]
            expired[site] = f"its certificate {'does not count yet' if early else 'is expired'} by its own clock"
    yield _site_by_site(
        "clocks", wrong, f"all within {CLOCK_SECONDS:g} s of {HERE}'s", "set that clock: NTP, or by hand"
    )
    yield _site_by_site(
        "sites' certificates",
        expired,
        "all count, by the sites' own clocks",
        "set the clock; if it is right, have the site ask anew: privfed consortium request, approve, kit",
    )


def _versions(found: Mapping[str, About]) -> Finding:
    """Who has what, where not all have the same."""
    own = versions()
    parties = {HERE: own, **{site: about.versions for site, about in found.items()}}
    mixed = []
    for name in COMPARED:
        holders: dict[str, list[str]] = {}
        for party, held in parties.items():
            holders.setdefault(held.get(name, "none"), []).append(party)
        if len(holders) > 1:
            mixed.append(f"{name} " + ", ".join(f"{held} at {' and '.join(who)}" for held, who in holders.items()))
    if not mixed:
        return Finding("versions", True, ", ".join(f"{name} {own[name]}" for name in COMPARED))
    return Finding("versions", False, "; ".join(mixed), f"install one version everywhere, as {HERE} has it")


def _rosters(found: Mapping[str, About], roster: Roster, consortium: Consortium) -> Finding:
    wrong = {
        site: f"it has accepted version {about.roster}, not {roster.version}"
        if about.roster != roster.version
        else "it has another list under this number"
        for site, about in found.items()
        if about.roster_hash not in ("", roster.hash.hex())
    }
    return _site_by_site(
        "rosters",
        wrong,
        f"all have accepted version {roster.version}",
        f"send it {consortium.roster_file()}, and have it type privfed site roster FOLDER FILE",
    )


def _tables(found: Mapping[str, About], consortium: Consortium) -> Iterable[Finding]:
    compared = {site: agreement_faults(consortium.terms, about) for site, about in found.items()}
    other = {site: ", ".join(faults) for site, faults in compared.items() if faults}
    yield _site_by_site(
        "agreed table",
        other,
        f"{len(consortium.terms.data.columns)} columns, with their types and ranges, the same everywhere",
        "send it a new kit: privfed consortium kit; then privfed site init there",
    )
    wrong = {
        site: ", ".join(f"column {name!r} {fault}" for name, fault in sorted(about.columns.items()))
        for site, about in found.items()
        if about.columns
    }
    yield _site_by_site(
        "columns",
        wrong,
        "every site's file has them, as agreed",
        "have the site name or add the column as consortium.toml has it; privfed data check FILE shows it more",
    )


def _words(consortium: Consortium, names: Iterable[str]) -> dict[str, list[seals.Seal]]:
    """Every word that the sites have signed, by site, in the order in which they came."""
    with Ledger(consortium.home / LEDGER) as book:
        return {name: [seals.read(body) for body in book.statements(name)] for name in names}


def _ledgers(found: Mapping[str, About], words: Mapping[str, Sequence[seals.Seal]], consortium: Consortium) -> Finding:
    """Whether some site's ledger is not the one that its own signed words are about."""
    wrong = {}
    for site, about in found.items():
        known = set(about.settled)
        for word in (word for word in words[site] if about.ledger and name_of(word) not in known):
            if word.ledger != about.ledger:
                wrong[site] = "it has another ledger than the one that its signed words are about"
            elif about.entries < word.sequence:
                wrong[site] = (
                    f"its ledger has {about.entries} entries, its own signed word is about entry {word.sequence}"
                )
            elif word.sequence and about.heads.get(word.sequence) != word.head:
                wrong[site] = (
                    f"entry {word.sequence} of its ledger is another than the one that its own signed word is about: "
                    "an older copy that has gone on"
                )
    return _site_by_site(
        "ledgers",
        wrong,
        "every entry that its site has signed is there",
        f"it was lost, or an older copy was put back: stop it, send it privfed consortium account {consortium.home} "
        "SITE, and have it type privfed site catch-up",
    )


def _ready(found: Mapping[str, About]) -> Finding:
    wrong = {site: about.unready for site, about in found.items() if about.unready and not about.columns}
    return _site_by_site("sites", wrong, "all can work", "have the site look into its log, and start it again")


def _experiment(found: Mapping[str, About], config: Config | None) -> Iterable[Finding]:
    if config is None:
        return
    yield _site_by_site(
        "policies",
        {site: about.refuses for site, about in found.items() if about.refuses},
        "every site would take part",
        "change the experiment, or talk to the site: privfed site policy check FOLDER FILE says the same there",
    )


def _dry_sum(
    consortium: Consortium, config: Config | None, order: Order, engine: Engine, roster: Roster, there: set[str]
) -> Finding:
    """Zeros added up by the aggregation of the run, with the sites' own keys."""
    what = "a secure sum over zeros"
    apart = held_out(config, [member.name for member in roster.members]) if config else frozenset()
    cohort = tuple(
        index for index, member in enumerate(roster.members) if member.name in there and member.name not in apart
    )
    if len(cohort) < 3:
        return Finding(what, False, f"it needs 3 sites, {len(cohort)} answer", "bring the others back, then try again")
    try:
        dry = _dry(consortium, config, order, roster, cohort)
        refused = _sum(dry, roster, engine)
    except (PrivfedError, PrivacyError, AggregationError, ValueError) as error:
        return Finding(what, False, str(error), "see what is wrong above; each site's log.txt says what it refused")
    fine = f"{len(cohort)} sites, {dry.dim} numbers, {'masked' if dry.key_holder is None else 'encrypted'}: zero"
    return _site_by_site(what, refused, fine, "see what is wrong above, and the site's log.txt")


def _dry(consortium: Consortium, config: Config | None, order: Order, roster: Roster, cohort: tuple[int, ...]) -> Dry:
    """What the sum is made of: as the experiment's rounds will be, if there is one."""
    n = len(cohort)
    if config is None or not config.method.sends or config.aggregation.kind == "plain":
        given: dict[str, Any] = {**SAMPLE, **vars(default_parameters(n))}
        return Dry(order=order.preflight, step="", payload=b"", cohort=cohort, **given)
    ready = runs.plan(config, consortium, roster)
    numbers = cohort_of(config, n)
    size = update_size(config, ready.schema.features, parameter_count(config, ready.schema))
    encoding = checked_encoding(config, numbers, size, ready.noise_multiplier)
    return Dry(
        order=order.preflight,
        step="",
        payload=b"",
        cohort=cohort,
        dim=encoding.dim,
        bound=encoding.bound,
        threshold=numbers.threshold,
        minimum_cohort=numbers.minimum_cohort,
        colluders=numbers.colluders,
        degree=numbers.degree,
        key_holder=key_holder_of(config, roster) if needs_key_holder(config) else None,
    )


def _sum(dry: Dry, roster: Roster, engine: Engine) -> dict[str, str]:
    """Site → why it is not in the sum; the sum itself is zero, or this raises.

    Raises:
        AggregationError: there is none.
        ValueError: it is not zero.
    """
    session, wrong = dry.session(), {}
    server: AggregationServer = (
        MaskedServer(session=session, roster=roster)
        if dry.key_holder is None
        else HomomorphicServer(session=session, roster=roster, key_holder=dry.key_holder)
    )
    names = [member.name for member in roster.members]

    def exchange(requests: dict[int, bytes]) -> dict[int, bytes]:
        step = server.phase if server.phase in KEY_HOLDER_STEPS else "client"
        messages = {
            names[index]: msgspec.msgpack.encode(msgspec.structs.replace(dry, step=step, payload=payload))
            for index, payload in requests.items()
        }
        replies: dict[int, bytes] = {}
        raw = engine.exchange(messages, ANSWER_SECONDS)
        for index in requests:
            try:
                reply = decode_reply(raw[names[index]])
            except (KeyError, ValueError):
                wrong[names[index]] = f"no answer to the step {server.phase}"
                continue
            if isinstance(reply, Said) and not reply.refused:
                replies[index] = reply.payload
            else:
                wrong[names[index]] = getattr(reply, "refused", "another answer")
        return replies

    def bad(index: int, error: RemoteProtocolError) -> None:
        wrong[names[index]] = f"sent an invalid message: {error}"

    try:
        result = run_round(server, exchange, bad)
    except AggregationError as error:
        raise ValueError("; ".join([str(error), *(f"{site}: {reason}" for site, reason in wrong.items())])) from None
    if result.total.any():
        raise ValueError("the sum is not zero: a party computes something else than the protocol")
    return wrong
