"""The report's numbers, recomputed from the events: losses, adversaries, groups of events, curves, second opinions."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

import msgspec
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

from privfed.cohort import cohort_of
from privfed.errors import ConfigError
from privfed.privacy.accountant import Accountant, Epsilon
from privfed.privacy.adversaries import Adversary, Deployment, Exposure, exposures
from privfed.privacy.errors import PrivacyError
from privfed.privacy.events import (
    ALL_RECORDS,
    Charge,
    Event,
    Gaussian,
    NoiseSite,
    PatientMixture,
    Skellam,
    from_canonical_json,
)
from privfed.privacy.ledger import Recorded
from privfed.privacy.opinions import opinions
from privfed.summary import worst
from privfed.terms import worthwhile_colluders
from privfed.verification import Spends

from .evidence import BookEvidence, Evidence, RunEvidence, base_run
from .model import (
    AdversaryLine,
    Curve,
    EventGroup,
    NoiseRound,
    Opinion,
    Pair,
    Point,
    RunLine,
    SiteLoss,
    Thresholds,
)

_POINTS = 25  # of a curve over the rounds
_MOST_EVENTS = 24  # of a chain that the slow second accountants are asked about


@dataclass(frozen=True)
class Account:
    """One data set of a site towards one audience: all its spends, and what they cost."""

    book: BookEvidence
    site: str
    dataset: str
    audience: str
    lines: tuple[Recorded, ...]
    charges: tuple[Charge, ...]
    cost: Epsilon

    @property
    def units(self) -> tuple[str, ...]:
        return tuple(sorted({line.entry.unit.value for line in self.lines}))

    @property
    def noise(self) -> tuple[str, ...]:
        return tuple(sorted({line.entry.noise.value for line in self.lines}))


def accounts(evidence: Evidence, accountant: Accountant) -> tuple[Account, ...]:
    """Every data set of every site, towards every audience, in order. Units that do not compose cost ∞."""
    found = []
    for book in evidence.books:
        for site in book.sites:
            chain = book.chains[site]
            spends = [line for line in chain if line.entry.charges]
            for dataset, audience in sorted({(line.entry.dataset, line.entry.audience) for line in spends}):
                own = tuple(line for line in spends if (line.entry.dataset, line.entry.audience) == (dataset, audience))
                charges = Spends(chain, dataset, audience).upto(len(chain))
                cost = accountant.epsilon(charges, evidence.delta)
                if len({line.entry.unit for line in own}) > 1:
                    cost = msgspec.structs.replace(cost, value=math.inf)
                found.append(Account(book, site, dataset, audience, own, charges, cost))
    return tuple(found)


def totals(accounts: Sequence[Account], delta: float, accountant: Accountant) -> dict[str, Epsilon]:
    """Site → ε of all its data sets, audiences and ledgers together, as if the same people were in all of them."""
    by_site: dict[str, list[Account]] = {}
    for account in accounts:
        by_site.setdefault(account.site, []).append(account)
    found = {}
    for site, own in by_site.items():
        cost = accountant.epsilon([charge for account in own for charge in account.charges], delta)
        if len({unit for account in own for unit in account.units}) > 1:  # they do not compose
            cost = msgspec.structs.replace(cost, value=math.inf)
        found[site] = cost
    return found


def site_losses(accounts: Sequence[Account]) -> tuple[SiteLoss, ...]:
    lines = []
    for account in accounts:
        verified = account.book.verified
        signed = {site.name: site.signed for site in verified.sites} if verified else {}
        lines.append(
            SiteLoss(
                ledger=account.book.name,
                site=account.site,
                dataset=account.dataset,
                audience=account.audience,
                unit=", ".join(account.units),
                noise=", ".join(account.noise),
                epsilon=bounded(account.cost.value),
                accountant=account.cost.accountant,
                tolerance=account.cost.tolerance,
                entries=len(account.book.chains[account.site]),
                signed=signed.get(account.site, 0),
                known_seed=any(line.entry.insecure_seed for line in account.lines),
            )
        )
    return tuple(lines)


def bounded(value: float) -> float | None:
    """None for no bound: JSON has no infinity."""
    return value if math.isfinite(value) else None


def run_lines(evidence: Evidence) -> tuple[RunLine, ...]:
    """The runs on the ledgers, the first to spend first."""
    runs: dict[tuple[str, str], list[Recorded]] = {}
    for book, line in evidence.spends():
        runs.setdefault((book.name, base_run(line.entry.run)), []).append(line)
    lines = []
    for (ledger, run), spends in runs.items():
        times = [line.time for line in spends]
        lines.append(
            RunLine(
                ledger=ledger,
                run=run,
                sites=len({line.entry.site for line in spends}),
                rounds=len({line.entry.round for line in spends}),
                entries=len(spends),
                first=min(times),
                last=max(times),
                given=evidence.run_of(run) is not None,
            )
        )
    return tuple(sorted(lines, key=lambda line: line.first))


# Adversaries

_UNTOLD = "the ledger does not say whether the server saw sums or single vectors"


def adversary_lines(
    evidence: Evidence, accounts: Sequence[Account], accountant: Accountant
) -> tuple[AdversaryLine, ...]:
    """ε against each adversary, recomputed from the events; the largest of any site.

    Each release counts as its entry says that it was made. Where an entry does not say what the server saw, there is no
    ε against the server.
    """
    colluders = _colluders(evidence, accounts)
    lines, untold = list[tuple[Exposure, ...]](), False
    for account in accounts:
        made: dict[Deployment, list[Charge]] = {}
        for line in counted(account.lines):
            how = deployment_in(line)
            untold = untold or how is None
            made.setdefault(how or _supposed(line), []).extend(line.entry.charges)
        (first, charges), *others = made.items()
        try:
            lines.append(exposures(first, charges, evidence.delta, accountant, colluders=colluders, others=others))
        except PrivacyError as refusal:
            return (AdversaryLine(adversary="anybody", colluders=0, epsilon=None, reason=str(refusal)),)
    table = []
    for worst_line in worst(lines):
        hidden = untold and worst_line.adversary in (Adversary.SERVER.value, Adversary.COALITION.value)
        value = None if hidden or worst_line.epsilon is None else bounded(worst_line.epsilon)
        table.append(
            AdversaryLine(
                adversary=worst_line.adversary,
                colluders=worst_line.colluders,
                epsilon=value,
                reason=_UNTOLD if hidden else worst_line.reason,
            )
        )
    return tuple(table)


def counted(lines: Sequence[Recorded]) -> list[Recorded]:
    """The spends that count: a settlement takes the place of its reserve."""
    found: dict[tuple[object, ...], Recorded] = {}
    for line in lines:
        found[line.entry.kind == "charge", *_key(line)] = line
    return list(found.values())


def deployment_in(line: Recorded) -> Deployment | None:
    """Who saw what of a release, as its entry has it; None where it does not say and it matters."""
    text = line.entry.metadata.get("deployment")
    if text is not None:
        try:
            return from_canonical_json(text.encode(), Deployment)
        except (ValueError, TypeError, msgspec.MsgspecError):
            return None
    return _supposed(line) if line.entry.noise is NoiseSite.LOCAL else None


def _supposed(line: Recorded) -> Deployment:
    """For adversaries who see no more than the sum in any case."""
    return Deployment(unit=line.entry.unit, noise=line.entry.noise, secure_sum=True, threshold=None)


def _colluders(evidence: Evidence, accounts: Sequence[Account]) -> tuple[int, ...]:
    """Numbers of sites that stand by the server and are worth a line of their own."""
    numbers = set[int]()
    for account in accounts:
        numbers |= {charge.event.colluders for charge in account.charges if isinstance(charge.event, Skellam)}
        for line in account.lines:
            how = deployment_in(line)
            if how is not None and how.noise is NoiseSite.DISTRIBUTED:
                numbers.add(how.threshold or 0)
    for run in evidence.runs:
        for cohort in run.history.cohorts if run.private else ():
            numbers |= set(worthwhile_colluders(run.history.config, cohort))
    return tuple(sorted(numbers - {0}))


def thresholds(evidence: Evidence) -> tuple[Thresholds, ...]:
    """The aggregation's numbers, run by run."""
    lines = []
    for run in evidence.runs:
        config, sizes = run.history.config, [len(line.invited) for line in run.history.rounds if line.invited]
        if not config.method.sends:
            continue
        try:
            cohort = cohort_of(config, min(sizes, default=run.history.summary.sites))
        except ConfigError:
            continue
        masked = config.aggregation.kind == "masked"
        lines.append(
            Thresholds(
                run=run.run,
                sites=cohort.size,
                threshold=cohort.threshold if masked else None,
                minimum_cohort=cohort.minimum_cohort,
                colluders=cohort.colluders,
                dropouts=cohort.tolerated_dropouts,
                smallest_sum=min(
                    (len(line.contributed) for line in run.history.rounds if line.contributed), default=None
                ),
            )
        )
    return tuple(lines)


