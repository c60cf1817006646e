"""Strict decoding of what a peer sent: bounded, canonical, and failing in one way only.

Messages hold fixed-size records in byte strings, never msgpack arrays: a forged array length would make the decoder
allocate it before it notices that the bytes are missing.
"""

from itertools import pairwise
from typing import TypeVar

import msgspec
import numpy as np

from .errors import RemoteProtocolError

M = TypeVar("M", bound=msgspec.Struct)
INDEX_BYTES = 4


def decode(data: bytes, kind: type[M], *, most: int) -> M:
    """The message in `data`.

    Args:
        data: bytes of a peer.
        kind: the one type that is due now, all of its fields byte strings.
        most: bytes the largest legal message has; checked before anything is decoded.

    Raises:
        RemoteProtocolError: too large, malformed, of another type or version, or not the canonical encoding: signatures
            and hashes are over received bytes, so one message must have one form.
    """
    if len(data) > most:
        raise RemoteProtocolError(f"a {kind.__name__} has at most {most} bytes here, got {len(data)}")
    try:
        message = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise RemoteProtocolError(f"not a {kind.__name__}") from None
    if _canonical_size(message) != len(data):
        raise RemoteProtocolError(f"not a {kind.__name__} in canonical form")
    return message


def _canonical_size(message: msgspec.Struct) -> int:
    """Bytes of the canonical encoding of a struct of byte strings, which is the one shortest encoding.

    Every other encoding writes some length in a longer form and none in a shorter one, and so is longer as a whole:
    comparing sizes is enough, where comparing bytes would copy a model-sized message.
    """
    tag = message.__struct_config__.tag
    size = 1 + 1 + (len(tag.encode()) if isinstance(tag, str) else 0)  # array of < 16, string of < 32
    for name in message.__struct_fields__:
        length = len(getattr(message, name))
        size += length + (2 if length < 2**8 else 3 if length < 2**16 else 5)
    return size


def encode(message: msgspec.Struct) -> bytes:
    """The canonical bytes of a message."""
    return msgspec.msgpack.encode(message)


def encode_indices(indices: tuple[int, ...]) -> bytes:
    """Fixed-width little-endian uint32 each."""
    return np.array(indices, dtype="<u4").tobytes()


def decode_indices(data: bytes) -> tuple[int, ...]:
    """Raises RemoteProtocolError unless the indices strictly increase: no duplicates, one form for one set."""
    if len(data) % INDEX_BYTES:
        raise RemoteProtocolError("a list of indices has a broken length")
    indices: tuple[int, ...] = tuple(np.frombuffer(data, dtype="<u4").tolist())
    if any(a >= b for a, b in pairwise(indices)):
        raise RemoteProtocolError("a list of indices is not strictly increasing")
    return indices


def records(data: bytes, count: int, size: int) -> list[bytes]:
    """`count` records of `size` bytes. Raises RemoteProtocolError for any other length."""
    if len(data) != count * size:
        raise RemoteProtocolError(f"{count} records of {size} bytes were due, got {len(data)} bytes")
    return [data[start : start + size] for start in range(0, len(data), size)]
