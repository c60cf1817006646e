"""Flatten a vector, then round it to integers at random without lengthening it: what distributed noise is added to.

Rounding d coordinates to integers can lengthen a vector by √d/2 and more, and noise is calibrated to length. Kairouz,
Liu and Steinke 2021 ("The Distributed Discrete Gaussian Mechanism", §4) make both small: a random rotation spreads a
few large coordinates over all, and rounding that came out too long is drawn again.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32] | NDArray[np.float64]

_MOST_SIDE = 64  # blocks of 64² = 4096: below 1 % of padding from 400,000 coordinates on
_MOST_DRAWS = 1000


@dataclass(frozen=True)
class Rotation:
    """Random signs, then a Walsh–Hadamard transform of every block; padded with zeros to whole blocks.

    Args:
        dim: coordinates of the vectors.
        seed: what the signs come from (SHAKE-256). Public, and the same for all who add up their vectors.

    Guarantees:
        ``rotate`` is linear and keeps the L2 norm, ``restore`` undoes it, both up to float64 rounding (relative 1e-12).
        With signs independent of the vector, a rotated coordinate of a block of B is above t·‖block‖/√B in magnitude
        with probability at most 2·exp(−t²/2) (Hoeffding). Not promised: flatness across blocks, or against someone
        who chooses a vector after seeing the seed.
    """

    dim: int
    seed: bytes

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1, got {self.dim}")

    @property
    def side(self) -> int:
        """√B, a power of two up to 64."""
        return min(_MOST_SIDE, 1 << math.ceil(math.log2(self.dim) / 2))

    @property
    def padded_dim(self) -> int:
        """Coordinates after rotation: ``dim`` rounded up to whole blocks."""
        block = self.side**2
        return -(-self.dim // block) * block

    def rotate(self, vector: Floats) -> NDArray[np.float64]:
        """float64[padded_dim] from float[dim]."""
        if vector.shape != (self.dim,):
            raise ValueError(f"vector must have shape ({self.dim},), got {vector.shape}")
        padded = np.zeros(self.padded_dim)
        padded[: self.dim] = vector
        return self._transform(padded * self._signs())

    def restore(self, rotated: Floats) -> NDArray[np.float64]:
        """float64[dim] from float[padded_dim]."""
        if rotated.shape != (self.padded_dim,):
            raise ValueError(f"rotated must have shape ({self.padded_dim},), got {rotated.shape}")
        return (self._transform(np.asarray(rotated, dtype=np.float64)) * self._signs())[: self.dim]

    def _signs(self) -> NDArray[np.float64]:
        data = hashlib.shake_256(b"privfed/rotation/1" + self.seed).digest(-(-self.padded_dim // 8))
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=self.padded_dim)
        return 1.0 - 2.0 * bits.astype(np.float64)

    def _transform(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        # The Hadamard matrix of B = side² is the Kronecker product of two of `side`: two small matrix products do.
        matrix = _hadamard(self.side)
        blocks = values.reshape(-1, self.side, self.side)
        transformed: NDArray[np.float64] = (matrix @ blocks @ matrix / self.side).reshape(-1)
        return transformed


@dataclass(frozen=True)
class ConditionalRounding:
    """Vectors of L2 norm at most ``max_norm`` as integer vectors of L2 norm at most ``l2_bound``.

    Args:
        rotation: applied before rounding.
        max_norm: C; a longer vector is scaled down to it.
        scale: s, integer steps per unit. About 10·√d keeps the rounding's share of the length near 1 %.
        beta: chance that one rounding is too long and drawn again, at most; in (0, 1).

    Guarantees:
        - Every integer vector ``encode`` returns has a squared L2 norm of at most ⌊l2_bound²⌋, computed in exact
          integers after rounding: no float error, rotation or draw can break it. So Δ₂ of adding or removing a whole
          client is ``l2_bound`` and Δ₁ is ``l1_bound``; of replacing one, twice that.
        - Not promised: an exact mean. One draw has the rotated vector's mean; drawing again favours shorter vectors,
          by a bias the paper bounds for β well below 1.
        - Not promised: anything about one *record* inside a client's vector. Redrawing depends on the whole vector;
          use ``round_at_random`` and ``record_l2_bound`` there.
    """

    rotation: Rotation
    max_norm: float
    scale: float
    beta: float = math.exp(-0.5)

    def __post_init__(self) -> None:
        for name, value in (("max_norm", self.max_norm), ("scale", self.scale)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must be in (0, 1), got {self.beta}")
        if self.l2_bound < 1:
            raise ValueError(f"scale must make room for one step, got {self.scale} for max_norm {self.max_norm}")
        if self.l2_bound >= 2**30:
            raise ValueError(f"scale must keep l2_bound below 2^30, got {self.l2_bound:g}; lower it")

    @property
    def l2_bound(self) -> float:
        """min{Cs + √d, √((Cs)² + d/4 + √(2 ln(1/β))·(Cs + √d/2))}, d the padded dimension."""
        length, d = self.max_norm * self.scale, self.rotation.padded_dim
        probable = length**2 + d / 4 + math.sqrt(2 * math.log(1 / self.beta)) * (length + math.sqrt(d) / 2)
        return min(length + math.sqrt(d), math.sqrt(probable))

    @property
    def l1_bound(self) -> float:
        """min{√d·Δ₂, Δ₂²}: the second because the coordinates are integers."""
        return min(math.sqrt(self.rotation.padded_dim) * self.l2_bound, self.l2_bound**2)

    @property
    def bound(self) -> int:
        """The largest magnitude of one encoded coordinate, before noise: no coordinate is longer than its vector."""
        return math.floor(self.l2_bound)

    def encode(self, vector: Floats, randomness: np.random.Generator) -> NDArray[np.int64]:
        """int64[padded_dim].

        Args:
            vector: float[dim], finite.
            randomness: for rounding. The norm bound does not rest on it.

        Raises:
            ValueError: wrong shape, or a coordinate that is not finite.
        """
        wide = np.asarray(vector, dtype=np.float64)
        if not np.isfinite(wide).all():
            raise ValueError("the update has coordinates that are not finite: lower the learning rate, check the loss")
        # A millionth below C, so that float error in the norm or the rotation costs no redraw.
        longest = self.max_norm * (1 - 1e-6)
        norm = float(np.linalg.norm(wide))
        scaled = self.rotation.rotate(wide * min(1.0, longest / norm) if norm > 0 else wide) * self.scale
        limit = math.floor(self.l2_bound**2)
        for _ in range(_MOST_DRAWS):
            rounded = round_at_random(scaled, randomness)
            # Exact: below 2^30 each, so that a square is below 2^60, and the limit is below 2^60 as well.
            if int(np.abs(rounded).max()) <= self.bound and sum(_squares(rounded)) <= limit:
                return rounded
        raise AssertionError(f"{_MOST_DRAWS} roundings in a row were too long, each with probability below {self.beta}")

    def decode(self, total: NDArray[np.int64], *, summands: int) -> NDArray[np.float64]:
        """float64[dim]: the mean of ``summands`` encoded vectors, noise and all, whose integer sum is ``total``."""
        if summands < 1:
            raise ValueError(f"summands must be at least 1, got {summands}")
        return self.rotation.restore(total.astype(np.float64)) / (self.scale * summands)


def round_at_random(values: NDArray[np.float64], randomness: np.random.Generator) -> NDArray[np.int64]:
    """int64: each value rounded up with the chance of its fraction, so that its mean is the value.

    One dither u ∈ [0, 1) a coordinate, ⌊value + u⌋: with the same dithers, vectors that differ by g in a coordinate are
    rounded to integers that differ by less than |g| + 1.
    """
    rounded: NDArray[np.int64] = np.floor(values + randomness.random(values.shape)).astype(np.int64)
    return rounded


def record_l2_bound(max_record_norm: float, scale: float, padded_dim: int) -> float:
    """Cs + √d: Δ₂ of one record of norm ≤ C that is a summand of a vector rounded once by ``round_at_random``.

    Guarantees:
        For neighbours that differ in one record, coupled by equal dithers, the rounded vectors differ by at most this
        in L2: s·g, and less than 1 in every coordinate. It holds for every dither, so also for dithers somebody knows.
        In real arithmetic: clip records to C(1 − 1e-6), which leaves room for float64 in coordinates below 2^30.
    """
    return max_record_norm * scale + math.sqrt(padded_dim)


def _squares(values: NDArray[np.int64]) -> list[int]:
    """Sums of squares of pieces short enough that none overflows; Python integers, to be summed exactly."""
    most = int(np.abs(values).max()) if values.size else 0
    piece = max(1, 2**62 // max(1, most**2))
    return [int(np.dot(part, part)) for part in np.split(values, range(piece, len(values), piece))]


def _hadamard(side: int) -> NDArray[np.float64]:
    """Sylvester's matrix of ±1."""
    matrix = np.ones((1, 1))
    while len(matrix) < side:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
