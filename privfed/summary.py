"""The figures of a run: one object for Python, for ``--json`` and for the summary on the screen."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from privfed.privacy.accountant import Epsilon
from privfed.privacy.adversaries import Exposure
from privfed.privacy.events import PrivacyUnit

from . import wire
from .cohort import cohort_of
from .config import Config
from .errors import RunFolderError
from .evaluation import Spread, fraction_hurt, spread
from .federation import RoundReport
from .figures import Released
from .selection import best
from .tasks import LOWER_IS_BETTER
from .terms import claimed_colluders, shares_noise
from .transfer.base import told_by


class EpsilonSummary(msgspec.Struct, frozen=True):
    """ε per site, from each site's own ledger, all runs on it together; the system's is the largest."""

    max: float | None
    per_site: dict[str, float | None]


class AdversarySummary(msgspec.Struct, frozen=True):
    """ε against one adversary, the largest of any site; none where there is no bound, and why.

    Attributes:
        colluders: sites that stand by it.
    """

    adversary: str
    colluders: int
    epsilon: float | None
    reason: str


class PrivacySummary(msgspec.Struct, frozen=True):
    """What is claimed. ε means nothing without δ, the unit and who adds the noise.

    Attributes:
        colluders: with noise in shares, how many sites may work with the server and ε still holds; None otherwise.
    """

    unit: str
    noise: str
    delta: float
    epsilon: EpsilonSummary
    noise_multiplier: float
    accountant: str
    adjacency: str
    sampling: str
    insecure_seed: bool
    adversaries: tuple[AdversarySummary, ...] = ()
    colluders: int | None = None


class FigureSummary(msgspec.Struct, frozen=True):
    """One figure over the sites, every site counting once."""

    mean: float | None
    worst_decile: float | None
    sd: float | None
    weighted_mean: float | None = None


class UnseenSummary(msgspec.Struct, frozen=True, rename={"global_": "global"}):
    """Figures of the sites that took no part in training, after adapting the final model to themselves."""

    sites: int
    global_: FigureSummary
    personalized: FigureSummary
    local_only: FigureSummary
    fraction_hurt: float | None
    fraction_hurt_versus_global: float | None


class UtilitySummary(msgspec.Struct, frozen=True, rename={"global_": "global"}):
    """Figures on each site's own test records; ``status`` says what, if anything, covers them.

    Released through noise, there is one figure of all records together and no spread over sites; ``noise_deviation`` is
    the standard deviation that the noise makes. Personal models then have none: they saw their records without noise.
    """

    metric: str
    global_: FigureSummary
    personalized: FigureSummary
    local_only: FigureSummary
    fraction_hurt: float | None
    fraction_hurt_versus_global: float | None
    status: str = "internal, not DP"
    noise_deviation: float | None = None
    unseen: UnseenSummary | None = None


class AggregationSummary(msgspec.Struct, frozen=True):
    """How the updates were added up."""

    kind: str
    bytes_up_per_site_per_round: float
    dropouts: int
    aborted_rounds: int


class Summary(msgspec.Struct, frozen=True):
    """What ``privfed run --json`` prints.

    Attributes:
        stopped_early: the figure did not get better for ``evaluation.patience`` measurements.
        kept_round: with ``evaluation.keep = "best"``, the round, from 0, whose model was kept; the figures are always
            those of the last round.
        base: what the file that the network started from says of its source; None where it started anew.
    """

    run: str
    rounds: int
    rounds_planned: int
    complete: bool
    sites: int
    simulated: bool
    seconds: float
    method: str
    refusals: dict[str, str]
    privacy: PrivacySummary
    utility: UtilitySummary
    aggregation: AggregationSummary
    stopped_early: bool = False
    kept_round: int | None = None
    base: str | None = None

    def to_json(self) -> str:
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()


def claim_of(privacy: PrivacySummary) -> str:
    """JSON: what the run claims for its records, for whoever starts from its model."""
    epsilon = None if privacy.insecure_seed else privacy.epsilon.max
    return json.dumps({"unit": privacy.unit, "epsilon": epsilon, "delta": privacy.delta})


def base_words(facts: Mapping[str, Any]) -> str:
    """What a base says of the records that it was made from. It is the file's own word: their ledger has the proof."""
    if "run" not in facts:
        return "a file that says nothing of its source's privacy"
    epsilon, delta = facts.get("epsilon"), facts.get("delta")
    if not isinstance(epsilon, float) or not isinstance(delta, float):
        return f"run {facts['run']}, without a claim for its source's records"
    return f"run {facts['run']}, ε ≤ {epsilon:.3g} (δ = {delta:g}, {facts.get('unit')}) for its source's records"


