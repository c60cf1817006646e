"""A consortium's own table: CSV or Parquet files, with what is public about them declared in the configuration."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
import numpy as np
import pandas as pd
from msgspec import Meta
from numpy.typing import NDArray

from privfed.errors import DataError
from privfed.tasks import Classification, Task
from privfed.tasks.task import usable

from .columns import (
    Categorical,
    Column,
    Item,
    Numeric,
    canonical,
    distinct,
    encode,
    input_names,
    input_ranges,
    is_missing,
    item_positions,
    numbers,
    parse,
    rows,
    spellings,
)
from .files import read_frame
from .partition import Partition, Uncut
from .parts import Part, gathered
from .records import Sites


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="source", tag="csv"):
    """Records in CSV files (also .gz) or Parquet files.

    One file with a ``site`` column, or ``files``, one a site; or one file that ``partition`` cuts.
    """

    file: Annotated[str | None, Meta(description="the table; a path, or a name under the folder in PRIVFED_DATA")] = (
        None
    )
    files: Annotated[dict[str, str], Meta(description="site name = file, instead of file and site")] = {}
    header: Annotated[tuple[str, ...], Meta(description="column names of files without a header line")] = ()
    separator: Annotated[
        str, Meta(pattern="^[,;|\t]$", description='what stands between two cells of a CSV file: "," ";" "|" or "\\t"')
    ] = ","
    decimal: Annotated[str, Meta(pattern="^[.,]$", description='what stands before decimals: "." or ","')] = "."
    site: Annotated[str | None, Meta(description="column that names the site of a record")] = None
    label: Annotated[str, Meta(min_length=1, description="column to predict; for survival the time")]
    classes: Annotated[
        dict[str, tuple[str, ...]],
        Meta(
            description="task classification: class name = the label's texts that mean it; the second class is the "
            "positive one"
        ),
    ] = {}
    other_labels: Annotated[
        str,
        Meta(
            pattern="^(refuse|drop)$",
            description='records with another label or none: "refuse" the table, "drop" them',
        ),
    ] = "refuse"
    id: Annotated[
        str | None, Meta(description="column with a unique id a record; default a hash of the columns in use")
    ] = None
    patient: Annotated[
        str | None,
        Meta(description="column with the patient's id: records of one patient stay together in every split"),
    ] = None
    numeric: Annotated[tuple[Numeric, ...], Meta(description="numeric inputs")] = ()
    categorical: Annotated[tuple[Categorical, ...], Meta(description="inputs that are names")] = ()
    items: Annotated[tuple[Item, ...], Meta(description="inputs that name an item by its number")] = ()
    test: Annotated[
        str | None,
        Meta(description="column that is 1 for test records and 0 for others, instead of evaluation.test_fraction"),
    ] = None
    partition: Annotated[Partition | None, Meta(description="cut the file into simulated sites")] = None
    missing_values: Annotated[tuple[str, ...], Meta(description="texts that mean: no value")] = ("", "NA", "NaN", "?")
    drop_incomplete: Annotated[bool, Meta(description="leave out records with a missing input")] = False
    minimum_records: Annotated[
        int, Meta(ge=1, description="leave out sites with fewer records (this cohort is not private)")
    ] = 1
    maximum_rows: Annotated[int, Meta(ge=1, description="refuse larger files before they fill the memory")] = 2_000_000

    def __post_init__(self) -> None:
        if (self.file is None) == (not self.files):
            raise ValueError("data needs either file (with site) or files")
        if self.file is not None and (self.site is None) == (self.partition is None):
            raise ValueError(
                "data.file needs data.site, the column that names the site of a record, or data.partition, which "
                "cuts it into simulated sites: one of them"
            )
        if self.files and self.partition is not None:
            raise ValueError("data.partition cuts one file, and data.files names the sites already: remove one")
        if len(self.classes) == 1:
            raise ValueError("data.classes must name at least two classes")
        texts = pd.Series(spellings(tuple(text for values in self.classes.values() for text in values)), dtype=str)
        if texts.duplicated().any() or not all(self.classes.values()):
            raise ValueError(
                "data.classes must give each class its texts, and no text twice (1, 1.0 and 01 are the same)"
            )
        if not self.columns:
            raise ValueError("data needs at least one numeric or categorical input, or items")
        names = [column.name for column in self.columns]
        taken = {self.label: "the label", self.site: "the site", self.id: "the id", self.patient: "the patient's id"}
        taken[self.test] = "the mark of test records"
        for name in names:
            if name in taken or names.count(name) > 1:
                raise ValueError(f"column {name!r} can not be an input: it is {taken.get(name, 'listed twice')}")

    @property
    def columns(self) -> tuple[Column, ...]:
        """The inputs, in the model's order."""
        return (*self.numeric, *self.categorical, *self.items)

    @property
    def planned_sites(self) -> int | None:
        """How many sites there will be, where that is known before a record is read."""
        return None if self.partition is None else self.partition.planned

    @property
    def items_at(self) -> tuple[tuple[int, int], ...]:
        """(position, count) of each input that names an item."""
        return item_positions(self.columns)

    def needed(self, task: Task) -> list[str]:
        """The columns that are read."""
        own = [self.site, self.id, self.patient, self.test]
        names = [*(column.name for column in self.columns), self.label, *task.columns]
        return list(dict.fromkeys([*names, *(name for name in own if name is not None)]))

    def load(self, *, seed: int, task: Task | None = None) -> Sites:
        """The sites' records.

        Args:
            seed: public, of ``partition``; sites that are real are as they are.
            task: what is read from the label columns; default the classes.

        Raises:
            DataError: names the file, the column and the rows by number, never a value, and what to do.
        """
        files = self.files if self.file is None else {"": self.file}
        task = task or Classification()
        parts = [self._part(site, file, task, seed) for site, file in files.items()]
        classes = tuple(self.classes)
        # A hospital's own file: whether its records are of one class is nobody else's business, and others have more
        looked_at = () if len(self.files) == 1 else classes
        sites, notes = gathered(parts, classes=looked_at, label=self.label, minimum_records=self.minimum_records)
        filled = set().union(*(part.filled for part in parts))
        notes += [
            f"column {column.name!r} has no value in any record: it tells nothing, remove it"
            for column in self.columns
            if column.name not in filled
        ]
        return Sites(
            sites=sites,
            inputs=input_names(self.columns),
            ranges=input_ranges(self.columns),
            classes=classes,
            simulated=self.partition is not None,
            description=f"{sum(map(len, sites.values()))} records of {len(sites)} "
            f"{'simulated ' if self.partition is not None else ''}sites",
            notes=tuple(notes),
        )

    def _part(self, site: str, file: str, task: Task, seed: int) -> "_Part":
        """One file's records."""
        frame = self._frame(file, [name for name in self.needed(task) if not (name == self.site and site)])
        try:
            return self._encoded(frame, site, task, seed)
        except DataError as error:
            raise DataError(f"{file}: {error}") from None

    def _frame(self, file: str, columns: list[str]) -> pd.DataFrame:
        """These columns of a file, as `read_frame` gives them."""
        return read_frame(file, columns, header=self.header, separator=self.separator, maximum_rows=self.maximum_rows)

    def _encoded(self, frame: pd.DataFrame, site: str, task: Task, seed: int) -> "_Part":
        missing = frozenset(self.missing_values)
        given = site or self.partition is not None
        where = pd.Series(site, index=frame.index, dtype=str) if given else self._sites_of(frame, missing)
        targets = task.targets(TableLabels(frame, self.label, self.classes, missing, self.decimal))
        other = ~usable(targets)
        if other.any() and self.other_labels == "refuse":
            which = rows(frame.index.to_numpy()[other])
            wrong = f"{which} are in none of data.classes; list their label" if self.classes else f"{which} have none"
            raise DataError(f"label column {self.label!r}: {wrong}, or set data.other_labels = 'drop'")
        keep, filled = ~other, set()
        for column in self.columns:
            gone = is_missing(frame[column.name], missing)
            if not gone.all():
                filled.add(column.name)
            if self.drop_incomplete:
                keep &= ~gone
        inputs = encode(frame, self.columns, missing=missing, decimal=self.decimal)
        ids, patients = self._ids(frame, where), self._patients(frame, where)
        test = None if self.test is None else self._marks(frame, self.test)
        sites = where.to_numpy(object)
        if self.partition is not None:
            labels = np.nan_to_num(targets) if targets.dtype.kind == "f" else targets
            uncut = Uncut(ids if patients is None else patients, labels, inputs, input_names(self.columns))
            sites = np.array(self.partition.assign(uncut, seed), dtype=object)
        return _Part(ids, patients, sites, inputs, targets, keep, test, frozenset(filled))

    def _marks(self, frame: pd.DataFrame, column: str) -> NDArray[np.bool_]:
        """bool[n]: the test records."""
        marks = canonical(frame[column])
        wrong = ~marks.isin(["0", "1"]).to_numpy(bool)
        if wrong.any():
            raise DataError(f"test column {column!r}: {rows(frame.index.to_numpy()[wrong])} are neither 0 nor 1")
        return (marks == "1").to_numpy(bool)

    def _sites_of(self, frame: pd.DataFrame, missing: frozenset[str]) -> "pd.Series[str]":
        """The site of each record, one spelling each."""
        assert self.site is not None  # without files, there is one
        nameless = is_missing(frame[self.site], missing)
        if nameless.any():
            raise DataError(
                f"site column {self.site!r}: {rows(frame.index.to_numpy()[nameless])} name no site: fill them or "
                "remove these rows"
            )
        return canonical(frame[self.site])

    def _ids(self, frame: pd.DataFrame, site: "pd.Series[str]") -> NDArray[np.uint64]:
        """uint64[n]: what stands for each record in the keyed split, unmoved by other records or their order."""
        if self.id is not None:
            named = pd.DataFrame({"site": site, "id": self._named(frame, self.id, "id")})
            twice = named.duplicated(keep=False).to_numpy(bool)
            if twice.any():
                raise DataError(
                    f"id column {self.id!r}: {rows(frame.index.to_numpy()[twice])} share an id with another record of "
                    "their site: remove the duplicates, or leave data.id away"
                )
            return _hashes(named)
        cells: dict[str, NDArray[np.uint64]] = {
            name: _content(frame[name]) for name in frame.columns if name != self.site
        }
        content = pd.Series(_hashes(pd.DataFrame({**cells, _SITE: _content(site)})))
        # The same row twice is two records: the second one's id says so, whatever stands between them.
        copy = content.groupby(content).cumcount()
        return _hashes(pd.DataFrame({"content": content, "copy": copy}))

    def _patients(self, frame: pd.DataFrame, site: "pd.Series[str]") -> NDArray[np.uint64] | None:
        """uint64[n]: what stands for the patient of each record, at its own site."""
        if self.patient is None:
            return None
        # In one spelling: a patient taken for two would be protected as two
        patient = canonical(self._named(frame, self.patient, "patient"))
        return _hashes(pd.DataFrame({"site": site, "patient": patient}))

    def _named(self, frame: pd.DataFrame, column: str, key: str) -> "pd.Series[str]":
        """A column of ids, none of them empty."""
        own = frame[column].str.strip()
        nameless = is_missing(own, frozenset(self.missing_values))
        if nameless.any():
            raise DataError(
                f"{key} column {column!r}: {rows(frame.index.to_numpy()[nameless])} have no id: fill them, or leave "
                f"data.{key} away"
            )
        return own


