"""Columns of a table as numbers, from what is public about them.

Means and deviations of the records would be a release of their own. A declared range or list of values is not: it comes
from a data dictionary or from medicine, the same for every site, whoever is in the table.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated

import msgspec
import numpy as np
import pandas as pd
from msgspec import Meta
from numpy.typing import NDArray

from privfed.errors import DataError

_SHOWN_ROWS = 5


class Numeric(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A numeric column as 4 (x − typical) / (high − low), x clipped to the range.

    That has unit spread where the range spans four standard deviations. A missing value counts as typical.
    """

    name: Annotated[str, Meta(min_length=1, description="header of the column")]
    range: Annotated[tuple[float, float], Meta(description="public [low, high]; values outside are clipped")]
    typical: Annotated[float | None, Meta(description="public typical value; default the middle of the range")] = None
    missing: Annotated[bool, Meta(description="add an input that is 1 where the value is missing")] = False

    def __post_init__(self) -> None:
        low, high = self.range
        if not (np.isfinite(low) and np.isfinite(high) and low < high):
            raise ValueError(f"range of column {self.name!r} must be [low, high] with low < high, got {[low, high]}")
        if self.typical is not None and not low <= self.typical <= high:
            raise ValueError(f"typical of column {self.name!r} must lie in its range, got {self.typical}")