# Events


class _Same(NamedTuple):
    """What entries have in common that are counted together."""

    ledger: str
    site: str
    dataset: str
    audience: str
    run: str
    kind: Literal["charge", "settled", "unsettled"]
    known_seed: bool
    events: tuple[str, ...]


_KINDS: dict[str, Literal["charge", "settled", "unsettled"]] = {"settle": "settled", "reserve": "unsettled"}


def event_groups(accounts: Sequence[Account]) -> tuple[EventGroup, ...]:
    """The whole event ledger, equal entries counted together. A settled release counts once, as it was settled."""
    groups: dict[_Same, list[Recorded]] = {}
    for account in accounts:
        settled = {_key(line) for line in account.lines if line.entry.kind == "settle"}
        for line in account.lines:
            entry = line.entry
            if entry.kind == "reserve" and _key(line) in settled:
                continue
            same = _Same(
                ledger=account.book.name,
                site=account.site,
                dataset=account.dataset,
                audience=account.audience,
                run=entry.run,
                kind=_KINDS.get(entry.kind, "charge"),
                known_seed=entry.insecure_seed,
                events=tuple(_describe(charge) for charge in entry.charges),
            )
            groups.setdefault(same, []).append(line)
    found = []
    for same, lines in groups.items():
        rounds = [line.entry.round for line in lines]
        counts = [count for line in lines for count in _shares(line)]
        found.append(
            EventGroup(
                ledger=same.ledger,
                site=same.site,
                audience=same.audience,
                run=same.run,
                kind=same.kind,
                first_round=min(rounds),
                last_round=max(rounds),
                entries=len(lines),
                events=same.events,
                shares=(min(counts), max(counts)) if counts else None,
                known_seed=same.known_seed,
            )
        )
    return tuple(found)


