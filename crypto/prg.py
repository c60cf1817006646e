"""AES-256-CTR as a pseudo-random generator: entropy streams, and masks added to vectors in place."""

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
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

# Chunk, keystream and zeros together stay in a 512 KiB L2 cache; measured best of 16 KiB to 512 KiB.
CHUNK_BYTES = 64 * 1024
_KEYS_AT_ONCE = 128  # their key schedules stay in cache too


def keystream(key: bytes, size: int) -> bytes:
    """The first `size` bytes of AES-256-CTR under the key, zero IV."""
    return _cipher(key).update(bytes(size))


def _cipher(key: bytes, offset: int = 0) -> CipherContext:
    # Every key is derived for one use, so the counter starts at zero; it counts blocks of 16 bytes.
    return Cipher(AES256(key), CTR((offset // 16).to_bytes(16, "big"))).encryptor()


def expand(seed: bytes, *, session_id: bytes, label: str) -> Entropy:
    """The deterministic stream of one purpose of one session: HKDF-SHA256 to a key, then AES-256-CTR.

    Args:
        seed: 32 secret bytes from the journal, never from a configuration.
        session_id: bytes[32].
        label: the purpose; two labels give independent streams.
    """
    stream = _cipher(derive(seed, salt=session_id, info=b"privfed/entropy/" + label.encode()))
    return lambda size: stream.update(bytes(size))


def word_dtype(bits: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The narrowest little-endian word that holds `bits` (at most 32): half the keystream where 16 bits are enough."""
    return np.dtype("<u2") if bits <= 16 else np.dtype("<u4")


def add_masks(words: Words, *, plus: Collection[bytes] = (), minus: Collection[bytes] = (), threads: int = 1) -> None:
    """words += Σ PRG(plus) − Σ PRG(minus), in place.

    Args:
        words: contiguous uint16[dim] or uint32[dim].
        plus, minus: 32-byte keys.
        threads: coefficient ranges to work on at once. Above 1 pays only where cores are idle (benchmarks/masking.py).

    **Guarantees**: a mask is the AES-256-CTR keystream (zero IV) read as little-endian words, whatever the number of
    threads; adding it and subtracting it cancel exactly modulo 2^16 or 2^32, hence modulo every smaller 2^w. One key
    must mask one vector.
    """
    signed: list[tuple[bytes, np.ufunc]] = [*((key, np.add) for key in plus), *((key, np.subtract) for key in minus)]
    chunks = -(-words.nbytes // CHUNK_BYTES)
    threads = min(threads, chunks)
    if threads <= 1:
        _mask_range(words, signed, 0)
        return
    step = -(-chunks // threads) * CHUNK_BYTES // words.itemsize
    with ThreadPoolExecutor(threads) as pool:
        ranges = [pool.submit(_mask_range, words[at : at + step], signed, at) for at in range(0, len(words), step)]
        for done in ranges:
            done.result()


def _mask_range(words: Words, signed: list[tuple[bytes, np.ufunc]], first: int) -> None:
    """Masks `words`, which start at word `first` of the whole vector."""
    zeros, buffer = memoryview(bytes(CHUNK_BYTES)), bytearray(CHUNK_BYTES)
    into, mask = memoryview(buffer), np.frombuffer(buffer, dtype=words.dtype)
    per_chunk = CHUNK_BYTES // words.itemsize
    for batch in range(0, len(signed), _KEYS_AT_ONCE):
        streams = [
            (_cipher(key, first * words.itemsize).update_into, operation)
            for key, operation in signed[batch : batch + _KEYS_AT_ONCE]
        ]
        # Neighbours inside, chunks outside: a chunk of the vector stays in cache while every mask is added to it.
        for start in range(0, len(words), per_chunk):
            part = words[start : start + per_chunk]
            source, target, addend = zeros[: part.nbytes], into[: part.nbytes], mask[: len(part)]
            for update_into, operation in streams:
                update_into(source, target)
                operation(part, addend, part)
