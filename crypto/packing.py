"""Signed integers ↔ residues modulo 2^w ↔ tightly packed wire bytes."""

import math
from collections.abc import Iterator
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


def decode(words: Words, bits: int) -> npt.NDArray[np.int64]:
    """int64[dim]: the balanced representatives, in [−2^(bits−1), 2^(bits−1)), of residues modulo 2^bits."""
    spare = words.dtype.type(words.itemsize * 8 - bits)
    signed = np.dtype(f"<i{words.itemsize}")
    values = np.empty(len(words), dtype=np.int64)
    # Shifted up and down again as a signed number, the word's sign is that of its bit `bits − 1`.
    for start in range(0, len(words), _COLUMNS):
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
    mask = words.dtype.type((1 << bits) - 1)
    low, part = (np.empty(min(columns, _COLUMNS), dtype=words.dtype) for _ in range(2))
    for start in range(0, columns, _COLUMNS):
        for position, row in _rows(words, columns, start):
            lane, shift = divmod(position * bits, width)
            at = slice(start, start + len(row))
            value, moved = low[: len(row)], part[: len(row)]
            np.bitwise_and(row, mask, value)
            if shift == 0:
                packed[lane, at] = value
                continue
            np.left_shift(value, words.dtype.type(shift), moved)
            packed[lane, at] |= moved
            if shift + bits > width:
                np.right_shift(value, words.dtype.type(width - shift), packed[lane + 1, at])
    return packed.reshape(-1).view(np.uint8).data


def add_packed(total: Words, data: bytes | memoryview, bits: int) -> None:
    """total += the words of `pack`, modulo 2^bits: bits of `total` above the lowest `bits` mean nothing afterwards.

    Raises:
        RemoteProtocolError: wrong length, or padding that is not zero (two encodings of one vector). `total` is
            unchanged then.
    """
    rows, width = _check_packed(data, len(total), bits)
    columns, word = rows.shape[1], total.dtype.type
    part = np.empty(min(columns, _COLUMNS), dtype=total.dtype)
    for start in range(0, columns, _COLUMNS):
        for position, row in _rows(total, columns, start):
            lane, shift = divmod(position * bits, width)
            at = slice(start, start + len(row))
            if shift == 0:
                np.add(row, rows[lane, at], row)
                continue
            # Neighbours in the lane stay above the word's own bits, where they cannot reach down.
            low = part[: len(row)]
            np.right_shift(rows[lane, at], word(shift), low)
            np.add(row, low, row)
            if shift + bits > width:
                np.left_shift(rows[lane + 1, at], word(width - shift), low)
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


def _rows(words: Words, columns: int, start: int) -> Iterator[tuple[int, Words]]:
    """(position, its words from column `start` on, _COLUMNS at most); positions beyond the end have none."""
    for position, first in enumerate(range(0, len(words), columns)):
        row = words[first + start : min(first + start + _COLUMNS, first + columns)]
        if len(row):
            yield position, row


def _check_packed(data: bytes | memoryview, dim: int, bits: int) -> tuple[Words, int]:
    """The lanes and their width of a packed vector that has one form only."""
    if len(data) != packed_bytes(dim, bits):
        raise RemoteProtocolError(f"a packed vector must have {packed_bytes(dim, bits)} bytes, got {len(data)}")
    period, lanes, width = _period(bits)
    rows: Words = np.frombuffer(data, dtype=word_dtype(bits)).reshape(lanes, -1)
    columns = rows.shape[1]
    for index in range(dim, period * columns):  # fewer than `period` of them, at the ends of the last rows
        position, column = divmod(index, columns)
        lane, shift = divmod(position * bits, width)
        value = int(rows[lane, column]) >> shift
        if shift + bits > width:
            value |= int(rows[lane + 1, column]) << (width - shift)
        if value & ((1 << bits) - 1):
            raise RemoteProtocolError("a packed vector has padding that is not zero")
    return rows, width