def _key(line: Recorded) -> tuple[str, int, int]:
    return line.entry.run, line.entry.round, line.entry.attempt


def _shares(line: Recorded) -> list[int]:
    return [charge.event.shares for charge in line.entry.charges if isinstance(charge.event, Skellam)]


def _describe(charge: Charge) -> str:
    """An event in public constants; shares of noise stand beside it."""
    event, times = charge.event, f"{charge.count} × " if charge.count > 1 else ""
    where = "" if charge.group == "all" else f", part {charge.group.partition('/')[2]} of a split"
    if isinstance(event, Skellam):
        rate = "" if event.sample_rate == 1 else f", sample rate {event.sample_rate:g}"
        return (
            f"{times}Skellam sum: share variance {event.share_variance}, {event.colluders} colluders assumed, "
            f"dimension {event.dim}, Δ₂² {event.l2_squared}, Δ₁ {event.l1}{rate}{where}"
        )
    if isinstance(event, Gaussian):
        return f"{times}Gaussian sum: noise multiplier {event.noise_multiplier:g}{where}"
    if isinstance(event, PatientMixture):
        return (
            f"{times}Gaussian sum of sampled records of patients: sample rate {event.sample_rate:g}, at most "
            f"{event.max_records} records a patient, noise multiplier {event.noise_multiplier:g}{where}"
        )
    return (
        f"{times}Gaussian sum of a Poisson sample: sample rate {event.sample_rate:g}, noise multiplier "
        f"{event.noise_multiplier:g}{where}"
    )


def multiplier(event: Event) -> float:
    """Standard deviation of the whole noise over the most that one unit can move the sum, unitless."""
    if isinstance(event, Skellam):
        return math.sqrt(event.share_variance * event.shares / event.l2_squared)
    return event.noise_multiplier


# Curves