def summarize(
    config: Config,
    *,
    run: str,
    spent: Mapping[str, Epsilon],
    insecure: bool,
    simulated: bool,
    noise_multiplier: float,
    reports: Sequence[RoundReport],
    retired: Mapping[str, str],
    seconds: float,
    stopped_early: bool = False,
    exposed: Sequence[Sequence[Exposure]] = (),
) -> Summary:
    """The summary of the rounds in ``reports``. A site that left counts with what it last measured.

    ``insecure`` says that some spend on the ledgers had noise that others can recompute; ``spent`` is what each site's
    ledger holds at the end, whatever it has measured. ``exposed`` has ε against each adversary, site by site.
    """
    private = config.privacy.unit is not PrivacyUnit.NONE
    largest = max(spent.values(), key=lambda epsilon: epsilon.value)
    summed = [report for report in reports if report.contributed]
    sends = config.method.sends
    return Summary(
        run=run,
        rounds=len(reports),
        rounds_planned=config.rounds,
        complete=(stopped_early or len(reports) == config.rounds) and (not sends or len(summed) > 0),
        stopped_early=stopped_early,
        kept_round=best(reports, config.metric) if config.evaluation.keep == "best" else None,
        base=None if config.transfer.base is None else base_words(told_by(config.transfer.base)),
        sites=len(spent),
        simulated=simulated,
        seconds=round(seconds, 3),
        method=str(type(config.method).__struct_config__.tag),
        refusals={site: reason for report in reports for site, reason in report.refused.items()} | dict(retired),
        privacy=PrivacySummary(
            unit=config.privacy.unit.value,
            noise=config.privacy.noise.value,
            delta=config.privacy.delta,
            epsilon=EpsilonSummary(
                largest.value if private else None,
                {site: epsilon.value if private else None for site, epsilon in spent.items()},
            ),
            noise_multiplier=noise_multiplier,
            accountant=largest.accountant if private else "none",
            adjacency="add-or-remove-one",
            sampling=sampling(config),
            insecure_seed=insecure or config.privacy.insecure_seed is not None,
            adversaries=worst(exposed),
            colluders=colluders_of(config, {len(report.invited) for report in summed} or {len(spent)}),
        ),
        utility=_utility(config, reports),
        aggregation=AggregationSummary(
            kind=config.aggregation.kind if sends else "none",
            bytes_up_per_site_per_round=sum(r.bytes_up for r in summed) / len(summed) if summed else 0.0,
            dropouts=sum(len({*report.invited} - {*report.contributed, *report.refused}) for report in summed),
            aborted_rounds=sum(report.aborted is not None for report in reports),
        ),
    )


def _utility(config: Config, reports: Sequence[RoundReport]) -> UtilitySummary:
    """The figures that each site, and each that was held out, gave last; through noise, the one that was read last."""
    trained: dict[str, wire.Measurement] = {}
    unseen: dict[str, wire.Measurement] = {}
    for report in reports:
        trained.update(report.measurements)
        unseen.update(report.unseen)
    figures, held = _spreads(config, trained), _spreads(config, unseen)
    released = next((report.released for report in reversed(reports) if report.released is not None), None)
    if config.evaluation.release == "private":
        figures["global_"] = FigureSummary(released.score if released else None, None, None)
    return UtilitySummary(
        metric=config.metric,
        **figures,
        status=STATUS[config.evaluation.release],
        noise_deviation=released.deviation if released else None,
        unseen=UnseenSummary(sites=len(unseen), **held) if unseen else None,
    )


def _spreads(config: Config, measurements: Mapping[str, wire.Measurement]) -> dict[str, Any]:
    """What `UtilitySummary` and `UnseenSummary` have alike, by field."""
    lower_is_better, measured = config.metric in LOWER_IS_BETTER, measurements.values()

    def figure(name: str) -> FigureSummary:
        values: Spread | None = spread(
            [getattr(one, name) for one in measured],
            [one.records for one in measured],
            lower_is_better=lower_is_better,
        )
        if values is None:
            return FigureSummary(None, None, None)
        return FigureSummary(values.mean, values.worst_decile, values.sd, values.weighted_mean)

    def hurt(versus: str) -> float | None:
        ours = {site: one.personalized for site, one in measurements.items()}
        theirs = {site: getattr(one, versus) for site, one in measurements.items()}
        return fraction_hurt(ours, theirs, lower_is_better=lower_is_better)

    return {
        "global_": figure("global_score"),
        "personalized": figure("personalized"),
        "local_only": figure("local_only"),
        "fraction_hurt": hurt("local_only"),
        "fraction_hurt_versus_global": hurt("global_score"),
    }


