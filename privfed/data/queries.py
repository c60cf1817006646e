"""What a query gives, as a table of texts; and whether it can be what was agreed on, before a record is read."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd
import pyarrow as arrow
from msgspec import Meta

from privfed.errors import DataError
from privfed.tasks import Classification, Task

from .columns import Categorical, Item
from .databases import connected, is_database
from .files import read_frame, refuse_large, separator_of, texts, wanted_columns
from .partition import Assigned
from .records import Sites
from .tables import Table

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect, Select, Subquery

_PORTION_ROWS = 10_000
_LIMITS = {"int2": (-(2.0**15), 2.0**15 - 1), "int4": (-(2.0**31), 2.0**31 - 1), "int8": (-(2.0**63), 2.0**63)}


@dataclass(frozen=True)
class QueryColumn:
    """What a database says of a column, and of no record.

    Args:
        name: as the query gives it.
        kind: "number", "text" or "other"; "" where the database does not say (SQLite never does).
        type: its own name of the type, or "".
        limits: the least and the largest number that the type holds, where it says so.
    """

    name: str
    kind: str
    type: str = ""
    limits: tuple[float, float] | None = None


class Query(Table, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="source", tag="sql"):
    """Records that a query gives. ``file`` and ``files`` name database files; what is asked stands there alone.

    Its cells are texts as a Parquet file's are; what is missing, unknown or out of range counts as in any table.

    Guarantees:
        The same records are the same data set in whatever order the database gives them.
    """

    file: Annotated[
        str | None, Meta(description="the database file (.toml): url, query, and where the password is")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for file in (self.file, *self.files.values()):
            if file and not is_database(file):
                raise ValueError(f"data.source = 'sql' reads a database file (.toml), got {file!r}")
        if self.header or self.separator != ",":
            raise ValueError("data.header and data.separator are of CSV files: leave them away with a database")
        if isinstance(self.partition, Assigned):
            raise ValueError("data.partition.kind = 'file' goes by row numbers, and rows of a database have none")

    def load(self, *, seed: int, task: Task | None = None) -> Sites:
        """The sites' records; as of a table. Columns are compared before a record is read."""
        files = self.files if self.file is None else {"": self.file}
        for site, file in files.items():
            if faults := misfits(self, task or Classification(), describe(file), site=site):
                told = "; ".join(f"column {name!r} {fault}" for name, fault in faults.items())
                raise DataError(f"{file}: the query does not give what was agreed on. {told}")
        return super().load(seed=seed, task=task)

    def _frame(self, file: str, columns: list[str]) -> pd.DataFrame:
        frame = read_query(file, columns, maximum_rows=self.maximum_rows)
        # A database promises no order, and a round that is done again must see the same records in the same places
        told_apart = frame if self.id is None else frame[self.id]
        order = pd.util.hash_pandas_object(told_apart, index=False).to_numpy().argsort(kind="stable")
        return frame.iloc[order]


def at_site(agreed: Table, site: str, file: str) -> Table:
    """The agreed table, as a site's own file has it: a CSV or Parquet file, or a database file."""
    given = {name: getattr(agreed, name) for name in Table.__struct_fields__} | {"files": {site: file}}
    if not is_database(file):
        return Table(**given)
    return Query(**given | {"header": (), "separator": ","})  # a database knows where its columns are


def read_any(file: str, *, maximum_rows: int) -> tuple[pd.DataFrame, str]:
    """All columns of a CSV, Parquet or database file, and what stands between the cells. Raises `DataError`."""
    if is_database(file):
        return read_query(file, None, maximum_rows=maximum_rows), ","
    separator = separator_of(file)
    return read_frame(file, None, separator=separator, maximum_rows=maximum_rows), separator


def describe(file: str) -> tuple[QueryColumn, ...]:
    """What columns a database file's query has. No record is read.

    Raises:
        DataError: as `connected`.
    """
    with connected(file) as (connection, settings, _):
        return _described(connection, _asked(settings.query))


def misfits(table: Table, task: Task, columns: Sequence[QueryColumn], *, site: str = "") -> dict[str, str]:
    """Agreed columns that a query lacks, or whose type can not hold what was agreed on: name → what is wrong.

    Args:
        columns: what `describe` gave. Nothing here depends on a record.
        site: the one whose records all are, where the table's ``site`` column is not read.
    """
    there = {column.name: column for column in columns}
    wanted = [name for name in table.needed(task) if not (site and name == table.site)]
    faults = {name: "missing" for name in wanted if name not in there}
    for column in table.columns:
        if isinstance(column, Categorical) or (given := there.get(column.name)) is None:
            continue
        low, high = (1.0, float(column.count)) if isinstance(column, Item) else column.range
        if given.kind == "other":
            faults[column.name] = f"has the type {given.type}, which holds no numbers: cast it in the query"
        elif given.limits is not None and (given.limits[1] < low or high < given.limits[0]):
            faults[column.name] = f"has the type {given.type}, which holds nothing in [{low:g}, {high:g}]"
    return faults


