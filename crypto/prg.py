"""AES-256-CTR as a pseudo-random generator: entropy streams, and masks added to vectors in place."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from .keys import derive

Words = npt.NDArray[np.unsignedinteger[Any]]
"""uint16[dim] or uint32[dim]: residues modulo 2^w."""

Entropy = Callable[[int], bytes]
"""Gives the next `size` bytes of a stream; `os.urandom` is one."""

# Fits the L2 cache of current cores; a fresh 40 MB keystream would halve the speed by page faults.
CHUNK_BYTES = 512 * 1024


def _keystream(key: bytes) -> CipherContext:
    # Every key is derived for one use, so the counter starts at zero.
    return Cipher(AES256(key), CTR(bytes(16))).encryptor()


def expand(seed: bytes, *, session_id: bytes, label: str) -> Entropy:
    """The deterministic stream of one purpose of one session: HKDF-SHA256 to a key, then AES-256-CTR.

    Args:
        seed: 32 secret bytes from the journal, never from a configuration.
        session_id: bytes[32].
        label: the purpose; two labels give independent streams.
    """
    stream = _keystream(derive(seed, salt=session_id, info=b"privfed/entropy/" + label.encode()))
    return lambda size: stream.update(bytes(size))


def word_dtype(bits: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The narrowest little-endian word that holds `bits` (at most 32): half the keystream where 16 bits are enough."""
    return np.dtype("<u2") if bits <= 16 else np.dtype("<u4")


class Masker:
    """Adds or subtracts PRG(key) to a word vector in place, through one pair of reused, cache-sized buffers.

    **Guarantees**: the mask is the AES-256-CTR keystream (zero IV) read as little-endian words; adding it and
    subtracting it cancel exactly modulo 2^16 or 2^32, hence modulo every smaller 2^w. One key must mask one vector.
    """

    def __init__(self) -> None:
        self._zeros = bytes(CHUNK_BYTES)
        self._buffer = bytearray(CHUNK_BYTES)

    def add(self, words: Words, key: bytes) -> None:
        """words += PRG(key), in place."""
        self._apply(np.add, words, key)

    def subtract(self, words: Words, key: bytes) -> None:
        """words −= PRG(key), in place."""
        self._apply(np.subtract, words, key)

    def _apply(self, operation: np.ufunc, words: Words, key: bytes) -> None:
        stream = _keystream(key)
        per_chunk = CHUNK_BYTES // words.itemsize
        mask = np.frombuffer(self._buffer, dtype=words.dtype)
        zeros, keystream = memoryview(self._zeros), memoryview(self._buffer)
        for start in range(0, len(words), per_chunk):
            part = words[start : start + per_chunk]
            stream.update_into(zeros[: part.nbytes], keystream[: part.nbytes])
            operation(part, mask[: len(part)], out=part)
