"""The study's page: table, pictures and caveats in one self-contained HTML file."""

import html
import io
from collections.abc import Callable
from functools import partial

import jinja2
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from privfed import __version__

from .plan import Study
from .results import Results, shown

EPSILON_KEY = "privacy.target_epsilon"


def page(study: Study, results: Results) -> str:
    """The whole page as HTML text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("privfed.study", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    table = shown(results.table)
    failures = results.runs[results.runs["error"].notna()]
    return environment.get_template("study.html.jinja").render(
        study=study,
        columns=[str(column) for column in table.columns],
        rows=table.to_numpy().tolist(),
        panels=_panels(results),
        choosing=results.choosing,
        claims=results.claims,
        failures=[(str(row["cell"]), str(row["error"])) for _, row in failures.iterrows()],
        metric=next(iter(results.runs.get("metric", pd.Series(dtype=str)).dropna()), "figure"),
        statuses=sorted(set(results.runs.get("status", pd.Series(dtype=str)).dropna())),
        version=__version__,
    )


def _panels(results: Results) -> list[tuple[str, str, str]]:
    """(heading, picture as SVG, what it shows) of every plot that has something to show."""
    drawn = []
    table = results.table
    against_epsilon = EPSILON_KEY in table and table[EPSILON_KEY].nunique() > 1
    headings = {
        "personalized": "Personalised models",
        "global": "Global model",
        "personalized_worst_decile": "Worst decile of sites, personalised",
    }
    for measure, heading in headings.items():
        if against_epsilon and table[measure].notna().any():
            drawn.append(_panel(heading, partial(_trade_off, table=table, measure=measure)))
    sites = results.sites
    if len(sites) and sites["personalized"].notna().any():
        drawn.append(_panel("Sites, personalised", lambda axes: _spread(axes, sites)))
    if table["seconds"].notna().any():
        drawn.append(_panel("Time of a run", lambda axes: _cost(axes, table)))
    return drawn


def _panel(heading: str, draw: Callable[[Axes], str]) -> tuple[str, str, str]:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    text = draw(figure.subplots())
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(text)}"', 1)
    return heading, svg, text


def _lines_of(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """One line a case and a combination of the grid's other keys."""
    keys = [key for key in table.columns[: list(table.columns).index("runs")] if key != EPSILON_KEY]
    return [(_name(keys, values), group) for values, group in table.groupby(keys, sort=False, dropna=False)]


def _name(keys: list[str], values: tuple[object, ...]) -> str:
    pairs = zip(keys, values, strict=True)
    named = [str(v) if k == "case" else f"{k.rpartition('.')[2]}={v}" for k, v in pairs if v != ""]
    return ", ".join(named) or "all"


def _trade_off(axes: Axes, table: pd.DataFrame, measure: str) -> str:
    said = []
    width = "within" if f"{measure}_within" in table else "ci"
    for name, group in _lines_of(table):
        group = group.sort_values(EPSILON_KEY)
        x = [_position(value) for value in group[EPSILON_KEY]]
        mean, half = group[measure].to_numpy(float), np.nan_to_num(group[f"{measure}_{width}"].to_numpy(float))
        axes.plot(x, mean, marker=".", label=name)
        axes.fill_between(x, mean - half, mean + half, alpha=0.2)
        said.append(f"{name}: {', '.join(f'{m:.3f}' for m in mean)}")
    ticks = sorted(set(table[EPSILON_KEY]))
    axes.set_xscale("log")
    axes.set_xticks([_position(value) for value in ticks], [f"{value:g}" for value in ticks])
    axes.minorticks_off()
    band = "95 % within seeds" if width == "within" else "95 % over seeds"
    axes.set(xlabel="target ε", ylabel=f"mean over sites, band: {band}")
    axes.legend(frameon=False, fontsize="small")
    return f"Figure against ε ({', '.join(f'{value:g}' for value in ticks)}). {'; '.join(said)}"


def _position(epsilon: float) -> float:
    return float(epsilon) if np.isfinite(epsilon) else 1e3


def _spread(axes: Axes, sites: pd.DataFrame) -> str:
    keys = [key for key in sites.columns[: list(sites.columns).index("seed")]]
    groups = [(_name(keys, v), g["personalized"].dropna()) for v, g in sites.groupby(keys, sort=False, dropna=False)]
    groups = [(name, values) for name, values in groups if len(values)]
    axes.boxplot([values for _, values in groups], orientation="horizontal", tick_labels=[name for name, _ in groups])
    axes.invert_yaxis()
    axes.set(xlabel="figure of each site, all seeds")
    return "; ".join(f"{name}: median {values.median():.3f}, lowest {values.min():.3f}" for name, values in groups)


def _cost(axes: Axes, table: pd.DataFrame) -> str:
    keys = list(table.columns[: list(table.columns).index("runs")])
    names = [_name(keys, tuple(row)) for row in table[keys].to_numpy()]
    axes.barh(names, table["seconds"].to_numpy(float))
    axes.invert_yaxis()
    axes.set(xlabel="seconds")
    return "; ".join(f"{name}: {value:.1f} s" for name, value in zip(names, table["seconds"], strict=True))