def epsilon_curves(evidence: Evidence, accounts: Sequence[Account], accountant: Accountant) -> tuple[Curve, ...]:
    """ε after up to 25 of the rounds that the ledgers know, in the order in which they began; equal curves together."""
    curves: dict[tuple[str, tuple[float | None, ...]], list[str]] = {}
    across: tuple[int, ...] = ()
    numbers = _round_numbers(accounts)
    if numbers:
        total = max(numbers.values())
        across = tuple(sorted({max(1, round(total * part / _POINTS)) for part in range(1, _POINTS + 1)}))
    several = len({(account.site, account.audience) for account in accounts}) < len(accounts)
    for account in accounts:
        chain = account.book.chains[account.site]
        spends, values, reached = Spends(chain, account.dataset, account.audience), list[float | None](), 0
        last: dict[int, int] = {}
        for line in account.lines:
            last[numbers[account.book.name, base_run(line.entry.run), line.entry.round]] = line.sequence
        ends = sorted(last.items())
        place = 0
        for number in across:
            while place < len(ends) and ends[place][0] <= number:
                reached, place = max(reached, ends[place][1]), place + 1
            values.append(bounded(accountant.epsilon(spends.upto(reached), evidence.delta).value))
        name = f"{account.site} ({account.dataset[:6]})" if several else account.site
        curves.setdefault((account.audience, tuple(values)), []).append(name)
    return tuple(
        Curve(sites=tuple(sites), audience=audience, across=across, epsilon=values)
        for (audience, values), sites in curves.items()
    )


def _round_numbers(accounts: Sequence[Account]) -> dict[tuple[str, str, int], int]:
    """(ledger, run, round) → its number among all rounds on the ledgers, from 1, by when it was first booked."""
    first: dict[tuple[str, str, int], str] = {}
    for account in accounts:
        for line in account.lines:
            key = (account.book.name, base_run(line.entry.run), line.entry.round)
            first[key] = min(line.time, first.get(key, line.time))
    ordered = sorted(first, key=lambda key: (first[key], key))
    return {key: number for number, key in enumerate(ordered, start=1)}


def noise_rounds(accounts: Sequence[Account]) -> tuple[NoiseRound, ...]:
    """The realised noise of the updates' sums, round by round."""
    numbers = _round_numbers(accounts)
    lines: dict[tuple[str, str, int], list[Recorded]] = {}
    for account in accounts:
        for line in account.lines:
            if base_run(line.entry.run) == line.entry.run:
                lines.setdefault((account.book.name, line.entry.run, line.entry.round), []).append(line)
    found = []
    for key, booked in sorted(lines.items(), key=lambda item: numbers[item[0]]):
        settled = {(line.entry.site, _key(line)) for line in booked if line.entry.kind == "settle"}
        final = [
            line for line in booked if line.entry.kind != "reserve" or (line.entry.site, _key(line)) not in settled
        ]
        shares = [count for line in final for count in _shares(line)]
        least = [count for line in booked if line.entry.kind == "reserve" for count in _shares(line)]
        found.append(
            NoiseRound(
                number=numbers[key],
                run=key[1],
                round=key[2],
                shares=min(shares, default=None),
                least=min(least, default=None),
                sites=len({line.entry.site for line in final}),
                noise_multiplier=min(multiplier(charge.event) for line in final for charge in line.entry.charges),
            )
        )
    return tuple(found)


def accuracy_points(runs: Sequence[RunEvidence]) -> tuple[Point, ...]:
    """The mean score of a run's models after each measured round, beside the largest ε of any site then."""
    points = []
    for run in runs:
        names = {"personalized": "personalised", "global_score": "global"}
        tables = {model: run.history.curves(field) for field, model in names.items()}
        spent = run.history.curves("epsilon")
        for place, line in enumerate(run.history.evaluated):
            bounds = [curve[place] for curve in spent.values() if math.isfinite(curve[place])]
            for model, table in tables.items():
                scores = [curve[place] for curve in table.values() if math.isfinite(curve[place])]
                if model == "global" and line.released is not None and line.released.score is not None:
                    scores = [line.released.score]
                if bounds and scores:
                    mean = sum(scores) / len(scores)
                    points.append(Point(run=run.run, round=line.round, epsilon=max(bounds), model=model, score=mean))
    return tuple(points)


def delta_curve(charges: Sequence[Charge], accountant: Accountant) -> tuple[Pair, ...]:
    """ε of one chain at δ from 1e-10 to 0.1."""
    return tuple(
        Pair(delta=10.0**power, epsilon=bounded(accountant.epsilon(charges, 10.0**power).value))
        for power in range(-10, 0)
    )


# A second accountant


