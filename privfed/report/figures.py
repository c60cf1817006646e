"""The plots: matplotlib draws them as SVG, and what comes out takes its colours and fonts from the page.

Colours are drawn as stand-ins and become CSS variables afterwards, so that one drawing serves light, dark and paper.
"""

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .words import epsilon_text, signed

MANY = 60
"""Above this many sites a plot shows percentiles instead of one line a site."""
NAMED = 24
"""Up to this many sites a bar carries its site's name."""
_FEW = 10  # up to this many sites a band goes from the lowest to the highest
_GROUPS = 6  # up to this many different curves are labelled one by one

# Stand-ins: no drawing contains these by chance, and each is a CSS variable of the page.
INK, MUTED, GRID, GLOBAL, PERSONAL, LOCAL, EPSILON, HURT = (f"#{number:02x}feed" for number in range(0xC0, 0xC8))
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    GLOBAL: "--global",
    PERSONAL: "--personal",
    LOCAL: "--local",
    EPSILON: "--epsilon",
    HURT: "--hurt",
}
_SETTINGS = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 12.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Plot:
    """One drawing.

    Attributes:
        svg: the element, ready for a page.
        desc: what it shows, in words, for who can not see it; also inside the element.
    """

    svg: str
    desc: str


def epsilon_curve(
    rounds: Sequence[int], curves: Mapping[str, Sequence[float]], budget: float | None, *, unit: str
) -> Plot | None:
    """ε of every site over the rounds, with the budget; None when no site has an ε."""
    table = _table(curves)
    if not table.size or np.isnan(table).all():
        return None
    with canvas("epsilon", 440, 290) as drawing:
        axes = drawing.axes
        last = [_last(row) for row in table]
        top = max(value for value in last if value is not None)
        groups = _groups(curves)
        labels: list[tuple[float, str]] = []
        if len(curves) > MANY and len(groups) > _GROUPS:
            _band(axes, rounds, table, EPSILON, 0, 100, alpha=0.14)
            _band(axes, rounds, table, EPSILON, 10, 90, alpha=0.26)
            median, highest = _over_sites(table, np.nanmedian), _over_sites(table, np.nanmax)
            axes.plot(rounds, median, color=EPSILON, linewidth=2.2, marker=_marker(rounds))
            axes.plot(rounds, highest, color=EPSILON, linewidth=1.2, linestyle=(0, (1, 1.5)))
            labels = [(_last(median) or 0.0, "median"), (_last(highest) or 0.0, "highest")]
        elif len(groups) > _GROUPS:
            for name, row in zip(curves, table, strict=True):
                drawing.name(axes.plot(rounds, row, color=EPSILON, linewidth=1.0, alpha=0.6)[0], name)
            first = max(range(len(last)), key=lambda number: last[number] or -1.0)
            labels = [(top, _short(list(curves)[first], 14))]
        else:
            for number, (names, row) in enumerate(groups):
                line = axes.plot(
                    rounds, row, color=EPSILON, linewidth=2.2, marker=_marker(rounds), markersize=4,
                    linestyle=("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))[number % 4],
                )[0]  # fmt: skip
                drawing.name(line, ", ".join(names[:20]) + ("" if len(names) <= 20 else f" and {len(names) - 20} more"))
                value = _last(row)
                if value is not None:
                    labels.append((value, _group_label(names, len(curves))))
        # A line far above the curves would flatten them, and its label, out of sight, would push the plot together.
        drawn = budget if budget is not None and budget < 5 * top else None
        if drawn is not None:
            axes.axhline(drawn, color=HURT, linewidth=1.4, linestyle=(0, (6, 3)))
            drawing.text(axes, f"budget ε = {drawn:g}", drawn, colour=HURT)
        axes.set_ylim(0, 1.12 * max(top, drawn or 0.0, 1e-9))
        _end_labels(axes, rounds, labels, EPSILON)
        axes.set_ylabel(f"ε spent so far, {unit} unit")
        _rounds_axis(axes, rounds)
        desc = (
            f"ε over {len(rounds)} measured round{'s' if len(rounds) != 1 else ''}. The highest ε of any site ends at "
            f"{epsilon_text(top)}"
        )
        low = min(value for value in last if value is not None)
        desc += ", the same at every site." if top - low < 1e-9 else f", the lowest at {epsilon_text(low)}."
        desc += f" The budget line stands at {drawn:g}." if drawn is not None else " There is no budget line."
        if drawn is None and budget is not None and math.isfinite(budget):
            desc += f" The budget of {budget:g} is far above."
        return drawing.finish("ε of each site over the rounds", desc)


def score_curve(
    name: str,
    rounds: Sequence[int],
    curves: Mapping[str, Sequence[float]],
    *,
    title: str,
    metric: str,
    limits: tuple[float, float],
    reference: Sequence[float] | None,
) -> Plot | None:
    """One measure over the rounds: mean over sites, band, a thin line a site, and the mean of being alone."""
    table = _table(curves)
    if not table.size or np.isnan(table).all():
        return None
    colour = {"global_score": GLOBAL, "personalized": PERSONAL, "local_only": LOCAL}[name]
    low, high = band_percentiles(len(curves))
    with canvas(name.replace("_", "-"), 360, 270) as drawing:
        axes = drawing.axes
        _band(axes, rounds, table, colour, low, high, alpha=0.20)
        if len(curves) <= MANY:
            for site, row in zip(curves, table, strict=True):
                drawing.name(axes.plot(rounds, row, color=colour, linewidth=0.8, alpha=0.45)[0], site)
        mean = _over_sites(table, np.nanmean)
        if reference is not None:
            axes.plot(rounds, reference, color=LOCAL, linewidth=1.6, linestyle=(0, (4, 2.5)))
        axes.plot(rounds, mean, color=colour, linewidth=2.6, marker=_marker(rounds), markersize=4)
        axes.set_ylim(*limits)
        axes.set_ylabel(metric)
        _rounds_axis(axes, rounds)
        final = [value for row in table if (value := _last(row)) is not None]
        where = f"after round {rounds[-1]}" if len(rounds) > 1 else f"measured once, after round {rounds[0]}"
        return drawing.finish(
            f"{title} {metric} over the rounds",
            f"{title}: mean {metric} over {len(final)} sites {_last(mean) or 0.0:.3f} {where}, "
            f"lowest site {min(final):.3f}, highest site {max(final):.3f}.",
        )


def released_curve(rounds: Sequence[int], figures: Sequence[tuple[float, float | None]], *, metric: str) -> Plot | None:
    """The released figure over the rounds, each with the deviation that its noise makes."""
    if not rounds:
        return None
    scores = [score for score, _ in figures]
    known = [deviation or 0.0 for _, deviation in figures]
    low = min(score - deviation for (score, _), deviation in zip(figures, known, strict=True))
    high = max(score + deviation for (score, _), deviation in zip(figures, known, strict=True))
    margin = max(0.06 * (high - low), 0.01)
    with canvas("released", 440, 290) as drawing:
        axes = drawing.axes
        axes.plot(rounds, scores, color=GLOBAL, linewidth=1.2, alpha=0.5)
        axes.vlines(
            rounds,
            [score - deviation for score, deviation in zip(scores, known, strict=True)],
            [score + deviation for score, deviation in zip(scores, known, strict=True)],
            color=GLOBAL,
            linewidth=2.4 if len(rounds) <= 60 else 1.0,
            alpha=0.5,
        )
        if len(rounds) <= 60:
            for number, score, deviation in zip(rounds, scores, known, strict=True):
                point = axes.plot([number], [score], color=GLOBAL, marker="o", markersize=5)[0]
                drawing.name(point, f"round {number}: {score:.3f} ± {deviation:.3f}")
        axes.set_ylim(max(0.0, low - margin), min(1.0, high) + margin)
        axes.set_ylabel(metric)
        _rounds_axis(axes, rounds)
        desc = (
            f"The {metric} read from noised counts of {len(rounds)} round{'s' if len(rounds) != 1 else ''} goes from "
            f"{scores[0]:.3f} ± {known[0]:.3f} to {scores[-1]:.3f} ± {known[-1]:.3f}."
        )
        return drawing.finish(f"Released {metric} over the rounds", desc)


def gain_bars(gains: Sequence[tuple[str, float]], *, metric: str, lower_is_better: bool = False) -> Plot | None:
    """How much better personalised is than local-only at every site, from the largest loss to the largest gain."""
    if not gains:
        return None
    ordered = sorted(gains, key=lambda gain: (gain[1], gain[0]))
    values = np.array([value for _, value in ordered])
    hurt = int((values < 0).sum())
    named = len(ordered) <= NAMED
    span = max(float(np.abs(values).max()), 1e-3) * 1.15
    with canvas("gain", 440, max(150, 62 + 24 * len(ordered)) if named else 290) as drawing:
        axes = drawing.axes
        places = np.arange(len(ordered))
        colours = [HURT if value < 0 else PERSONAL for value in values]
        if named:
            axes.grid(visible=True, axis="x")
            axes.grid(visible=False, axis="y")
            axes.hlines(places, 0, values, color=colours, linewidth=2.4)
            for place, (name, value), colour in zip(places, ordered, colours, strict=True):
                marker = "v" if value < 0 else "o"
                drawing.name(axes.plot([value], [place], color=colour, marker=marker, markersize=8)[0], name)
            axes.set_yticks(places, [_short(name, 18) for name, _ in ordered])
            axes.set_ylim(len(ordered) - 0.4, -0.6)
            axes.set_xlim(-span, span)
            axes.axvline(0, color=INK, linewidth=1)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.set_xlabel(f"worse  ←  {metric} against alone  →  better")
            axes.xaxis.set_major_locator(MaxNLocator(7))
        else:
            axes.vlines(places, 0, values, color=colours, linewidth=min(3.0, 330 / len(ordered)))
            axes.axhline(0, color=INK, linewidth=1)
            axes.set_ylim(-span, span)
            axes.set_xlim(-0.02 * len(ordered) - 1, 1.02 * len(ordered))
            axes.set_xlabel(f"{len(ordered)} sites, from the largest loss to the largest gain")
            axes.set_ylabel(f"difference in {metric}")
            axes.text(0.02, 0.95, "better than alone ↑", transform=axes.transAxes, va="top", color=PERSONAL)
            axes.text(0.98, 0.04, "worse than alone ↓", transform=axes.transAxes, ha="right", color=HURT)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        difference = "Local-only minus personalised" if lower_is_better else "Personalised minus local-only"
        return drawing.finish(
            f"{difference} {metric}, site by site",
            f"{hurt} of {len(ordered)} sites have a personalised model worse than their own local-only one. The "
            f"differences go from {signed(values[0])} to {signed(values[-1])}, median {signed(np.median(values))}.",
        )


def score_limits(curves: Sequence[Mapping[str, Sequence[float]]], *, highest: float = 1.0) -> tuple[float, float]:
    """One y range for all panels of one metric that lies in [0, highest]."""
    tables = [table for table in map(_table, curves) if table.size and not np.isnan(table).all()]
    if not tables:
        return 0.0, 1.0
    cut = (1, 99) if len(tables[0]) > MANY else (0, 100)
    low = min(float(np.nanpercentile(table, cut[0])) for table in tables)
    high = max(float(np.nanpercentile(table, cut[1])) for table in tables)
    margin = max(0.06 * (high - low), 0.01)
    return max(0.0, low - margin), min(highest, high) + margin


def band_percentiles(sites: int) -> tuple[int, int]:
    """Which percentiles over sites a band shows: everything for a few sites, else without the outer tenths."""
    return (0, 100) if sites <= _FEW else (10, 90)


def mean_curve(curves: Mapping[str, Sequence[float]]) -> list[float]:
    """The mean over sites after each measured round."""
    table = _table(curves)
    return list(_over_sites(table, np.nanmean)) if table.size else []


class Drawing:
    """A figure in progress: no pyplot, no state outside this object but matplotlib's settings, put back at the end."""

    def __init__(self, name: str, width: int, height: int) -> None:
        self._name, self._width, self._height = name, width, height
        self._titles: dict[str, str] = {}
        defaults = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")}
        settings: Any = {**defaults, **_SETTINGS, "svg.hashsalt": f"privfed-{name}"}
        self._settings = matplotlib.rc_context(settings)

    def __enter__(self) -> "Drawing":
        self._settings.__enter__()
        self._figure = Figure(figsize=(self._width / 72, self._height / 72), layout="constrained")
        FigureCanvasSVG(self._figure)
        self.axes = self._figure.add_subplot()
        self.axes.patch.set_visible(False)
        self._figure.patch.set_visible(False)
        return self

    def __exit__(self, *error: object) -> None:
        self._settings.__exit__(None, None, None)

    def name(self, artist: matplotlib.artist.Artist, title: str) -> None:
        """Give one mark a tooltip."""
        gid = f"mark{len(self._titles)}"
        artist.set_gid(gid)
        self._titles[gid] = title

    def text(self, axes: Axes, text: str, y: float, *, colour: str) -> None:
        """A label over a horizontal line, at its left."""
        axes.annotate(
            text, (0, y), xycoords=("axes fraction", "data"), xytext=(4, 4), textcoords="offset points", color=colour
        )

    def finish(self, title: str, desc: str) -> Plot:
        """The SVG element, with ids of its own, CSS colours, a title and a description."""
        buffer = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
            warnings.filterwarnings(
                "ignore", message=".*[Mm]atplotlib currently does not support", category=UserWarning
            )
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            self._figure.savefig(buffer, format="svg", metadata=nothing)
        return Plot(self._adapted(buffer.getvalue(), title, desc), desc)

    def _adapted(self, svg: str, title: str, desc: str) -> str:
        body = svg[svg.index("<svg") :]
        body = body[body.index(">") + 1 : body.rindex("</svg>")]
        body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
        body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
        body = re.sub(r"\*\{[^}]*\}", "", body).replace('<style type="text/css"></style>', "")
        body = re.sub(r"font: (\S+?px)[^;\"]*", r"font-size: \1", body)
        body = body.replace("xlink:href", "href")
        for stand_in, variable in _VARIABLES.items():
            body = body.replace(stand_in, f"var({variable})")
        body = re.sub(r"<[^>]*>", _rounded, body)
        for gid, text in self._titles.items():
            body = body.replace(f'<g id="{gid}">', f'<g id="{gid}"><title>{html.escape(_printable(text))}</title>', 1)
        prefix = f"plot-{self._name}-"
        body = re.sub(r'\bid="', f'id="{prefix}', body)
        body = body.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
        head = (
            f'<svg class="plot" viewBox="0 0 {self._width} {self._height}" role="img" '
            f'aria-labelledby="{prefix}title {prefix}desc">'
            f'<title id="{prefix}title">{html.escape(title)}</title>'
            f'<desc id="{prefix}desc">{html.escape(desc)}</desc>'
        )
        return head + re.sub(r"\n\s*", "\n", body) + "</svg>"


def _rounded(tag: re.Match[str]) -> str:
    """Coordinates in a tag to a hundredth of a pixel: half the bytes, the same picture."""
    return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), tag[0])