class Categorical(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A column of names: one input of 0 or 1 a listed value. A missing or unlisted value is all zeros."""

    name: Annotated[str, Meta(min_length=1, description="header of the column")]
    values: Annotated[tuple[str, ...], Meta(min_length=1, description="the public list of values")]

    def __post_init__(self) -> None:
        spelled = pd.Series(spellings(self.values), dtype=str)
        if spelled.duplicated().any():
            raise ValueError(f"values of column {self.name!r} must differ from each other (1, 1.0 and 01 are the same)")


class Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A column that names items by the numbers 1 to count. A missing or other value is 0, the unknown item."""

    name: Annotated[str, Meta(min_length=1, description="header of the column")]
    count: Annotated[int, Meta(ge=1, le=2**24 - 1, description="public: how many items there are")]


Column = Numeric | Categorical | Item


def input_names(columns: Sequence[Column]) -> tuple[str, ...]:
    """The names of the model's inputs, in order."""
    names: list[str] = []
    for column in columns:
        if isinstance(column, Categorical):
            names += [f"{column.name}={value}" for value in column.values]
        elif isinstance(column, Item):
            names.append(column.name)
        else:
            names.append(column.name)
            if column.missing:
                names.append(f"{column.name} missing")
    return tuple(names)


def input_ranges(columns: Sequence[Column]) -> tuple[tuple[float, float], ...]:
    """[low, high] of each of the model's inputs, as `encode` makes them: public, like the declaration behind them."""
    ranges: list[tuple[float, float]] = []
    for column in columns:
        if isinstance(column, Categorical):
            ranges += [(0.0, 1.0)] * len(column.values)
            continue
        if isinstance(column, Item):
            ranges.append((0.0, float(column.count)))
            continue
        low, high = column.range
        typical = (low + high) / 2 if column.typical is None else column.typical
        ranges.append((4 * (low - typical) / (high - low), 4 * (high - typical) / (high - low)))
        if column.missing:
            ranges.append((0.0, 1.0))
    return tuple(ranges)


def item_positions(columns: Sequence[Column]) -> tuple[tuple[int, int], ...]:
    """(position among the model's inputs, count) of each item column."""
    if not any(isinstance(column, Item) for column in columns):
        return ()  # asked with every message
    found: list[tuple[int, int]] = []
    at = 0
    for column in columns:
        if isinstance(column, Item):
            found.append((at, column.count))
        at += len(input_names([column]))
    return tuple(found)


def encode(
    frame: pd.DataFrame, columns: Sequence[Column], *, missing: frozenset[str], decimal: str = "."
) -> NDArray[np.float32]:
    """float32[n, F] from a table of strings.

    Args:
        frame: every column a str column; rows are numbered by its index, as the user counts them.
        columns: what is public about the inputs.
        missing: texts that mean "no value".
        decimal: what stands before the decimals of a number.

    Raises:
        DataError: a column is not there, or a numeric one holds text. Rows are named by number, never by value.
    """
    absent = [column.name for column in columns if column.name not in frame.columns]
    if absent:
        raise DataError(
            f"no column {', '.join(map(repr, absent))}; the table has {', '.join(map(repr, frame.columns))}"
        )
    return np.column_stack([_encode_column(frame[column.name], column, missing, decimal) for column in columns])


def unknown_values(
    frame: pd.DataFrame, columns: Sequence[Column], *, missing: frozenset[str], decimal: str = "."
) -> tuple[str, ...]:
    """One note a column with values outside its declared list or range; rows by number, never a value."""
    notes = []
    for column in columns:
        if isinstance(column, Categorical):
            text = canonical(frame[column.name])
            listed = canonical(pd.Series([*column.values, *missing], dtype=str))
            unknown = ~text.isin(listed).to_numpy(bool)
            if unknown.any():
                notes.append(f"column {column.name!r}: {rows(frame.index.to_numpy()[unknown])} hold no listed value")
            continue
        parsed = numbers(frame[column.name], missing, decimal)
        if isinstance(column, Item):
            strange = ~np.isnan(parsed) & (_items(parsed, column) == 0)
            if strange.any():
                notes.append(f"column {column.name!r}: {rows(frame.index.to_numpy()[strange])} name no known item")
            continue
        low, high = column.range
        outside = (parsed < low) | (parsed > high)  # a missing value is neither
        if outside.any():
            where = rows(frame.index.to_numpy()[outside])
            notes.append(f"column {column.name!r}: {where} lie outside [{low:g}, {high:g}] and count as the nearer end")
    return tuple(notes)


def numbers(values: "pd.Series[str]", missing: frozenset[str], decimal: str = ".") -> NDArray[np.float64]:
    """float64[n] with NaN where a value is missing.

    Raises:
        DataError: some value is neither a number nor missing.
    """
    gone = is_missing(values, missing)
    parsed: NDArray[np.float64] = _parsed(values, decimal)
    parsed[gone] = np.nan
    wrong = ~gone & ~np.isfinite(parsed)
    if wrong.any():
        remedy = "list the column under categorical, or the text under data.missing_values"
        if decimal == "." and bool(np.isfinite(_parsed(values[wrong], ",")).all()):
            remedy = "its decimals stand behind a comma: set data.decimal = ','"
        raise DataError(
            f"column {values.name!r} is numeric, but {rows(values.index.to_numpy()[wrong])} hold no finite number: "
            f"{remedy}"
        )
    return parsed


def is_missing(values: "pd.Series[str]", missing: frozenset[str]) -> NDArray[np.bool_]:
    """bool[n]: where no value stands, however a number that means it is spelled (-9, -9.0)."""
    gone: NDArray[np.bool_] = canonical(values).isin(canonical(pd.Series(sorted(missing), dtype=str))).to_numpy(bool)
    return gone


def _parsed(values: "pd.Series[str]", decimal: str) -> NDArray[np.float64]:
    """float64[n]: the numbers, NaN for what is none."""
    number, texts = distinct(values)
    if decimal != ".":
        texts = texts.str.replace(decimal, ".", regex=False)
    parsed: NDArray[np.float64] = parse(texts)[number]
    return parsed


def parse(texts: "pd.Series[str]") -> NDArray[np.float64]:
    """float64[n]: the numbers, NaN for what is none."""
    return np.array(pd.to_numeric(texts, errors="coerce"), dtype=np.float64)


def distinct(values: "pd.Series[str]") -> tuple[NDArray[np.int64], "pd.Series[str]"]:
    """int64[n] and the distinct stripped texts that it numbers: a big table has few."""
    number, texts = pd.factorize(values.str.strip())
    return np.asarray(number, dtype=np.int64), pd.Series(texts, dtype=str)


def canonical(values: "pd.Series[str]") -> "pd.Series[str]":
    """Stripped texts, with one spelling for a whole number: hospitals write the same code as 1, 1.0 and 01."""
    at, text = distinct(values)
    number = pd.Series(parse(text))
    whole = number.notna() & (number == number.round()) & (number.abs() < 2**53)
    spelled = text.mask(whole, number.where(whole, 0).astype("int64").astype(str))
    return pd.Series(spelled.array.take(at), index=values.index, name=values.name, dtype=str)


@lru_cache(maxsize=1024)
def spellings(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The canonical spelling of declared texts. Remembered: every plan that a site decodes declares them again."""
    return tuple(canonical(pd.Series(texts, dtype=str)))


def rows(numbers: NDArray[np.int64]) -> str:
    """Row numbers for a message: the first few and how many more."""
    shown = ", ".join(str(number) for number in numbers[:_SHOWN_ROWS])
    more = f" and {len(numbers) - _SHOWN_ROWS} more" if len(numbers) > _SHOWN_ROWS else ""
    return f"row{'s' if len(numbers) != 1 else ''} {shown}{more}"


def _encode_column(
    values: "pd.Series[str]", column: Column, missing: frozenset[str], decimal: str
) -> NDArray[np.float32]:
    if isinstance(column, Categorical):
        listed = pd.Index(canonical(pd.Series(column.values, dtype=str)).astype(object))
        number = listed.get_indexer(pd.Index(canonical(values).astype(object)))
        hot: NDArray[np.float32] = (number[:, None] == np.arange(len(listed))[None, :]).astype(np.float32)
        return hot
    parsed = numbers(values, missing, decimal)
    if isinstance(column, Item):
        return _items(parsed, column)[:, None]
    low, high = column.range
    typical = (low + high) / 2 if column.typical is None else column.typical
    gone = np.isnan(parsed)
    scaled = 4 * (np.clip(np.where(gone, typical, parsed), low, high) - typical) / (high - low)
    inputs: NDArray[np.float32] = np.column_stack([scaled, gone] if column.missing else [scaled]).astype(np.float32)
    return inputs


def _items(parsed: NDArray[np.float64], column: Item) -> NDArray[np.float32]:
    """float32[n]: the items' numbers, 0 for what is none."""
    known = (parsed == np.round(parsed)) & (parsed >= 1) & (parsed <= column.count)  # NaN is not
    return np.where(known, parsed, 0.0).astype(np.float32)