def second_opinions(charges: Sequence[Charge], delta: float, accountant: Accountant) -> tuple[Opinion, ...]:
    """Other accountants on the chain that has spent most; no one answers for an accountant that has no bound."""
    if not charges or any(multiplier(charge.event) == 0 for charge in charges):
        return ()
    charges = _dearest_history(charges, delta, accountant)
    with _quiet():
        if any(isinstance(charge.event, Skellam) for charge in charges):
            return _second_on_skellam(charges, delta, accountant)
        if len({charge.group for charge in charges}) > 1 or len({charge.event for charge in charges}) > _MOST_EVENTS:
            value = accountant.rdp_epsilon(charges, delta)
            note = "parts of a split, or many different events: the other accountants were not asked"
            return (Opinion(accountant=_OUR_RDP, epsilon=bounded(value), tolerance=0.0, note=note),)
        return tuple(
            Opinion(accountant=line.accountant, epsilon=line.epsilon, tolerance=line.tolerance, note=line.note)
            for line in opinions(charges, delta, accountant)[1:]
        )


def _dearest_history(charges: Sequence[Charge], delta: float, accountant: Accountant) -> tuple[Charge, ...]:
    """What touched the records of the parts that cost most, if one can tell: the others have no say in ε."""
    per_group = accountant.epsilon(charges, delta).per_group
    parts = {ALL_RECORDS, *max(per_group, key=lambda name: per_group[name]).split()}
    if not parts <= {ALL_RECORDS, *(charge.group for charge in charges)}:
        return tuple(charges)
    return tuple(msgspec.structs.replace(charge, group=ALL_RECORDS) for charge in charges if charge.group in parts)


_OUR_RDP = "RDP, privfed"
_NEAR = "PLD, dp-accounting; Skellam noise as the rounded Gaussian noise it is near to"
_ORDERS = [*range(2, 64), *range(64, 512, 8), 1024, 2048]


def _second_on_skellam(charges: Sequence[Charge], delta: float, accountant: Accountant) -> tuple[Opinion, ...]:
    """dp-accounting has no Skellam noise: its RDP bound is written out here again, and converted by dp-accounting.
    Where the noise is near to rounded Gaussian noise, dp-accounting's PLD is asked about that.

    Source: Agarwal, Kairouz and Liu 2021, Theorem 3.5, for integer orders α: αΔ₂²/2μ + min{((2α−1)Δ₂²+6Δ₁)/4μ²,
    3Δ₁/2μ}. Gaussian noise costs α/2σ².
    """
    name, note = "RDP, dp-accounting; Skellam's bound written out again", ""
    ours = Opinion(accountant=_OUR_RDP, epsilon=bounded(accountant.rdp_epsilon(charges, delta)), tolerance=0.0, note="")
    total = dict.fromkeys(_ORDERS, 0.0)
    for charge in charges:
        event = charge.event
        for order in _ORDERS:
            if isinstance(event, Skellam) and event.sample_rate == 1 and charge.group == charges[0].group:
                mu, square, l1 = event.variance, event.l2_squared, event.l1
                rounding = min(((2 * order - 1) * square + 6 * l1) / (4 * mu**2), 3 * l1 / (2 * mu))
                total[order] += charge.count * (order * square / (2 * mu) + rounding)
            elif isinstance(event, Gaussian) and charge.group == charges[0].group:
                total[order] += charge.count * order / (2 * event.noise_multiplier**2)
            else:
                note = "sampling, or parts of a split, beside noise in shares: it has no bound"
    near = Opinion(accountant=_NEAR, epsilon=None, tolerance=0.0, note="parts of a split, or many different events")
    sampled = {charge.event for charge in charges if isinstance(charge.event, Skellam) and charge.event.sample_rate < 1}
    if len({charge.group for charge in charges}) == 1 and len(sampled) <= _MOST_EVENTS:
        by_pld = opinions(charges, delta, accountant)[1]
        near = Opinion(accountant=_NEAR, epsilon=by_pld.epsilon, tolerance=by_pld.tolerance, note=by_pld.note)
    if note:
        return (Opinion(accountant=name, epsilon=None, tolerance=0.0, note=note), ours, near)
    value, _ = compute_epsilon(list(total), list(total.values()), delta)
    return (Opinion(accountant=name, epsilon=bounded(float(value)), tolerance=0.0, note=""), ours, near)


@contextmanager
def _quiet() -> Iterator[None]:
    """dp-accounting reports orders that it leaves out; the report has no use for that."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def versions() -> dict[str, str]:
    """The accounting packages' versions."""
    found = {}
    for package in ("privfed", "dp-accounting", "opacus", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