def read_query(
    file: str,
    columns: Sequence[str] | None,
    *,
    maximum_rows: int,
    clock: Callable[[], float] = time.monotonic,
) -> pd.DataFrame:
    """What a database file's query gives, as `read_frame` gives a file's; rows numbered from 1 as they come.

    Rows come in portions, and each becomes columns before the next one comes.

    Raises:
        DataError: as `connected`; it lacks a column, gives no record, or too many.
    """
    with connected(file, clock) as (connection, settings, require_time):
        asked = _asked(settings.query)
        names = [column.name for column in _described(connection, asked)]
        wanted = wanted_columns(f"{file}: the query", names, columns)
        portions: dict[str, list[Any]] = {name: [] for name in wanted}
        count = 0
        for rows in _portions(connection, asked, wanted):
            count += len(rows)
            refuse_large(f"{file}: the query", count, maximum_rows)
            require_time()
            for name, cells in zip(wanted, zip(*rows, strict=True), strict=True):
                portions[name].append(_column(cells))
    if not count:
        raise DataError(f"{file}: the query gives no record")
    columns_read: dict[str, pd.Series[str]] = {}
    for name in wanted:
        try:
            columns_read[name] = _joined(portions.pop(name))
        except (ValueError, OverflowError, arrow.ArrowException):  # they quote what they could not read
            raise DataError(
                f"{file}: column {name!r} of the query holds what is no text: cast it in the query"
            ) from None
    frame = pd.DataFrame(columns_read)
    frame.index = pd.RangeIndex(1, count + 1)
    return frame


def _asked(query: str) -> "Subquery":
    """The site's query as a table of its own: so it can be but one SELECT, and only what is needed is sent."""
    from sqlalchemy import text

    literal = query.strip().rstrip(";").replace(":", "\\:")  # a colon is the query's own, and no parameter's
    return text(f"{literal}\n").columns().subquery("asked")  # the line may end in a comment


def _described(connection: "Connection", asked: "Subquery") -> tuple[QueryColumn, ...]:
    from sqlalchemy import literal, literal_column, select

    nothing: Select[Any] = select(literal_column("*")).select_from(asked).where(literal(0) == literal(1))
    with connection.execute(nothing) as result:
        assert result.cursor is not None  # a SELECT has one
        given = result.cursor.description
    dialect = connection.dialect
    shown = dialect.normalize_name if dialect.requires_name_normalize else str  # Oracle shouts
    return tuple(_kind(dialect, str(shown(name)), code) for name, code, *_ in given)


def _kind(dialect: "Dialect", name: str, code: Any) -> QueryColumn:
    """The type code of a driver, by the type objects that PEP 249 has it export."""
    type_, limits = "", None
    if dialect.driver == "psycopg":
        from psycopg import adapters

        known = adapters.types.get(code)
        type_, limits = known.name if known else "", _LIMITS.get(known.name) if known else None
    for kind, word in (("number", "NUMBER"), ("text", "STRING")):
        if code is not None and getattr(dialect.dbapi, word, None) == code:
            return QueryColumn(name, kind, type_, limits)
    return QueryColumn(name, "other" if type_ else "", type_)


def _portions(connection: "Connection", asked: "Subquery", wanted: Sequence[str]) -> Iterator[Sequence[Sequence[Any]]]:
    from sqlalchemy import column, literal, select

    # A parameter, here as in `_described`: statements with one are sent so that a second behind a ; is refused
    always = literal(1) == literal(1)
    statement: Select[*tuple[Any, ...]] = select(*(column(name) for name in wanted)).select_from(asked).where(always)
    with connection.execution_options(yield_per=_PORTION_ROWS).execute(statement) as result:
        yield from result.partitions()


def _column(cells: Sequence[Any]) -> Any:
    """Cells as an Arrow array, of texts where their types are mixed or of the driver's own."""
    try:
        return arrow.array(cells, from_pandas=False)
    except (arrow.ArrowException, OverflowError):
        return arrow.array([None if cell is None else str(cell) for cell in cells])


def _joined(arrays: list[Any]) -> "pd.Series[str]":
    """A column's texts. A portion without a value, or a type that the driver changed on the way, changes nothing."""
    kinds = {array.type for array in arrays} - {arrow.null()}
    if len(kinds) < 2:
        kind = next(iter(kinds), arrow.string())
        return texts(arrow.chunked_array([array.cast(kind) for array in arrays]))
    return pd.concat([texts(array) for array in arrays], ignore_index=True)
