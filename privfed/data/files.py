"""A file as a table of texts: CSV or Parquet, strictly. What a file holds never stands in a message."""

import csv
import io
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import pandas as pd
import pyarrow as arrow
import pyarrow.csv
import pyarrow.parquet

from privfed.errors import DataError

DATA_FOLDER = "PRIVFED_DATA"
SEPARATORS = ",;\t|"
_SHOWN_COLUMNS = 40
_BLOCK_BYTES = 4 << 20  # also the longest row
_CSV = "save it as comma-separated text (CSV, UTF-8) or as Parquet"


def find_file(name: str) -> Path:
    """The file of that path, or of that name under the folder in ``PRIVFED_DATA`` (default ``data/``).

    Raises:
        DataError: it is in neither place; says where it was looked for, and where a known data set comes from.
    """
    from . import catalog

    folder = Path(os.environ.get(DATA_FOLDER) or "data")
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
    file: str, columns: Sequence[str] | None, *, header: Sequence[str] = (), separator: str = ",", maximum_rows: int
) -> pd.DataFrame:
    """A table of strings, rows numbered from 1 as they stand below the header.

    Args:
        file: CSV (also .gz) or Parquet, found by `find_file`.
        columns: the columns to read; None for all.
        header: names of all columns where the file has no header line.
        separator: between two cells of a CSV file.
        maximum_rows: more are refused, before they are read.

    Raises:
        DataError: the file is missing, unreadable, lacks a column, is no rectangle, or is too large.
    """
    path = find_file(file)
    try:
        start = _start_of(path)
        if start.startswith(b"PAR1"):
            frame = _read_parquet(path, columns, maximum_rows)
        else:
            _refuse_other_kinds(path, start)
            frame = _read_csv(path, columns, header, separator, maximum_rows)
    except UnicodeDecodeError:
        raise DataError(_not_utf8(path)) from None
    except (OSError, ValueError, EOFError, csv.Error, zlib.error, NotImplementedError) as error:
        # Libraries quote the offending text: only what is known to be none of it may be shown
        raise DataError(f"can not read {path} as a table: {_reason(error, bool(header))}") from None
    if len(frame) == 0:
        raise DataError(f"{path} has no records")
    frame.index = pd.RangeIndex(1, len(frame) + 1)
    return frame


def separator_of(file: str) -> str:
    """What stands most often between the cells of a CSV file's first line; "," for Parquet or where nothing does."""
    path = find_file(file)
    try:
        first = next(iter(_start_of(path).splitlines()), b"")
    except (OSError, EOFError, zlib.error):  # reading it will say what is wrong
        return ","
    return "," if first.startswith(b"PAR1") else max(SEPARATORS, key=lambda mark: first.count(mark.encode()))


def column_names(file: str, *, header: Sequence[str], separator: str) -> list[str]:
    """The names of a table's columns; of a CSV file without a header line, the cells of its first.

    Raises:
        DataError: as `read_frame`.
    """
    path = find_file(file)
    try:
        start = _start_of(path)
        if start.startswith(b"PAR1"):
            with arrow.parquet.ParquetFile(path) as table:
                return list(table.schema_arrow.names)
        _refuse_other_kinds(path, start)
        return list(header) or _header_of(path, separator)
    except UnicodeDecodeError:
        raise DataError(_not_utf8(path)) from None
    except (OSError, ValueError, EOFError, csv.Error, zlib.error) as error:
        raise DataError(f"can not read {path} as a table: {_reason(error, bool(header))}") from None


def first_line(file: str, *, separator: str) -> list[str]:
    """The cells of a CSV file's first line; none where there is no reading it."""
    path = find_file(file)
    try:
        return [] if _start_of(path).startswith(b"PAR1") else _header_of(path, separator)
    except (OSError, ValueError, EOFError, csv.Error, zlib.error):  # reading it all will say what is wrong
        return []


def _read_csv(
    path: Path, columns: Sequence[str] | None, header: Sequence[str], separator: str, maximum_rows: int
) -> pd.DataFrame:
    names = list(header) or _header_of(path, separator)
    wanted = wanted_columns(path, names, columns)
    batches, count = [], 0
    with _opened(path) as file:
        quotes = _Quotes(file)
        with arrow.csv.open_csv(
            arrow.PythonFile(quotes, mode="r"),
            read_options=arrow.csv.ReadOptions(
                use_threads=False, block_size=_BLOCK_BYTES, column_names=list(header) or None
            ),
            parse_options=arrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            convert_options=arrow.csv.ConvertOptions(
                column_types={name: arrow.string() for name in names}, include_columns=wanted, strings_can_be_null=False
            ),
        ) as reader:
            schema = reader.schema
            for batch in reader:
                count += batch.num_rows
                refuse_large(path, count, maximum_rows)
                batches.append(batch)
    if quotes.count % 2:  # what follows the open one was read as a single cell
        raise DataError(f"can not read {path} as a table: a quotation mark is never closed")
    table = arrow.Table.from_batches(batches, schema)
    return pd.DataFrame({name: table.column(name).to_pandas().astype(str) for name in wanted})


