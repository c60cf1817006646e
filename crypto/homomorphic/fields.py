"""Balanced signed fields: several small integers in one plaintext slot of a ciphertext, and slots blinded one by one.

A slot holds v₀ + v₁·2^w + v₂·2^2w modulo the plaintext modulus t. Adding slots adds every field, and as long as no
field's sum leaves (−2^(w−1), 2^(w−1)) the balanced digits of the sum, base 2^w, are the fields' sums.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..aggregation import Session
from ..errors import SumOutOfRange
from ..packing import IntVector
from ..packing import encode as check_range
from ..prg import Entropy, expand

Slots = npt.NDArray[np.int64]
"""int64[chunks · 4096]: residues modulo t as balanced representatives, in (−t/2, t/2)."""

SLOTS = 4096
"""Slots of one ciphertext: BFV's ring dimension N, all of it with batching."""

PLAIN_MODULUS = 4_398_046_486_529
"""t, the largest 42-bit prime with t ≡ 1 mod 2N, so that plaintexts have N independent slots."""

PLAIN_BITS = 42
GUARD_BITS = 1

MAX_CLIENTS = 64
"""A fresh ciphertext passes with a noise budget of 10 bits, a sum is released with 4 (`bfv`): in the worst case 64
summands cost log₂ 64 = 6 bits, so ciphertexts that pass alone can never spoil a sum together."""


@dataclass(frozen=True)
class Layout:
    """Where the coordinates of a vector are: field j of slot s holds coordinate j·⌈dim/fields⌉ + s.

    Attributes:
        dim: coordinates.
        fields: per slot: 3, 2 or 1, the most that the sums leave room for.
    """

    dim: int
    fields: int

    @property
    def width(self) -> int:
        """w, bits of a field: 14, 21 or 42."""
        return PLAIN_BITS // self.fields

    @property
    def used(self) -> int:
        """Slots that hold coordinates; the rest of the last ciphertext is zero."""
        return -(-self.dim // self.fields)

    @property
    def chunks(self) -> int:
        """Ciphertexts of a vector."""
        return -(-self.used // SLOTS)


def largest_sum(fields: int) -> int:
    """The largest magnitude that the sum of one field may have: a quarter of the field, its sign and guard bit."""
    return 1 << (PLAIN_BITS // fields - 1 - GUARD_BITS)


def layout_of(dim: int, *, bound: int, n: int) -> Layout:
    """The layout with the most fields that hold the sum of n values of magnitude `bound` and a guard bit.

    Raises:
        ValueError: more clients than the noise budget allows, or no field is wide enough; with what would fit.
    """
    if n > MAX_CLIENTS:
        raise ValueError(
            f"homomorphic aggregation adds up at most {MAX_CLIENTS} clients within its noise budget, got {n}; split "
            "the cohort or use masked aggregation"
        )
    for fields in (3, 2, 1):
        if n * bound <= largest_sum(fields):
            return Layout(dim, fields)
    sizes = ", ".join(f"{largest_sum(fields) // n} with {fields}" for fields in (1, 2, 3))
    raise ValueError(
        f"bound must leave a guard bit for the sum of {n} clients, got {bound}; at most (by fields in a slot): {sizes}"
    )


def pack(vector: IntVector, layout: Layout, session: Session) -> Slots:
    """The slots of one client's vector, zeros in the unused ones.

    Raises:
        TypeError: not a vector of signed integers; floats, NaN among them, are never truncated.
        ValueError: wrong shape, or a value beyond the session's bound. The value itself is never shown.
    """
    # Checked by the same code as for masks: an input that one aggregation takes or refuses, the other does too.
    check_range(vector, dim=session.dim, bound=session.bound, bits=session.bits)
    slots = np.zeros(layout.chunks * SLOTS, dtype=np.int64)
    slots[: layout.used] = vector[: layout.used]
    for field in range(1, layout.fields):
        part = vector[field * layout.used : (field + 1) * layout.used]
        slots[: len(part)] += np.left_shift(part, field * layout.width, dtype=np.int64)
    return slots


def unpack(slots: Slots, layout: Layout, *, limit: int) -> npt.NDArray[np.int64]:
    """int64[dim]: the fields of a sum.

    Raises:
        SumOutOfRange: a field beyond ±limit, or a slot or field that holds no coordinate and is not zero: some
            ciphertext was not the encryption of an input in range, or not all blinds were taken off.
    """
    rest, values = slots, np.zeros(layout.fields * layout.used, dtype=np.int64)
    half, mask = 1 << (layout.width - 1), (1 << layout.width) - 1
    for field in range(layout.fields - 1):
        digit = ((rest + half) & mask) - half
        values[field * layout.used : (field + 1) * layout.used] = digit[: layout.used]
        rest = (rest - digit) >> layout.width
    values[(layout.fields - 1) * layout.used :] = rest[: layout.used]
    beyond = int(values.max()) > limit or int(values.min()) < -limit
    if beyond or values[layout.dim :].any() or slots[layout.used :].any():
        raise SumOutOfRange(f"a field of the sum is beyond ±{limit}: a client's ciphertext held no input in range")
    return values[: layout.dim]


def uniform(stream: Entropy, count: int) -> Slots:
    """int64[count], each uniform in [0, t): 42-bit words of the stream, drawn again where they are t or more."""
    drawn = _words(stream, count)
    while len(again := np.flatnonzero(drawn >= PLAIN_MODULUS)):
        drawn[again] = _words(stream, len(again))
    return drawn


def _words(stream: Entropy, count: int) -> Slots:
    return np.frombuffer(stream(8 * count), dtype="<i8") & ((1 << PLAIN_BITS) - 1)


def blind(key: bytes, th: bytes, layout: Layout) -> Slots:
    """int64[chunks · 4096]: r = PRG(k), uniform modulo t in every slot, also in those without a coordinate."""
    return uniform(expand(key, session_id=th, label="heagg/1 blind"), layout.chunks * SLOTS)


def balanced(residues: Slots) -> Slots:
    """The representatives in (−t/2, t/2), in place, of numbers in (−3t/2, 3t/2)."""
    half = PLAIN_MODULUS // 2
    # Multiplied and not chosen by `where`: without a branch for each number, that takes a quarter of the time.
    residues -= PLAIN_MODULUS * (residues > half)
    residues += PLAIN_MODULUS * (residues < -half)
    return residues
