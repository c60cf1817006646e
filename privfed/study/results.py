"""What the cells found: one tidy row a run, one line with intervals a setting, and what choosing among them costs."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
from scipy import stats

from privfed import folder
from privfed.privacy import rdp
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import Charge, NoiseSite, PrivacyUnit
from privfed.privacy.ledger import Ledger
from privfed.privacy.tuning import divergence_of, epsilon_of_best
from privfed.seals import COORDINATOR
from privfed.summary import Summary
from privfed.verification import charges_of

from .plan import Cell, Study
from .runner import CELLS, FAILURE

MEASURES = ("global", "personalized", "local_only")
_LEVEL = 0.95


@dataclass(frozen=True)
class Results:
    """A study's outcome.

    Attributes:
        runs: one row a cell: its settings, its figures, ``error`` where it failed.
        table: one row a setting: mean over seeds and half the width of the 95 % interval (Student's t) of each figure;
            ``…_within`` is that width without what a seed does to all settings alike, to compare settings by (Morey
            2008), where every setting has every seed.
        sites: one row a cell and site: personalised figure and ε.
        choosing: what releasing the best cell costs, in words.
        claims: what the ε of the runs mean, in words: each δ, unit, adversary, sampling and accountant that occurs.
    """

    runs: pd.DataFrame = field(repr=False)
    table: pd.DataFrame = field(repr=False)
    sites: pd.DataFrame = field(repr=False)
    choosing: str
    claims: tuple[str, ...] = ()

    def write(self, home: Path) -> tuple[Path, ...]:
        """results.csv, results.parquet, sites.csv, table.md and table.tex in the study's folder."""
        files = tuple(home / name for name in ("results.csv", "results.parquet", "sites.csv", "table.md", "table.tex"))
        self.runs.to_csv(files[0], index=False)
        self.runs.to_parquet(files[1], index=False)
        self.sites.to_csv(files[2], index=False)
        files[3].write_text(markdown(self.table) + "\n", encoding="utf-8")
        files[4].write_text(latex(self.table) + "\n", encoding="utf-8")
        return files


def collect(study: Study, cells: Sequence[Cell], home: Path) -> Results:
    """Read every cell's folder; one without a result has empty figures and its reason."""
    rows, sites = [], []
    for cell in cells:
        path = home / CELLS / cell.id
        settings = {"case": cell.case, **cell.point, "seed": cell.seed}
        row: dict[str, object] = {**settings, "cell": cell.id, "error": None}
        if (path / folder.SUMMARY).exists():
            summary = msgspec.json.decode((path / folder.SUMMARY).read_bytes(), type=Summary)
            row |= _figures(summary)
            sites += [{**settings, **line} for line in _per_site(path, summary)]
        elif (path / FAILURE).exists():
            row["error"] = json.loads((path / FAILURE).read_text(encoding="utf-8"))["error"]
        else:
            row["error"] = "not run yet"
        rows.append(row)
    runs = pd.DataFrame(rows)
    keys = ["case", *study.grid]
    return Results(runs, _table(runs, keys), pd.DataFrame(sites), _choosing(cells, home), _claims(runs))


def _figures(summary: Summary) -> dict[str, object]:
    utility, privacy = summary.utility, summary.privacy
    figures = {"global": utility.global_, "personalized": utility.personalized, "local_only": utility.local_only}
    if utility.unseen is not None:
        figures |= {"unseen_global": utility.unseen.global_, "unseen_personalized": utility.unseen.personalized}
    return {
        "unit": privacy.unit,
        "noise": privacy.noise,
        "epsilon": privacy.epsilon.max,
        "delta": privacy.delta,
        "adjacency": privacy.adjacency,
        "sampling": privacy.sampling,
        "accountant": privacy.accountant,
        "colluders": privacy.colluders,
        "metric": utility.metric,
        **{name: figure.mean for name, figure in figures.items()},
        **{f"{name}_worst_decile": figure.worst_decile for name, figure in figures.items()},
        "fraction_hurt": utility.fraction_hurt,
        "status": utility.status,
        "sites": summary.sites,
        "rounds": summary.rounds,
        "complete": summary.complete,
        "bytes_up_per_site_per_round": summary.aggregation.bytes_up_per_site_per_round,
        "seconds": summary.seconds,
    }


def _claims(runs: pd.DataFrame) -> tuple[str, ...]:
    if "unit" not in runs:
        return ()
    found = []
    names = ["delta", "unit", "noise", "adjacency", "sampling", "accountant", "colluders"]
    for delta, unit, noise, adjacency, sampling, accountant, colluders in (
        runs.loc[runs["unit"].notna() & (runs["unit"] != PrivacyUnit.NONE.value), names].drop_duplicates().to_numpy()
    ):
        against = "against everybody"
        if noise == NoiseSite.DISTRIBUTED.value:
            against = f"against the server and up to {colluders:.0f} sites that work with it"
        elif noise == NoiseSite.CENTRAL.value:
            against = "against everybody but the server"
        found.append(
            f"{noise} noise: ε at δ = {delta:g} for one {unit} ({adjacency}), {against}; {sampling}; {accountant} "
            "accountant"
        )
    return tuple(found)


def _per_site(path: Path, summary: Summary) -> list[dict[str, object]]:
    """Each site's last own figures, where the run kept any."""
    lines = (path / folder.METRICS).read_text(encoding="utf-8").splitlines()
    latest: dict[str, dict[str, object]] = {}
    for line in lines:
        latest |= json.loads(line)["sites"]
    found = []
    for site, epsilon in summary.privacy.epsilon.per_site.items():
        own = latest.get(site, {})
        found.append({"site": site, **{name: own.get(key) for name, key in _SITE_COLUMNS.items()}, "epsilon": epsilon})
    return found


_SITE_COLUMNS = {"global": "global_score", "personalized": "personalized", "local_only": "local_only"}
_AVERAGED = ("epsilon", *MEASURES, *(f"{name}_worst_decile" for name in MEASURES), "fraction_hurt", "seconds")


def _table(runs: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """One row a setting."""
    lines, within = [], _within_seeds(runs, keys)
    for values, group in runs.groupby(keys, sort=False, dropna=False):
        line: dict[str, object] = dict(zip(keys, values, strict=True))
        line["runs"] = int(group["error"].isna().sum())
        line["failed"] = int(group["error"].notna().sum())
        for name in _AVERAGED:
            found = pd.to_numeric(group[name], errors="coerce").dropna() if name in group else pd.Series(dtype=float)
            line[name] = float(found.mean()) if len(found) else math.nan
            line[f"{name}_ci"] = _half_width(found.to_numpy())
            if name in within:
                line[f"{name}_within"] = _half_width(within.loc[group.index, name].to_numpy())
        lines.append(line)
    return pd.DataFrame(lines)


def _within_seeds(runs: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The measures of each run, less its seed's mean over settings: a hard split of the records is hard for all.

    Morey 2008: with M settings, times √(M / (M − 1)), for what the settings lose by sharing their seed's mean.
    """
    names = [name for name in (*MEASURES, *(f"{name}_worst_decile" for name in MEASURES)) if name in runs]
    names = [name for name in names if pd.to_numeric(runs[name], errors="coerce").notna().all()]
    settings = runs.groupby(keys, sort=False, dropna=False).ngroups
    if settings < 2 or len(runs) != settings * runs["seed"].nunique():
        return pd.DataFrame(index=runs.index)
    values = runs[names].astype(float)
    return (values - values.groupby(runs["seed"]).transform("mean")) * math.sqrt(settings / (settings - 1))


def _half_width(values: np.ndarray) -> float:
    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf((1 + _LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table as text: figures with their intervals, empty columns left out."""
    keys = list(table.columns[: list(table.columns).index("runs")])
    text = table[[key for key in keys if key != "case" or table["case"].astype(bool).any()]].astype(str)
    short = {key: key.rpartition(".")[2] for key in text.columns}
    text = text.rename(columns=short) if len({*short.values()}) == len(short) else text
    for name in ("epsilon", *MEASURES, "personalized_worst_decile", "fraction_hurt"):
        if table[name].notna().any():
            pairs = zip(table[name], table[f"{name}_ci"], strict=True)
            text[name.replace("_", " ")] = ["–" if math.isnan(m) else _interval(m, w) for m, w in pairs]
    counts = zip(table["runs"], table["failed"], strict=True)
    text["runs"] = [str(runs) if not failed else f"{runs} ({failed} failed)" for runs, failed in counts]
    return text


def _interval(mean: float, width: float) -> str:
    return f"{mean:.4g}" if math.isnan(width) else f"{mean:.3f} ± {width:.3f}"


def markdown(table: pd.DataFrame) -> str:
    text = shown(table)
    lines = [list(map(str, text.columns)), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


_TEX = {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$", "ε": r"$\varepsilon$", "–": "--"}


def latex(table: pd.DataFrame) -> str:
    text = shown(table)
    escape = str.maketrans(_TEX)
    lines = [text.columns, *text.to_numpy()]
    rows = [" & ".join(str(cell).translate(escape) for cell in line) + r" \\" for line in lines]
    body = "\n".join([rows[0], r"\midrule", *rows[1:]])
    return f"\\begin{{tabular}}{{{'l' * len(text.columns)}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}"


def _choosing(cells: Sequence[Cell], home: Path) -> str:
    """What the reader must know before releasing the best cell."""
    private = [cell for cell in cells if cell.config.privacy.unit is not PrivacyUnit.NONE and cell.config.method.sends]
    spent: list[tuple[Charge, ...]] = []
    for cell in private:
        path = home / CELLS / cell.id
        if not (path / folder.SUMMARY).exists():
            continue
        with Ledger(path / folder.LEDGER) as book:
            per_site = [charges_of([book], site) for site in book.sites() if site != COORDINATOR]
        delta = cell.config.privacy.delta
        spent.append(max(per_site, key=lambda charges: rdp.epsilon(divergence_of(charges), delta)))
    if len(spent) < 2:
        return "One run or none makes a claim: nothing was chosen among private runs."
    delta = min(cell.config.privacy.delta for cell in private)
    try:
        best = f"ε = {epsilon_of_best(spent, delta):.3g} at δ = {delta:g}"
    except NoGuarantee as refusal:
        best = f"no bound ({refusal})"
    return (
        f"Each ε above is that of one run. Whoever looks at {len(spent)} runs on real records and releases the "
        "best has spent more. If settings were drawn at random, as many as these on average by a geometric "
        f"distribution, and were compared by released figures alone, the best one has {best} (Papernot and Steinke "
        "2022, Theorem 2). For a fixed grid compared by internal figures, as here, no such bound holds: treat the "
        "study as an experiment on data that may be studied, and choose on public or simulated records before a run "
        "on others."
    )
