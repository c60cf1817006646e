"""BFV by TenSEAL, in the one way that is used here: a fresh key, raw ciphertexts of trusted sizes, additions.

Fan–Vercauteren 2012 (BFV); N = 4096 and 80 bits of coefficient moduli, below the 109 bits that the Homomorphic
Encryption Standard (2018) allows for 128-bit security with ternary secrets.

On the wire a ciphertext is its coefficients and nothing else: no header, size, shape or parameter of a peer is ever
parsed by TenSEAL 0.3.18, whose vector decoder believes forged sizes and then reads beyond its heap. Coefficients are
checked against the modulus, put between headers made here, and loaded with a size that we know.
"""

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tenseal import _ts_cpp as seal  # the compiled part: its Python wrappers check and copy every vector once more

from ..errors import LocalProtocolError, RemoteProtocolError
from .coefficients import CHUNK_BYTES, COEFFICIENT_MODULUS, SPECIAL_MODULUS, check_chunks, check_public_key
from .fields import PLAIN_MODULUS, SLOTS, Slots

FRESH_BUDGET_BITS = 10
"""An honest fresh ciphertext has 10 or 11."""

RELEASE_BUDGET_BITS = 4


class NoiseTooHigh(RemoteProtocolError):
    """Ciphertexts that are not fresh ones under this key, or a sum with too little noise budget to be sure of."""


class PublicKey:
    """Encrypts under a key holder's public key.

    Args:
        data: bytes[98304] as `RoundKey.public` gives them: two polynomials modulo q, then two modulo the special prime.

    Raises:
        RemoteProtocolError: another length, or a coefficient that is not reduced.
    """

    def __init__(self, data: bytes) -> None:
        coefficients = check_public_key(data)
        library = _library()
        key = b"".join([*library.before(library.key_parameters, ntt=True, moduli=2), coefficients.tobytes()])
        context = _field(1, library.parameters) + _field(2, _field(1, key) + library.settings)
        self._context = seal.TenSEALContext.deserialize(context, 1)

    def encrypt(self, slots: Slots) -> bytes:
        """The ciphertexts of int64[count · 4096], one after the other.

        Raises:
            ValueError: not whole chunks, or a slot beyond ±t/2, which would wrap silently.
        """
        if slots.dtype != np.int64 or slots.ndim != 1 or not len(slots) or len(slots) % SLOTS:
            raise ValueError(f"slots must be int64 in whole chunks of {SLOTS}, got {slots.dtype}{list(slots.shape)}")
        if int(slots.max()) > PLAIN_MODULUS // 2 or int(slots.min()) < -(PLAIN_MODULUS // 2):
            raise ValueError("a slot is beyond the plaintext modulus")
        # A memoryview gives the library its integers one by one; a list of them costs as much as the packing before.
        return b"".join(_coefficients(seal.BFVVector(self._context, chunk.data)) for chunk in slots.reshape(-1, SLOTS))


def encrypt_part(public_key: bytes, slots: bytes) -> bytes:
    """`PublicKey.encrypt` for another process: bytes in, bytes out, the key parsed once for a round."""
    return _parsed(public_key).encrypt(np.frombuffer(slots, dtype=np.int64))


@lru_cache(maxsize=1)
def _parsed(public_key: bytes) -> PublicKey:
    return PublicKey(public_key)


class RoundKey:
    """A fresh key pair and the one sum that may be decrypted with it. Its repr is bare.

    Args:
        chunks: ciphertexts of every vector.

    **Guarantees**: `add` takes only what `check_chunks` and the noise budget pass, and decryption happens once, at or
    above the release budget. The secret key exists nowhere else and is never serialized.
    """

    def __init__(self, chunks: int) -> None:
        self._context: Any = _new_context()
        self._chunks = chunks
        self._sum: Any = None
        key = self._context.public_key().data()
        read = np.array([key[i] for i in range(4 * SLOTS)], dtype="<u8").reshape(2, 2, SLOTS)
        self.public: bytes = read[:, 0].tobytes() + read[:, 1].astype("<u4").tobytes()

    def add(self, data: bytes) -> None:
        """Add one client's ciphertexts.

        Raises:
            RemoteProtocolError: not ciphertexts of this size. The sum is unchanged.
            NoiseTooHigh: without the noise budget of fresh ones: of another key, or crafted. The sum is unchanged.
        """
        chunks = check_chunks(data, self._chunks)
        vector = _loaded(self._context, chunks)
        if self._budget(vector) < FRESH_BUDGET_BITS:
            raise NoiseTooHigh("a ciphertext is not a fresh one under this round's key")
        if self._sum is None:
            self._sum = vector
        else:
            self._sum.add_(vector)

    def decrypt(self) -> Slots:
        """int64[chunks · 4096]: the sum's slots in (−t/2, t/2). The key is destroyed, whatever happens.

        Raises:
            LocalProtocolError: nothing was added, or the key is gone.
            NoiseTooHigh: too little noise budget is left to be sure of the sum.
        """
        total, context = self._sum, self._context
        if total is None or context is None:
            raise LocalProtocolError("there is nothing to decrypt, or no key any more")
        try:
            if self._budget(total) < RELEASE_BUDGET_BITS:
                raise NoiseTooHigh("the sum has too little noise budget left")
            return np.array(total.decrypt(context.secret_key()), dtype=np.int64)
        finally:
            self.destroy()

    def destroy(self) -> None:
        """Drop the key; SEAL overwrites a secret key's memory when it frees it."""
        self._context = self._sum = None

    def _budget(self, vector: Any) -> int:
        budget = self._context.decryptor().invariant_noise_budget
        return min(int(budget(ciphertext)) for ciphertext in vector.ciphertext())