STATUS = {
    "internal": "internal, not DP",
    "private": "released through noise, counted in ε",
    "public-cohort": "of the public sites alone",
}


def sampling(config: Config) -> str:
    """What is drawn in a round, in words."""
    unit, rate = config.privacy.unit, config.privacy.rate
    if unit is PrivacyUnit.CLIENT:
        return "every site, every round"
    drawn = "patient" if unit is PrivacyUnit.PATIENT and config.privacy.sampling == "patient" else "record"
    return f"every {drawn}, every round" if rate == 1.0 else f"{drawn}s by Poisson sampling, rate {rate:g}"


def colluders_of(config: Config, cohorts: Collection[int]) -> int | None:
    """With noise in shares, the fewest sites beside the server that any round's noise was sized for; None otherwise.

    Args:
        cohorts: how many sites were invited to the rounds that had a sum.
    """
    if not shares_noise(config) or not cohorts:
        return None
    return min(claimed_colluders(config, cohort_of(config, size)) for size in cohorts)


def worst(exposed: Sequence[Sequence[Exposure]]) -> tuple[AdversarySummary, ...]:
    """The largest ε of any site, adversary by adversary."""
    worst = []
    for lines in zip(*exposed, strict=True):
        bounds = [line.epsilon.value for line in lines if line.epsilon is not None]
        bound = max(bounds) if len(bounds) == len(lines) else None
        first = next((line for line in lines if (line.epsilon is None) == (bound is None)), lines[0])
        worst.append(AdversarySummary(first.adversary.value, first.colluders, bound, first.reason))
    return tuple(worst)


def report_of(line: Mapping[str, Any]) -> RoundReport:
    """The round that `metrics_line` wrote down.

    Raises:
        RunFolderError: the line is not one of ours.
    """
    try:
        return RoundReport(
            round=line["round"],
            invited=tuple(line["invited"]),
            contributed=tuple(line["contributed"]),
            dropped={phase: tuple(sites) for phase, sites in line["dropped"].items()},
            refused=line["refused"],
            aborted=line["aborted"],
            bytes_up=line["bytes_up_per_site"],
            noise_multiplier=line["noise_multiplier"],
            clip=line.get("clip"),
            measurements=_measurements(line["sites"]),
            unseen=_measurements(line.get("unseen", {})),
            seconds=line["seconds"],
            released=Released(**line["released"]) if line.get("released") else None,
        )
    except (KeyError, TypeError, AttributeError, msgspec.ValidationError) as error:
        raise RunFolderError(f"a line of metrics.jsonl is damaged ({type(error).__name__})") from None


def _measurements(lines: Mapping[str, Any]) -> dict[str, wire.Measurement]:
    return {
        name: msgspec.convert({"type": "measurement", **measured}, wire.Measurement) for name, measured in lines.items()
    }


def _figures_of(measured: wire.Measurement) -> dict[str, Any]:
    """What a site measured; its signed word stands in the ledger."""
    figures: dict[str, Any] = msgspec.to_builtins(measured)
    del figures["seal"]
    return figures


def metrics_line(run: str, report: RoundReport) -> dict[str, Any]:
    """One round as it stands in metrics.jsonl."""

    def mean(name: str) -> float | None:
        values = report.figures(name)
        return values.mean if values else None

    return {
        "run": run,
        "round": report.round,
        "loss": mean("loss"),
        "global": report.released.score if report.released else mean("global_score"),
        "personalized": mean("personalized"),
        "local_only": mean("local_only"),
        "epsilon_max": report.epsilon,
        "invited": list(report.invited),
        "contributed": list(report.contributed),
        "dropped": {phase: list(sites) for phase, sites in report.dropped.items()},
        "refused": dict(report.refused),
        "aborted": report.aborted,
        "bytes_up_per_site": report.bytes_up,
        "noise_multiplier": report.noise_multiplier,
        **({"clip": report.clip} if report.clip is not None else {}),
        "sites": {name: _figures_of(measured) for name, measured in report.measurements.items()},
        **({"unseen": {name: _figures_of(one) for name, one in report.unseen.items()}} if report.unseen else {}),
        "released": asdict(report.released) if report.released else None,
        "seconds": round(report.seconds, 4),
    }