@dataclass(frozen=True)
class TableLabels:
    """The label columns of a table of strings; see `Labels`.

    Args:
        frame: every column a str column.
        label: name of the label's.
        names: class name → the texts that mean it.
        missing: texts that mean "no value".
        decimal: what stands before the decimals of a number.
    """

    frame: pd.DataFrame = field(repr=False)
    label: str
    names: dict[str, tuple[str, ...]]
    missing: frozenset[str]
    decimal: str = "."

    def classes(self) -> NDArray[np.int64]:
        targets = np.full(len(self.frame), -1, dtype=np.int64)
        labels = canonical(self.frame[self.label])
        for number, texts in enumerate(self.names.values()):
            targets[labels.isin(canonical(pd.Series(texts, dtype=str))).to_numpy(bool)] = number
        return targets

    def numbers(self) -> NDArray[np.float64]:
        return numbers(self.frame[self.label], self.missing, self.decimal)

    def among(self, column: str, texts: Sequence[str]) -> NDArray[np.float64]:
        values = self.frame[column]
        found = canonical(values).isin(canonical(pd.Series(texts, dtype=str))).to_numpy(bool)
        return np.where(is_missing(values, self.missing), np.nan, found.astype(np.float64))


_SITE = "\0site"


@dataclass(frozen=True)
class _Part(Part):
    """And the columns that hold some value."""

    filled: frozenset[str] = frozenset()


def _content(values: "pd.Series[str]") -> NDArray[np.uint64]:
    """uint64[n]: a hash of each cell, the same for one number in two spellings."""
    at, text = distinct(values)
    number = parse(text)
    finite = np.isfinite(number)
    hashed = np.asarray(pd.util.hash_array(np.where(finite, number, 0.0) + 0.0), dtype=np.uint64)  # + 0.0: −0 is 0
    if not finite.all():
        hashed[~finite] = pd.util.hash_array(text[~finite].to_numpy(object))
    hashes: NDArray[np.uint64] = hashed[at]
    return hashes


def _hashes(frame: pd.DataFrame) -> NDArray[np.uint64]:
    hashes: NDArray[np.uint64] = np.asarray(pd.util.hash_pandas_object(frame, index=False), dtype=np.uint64)
    return hashes