def canvas(name: str, width: int, height: int) -> Drawing:
    return Drawing(name, width, height)


def _table(curves: Mapping[str, Sequence[float]]) -> np.ndarray:
    """float64[sites, measured rounds]"""
    return np.array(list(curves.values()), dtype=np.float64).reshape(len(curves), -1)


def _over_sites(table: np.ndarray, statistic: Callable[..., np.ndarray], **settings: object) -> np.ndarray:
    """float64[measured rounds]: a NaN-skipping statistic of each column; NaN where no site has a figure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All-NaN|Mean of empty slice", category=RuntimeWarning)
        return np.asarray(statistic(table, axis=0, **settings), dtype=np.float64)


def _band(
    axes: Axes, rounds: Sequence[int], table: np.ndarray, colour: str, low: int, high: int, *, alpha: float
) -> None:
    bottom, top = (_over_sites(table, np.nanpercentile, q=q) for q in (low, high))
    axes.fill_between(rounds, bottom, top, color=colour, alpha=alpha, linewidth=0)


def _last(row: Sequence[float] | np.ndarray) -> float | None:
    known = [float(value) for value in row if math.isfinite(value)]
    return known[-1] if known else None


def _groups(curves: Mapping[str, Sequence[float]]) -> list[tuple[list[str], list[float]]]:
    """Sites that share one curve, together: sites with the same noise and participation spend the same."""
    groups: dict[tuple[str, ...], tuple[list[str], list[float]]] = {}
    for name, row in curves.items():
        if all(math.isnan(value) for value in row):
            continue
        key = tuple(f"{value:.9g}" for value in row)
        groups.setdefault(key, ([], list(row)))[0].append(name)
    return list(groups.values())


def _group_label(names: Sequence[str], sites: int) -> str:
    if len(names) == sites:
        return f"all {sites} sites" if sites > 1 else _short(names[0], 14)
    return _short(names[0], 14) if len(names) == 1 else f"{len(names)} sites"


def _end_labels(axes: Axes, rounds: Sequence[int], labels: Sequence[tuple[float, str]], colour: str) -> None:
    """Names at the right ends of lines, pushed apart so that they can be read."""
    step = 0.065 * (axes.get_ylim()[1] - axes.get_ylim()[0])
    ordered = sorted(labels)
    heights: list[float] = []
    for value, _ in ordered:
        heights.append(max(value, heights[-1] + step) if heights else value)
    shift = sum(value - height for (value, _), height in zip(ordered, heights, strict=True)) / max(1, len(heights))
    for (_, text), height in zip(ordered, heights, strict=True):
        axes.annotate(
            text, (rounds[-1], height + shift), xytext=(8, 0), textcoords="offset points", va="center", color=colour,
            annotation_clip=False,
        )  # fmt: skip


def _rounds_axis(axes: Axes, rounds: Sequence[int]) -> None:
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    first = 0.5 if rounds[0] == rounds[-1] else rounds[0] - 0.03 * (rounds[-1] - rounds[0])
    axes.set_xlim(first, rounds[-1] + (0.5 if rounds[0] == rounds[-1] else 0.03 * (rounds[-1] - rounds[0])))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _marker(rounds: Sequence[int]) -> str | None:
    return "o" if len(rounds) <= 5 else None  # few points need to be seen as points


def _short(name: str, length: int) -> str:
    name = _printable(name)
    return name if len(name) <= length else name[: length - 1] + "…"


def _printable(text: str) -> str:
    """Without line breaks and control characters, which no SVG may hold."""
    return "".join(character if character.isprintable() else "�" for character in text)
