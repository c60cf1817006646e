"""The figures of a run: one object for Python, for ``--json`` and for the summary on the screen."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from privfed.privacy.accountant import Epsilon
from privfed.privacy.events import PrivacyUnit

from . import wire
from .config import Config
from .errors import RunFolderError
from .evaluation import Spread, fraction_hurt, spread
from .federation import RoundReport


class EpsilonSummary(msgspec.Struct, frozen=True):
    """ε per site, from each site's own ledger, all runs on it together; the system's is the largest."""

    max: float | None
    per_site: dict[str, float | None]


class PrivacySummary(msgspec.Struct, frozen=True):
    """What is claimed. ε means nothing without δ, the unit and who adds the noise."""

    unit: str
    noise: str
    delta: float
    epsilon: EpsilonSummary
    noise_multiplier: float
    accountant: str
    adjacency: str
    sampling: str
    insecure_seed: bool


class FigureSummary(msgspec.Struct, frozen=True):
    """One figure over the sites, every site counting once."""

    mean: float | None
    worst_decile: float | None
    sd: float | None


class UtilitySummary(msgspec.Struct, frozen=True, rename={"global_": "global"}):
    """Figures on each site's own test records. Internal: the figures themselves are not differentially private."""

    metric: str
    global_: FigureSummary
    personalized: FigureSummary
    local_only: FigureSummary
    fraction_hurt: float | None
    fraction_hurt_versus_global: float | None
    status: str = "internal, not DP"


class AggregationSummary(msgspec.Struct, frozen=True):
    """How the updates were added up."""

    kind: str
    bytes_up_per_site_per_round: float
    dropouts: int
    aborted_rounds: int


class Summary(msgspec.Struct, frozen=True):
    """What ``privfed run --json`` prints."""

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

    def to_json(self) -> str:
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()


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
) -> Summary:
    """The summary of the rounds in ``reports``. A site that left counts with what it last measured.

    ``insecure`` says that some spend on the ledgers had noise that others can recompute; ``spent`` is what each site's
    ledger holds at the end, whatever it has measured.
    """
    latest: dict[str, wire.Measurement] = {}
    for report in reports:
        latest.update(report.measurements)
    private = config.privacy.unit is not PrivacyUnit.NONE
    largest = max(spent.values(), key=lambda epsilon: epsilon.value)
    refusals = {site: reason for report in reports for site, reason in report.refused.items()} | dict(retired)
    summed = [report for report in reports if report.contributed]
    sends = config.method.sends

    def figure(name: str) -> FigureSummary:
        values: Spread | None = spread([getattr(measured, name) for measured in latest.values()])
        return FigureSummary(values.mean, values.worst_decile, values.sd) if values else FigureSummary(None, None, None)

    def hurt(versus: str) -> float | None:
        return fraction_hurt(
            {site: m.personalized for site, m in latest.items()}, {s: getattr(m, versus) for s, m in latest.items()}
        )

    return Summary(
        run=run,
        rounds=len(reports),
        rounds_planned=config.rounds,
        complete=len(reports) == config.rounds and (not sends or len(summed) > 0),
        sites=len(spent),
        simulated=simulated,
        seconds=round(seconds, 3),
        method=str(type(config.method).__struct_config__.tag),
        refusals=refusals,
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
            sampling=f"Poisson, rate {config.privacy.rate:g}",
            insecure_seed=insecure or config.privacy.insecure_seed is not None,
        ),
        utility=UtilitySummary(
            metric=config.evaluation.metric,
            global_=figure("global_score"),
            personalized=figure("personalized"),
            local_only=figure("local_only"),
            fraction_hurt=hurt("local_only"),
            fraction_hurt_versus_global=hurt("global_score"),
        ),
        aggregation=AggregationSummary(
            kind=config.aggregation.kind if sends else "none",
            bytes_up_per_site_per_round=sum(r.bytes_up for r in summed) / len(summed) if summed else 0.0,
            dropouts=sum(len({*report.invited} - {*report.contributed, *report.refused}) for report in summed),
            aborted_rounds=sum(report.aborted is not None for report in reports),
        ),
    )


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
            measurements={
                name: msgspec.convert({"type": "measurement", **measured}, wire.Measurement)
                for name, measured in line["sites"].items()
            },
            seconds=line["seconds"],
        )
    except (KeyError, TypeError, AttributeError, msgspec.ValidationError) as error:
        raise RunFolderError(f"a line of metrics.jsonl is damaged ({type(error).__name__})") from None


def metrics_line(run: str, report: RoundReport) -> dict[str, Any]:
    """One round as it stands in metrics.jsonl."""

    def mean(name: str) -> float | None:
        values = report.figures(name)
        return values.mean if values else None

    return {
        "run": run,
        "round": report.round,
        "loss": mean("loss"),
        "global": mean("global_score"),
        "personalized": mean("personalized"),
        "local_only": mean("local_only"),
        "epsilon_max": report.epsilon,
        "invited": list(report.invited),
        "contributed": list(report.contributed),
        "dropped": {phase: list(sites) for phase, sites in report.dropped.items()},
        "refused": dict(report.refused),
        "aborted": report.aborted,
        "bytes_up_per_site": report.bytes_up,
        "sites": {name: msgspec.to_builtins(measured) for name, measured in report.measurements.items()},
        "seconds": round(report.seconds, 4),
    }