def _read_parquet(path: Path, columns: Sequence[str] | None, maximum_rows: int) -> pd.DataFrame:
    with arrow.parquet.ParquetFile(path) as file:
        refuse_large(path, file.metadata.num_rows, maximum_rows)
        wanted = wanted_columns(path, file.schema_arrow.names, columns)
        table = file.read(columns=wanted)
    return pd.DataFrame({name: texts(table.column(name)) for name in wanted})


def texts(values: Any) -> "pd.Series[str]":
    """An Arrow column as the same table's CSV file has it: no value is an empty text."""
    kind = values.type
    if arrow.types.is_dictionary(kind):
        values = values.cast(kind.value_type)
        kind = values.type
    plain = arrow.types.is_integer(kind) or arrow.types.is_string(kind) or arrow.types.is_large_string(kind)
    if plain or arrow.types.is_floating(kind):
        text = values.cast(arrow.string()).to_pandas().astype("string")
        text = text.mask(text == "nan") if arrow.types.is_floating(kind) else text
    else:
        text = values.to_pandas().astype("string")
    filled: pd.Series[str] = text.fillna("").astype(str)
    return filled


def wanted_columns(path: Path | str, names: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    """The columns to read, if the table has each of them once. Raises `DataError` if it has not."""
    wanted = list(dict.fromkeys(names if columns is None else columns))
    absent = [name for name in wanted if name not in names]
    if absent:
        raise DataError(f"{path} has no column {', '.join(map(repr, absent))}{_there_is(names)}")
    twice = [name for name in wanted if names.count(name) > 1] if isinstance(names, list) else []
    if twice:
        raise DataError(
            f"{path} has {len(twice)} column name{'s' * (len(twice) > 1)} more than once (column "
            f"{', '.join(str(list(names).index(name) + 1) for name in twice)}): rename one of them"
        )
    return wanted


def _there_is(names: Sequence[str]) -> str:
    """What columns there are, unless the first line may be a record: a record is nobody's business."""
    if len(names) == 1 and (marks := [mark for mark in SEPARATORS if mark in names[0]]):
        mark = max(marks, key=names[0].count)
        return f": its first line has {names[0].count(mark)} {mark!r} in it; set data.separator = {_toml(mark)}?"
    if looks_like_record(names):
        return ": its first line looks like a record, not like column names; give the names in data.header"
    more = f" and {len(names) - _SHOWN_COLUMNS} more" if len(names) > _SHOWN_COLUMNS else ""
    return f"; it has {', '.join(map(repr, names[:_SHOWN_COLUMNS]))}{more}"


def looks_like_record(names: Sequence[str]) -> bool:
    """Whether these are cells rather than column names: a number, or the usual text for a missing one, among them."""
    numbers = pd.to_numeric(pd.Series(list(names), dtype=str).str.strip(), errors="coerce").notna()
    return bool(numbers.any()) or any(name.strip() in ("?", "NA", "NaN", "nan") for name in names)


def _header_of(path: Path, separator: str) -> list[str]:
    with _opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        return next((names for names in csv.reader(text, delimiter=separator) if names), [])


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    if not start.strip(b"\xef\xbb\xbf\r\n\t "):
        raise DataError(f"{path} is empty")
    if start.lstrip(b"\xef\xbb\xbf\r\n\t ").startswith(b"<"):
        raise DataError(f"{path} is HTML or XML, not a table: was a web page saved instead of the file?")
    if start.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise DataError(f"{path} is an Excel workbook or an archive, not a text file: {_CSV}")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(_not_utf8(path))
    if b"\0" in start:
        raise DataError(f"{path} is a binary file, not a table: {_CSV}")


def _not_utf8(path: Path) -> str:
    return (
        f"{path} is not UTF-8 text: save it as UTF-8, or convert it: iconv -f WINDOWS-1252 -t UTF-8 (UTF-16 for "
        "Excel's Unicode text)"
    )


def refuse_large(path: Path | str, count: int, maximum_rows: int) -> None:
    """Return if a table is not too large. Raises `DataError`."""
    if count > maximum_rows:
        raise DataError(
            f"{path} has more than {maximum_rows:,} rows: raise data.maximum_rows if this machine has the memory "
            "(about 1 GB for a million rows of 20 columns)"
        )


def _reason(error: Exception, headerless: bool) -> str:
    """What an error of a library says, less whatever it quotes."""
    text = str(error)
    if ragged := re.match(r"CSV parse error: Row #(\d+): Expected (\d+) columns, got (\d+)", text):
        row, expected, got = map(int, ragged.groups())
        row -= 0 if headerless else 1
        return (
            f"row {row} has {got} cells, {'data.header' if headerless else 'the header'} has {expected}: "
            "is a cell with a comma in it not quoted, or the file cut short?"
        )
    if "invalid UTF8" in text:
        return "it is not UTF-8 text; convert it: iconv -f WINDOWS-1252 -t UTF-8"
    if isinstance(error, (EOFError, zlib.error)) or "gzip" in text.lower():
        return "it is compressed and damaged or cut short: get it again"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}; check that it is CSV or Parquet, and whole"


class _Quotes(io.RawIOBase):
    """A file that counts the quotation marks in what is read from it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.count = file, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.count += data.count(b'"')
        return data


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if its name ends in .gz."""
    import gzip

    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        yield cast(BinaryIO, file)


def _start_of(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read(4096)


def _toml(text: str) -> str:
    return '"\\t"' if text == "\t" else f'"{text}"'
