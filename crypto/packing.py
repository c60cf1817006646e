"""Signed integers ↔ residues modulo 2^w ↔ tightly packed wire bytes."""

from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import RemoteProtocolError
from .prg import Words, word_dtype

IntVector = npt.NDArray[np.signedinteger[Any]]
"""A one-dimensional vector of a signed integer dtype; `int64[dim]` where we make it."""

# 64 words of w bits fill w lanes of 64 bits exactly, for every w.
_GROUP = 64
_GROUPS_PER_BLOCK = 1024  # 64 Ki words: both transposed blocks stay in cache


def packed_bytes(dim: int, bits: int) -> int:
    """Bytes that `dim` words of `bits` bits take on the wire."""
    return (dim * bits + 7) // 8


def encode(vector: IntVector, *, dim: int, bound: int, bits: int) -> Words:
    """The residues of a signed vector modulo 2^bits.

    Args:
        vector: a signed integer dtype, shape [dim], every |value| ≤ bound.
        dim: expected length.
        bound: largest magnitude allowed.
        bits: width of the modulus; n·bound must fit (see `Session.bits`).

    Returns:
        A new uint16[dim] or uint32[dim].

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
    # Compared from both sides: the absolute value of the most negative integer overflows.
    if int(vector.max()) > bound or int(vector.min()) < -bound:
        raise ValueError(f"vector holds a value beyond ±{bound}; saturate it before aggregation")
    return (vector.astype(np.int64) & ((1 << bits) - 1)).astype(word_dtype(bits))


def decode(words: Words, bits: int) -> npt.NDArray[np.int64]:
    """int64[dim]: the balanced representatives, in [−2^(bits−1), 2^(bits−1)), of residues modulo 2^bits."""
    values = words.astype(np.int64) & ((1 << bits) - 1)
    values[values >= 1 << (bits - 1)] -= 1 << bits
    return values


def pack(words: Words, bits: int) -> bytes:
    """The low `bits` bits of every word, little-endian and without gaps; the last byte is padded with zeros."""
    if bits == words.itemsize * 8:
        return words.tobytes()
    size, blocks = packed_bytes(len(words), bits), []
    for start in range(0, len(words), _GROUP * _GROUPS_PER_BLOCK):
        block = words[start : start + _GROUP * _GROUPS_PER_BLOCK]
        groups = np.zeros(-(-len(block) // _GROUP) * _GROUP, dtype=np.uint64)
        np.bitwise_and(block, words.dtype.type((1 << bits) - 1), out=groups[: len(block)], casting="safe")
        columns = np.ascontiguousarray(groups.reshape(-1, _GROUP).T)
        lanes = np.zeros((bits, columns.shape[1]), dtype=np.uint64)
        for position in range(_GROUP):
            lane, shift = divmod(position * bits, 64)
            lanes[lane] |= columns[position] << np.uint64(shift)
            if shift + bits > 64:
                lanes[lane + 1] |= columns[position] >> np.uint64(64 - shift)
        blocks.append(lanes.T.astype("<u8").tobytes())
    return b"".join(blocks)[:size]


def unpack(data: bytes, *, dim: int, bits: int) -> Words:
    """The words of `pack`.

    Raises:
        RemoteProtocolError: wrong length, or padding that is not zero (two encodings of one vector).
    """
    if len(data) != packed_bytes(dim, bits):
        raise RemoteProtocolError(f"a packed vector must have {packed_bytes(dim, bits)} bytes, got {len(data)}")
    if bits * dim % 8 and data[-1] >> (bits * dim % 8):
        raise RemoteProtocolError("a packed vector has padding that is not zero")
    words = np.empty(dim, dtype=word_dtype(bits))
    if bits == words.itemsize * 8:
        words[:] = np.frombuffer(data, dtype=words.dtype)
        return words
    mask = np.uint64((1 << bits) - 1)
    block_bytes = _GROUPS_PER_BLOCK * bits * 8
    for number, start in enumerate(range(0, len(data), block_bytes)):
        chunk = data[start : start + block_bytes]
        chunk = chunk.ljust(-(-len(chunk) // (8 * bits)) * 8 * bits, b"\0")
        lanes = np.ascontiguousarray(np.frombuffer(chunk, dtype="<u8").reshape(-1, bits).T)
        columns = np.empty((_GROUP, lanes.shape[1]), dtype=words.dtype)
        for position in range(_GROUP):
            lane, shift = divmod(position * bits, 64)
            column = lanes[lane] >> np.uint64(shift)
            if shift + bits > 64:
                column |= lanes[lane + 1] << np.uint64(64 - shift)
            columns[position] = column & mask
        part = words[number * _GROUP * _GROUPS_PER_BLOCK :][: columns.size]
        part[:] = columns.T.reshape(-1)[: len(part)]
    return words
