"""Signed integers ↔ residues modulo 2^w ↔ tightly packed wire bytes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import RemoteProtocolError
from .prg import Words, word_dtype

IntVector = npt.NDArray[np.signedinteger[Any]]
"""A one-dimensional vector of a signed integer dtype; `int64[dim]` where we make it."""

_COLUMNS = 32 * 1024  # words worked on at a time: three rows stay in L2; fewer, and calling numpy takes longer


def _period(bits: int) -> tuple[int, int, int]:
    """(words, lanes, width): `words` words of `bits` bits fill `lanes` lanes of `width` bits exactly."""
    width = word_dtype(bits).itemsize * 8
    common = math.gcd(bits, width)
    return width // common, bits // common, width


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the word at one position of a period lies; shifts are arrays because numpy takes those fastest."""

    lane: int
    shift: Words | None  # from the lane's lowest bit; None where it starts there
    rest: Words | None  # bits of it in this lane, where the next one holds more


@cache
def _places(bits: int) -> tuple[_Place, ...]:
    """One for each position of the period."""
    words, _, width = _period(bits)
    starts = (divmod(position * bits, width) for position in range(words))
    return tuple(
        _Place(
            lane=lane,
            shift=np.array(shift, dtype=word_dtype(bits)) if shift else None,
            rest=np.array(width - shift, dtype=word_dtype(bits)) if shift + bits > width else None,
        )
        for lane, shift in starts
    )


