"""One table cut into sites, before any run: the assignment, what it looks like, and copies where they are asked for."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from privfed.errors import ConfigError, DataError

from .columns import canonical, numbers
from .databases import is_database
from .files import read_frame, separator_of
from .partition import Partition, Uncut

_MOST_CLASSES = 40
_MOST_NAMES = 200
PICTURES = (".svg", ".png", ".pdf")


@dataclass(frozen=True)
class SiteOf:
    """One site of a cut: its records, and how many of each label, empty where labels are numbers or not given."""

    name: str
    records: int
    labels: dict[str, int]


@dataclass(frozen=True)
class Split:
    """What `split` made.

    Attributes:
        table: the records, as texts, rows numbered from 1.
        names: the site of each row.
        sites: in order of their names.
    """

    table: pd.DataFrame = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    sites: tuple[SiteOf, ...]

    def write(self, file: Path) -> None:
        """Row numbers and sites, and nothing else of a record."""
        frame = pd.DataFrame({"row": self.table.index, "site": self.names})
        with file.open("x", encoding="utf-8", newline="") as opened:
            frame.to_csv(opened, index=False)

    def copy(self, folder: Path) -> None:
        """The records themselves, one file a site."""
        if strange := [site.name for site in self.sites if not re.fullmatch(r"\w[\w .-]*", site.name)]:
            raise DataError(f"{len(strange)} sites have names that no file can have: rename them")
        folder.mkdir()
        for site, rows in self.table.groupby(np.array(self.names)):
            with (folder / f"{site}.csv").open("x", encoding="utf-8", newline="") as opened:
                rows.to_csv(opened, index=False)


def split(
    file: str,
    partition: Partition | str,
    *,
    seed: int,
    label: str | None = None,
    patient: str | None = None,
    maximum_rows: int = 2_000_000,
) -> Split:
    """Cut a table.

    Args:
        file: CSV or Parquet.
        partition: how; a text is the column that names each record's site.
        seed: public.
        label: its column, for label skew and for the summary.
        patient: column with the patient's id: records of one patient stay together.

    Raises:
        DataError: the table can not be read, or lacks a column.
        ConfigError: the cut does not fit it, or the table is a database's.
    """
    if is_database(file):
        raise ConfigError("rows of a database have no numbers: cut them in a run, data.partition = { kind = ... }")
    frame = read_frame(file, None, separator=separator_of(file), maximum_rows=maximum_rows)
    column = getattr(partition, "column", None)
    by = partition if isinstance(partition, str) else None
    for name in (by, label, patient, column):
        if name is not None and name not in frame.columns:
            raise DataError(f"no column {name!r}; the table has {', '.join(map(repr, frame.columns))}")
    labels = None if label is None else canonical(frame[label])
    if isinstance(partition, str):
        names = canonical(frame[partition]).tolist()
        if not all(names):
            raise DataError(f"column {partition!r} names no site in some rows: fill them")
    else:
        units = np.arange(len(frame)) if patient is None else pd.factorize(canonical(frame[patient]))[0]
        coded: NDArray[Any] = np.zeros(len(frame), np.int64) if labels is None else pd.factorize(labels)[0]
        if labels is not None and _are_numbers(labels):
            coded = numbers(frame[str(label)], frozenset({""}))
        inputs = np.zeros((len(frame), 0))
        if column is not None:
            inputs = np.nan_to_num(numbers(frame[column], frozenset({"", "NA", "NaN", "?"})))[:, None]
        uncut = Uncut(units.astype(np.uint64), coded, inputs, () if column is None else (column,))
        if column is None and getattr(partition, "strength", None) is not None:
            raise ConfigError("a cut along a feature needs its column")
        names = partition.assign(uncut, seed)
    return Split(frame, tuple(names), _summarised(names, labels))


def _are_numbers(labels: "pd.Series[str]") -> bool:
    return labels.nunique() > _MOST_CLASSES


def _summarised(names: Sequence[str], labels: "pd.Series[str] | None") -> tuple[SiteOf, ...]:
    shown = [""] * len(names) if labels is None or _are_numbers(labels) else labels.tolist()
    counts: dict[str, Counter[str]] = {}
    for site, text in zip(names, shown, strict=True):
        counts.setdefault(str(site), Counter())[str(text)] += 1
    told = labels is not None and not _are_numbers(labels)
    return tuple(
        SiteOf(site, counts[site].total(), dict(sorted(counts[site].items())) if told else {})
        for site in sorted(counts, key=_natural)
    )


def _natural(name: str) -> tuple[str, int]:
    """site-2 before site-10."""
    stem, _, number = name.rpartition("-")
    return (stem, int(number)) if number.isdecimal() else (name, 0)


def draw(cut: Split, file: Path) -> None:
    """A picture: a bar a site, as long as it has records, in the colours of its labels.

    Args:
        file: its suffix says the kind, one of `PICTURES`.
    """
    from matplotlib.figure import Figure

    labels = sorted({label for site in cut.sites for label in site.labels})
    figure = Figure(figsize=(7, 1.5 + 0.28 * min(len(cut.sites), _MOST_NAMES)), layout="constrained")
    axes = figure.subplots()
    names = np.arange(len(cut.sites))
    if len(cut.sites) <= _MOST_NAMES:
        axes.set_yticks(names, [site.name for site in cut.sites])
    else:
        axes.set_ylabel("sites, in order of their names")
    left = np.zeros(len(names))
    for label in labels or [""]:
        widths = [site.labels.get(label, 0) if labels else site.records for site in cut.sites]
        axes.barh(names, widths, left=left, label=label)
        left += widths
    axes.invert_yaxis()
    axes.set_xlabel("records")
    axes.spines[["top", "right"]].set_visible(False)
    if labels:
        axes.legend(title="label", frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
    figure.savefig(file)
