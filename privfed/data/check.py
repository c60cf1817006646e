"""A look at a user's own table: what is wrong with it, and the ``[data]`` section that would read it.

Rows are named by number and counts are given, never a value of a column that could identify someone: the text is meant
to be pasted into a mail.
"""

import re
from dataclasses import dataclass, field
from pathlib import PurePath

import numpy as np
import pandas as pd

from privfed.errors import DataError

from .columns import canonical, rows
from .databases import is_database
from .files import looks_like_record
from .queries import read_any

MISSING = ("", "NA", "N/A", "NaN", "nan", "?", ".", "null", "NULL", "None")
_FEW_VALUES = 12
_COMMON = 5  # fewer records than this share a text: it is not shown
_MANY_SITES = 1000


@dataclass(frozen=True)
class Finding:
    """One thing about one column. ``problem`` is True if a run would stop or go wrong."""

    column: str
    text: str
    problem: bool


@dataclass
class Check:
    """What `check` found.

    Attributes:
        records: rows in the table.
        findings: by column, in the table's order.
        proposal: a ``[data]`` section in TOML, to be reviewed.
    """

    records: int
    findings: list[Finding] = field(default_factory=list)
    proposal: str = ""

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.problem]


def check(file: str, *, label: str | None, site: str | None, maximum_rows: int = 2_000_000) -> Check:
    """Look at a table.

    Args:
        file: CSV, Parquet or a database file.
        label, site: the columns to predict and to group by; guessed from their names when None.
        maximum_rows: larger tables are refused.

    Raises:
        DataError: the table can not be read, or a named column is not in it.
    """
    frame, separator = read_any(file, maximum_rows=maximum_rows)
    if not is_database(file) and looks_like_record(list(frame.columns)):
        raise DataError(
            f"the first line of {file} looks like a record, not like column names: add a line of names, or give them "
            "in data.header"
        )
    for name in (label, site):
        if name is not None and name not in frame.columns:
            raise DataError(f"no column {name!r}; the table has {', '.join(map(repr, frame.columns))}")
    label = label or _guess(frame, ("label", "outcome", "target", "y", "class", "diagnosis"))
    site = site or _guess(frame, ("site", "hospital", "center", "centre", "clinic", "hospnum"))
    result = Check(len(frame))
    # The name heads the report: not the embedded example's
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", PurePath(file).name.split(".")[0])[:64].strip("-") or "my-run"
    source = "sql" if is_database(file) else "csv"
    lines = [f"name = {_quoted(name)}", "", "[data]", f'source = "{source}"', f"file = {_quoted(file)}"]
    lines += [f"separator = {_quoted(separator)}"] if separator != "," else []
    decimal = _decimal_of(frame)
    lines += [f"decimal = {_quoted(decimal)}"] if decimal != "." else []
    lines.append(f"site = {_quoted(site)}" if site else '# site = "…"           # the column that names the hospital')
    lines.append(f"label = {_quoted(label)}" if label else '# label = "…"          # the column to predict')
    record = next((name for name in frame.columns if name not in (label, site) and _names_records(frame[name])), None)
    lines += (
        [f"id = {_quoted(record)}   # confirm: does it stay the same when a record is corrected?"] if record else []
    )
    lines.append(f"missing_values = [{', '.join(map(_quoted, _missing_in(frame)))}]")
    lines += _classes(frame, label, result)
    if site is None:
        result.findings.append(
            Finding("", "no site column was named or guessed: taken for one site's own; else give --site", False)
        )
    inputs: list[str] = []
    for name in frame.columns:
        if name == site:
            _look_at_site(frame[name], result)
        elif name == record:
            result.findings.append(Finding(name, "differs in every row: proposed as data.id, and no input", False))
        elif name != label:
            inputs += _propose(frame[name], decimal, result)
    result.proposal = "\n".join([*lines, *inputs]) + "\n"
    return result


def _guess(frame: pd.DataFrame, names: tuple[str, ...]) -> str | None:
    return next((column for name in names for column in frame.columns if column.strip().lower() == name), None)


def _names_records(values: "pd.Series[str]") -> bool:
    """Whether a column's name and cells are those of a record's id: no two alike, none missing."""
    known = re.search(r"(^|_)(record|id|key|nr)$", str(values.name).strip().lower()) is not None
    text = canonical(values)
    return known and text.nunique() == len(text) and not text.isin(MISSING).any()


def _missing_in(frame: pd.DataFrame) -> list[str]:
    """The usual texts for "no value" that occur somewhere, and the empty one."""
    stripped = frame.apply(lambda column: column.str.strip())
    return ["", *(text for text in MISSING[1:] if bool((stripped == text).any(axis=None)))]