def packed_bytes(dim: int, bits: int) -> int:
    """Bytes that `dim` words of `bits` bits take on the wire: dim·bits/8 and less than 128 more."""
    words, lanes, width = _period(bits)
    return -(-dim // words) * lanes * width // 8


def encode(vector: IntVector, *, dim: int, bound: int, bits: int) -> Words:
    """The residues of a signed vector modulo 2^bits.

    Args:
        vector: a signed integer dtype, shape [dim], every |value| ≤ bound.
        dim: expected length.
        bound: largest magnitude allowed.
        bits: width of the modulus; n·bound must fit (see `Session.bits`).

    Returns:
        A new uint16[dim] or uint32[dim]; only the low `bits` bits of a word count.

    Raises:
        TypeError: not a numpy array of a signed integer dtype. Floats are never truncated silently.
        ValueError: wrong shape or a value beyond the bound. The value itself is never shown.
    """
    # `object` here: the annotation is a promise of typed callers, and this is where the others are caught.
    given: object = vector
    if not isinstance(given, np.ndarray) or given.dtype.kind != "i":
        found = given.dtype if isinstance(given, np.ndarray) else type(given).__name__
        raise TypeError(f"vector must be a numpy array of a signed integer dtype, got {found}; discretize it first")
    if vector.shape != (dim,):
        raise ValueError(f"vector must have shape ({dim},), got {vector.shape}")
    words = np.empty(dim, dtype=word_dtype(bits))
    # Compared from both sides: the absolute value of the most negative integer overflows. By blocks, so that one pass
    # over a long vector does all of it; casting to an unsigned word is reduction modulo 2^16 or 2^32.
    for start in range(0, dim, _COLUMNS):
        block = vector[start : start + _COLUMNS]
        if block.max() > bound or block.min() < -bound:
            raise ValueError(f"vector holds a value beyond ±{bound}; saturate it before aggregation")
        np.copyto(words[start : start + _COLUMNS], block, casting="unsafe")
    return words


def residues_in(sums: npt.NDArray[np.int64], bits: int) -> Words:
    """uint16[dim] or uint32[dim] in the first bytes of `sums`, from where `decode` spreads them over all of it."""
    return sums.view(word_dtype(bits))[: len(sums)]


def decode(words: Words, bits: int, *, into: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.int64]:
    """int64[dim]: the balanced representatives, in [−2^(bits−1), 2^(bits−1)), of residues modulo 2^bits.

    Args:
        words: the residues.
        bits: width of the modulus.
        into: int64[dim] to fill, which may be where `residues_in` took the words from; by default new memory.
    """
    spare = words.dtype.type(words.itemsize * 8 - bits)
    signed = np.dtype(f"<i{words.itemsize}")
    values = np.empty(len(words), dtype=np.int64) if into is None else into
    # Shifted up and down again as a signed number, the word's sign is that of its bit `bits − 1`. From the end: a value
    # takes more room than its word, so those written there cover no words but their own and those done before.
    for start in reversed(range(0, len(words), _COLUMNS)):
        raised = words[start : start + _COLUMNS] << spare
        values[start : start + _COLUMNS] = raised.view(signed) >> signed.type(spare)
    return values


def pack(words: Words, bits: int) -> memoryview:
    """The low `bits` bits of every word without gaps, in the layout below; what higher bits hold is dropped.

    Bytes, of the words themselves where these are `bits` wide: model-sized, and not copied before they are encoded.

    With (m, l, L) = `_period(bits)` and G = ⌈dim/m⌉, the wire is l rows of G little-endian lanes of L bits. Column g
    of them, read as one number of m·bits bits, holds the words g, G + g, …, (m−1)·G + g from the lowest bit up. So
    each word position is a contiguous run on both sides, and packing is a few shifts of whole rows.
    """
    period, lanes, width = _period(bits)
    if bits == width:
        return words.view(np.uint8).data
    columns = -(-len(words) // period)
    packed = np.zeros((lanes, columns), dtype=words.dtype)
    mask = np.array((1 << bits) - 1, dtype=words.dtype)
    low, part = (np.empty(min(columns, _COLUMNS), dtype=words.dtype) for _ in range(2))
    for place, at, row in _rows(words, columns, bits):
        value, moved, lane = low[: len(row)], part[: len(row)], packed[place.lane, at]
        np.bitwise_and(row, mask, value)
        if place.shift is None:
            lane[:] = value
            continue
        np.left_shift(value, place.shift, moved)
        np.bitwise_or(lane, moved, lane)
        if place.rest is not None:
            np.right_shift(value, place.rest, packed[place.lane + 1, at])
    return packed.reshape(-1).view(np.uint8).data


def add_packed(total: Words, data: bytes | memoryview, bits: int) -> None:
    """total += the words of `pack`, modulo 2^bits: bits of `total` above the lowest `bits` mean nothing afterwards.

    Raises:
        RemoteProtocolError: wrong length, or padding that is not zero (two encodings of one vector). `total` is
            unchanged then.
    """
    lanes = _check_packed(data, len(total), bits)
    columns = lanes.shape[1]
    part = np.empty(min(columns, _COLUMNS), dtype=total.dtype)
    for place, at, row in _rows(total, columns, bits):
        if place.shift is None:
            np.add(row, lanes[place.lane, at], row)
            continue
        # Neighbours in the lane stay above the word's own bits, where they cannot reach down.
        low = part[: len(row)]
        np.right_shift(lanes[place.lane, at], place.shift, low)
        np.add(row, low, row)
        if place.rest is not None:
            np.left_shift(lanes[place.lane + 1, at], place.rest, low)
            np.add(row, low, row)


def unpack(data: bytes | memoryview, *, dim: int, bits: int) -> Words:
    """The words of `pack`.

    Raises:
        RemoteProtocolError: wrong length, or padding that is not zero (two encodings of one vector).
    """
    words = np.zeros(dim, dtype=word_dtype(bits))
    add_packed(words, data, bits)
    words &= words.dtype.type((1 << bits) - 1)
    return words


def _rows(words: Words, columns: int, bits: int) -> Iterator[tuple[_Place, slice, Words]]:
    """(place, columns, the words there), _COLUMNS at a time; positions beyond the end have none."""
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        for place, first in zip(_places(bits), range(0, len(words), columns), strict=False):
            row = words[first + start : first + stop]
            if len(row):
                yield place, slice(start, start + len(row)), row


def _check_packed(data: bytes | memoryview, dim: int, bits: int) -> Words:
    """The lanes of a packed vector that has one form only."""
    if len(data) != packed_bytes(dim, bits):
        raise RemoteProtocolError(f"a packed vector must have {packed_bytes(dim, bits)} bytes, got {len(data)}")
    period, rows, width = _period(bits)
    lanes: Words = np.frombuffer(data, dtype=word_dtype(bits)).reshape(rows, -1)
    columns = lanes.shape[1]
    for index in range(dim, period * columns):  # fewer than `period` of them, at the ends of the last rows
        position, column = divmod(index, columns)
        lane, shift = divmod(position * bits, width)
        value = int(lanes[lane, column]) >> shift
        if shift + bits > width:
            value |= int(lanes[lane + 1, column]) << (width - shift)
        if value & ((1 << bits) - 1):
            raise RemoteProtocolError("a packed vector has padding that is not zero")
    return lanes
