"""A consortium's own table: CSV or Parquet files, with what is public about them declared in the configuration."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import pandas as pd
import torch
from msgspec import Meta
from numpy.typing import NDArray

from privfed.errors import DataError

from .columns import Categorical, Column, Numeric, canonical, encode, input_names, rows
from .records import SiteData, Sites

DATA_FOLDER = "PRIVFED_DATA"


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="source", tag="csv"):
    """Records in CSV files (also .gz) or Parquet files.

    Either one file with a ``site`` column, or ``files``, one a site.
    """

    file: Annotated[str | None, Meta(description="the table; a path, or a name under the folder in PRIVFED_DATA")] = (
        None
    )
    files: Annotated[dict[str, str], Meta(description="site name = file, instead of file and site")] = {}
    header: Annotated[tuple[str, ...], Meta(description="column names of files without a header line")] = ()
    site: Annotated[str | None, Meta(description="column that names the site of a record")] = None
    label: Annotated[str, Meta(min_length=1, description="column to predict")]
    classes: Annotated[
        dict[str, tuple[str, ...]],
        Meta(description="class name = the label's texts that mean it; the second class is the positive one"),
    ]
    other_labels: Annotated[
        str, Meta(pattern="^(refuse|drop)$", description='records with another label: "refuse" the table, "drop" them')
    ] = "refuse"
    id: Annotated[str | None, Meta(description="column with a unique id a record; default a hash of the whole row")] = (
        None
    )
    numeric: Annotated[tuple[Numeric, ...], Meta(description="numeric inputs")] = ()
    categorical: Annotated[tuple[Categorical, ...], Meta(description="inputs that are names")] = ()
    missing_values: Annotated[tuple[str, ...], Meta(description="texts that mean: no value")] = ("", "NA", "NaN", "?")
    drop_incomplete: Annotated[bool, Meta(description="leave out records with a missing input")] = False
    minimum_records: Annotated[
        int, Meta(ge=1, description="leave out sites with fewer records (this cohort is not private)")
    ] = 1
    maximum_rows: Annotated[int, Meta(ge=1, description="refuse larger files before they fill the memory")] = 2_000_000

    def __post_init__(self) -> None:
        if (self.file is None) == (not self.files):
            raise ValueError("data needs either file (with site) or files")
        if self.file is not None and self.site is None:
            raise ValueError("data.file needs data.site, the column that names the site of a record")
        if len(self.classes) < 2:
            raise ValueError("data.classes must name at least two classes")
        texts = [text for values in self.classes.values() for text in values]
        if len(set(texts)) != len(texts):
            raise ValueError("data.classes must not list a text twice")
        if not self.columns:
            raise ValueError("data needs at least one numeric or categorical input")
        names = [column.name for column in self.columns]
        taken = {self.label: "the label", self.site: "the site", self.id: "the id"}
        for name in names:
            if name in taken or names.count(name) > 1:
                raise ValueError(f"column {name!r} can not be an input: it is {taken.get(name, 'listed twice')}")

    @property
    def columns(self) -> tuple[Column, ...]:
        """The inputs, in the model's order."""
        return (*self.numeric, *self.categorical)

    def load(self, *, seed: int) -> Sites:
        """The sites' records.

        Raises:
            DataError: names the file, the column and the rows by number, never a value, and what to do.
        """
        frame = self._read()
        notes: list[str] = []
        missing = frozenset(self.missing_values)
        targets = np.full(len(frame), -1, dtype=np.int64)
        labels = canonical(frame[self.label])
        for number, texts in enumerate(self.classes.values()):
            targets[labels.isin(canonical(pd.Series(texts, dtype=str))).to_numpy(bool)] = number
        other = targets < 0
        if other.any() and self.other_labels == "refuse":
            raise DataError(
                f"label column {self.label!r}: {rows(frame.index.to_numpy()[other])} are in none of data.classes; list "
                "their label, or set data.other_labels = 'drop'"
            )
        keep = ~other
        if self.drop_incomplete:
            for column in self.columns:
                keep &= ~frame[column.name].str.strip().isin(missing).to_numpy(bool)
        if not keep.all():
            notes.append(f"{int((~keep).sum())} of {len(keep)} records left out (label or missing value)")
        inputs = encode(frame, self.columns, missing=missing)
        ids = self._ids(frame)
        for column in self.columns:
            if frame[column.name].str.strip().isin(missing).all():
                notes.append(f"column {column.name!r} has no value in any record: it tells nothing, remove it")
        sites: dict[str, SiteData] = {}
        where = frame[_SITE].to_numpy(object)
        small = 0
        for site in sorted(set(where), key=_natural):
            at = (where == site) & keep
            if at.sum() < max(1, self.minimum_records):
                small += 1
                continue
            sites[site] = SiteData(ids[at], torch.from_numpy(inputs[at]), torch.from_numpy(targets[at]))
            present = np.bincount(targets[at], minlength=len(self.classes))
            if at.sum() == 1:
                notes.append(f"site {site!r} has one record: nothing can be measured there")
            elif (present > 0).sum() == 1:
                notes.append(f"site {site!r} has one class only: AUROC is undefined there")
        if small:
            notes.append(f"{small} sites with fewer than {self.minimum_records} records left out")
        if not sites:
            raise DataError(f"no site has {self.minimum_records} usable records: lower data.minimum_records")
        return Sites(
            sites=sites,
            inputs=input_names(self.columns),
            classes=tuple(self.classes),
            simulated=False,
            description=f"{sum(map(len, sites.values()))} records of {len(sites)} sites",
            notes=tuple(notes),
        )

    def _read(self) -> pd.DataFrame:
        """All files as one table of strings, with the site in a column of ours."""
        columns = [column.name for column in self.columns] + [self.label]
        columns += [name for name in (self.site, self.id) if name is not None]
        if self.file is not None:
            frame = read_frame(self.file, columns, header=self.header, maximum_rows=self.maximum_rows)
            frame[_SITE] = frame[self.site].str.strip()
            nameless = frame[_SITE].isin(self.missing_values).to_numpy(bool)
            if nameless.any():
                raise DataError(
                    f"site column {self.site!r}: {rows(frame.index.to_numpy()[nameless])} name no site: fill them or "
                    "remove these rows"
                )
            return frame
        frames = []
        for site, file in self.files.items():
            frame = read_frame(file, columns, header=self.header, maximum_rows=self.maximum_rows)
            frame[_SITE] = site
            frames.append(frame)
        return pd.concat(frames)

    def _ids(self, frame: pd.DataFrame) -> NDArray[np.uint64]:
        """uint64[n]: what stands for each record in the keyed split, unmoved by other records."""
        per_site = frame[_SITE]
        if self.id is not None:
            twice = frame.duplicated([_SITE, self.id], keep=False).to_numpy(bool)
            if twice.any():
                raise DataError(
                    f"id column {self.id!r}: {rows(frame.index.to_numpy()[twice])} share an id with another record of "
                    "their site: remove the duplicates, or leave data.id away"
                )
            return _hashes(frame[[_SITE, self.id]])
        # The same row twice is two records: the second one's id says so, whatever stands between them.
        content = pd.util.hash_pandas_object(frame, index=False)
        copy = content.groupby([per_site.to_numpy(object), content.to_numpy()]).cumcount()
        return _hashes(pd.DataFrame({"content": content.to_numpy(), "copy": copy.to_numpy()}))


