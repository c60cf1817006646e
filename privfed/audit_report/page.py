"""The report as one HTML page: what the template is given, and the template filled in."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from privfed.report.figures import Plot
from privfed.report.words import delta_text, epsilon_text

from . import figures, words
from .model import AuditReport, EventGroup, Finding

_KINDS = {
    "UNSOUND-CLAIM": "void",
    "AUDIT-VIOLATION": "void",
    "BUDGET-EXCEEDED": "void",
    "INCONCLUSIVE": "warn",
    "CLAIM-SUPPORTED": "good",
}
_MANY = 40  # rows of a table that scrolls on a screen


def page(report: AuditReport, *, paper: bool = False) -> str:
    """The whole page as HTML text.

    Args:
        paper: for a program that makes pages and knows no colour variables inside drawings.
    """
    loaders = [jinja2.PackageLoader(f"privfed.{package}", "templates") for package in ("audit_report", "report")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        epsilon=_epsilon,
        delta=_delta,
        figure=_figure,
        verdict=words.verdict_title,
        percent=_percent,
        plain=_plain,
        figures_of=words.figures_of,
    )
    text = environment.get_template("audit.html.jinja").render(_content(report)).rstrip() + "\n"
    return _on_paper(text) if paper else text


def _content(report: AuditReport) -> Mapping[str, Any]:
    return {
        "report": report,
        "kind": _KINDS[report.verdict],
        "kinds": _KINDS,
        "meaning": words.VERDICTS[report.verdict],
        "serious": [finding for finding in report.findings if finding.verdict != "CLAIM-SUPPORTED"],
        "counts": _counts(report.findings),
        "title": report.about.data_product or ", ".join(line.run for line in report.composition.runs[:3]) or "no run",
        "glossary": words.GLOSSARY,
        "events": _events(report.events),
        "many": len(report.sites) > _MANY,
        "several_ledgers": len(report.verification) > 1,
        "plots": _plots(report),
        "not_stated": words.NOT_STATED,
        "inferred": [audit for audit in report.audits if audit.level == 4],
        "several_runs": len({audit.run for audit in report.audits}) > 1,
        "sites_total": len({line.site for line in report.sites}),
    }


def _plots(report: AuditReport) -> dict[str, Plot | None]:
    return {
        "epsilon": figures.epsilon_plot(report),
        "accuracy": figures.accuracy_plot(report),
        "delta": figures.delta_plot(report),
        "trade_off": figures.trade_off_plot(report),
        "noise": figures.noise_plot(report),
        "membership": figures.membership_plot(report),
    }


def _counts(findings: Sequence[Finding]) -> str:
    held = sum(finding.verdict == "CLAIM-SUPPORTED" for finding in findings)
    return f"{held} of {len(findings)}"


def _events(groups: Sequence[EventGroup]) -> list[tuple[EventGroup, list[str]]]:
    """Groups that differ by their site alone, together, with the sites' names."""
    together: dict[tuple[object, ...], tuple[EventGroup, list[str]]] = {}
    for group in groups:
        key = tuple(getattr(group, name) for name in group.__struct_fields__ if name != "site")
        together.setdefault(key, (group, []))[1].append(group.site)
    return list(together.values())


def _on_paper(text: str) -> str:
    """Colour variables inside drawings as the colours of the light scheme."""
    light = re.search(r":root \{(.*?)\}", text, flags=re.DOTALL)
    colours = dict(re.findall(r"(--[a-z-]+): (#[0-9a-f]{6})", light[1])) if light else {}

    def plain(drawing: re.Match[str]) -> str:
        return re.sub(r"var\((--[a-z-]+)\)", lambda name: colours.get(name[1], "#000000"), drawing[0])

    return re.sub(r"<svg.*?</svg>", plain, text, flags=re.DOTALL)


def _epsilon(value: float | None) -> str:
    return "no bound" if value is None else epsilon_text(value)


def _delta(value: float | None) -> str:
    return "–" if value is None else delta_text(value)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:g} %"


def _plain(adjacency: str) -> str:
    return {"add-or-remove-one": "one unit added or removed"}.get(adjacency, adjacency)
