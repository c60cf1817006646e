"""What the page shows: a run's state in parts, each a piece of HTML that is sent when it changes."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from markupsafe import Markup, escape

from privfed import __version__
from privfed.config import Config
from privfed.privacy.events import PrivacyUnit
from privfed.report.standing import meaning, void
from privfed.report.words import delta_text, epsilon_text, metric_name
from privfed.summary import STATUS
from privfed.watching import Row, View, Watcher

from .chart import Line, chart

PARTS = ("said", "standing", "charts", "faults", "sites", "rounds")
"""The pieces, by the ids of their places on the page."""

_ROUNDS, _SITES, _FAULTS = 100, 500, 50
"""How many of each are shown; how many more there are is said."""

_BELOW_ONE = ("accuracy", "auroc", "auprc", "ece", "c-index")


class Renderer:
    """Makes the page and its parts of what a watcher has seen."""

    def __init__(self) -> None:
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("privfed.web", "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters.update(figure=_figure, epsilon=_epsilon)
        self._page = environment.get_template("page.html.jinja")
        self._parts = {name: environment.get_template(f"{name}.html.jinja") for name in PARTS if name != "said"}

    def page(self, run: str, parts: Mapping[str, str]) -> str:
        """The whole page, as it is served: without JavaScript it shows the state at this moment."""
        return self._page.render(
            run=run, version=__version__, parts={name: Markup(text) for name, text in parts.items()}
        )  # the templates have escaped the parts

    def parts(self, watcher: Watcher, view: View) -> dict[str, str]:
        """The parts of a run whose folder can be read."""
        return self._rendered(_content(watcher, view))

    def broken(self, run: str, reason: str) -> dict[str, str]:
        """The parts of one whose folder can not."""
        words = {"headline": "The folder of this run can not be read", "said": "The folder can not be read."}
        return self._rendered({**_NOTHING, **words, "run": run, "state": "unreadable", "reason": reason})

    def _rendered(self, content: Mapping[str, Any]) -> dict[str, str]:
        drawn = {name: template.render(content).strip() for name, template in self._parts.items()}
        return {"said": str(escape(content["said"])), **drawn}


_NOTHING: Mapping[str, Any] = {
    "reason": "", "phase": "", "done": 0, "planned": 0, "tiles": (), "claim": "", "status": "", "void": False,
    "no_claim": False, "incomplete": False, "seconds": 0.0, "charts": (), "faults": (), "faults_more": 0, "sites": (),
    "sites_more": 0, "rows": (), "rows_more": 0, "metric": "", "personalized": False, "moving": False,
    "remark": "", "sends": True,
}  # fmt: skip


def _content(watcher: Watcher, view: View) -> dict[str, Any]:
    config, rows = watcher.config, watcher.rows
    if config is None:
        return {**_NOTHING, "run": view.run, "state": view.state, "headline": "No run here yet",
                "reason": "It shows once it begins: privfed run --out, or privfed coordinator submit.",
                "said": "No run here yet."}  # fmt: skip
    summary, privacy = watcher.summary, config.privacy
    no_claim = privacy.unit is PrivacyUnit.NONE
    failed = [(row.round + 1, fault) for row in reversed(rows) for fault in row.faults]
    names = _sites(watcher, view)
    incomplete = summary is not None and not summary.complete
    return {
        **_NOTHING,
        "run": view.run,
        "state": view.state,
        "headline": _headline(view, incomplete=incomplete, stopped=summary is not None and summary.stopped_early),
        "phase": f"{view.phase}; asked of {_count(len(view.sites_in))}" if view.phase else "",
        "said": _said(view, rows),
        "done": view.done,
        "planned": view.planned,
        "void": void(config, summary),
        "no_claim": no_claim,
        "sends": config.method.sends,
        "incomplete": incomplete,
        "delta": delta_text(privacy.delta),
        "unit": privacy.unit.value,
        "epsilon": view.epsilon,
        "claim": "" if view.epsilon is None else meaning(config, rows, summary),
        "status": STATUS[config.evaluation.release],
        "metric": metric_name(view.metric),
        "score": view.score,
        "deviation": next((row.deviation for row in reversed(rows) if row.score is not None), None),
        "better": next((row.personalized for row in reversed(rows) if row.personalized is not None), None),
        "personalized": any(row.personalized is not None for row in rows),
        "moving": privacy.clip == "adaptive",
        "inside": len(view.sites_in),
        "outside": len(view.sites_out),
        "seconds": sum(row.seconds for row in rows),
        "remark": next((fault for fault in view.faults if fault.startswith("the last block ended")), ""),
        "charts": [Markup(drawn) for drawn in _charts(config, rows, view.metric, struck=void(config, summary))],
        "faults": failed[:_FAULTS],
        "faults_more": len(failed) - _FAULTS,
        "sites": names[:_SITES],
        "sites_more": len(names) - _SITES,
        "rows": rows[: -_ROUNDS - 1 : -1],
        "rows_more": len(rows) - _ROUNDS,
    }


def _headline(view: View, *, incomplete: bool, stopped: bool) -> str:
    done = f"{view.done} of {view.planned} rounds"
    match view.state:
        case "at work" if view.done < view.planned:
            return f"Round {view.done + 1} of {view.planned}"
        case "at work":
            return f"{done} done; the run is being closed"
        case "over" if stopped:
            return f"Over: stopped early after {done}"
        case "over":
            return f"Over, and incomplete: {done}" if incomplete else f"Over: {done}"
    return f"Nobody works on it: {done}"


def _said(view: View, rows: Sequence[Row]) -> str:
    """For who hears the page: what stands at a tenth of the rounds, not what passes."""
    step = max(1, view.planned // 10)
    done = view.done if view.state != "at work" else view.done - view.done % step
    words = {"at work": "At work", "idle": "Nobody works on it", "over": "The run is over"}.get(view.state, view.state)
    failed = sum(bool(row.faults) for row in rows[:done])
    return f"{words}: {done} of {view.planned} rounds" + (f", faults in {failed}." if failed else ".")


def _sites(watcher: Watcher, view: View) -> list[tuple[str, str, int, int, str]]:
    """(name, where it is, rounds contributed, rounds missed, last fault), those with faults first."""
    inside, word = set(view.sites_in), "asked" if view.phase else "in"
    known = {*watcher.sites, *view.sites_in, *view.sites_out}
    lines = []
    for name in known:
        site = watcher.sites.get(name)
        where = word if name in inside else "out"
        lines.append(
            (name, where, site.contributed if site else 0, site.missed if site else 0, site.fault if site else "")
        )
    return sorted(lines, key=lambda line: (not line[4], line[1] != "out", _natural(line[0])))


@lru_cache(maxsize=20_000)
def _natural(name: str) -> list[tuple[int, str]]:
    """site-9 before site-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _charts(config: Config, rows: Sequence[Row], metric: str, *, struck: bool) -> list[str]:
    drawn = []
    found = {
        "global_score": ("global", [(row.round + 1, row.score, row.deviation or 0.0) for row in rows]),
        "personalized": ("personalised", [(row.round + 1, row.personalized, 0.0) for row in rows]),
    }
    known = {
        key: (label, tuple((n, v, bar) for n, v, bar in points if v is not None))
        for key, (label, points) in found.items()
    }
    scores = [Line(key, label, points) for key, (label, points) in known.items() if points]
    if scores:
        values = [end for line in scores for _, value, bar in line.points for end in (value - bar, value + bar)]
        margin = max(0.06 * (max(values) - min(values)), 0.01)
        highest = 1.0 if metric in _BELOW_ONE else float("inf")
        limits = (max(0.0, min(values) - margin), min(highest, max(values) + margin))
        drawn.append(chart("score", f"{metric_name(metric)} over the rounds", scores, y=metric, limits=limits))
    spent = tuple((row.round + 1, row.epsilon, 0.0) for row in rows if row.epsilon is not None)
    if spent and config.privacy.unit is not PrivacyUnit.NONE and config.method.sends:
        top, budget = max(value for _, value, _ in spent), config.policy.max_epsilon or config.privacy.target_epsilon
        shown = budget if budget < 5 * top else None  # one far above would flatten the line
        limits = (0.0, 1.08 * max(top, shown or 0.0, 1e-9))
        line = Line("epsilon", f"ε {epsilon_text(spent[-1][1])}", spent)
        drawn.append(
            chart(
                "epsilon",
                "ε over the rounds",
                [line],
                y="ε, the largest of any site" + (" (VOID)" if struck else ""),
                limits=limits,
                budget=shown,
            )
        )
    return drawn


def _count(sites: int) -> str:
    return "one site" if sites == 1 else f"{sites} sites"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _epsilon(value: float | None) -> str:
    return "–" if value is None else epsilon_text(value)