# TenSEAL's and SEAL's serialized forms. Read: only what this process's own library wrote. Written: only constants,
# sizes known here, and checked coefficients.

_HEADER = struct.Struct("<HB2sBHQ")  # magic, size of this header, version, compression, reserved, size of all
_CIPHERTEXT = struct.Struct("<32sBQQQdQ")  # id of the parameters, NTT form, size, N, moduli, scale, correction factor
_COUNT = struct.Struct("<Q")
_MAGIC, _UNCOMPRESSED = 0xA15E, 0


@dataclass(frozen=True)
class _Library:
    """What SEAL calls our parameters, learnt once from objects made here."""

    parameters: bytes
    settings: bytes  # TenSEAL's flags and scale, encoded
    version: bytes
    key_parameters: bytes
    ciphertext_parameters: bytes

    def before(self, parameters: bytes, *, ntt: bool, moduli: int) -> tuple[bytes, bytes]:
        """(outer header, the rest) of what stands before two polynomials' coefficients, uncompressed."""
        count = 2 * moduli * SLOTS
        array = self._header(_COUNT.size + 8 * count) + _COUNT.pack(count)
        inner = _CIPHERTEXT.pack(parameters, ntt, 2, SLOTS, moduli, 1.0, 1) + array
        return self._header(len(inner) + 8 * count), inner

    def _header(self, following: int) -> bytes:
        return _HEADER.pack(_MAGIC, _HEADER.size, self.version, _UNCOMPRESSED, 0, _HEADER.size + following)


@lru_cache(maxsize=1)
def _library() -> _Library:
    context = _new_context()
    fields = _proto(context.serialize(False, False, False, False))
    sample = seal.BFVVector(context, [0] * SLOTS)
    return _Library(
        parameters=fields[1],
        settings=fields[2],
        version=fields[1][3:5],
        key_parameters=_parameters_id(context.public_key().parms_id()),
        ciphertext_parameters=_parameters_id(sample.ciphertext()[0].parms_id()),
    )


def _new_context() -> Any:
    moduli = [COEFFICIENT_MODULUS.bit_length(), SPECIAL_MODULUS.bit_length()]
    # One thread: a pool of them in every context would only wait, and would not survive a fork.
    return seal.TenSEALContext.new(
        seal.SCHEME_TYPE.BFV, SLOTS, PLAIN_MODULUS, moduli, seal.ENCRYPTION_TYPE.ASYMMETRIC, 1
    )


def _parameters_id(words: list[int]) -> bytes:
    return np.array(words, dtype="<u8").tobytes()


@lru_cache(maxsize=1)
def _before_chunk() -> tuple[bytes, bytes]:
    library = _library()
    return library.before(library.ciphertext_parameters, ntt=False, moduli=1)


def _loaded(context: Any, chunks: npt.NDArray[np.uint64]) -> Any:
    """A TenSEAL vector of checked ciphertexts; its sizes are ours."""
    before = b"".join(_before_chunk())
    tag = _field(2, before, more=CHUNK_BYTES)
    pieces: list[bytes | memoryview] = [_field(1, _varint(SLOTS) * len(chunks))]
    for chunk in chunks:
        pieces += (tag, chunk.data)
    return seal.BFVVector(context, b"".join(pieces))


def _coefficients(vector: Any) -> bytes | memoryview:
    """The bytes of one ciphertext of our own, where they stand in its serialized form."""
    written = memoryview(vector.serialize())
    _, inner = _before_chunk()
    # SEAL compresses, but random coefficients do not get smaller, and then zstd stores them as they are.
    if len(written) >= len(inner) + CHUNK_BYTES and written[-CHUNK_BYTES - len(inner) : -CHUNK_BYTES] == inner:
        return written[-CHUNK_BYTES:]
    return _coefficients_one_by_one(vector)


def _coefficients_one_by_one(vector: Any) -> bytes:
    (ciphertext,) = vector.ciphertext()
    return np.array([ciphertext[i] for i in range(CHUNK_BYTES // 8)], dtype="<u8").tobytes()


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _field(number: int, content: bytes, *, more: int = 0) -> bytes:
    """A length-delimited protobuf field, or its start where `more` bytes of content are still to follow."""
    return bytes([number << 3 | 2]) + _varint(len(content) + more) + content


def _proto(message: bytes) -> dict[int, bytes]:
    """The length-delimited fields at the start of a protobuf message that this process wrote."""
    fields, at = {}, 0
    while at < len(message) and message[at] & 7 == 2:
        number, at, length, shift = message[at] >> 3, at + 1, 0, 0
        while True:
            byte, at = message[at], at + 1
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        fields[number], at = message[at : at + length], at + length
    return fields