def _classes(frame: pd.DataFrame, label: str | None, result: Check) -> list[str]:
    if label is None:
        result.findings.append(Finding("", "no label column was named or guessed: give --label", True))
        return ["", "[data.classes]", '# negative = ["0"]', '# positive = ["1"]']
    text = canonical(frame[label])
    gone = text.isin(MISSING).to_numpy(bool)
    if gone.any():
        note = f"label missing in {rows(frame.index.to_numpy()[gone])}: set other_labels = 'drop' or fill them"
        result.findings.append(Finding(label, note, True))
    distinct, values = text[~gone].nunique(), _common(text[~gone])
    if not 2 <= distinct <= _FEW_VALUES:
        result.findings.append(Finding(label, f"label has {distinct} distinct values: 2 to 12 are classes", True))
        return ["", "[data.classes]", "# NAME = [the label's texts that mean it]"]
    if distinct > len(values):
        note = (
            f"{distinct - len(values)} labels with fewer than {_COMMON} records are not shown: list them, or drop them"
        )
        result.findings.append(Finding(label, note, True))
    return ["", "[data.classes]", *(f"{_quoted('class ' + value)} = [{_quoted(value)}]" for value in values)]


def _common(text: "pd.Series[str]") -> list[str]:
    """The texts that enough records share for showing them."""
    counts = text.value_counts()
    return sorted(str(value) for value in counts.index[counts >= _COMMON])


def _decimal_of(frame: pd.DataFrame) -> str:
    """ "," if the numbers of some column have a comma before their decimals."""
    for name in frame.columns:
        text = frame[name].str.strip()
        text = text[~text.isin(MISSING).to_numpy(bool)]
        if len(text) and text.str.contains(",", regex=False).any() and text.str.fullmatch(r"[+-]?\d+(,\d+)?").all():
            return ","
    return "."


def _look_at_site(values: "pd.Series[str]", result: Check) -> None:
    text = values.str.strip()
    gone = text.isin(MISSING).to_numpy(bool)
    if gone.any():
        result.findings.append(Finding(str(values.name), f"no site in {rows(values.index.to_numpy()[gone])}", True))
    sizes = canonical(text[~gone]).value_counts()
    if sizes.empty:
        return
    result.findings.append(
        Finding(str(values.name), f"{len(sizes)} sites of {int(sizes.min())} to {int(sizes.max())} records", False)
    )
    if len(sizes) > _MANY_SITES:
        result.findings.append(Finding(str(values.name), "more than 1000 sites: is this really the site?", True))
    if (sizes == 1).any():
        lonely = f"{int((sizes == 1).sum())} sites have one record: set data.minimum_records"
        result.findings.append(Finding(str(values.name), lonely, True))


def _propose(values: "pd.Series[str]", decimal: str, result: Check) -> list[str]:
    """Findings on an input column, and its part of the proposal."""
    name, text = str(values.name), values.str.strip()
    gone = text.isin(MISSING).to_numpy(bool)
    if gone.all():
        result.findings.append(Finding(name, "has no value in any row: left out of the proposal", True))
        return []
    if gone.any():
        result.findings.append(Finding(name, f"missing in {int(gone.sum())} of {len(gone)} rows", False))
    pointed = text[~gone].str.replace(decimal, ".", regex=False)
    parsed = pd.to_numeric(pointed, errors="coerce").to_numpy(np.float64)
    wrong = ~np.isfinite(parsed)
    distinct = text[~gone].nunique()
    if distinct == 1:
        result.findings.append(Finding(name, "has the same value in every row: left out of the proposal", True))
        return []
    if wrong.mean() > 0.5:
        if distinct > _FEW_VALUES:
            note = f"is text with {distinct} distinct values (a name, a date, an identifier?): left out of the proposal"
            result.findings.append(Finding(name, note, True))
            return []
        spelled = canonical(text[~gone])
        common = _common(spelled)
        if spelled.nunique() > len(common):
            note = (
                f"has {spelled.nunique() - len(common)} values with fewer than {_COMMON} records: not shown, add them"
            )
            result.findings.append(Finding(name, note, False))
        if not common:
            note = "is text, and no value is common enough to be shown: left out of the proposal"
            result.findings.append(Finding(name, note, True))
            return []
        listed = ", ".join(map(_quoted, common))
        return [
            "",
            "[[data.categorical]]",
            f"name = {_quoted(name)}",
            f"values = [{listed}]   # confirm: is this list public?",
        ]
    if wrong.any():
        at = text[~gone].index.to_numpy()[wrong]
        note = f"is numeric, but {rows(at)} hold text: fix them, or list the text as missing"
        result.findings.append(Finding(name, note, True))
    if distinct == len(text) and len(text) > 20 and bool((parsed[~wrong] == np.round(parsed[~wrong])).all()):
        result.findings.append(Finding(name, "differs in every row and is whole: an identifier? left out", True))
        return []
    # A range taken from the records would itself be a release: the user has to state what is public.
    section = ["", "[[data.numeric]]", f"name = {_quoted(name)}"]
    section.append("range = [low, high]   # fill in what is public: a data dictionary or medicine, not these records")
    return [*section, "missing = true"] if gone.any() else section


def _quoted(text: str) -> str:
    import tomlkit

    return tomlkit.string(text).as_string()
