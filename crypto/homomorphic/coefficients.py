"""Keys and ciphertexts on the wire: the coefficients of two polynomials, little-endian, and nothing else.

No header, size, shape or parameter: all but the coefficients is known to both sides. Every one of them must be reduced,
so that one ciphertext has one form; serialized objects of TenSEAL or SEAL, secret keys among them, do not pass.
"""

import numpy as np
import numpy.typing as npt

from ..errors import RemoteProtocolError
from .fields import SLOTS

COEFFICIENT_MODULUS = 1_152_921_504_606_830_593
"""q, the 60-bit prime of every ciphertext."""

SPECIAL_MODULUS = 1_032_193
"""The 20-bit prime that only keys have besides: encryption divides by it, and that keeps fresh noise small."""

CHUNK_BYTES = 2 * SLOTS * 8
PUBLIC_KEY_BYTES = 2 * SLOTS * (8 + 4)


def check_chunks(data: bytes, count: int) -> npt.NDArray[np.uint64]:
    """uint64[count, 2, 4096]: a peer's ciphertexts.

    Raises:
        RemoteProtocolError: another length, a coefficient that is not reduced, or a ciphertext without its second half,
            which is no encryption at all and which SEAL refuses to add up.
    """
    if len(data) != count * CHUNK_BYTES:
        raise RemoteProtocolError(f"{count} ciphertexts must have {count * CHUNK_BYTES} bytes, got {len(data)}")
    chunks = np.frombuffer(data, dtype="<u8").reshape(count, 2, SLOTS)
    if int(chunks.max()) >= COEFFICIENT_MODULUS:
        raise RemoteProtocolError("a ciphertext has a coefficient that is not reduced")
    if not chunks[:, 1].any(axis=1).all():
        raise RemoteProtocolError("a ciphertext does not depend on the key")
    return chunks


def check_public_key(data: bytes) -> npt.NDArray[np.uint64]:
    """uint64[2, 2, 4096] (polynomial, modulus, coefficient): a peer's public key.

    Raises:
        RemoteProtocolError: another length, or a coefficient that is not reduced.
    """
    if len(data) != PUBLIC_KEY_BYTES:
        raise RemoteProtocolError(f"a public key must have {PUBLIC_KEY_BYTES} bytes, got {len(data)}")
    large = np.frombuffer(data, dtype="<u8", count=2 * SLOTS).reshape(2, SLOTS)
    small = np.frombuffer(data, dtype="<u4", offset=large.nbytes).reshape(2, SLOTS)
    if int(large.max()) >= COEFFICIENT_MODULUS or int(small.max()) >= SPECIAL_MODULUS:
        raise RemoteProtocolError("a public key has a coefficient that is not reduced")
    return np.stack([large, small.astype(np.uint64)], axis=1)
