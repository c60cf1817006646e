"""The page: what the template is given, and the template filled in."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from privfed import __version__
from privfed.privacy.events import PrivacyUnit

from ..summary import UnseenSummary, UtilitySummary
from . import figures, promises, words
from .figures import Plot
from .history import MEASURES, History, SiteRow
from .words import delta_text, epsilon_text

_TESTED = {
    "internal": "Measured by each site on its own test records, without noise: for the consortium's own eyes.",
    "private": "Each site counted on its own test records and added its share of noise; only the sum was read. So "
    "there is one figure for all test records together and none for a single site. Personal models have none either: "
    "they saw their records without noise.",
    "public-cohort": "Measured, without noise, by the public sites alone. The other sites' figures stay with them.",
}

_TITLES = {"global_score": "Global model", "personalized": "Personalised", "local_only": "Local-only"}
_NOTES = {
    "global_score": "the one shared model",
    "personalized": "adapted at each site",
    "local_only": "alone, without noise",
}
_SUMMARY_NAMES = {"global_score": "global_", "personalized": "personalized", "local_only": "local_only"}


@dataclass(frozen=True)
class Figure:
    """One line of the table of figures of merit."""

    key: str
    title: str
    note: str
    mean: float | None
    worst_decile: float | None
    sd: float | None
    hurt: float | None


@dataclass(frozen=True)
class Panel:
    """One plot under a heading."""

    key: str
    title: str
    plot: Plot


def page(history: History) -> str:
    """The whole page as HTML text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("privfed.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=_figure, signed=words.signed, percent=_percent, bytes=_bytes, epsilon=_epsilon)
    return environment.get_template("report.html.jinja").render(_content(history)).rstrip() + "\n"


def _content(history: History) -> Mapping[str, Any]:
    summary, config = history.summary, history.config
    rows = history.rows()
    many = len(rows) > figures.MANY
    sends = config.method.sends
    noised = history.release == "private" and sends
    return {
        "noised": noised,
        "release": history.release,
        "tested": _TESTED[history.release if sends else "internal"],
        "figure_label": {"internal": "not DP", "private": "with noise, in ε", "public-cohort": "public sites only"}[
            history.release
        ],
        "released_plot": _released_plot(history) if noised else None,
        "unit_words": words.UNITS.get(summary.privacy.unit, "record"),
        "against": words.against_short(summary.privacy.noise, summary.privacy.colluders),
        "version": __version__,
        "summary": summary,
        "metric_name": words.metric_name(summary.utility.metric),
        "config": config,
        "config_text": history.config_text,
        "headline": words.headline(history),
        "claim": words.claim(history),
        "named": ", ".join(history.sites) if len(rows) <= 8 else "",
        "particulars": words.particulars(history),
        "no_claim": summary.privacy.unit == PrivacyUnit.NONE.value,
        "sends": sends,
        "delta": delta_text(summary.privacy.delta),
        "budget": _budget(history),
        "joined": sum(row.contributed > 0 for row in rows),
        "aborted": [(line.round + 1, line.aborted) for line in history.rounds if line.aborted],
        "refusals": [(row.name, row.refusal) for row in rows if row.refusal],
        "figures": _figures(history, rows, summary.utility),
        "unseen": _figures(history, history.unseen(), summary.utility.unseen),
        "unseen_rows": history.unseen(),
        "score_panels": _score_panels(history),
        "band": "lowest to the highest site" if figures.band_percentiles(len(rows))[0] == 0 else "middle 80 % of sites",
        "epsilon_plot": _epsilon_plot(history),
        "gain_plot": figures.gain_bars(
            [(row.name, row.gain) for row in rows if row.gain is not None],
            metric=summary.utility.metric,
            lower_is_better=history.lower_is_better,
        ),
        "gain_of": "Local-only minus personalised" if history.lower_is_better else "Personalised minus local-only",
        "gain_named": len(rows) <= figures.NAMED,
        "rows": sorted(rows, key=_worst_first) if many else rows,
        "many": many,
        "adversaries": promises.adversaries(history),
        "not_protected": words.not_protected(history),
        "glossary": words.glossary(history),
        "cohort": history.cohorts[0] if history.cohorts else None,
        "cohort_shrank": len(history.cohorts) > 1,
        "smallest_sum": min((len(line.contributed) for line in history.rounds if line.contributed), default=None),
        "steps": _dropouts_by_step(history),
        "rounds_summed": sum(bool(line.contributed) for line in history.rounds),
    }


def _figures(history: History, rows: Sequence[SiteRow], utility: UtilitySummary | UnseenSummary | None) -> list[Figure]:
    """A line a model, over the sites of ``rows``, of which ``utility`` is the summary."""
    lines: list[Figure] = []
    if utility is None:
        return lines
    for key in MEASURES:
        spread = getattr(utility, _SUMMARY_NAMES[key])
        hurt = utility.fraction_hurt if key == "personalized" else None
        if key == "global_score":
            pairs = [(row.figures.global_score, row.figures.local_only) for row in rows if row.figures is not None]
            both = [(ours, alone) for ours, alone in pairs if ours is not None and alone is not None]
            worse = [(ours > alone if history.lower_is_better else ours < alone) for ours, alone in both]
            hurt = sum(worse) / len(both) if both else None
        lines.append(Figure(key, _TITLES[key], _NOTES[key], spread.mean, spread.worst_decile, spread.sd, hurt))
    return lines


def _highest(history: History) -> float:
    """The largest value that the run's figure can have."""
    return math.inf if history.summary.utility.metric in ("mae", "rmse") else 1.0


def _score_panels(history: History) -> list[Panel]:
    rounds = [line.round + 1 for line in history.evaluated]
    curves = {key: history.curves(key) for key in MEASURES}
    if not rounds:
        return []
    limits = figures.score_limits(list(curves.values()), highest=_highest(history))
    alone = figures.mean_curve(curves["local_only"])
    panels = []
    for key in MEASURES:
        plot = figures.score_curve(
            key,
            rounds,
            curves[key],
            title=_TITLES[key],
            metric=history.summary.utility.metric,
            limits=limits,
            reference=alone if key != "local_only" else None,
        )
        if plot is not None:
            panels.append(Panel(key, _TITLES[key], plot))
    return panels


def _released_plot(history: History) -> Plot | None:
    known = [
        (line.round + 1, (line.released.score, line.released.deviation))
        for line in history.rounds
        if line.released is not None and line.released.score is not None
    ]
    return figures.released_curve(
        [number for number, _ in known], [figure for _, figure in known], metric=history.summary.utility.metric
    )


def _epsilon_plot(history: History) -> Plot | None:
    privacy = history.summary.privacy
    if privacy.unit == PrivacyUnit.NONE.value or not history.config.method.sends or not history.evaluated:
        return None
    rounds = [line.round + 1 for line in history.evaluated]
    return figures.epsilon_curve(rounds, history.curves("epsilon"), _budget(history), unit=privacy.unit)


def _budget(history: History) -> float | None:
    """What a site stops at, as site.py reads it."""
    return history.config.policy.max_epsilon or history.config.privacy.target_epsilon


def _dropouts_by_step(history: History) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for line in history.rounds:
        for step, gone in line.dropped.items():
            counts[step] = counts.get(step, 0) + len(gone)
    return list(counts.items())


def _worst_first(row: SiteRow) -> tuple[float, str]:
    return (row.gain if row.gain is not None else float("-inf"), row.name)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _epsilon(value: float | None) -> str:
    return "–" if value is None else epsilon_text(value)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _bytes(count: float | None) -> str:
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