_SITE = "\0site"


def _hashes(frame: pd.DataFrame) -> NDArray[np.uint64]:
    hashes: NDArray[np.uint64] = np.asarray(pd.util.hash_pandas_object(frame, index=False), dtype=np.uint64)
    return hashes


def find_file(name: str) -> Path:
    """The file of that path, or of that name under the folder in ``PRIVFED_DATA`` (default ``data/``).

    Raises:
        DataError: it is in neither place; says where it was looked for, and where a known data set comes from.
    """
    from . import catalog

    folder = Path(os.environ.get(DATA_FOLDER, "data"))
    for path in (Path(name), folder / name):
        if path.is_file():
            return path
    known = catalog.owner_of(name)
    source = f" {known.title}: {known.obtain}; see `privfed data describe {known.name}`." if known else ""
    raise DataError(
        f"no file {name!r}, neither here nor in {folder}.{source} Set {DATA_FOLDER} to the folder that holds it, or "
        "give its whole path"
    )


def read_frame(
    file: str, columns: Sequence[str] | None, *, header: Sequence[str] = (), maximum_rows: int
) -> pd.DataFrame:
    """A table of strings, rows numbered from 1 as they stand below the header.

    Args:
        file: CSV (also compressed) or Parquet, found by `find_file`.
        columns: the columns to read; None for all.
        header: names of all columns where the file has no header line.
        maximum_rows: more are refused.

    Raises:
        DataError: the file is missing, unreadable, lacks a column, or is too large.
    """
    path = find_file(file)
    try:
        frame = (
            _read_parquet(path, maximum_rows) if path.suffix == ".parquet" else _read_csv(path, header, maximum_rows)
        )
    except (OSError, ValueError, UnicodeError, EOFError) as error:
        # pandas quotes the offending text: the kind of error is all that may be shown
        raise DataError(
            f"can not read {path} as a table ({type(error).__name__}): check that it is CSV or Parquet"
        ) from None
    absent = [name for name in columns or () if name not in frame.columns]
    if absent:
        raise DataError(
            f"{path} has no column {', '.join(map(repr, dict.fromkeys(absent)))}; it has "
            f"{', '.join(map(repr, list(frame.columns)[:40]))}"
        )
    if len(frame) == 0:
        raise DataError(f"{path} has no records")
    frame.index = pd.RangeIndex(1, len(frame) + 1)
    return frame if columns is None else frame[list(dict.fromkeys(columns))].copy()


def _read_csv(path: Path, header: Sequence[str], maximum_rows: int) -> pd.DataFrame:
    frame = pd.read_csv(
        path,
        dtype=str,
        keep_default_na=False,
        na_filter=False,
        nrows=maximum_rows + 1,
        header=None if header else 0,
        names=list(header) if header else None,
        index_col=False,
        encoding="utf-8-sig",
    )
    _refuse_large(path, len(frame), maximum_rows)
    return frame


def _read_parquet(path: Path, maximum_rows: int) -> pd.DataFrame:
    import pyarrow.parquet as parquet

    _refuse_large(path, parquet.ParquetFile(path).metadata.num_rows, maximum_rows)
    frame = pd.read_parquet(path)
    return pd.DataFrame({str(name): frame[name].astype("string").fillna("") for name in frame.columns}).astype(str)


def _refuse_large(path: Path, count: int, maximum_rows: int) -> None:
    if count > maximum_rows:
        raise DataError(
            f"{path} has more than {maximum_rows:,} rows: raise data.maximum_rows if this machine has the memory "
            "(about 1 GB for a million rows of 20 columns)"
        )


def _natural(name: str) -> tuple[int, int | str]:
    """Site "2" before site "10", numbers before names."""
    return (0, int(name)) if name.isdecimal() else (1, name)
