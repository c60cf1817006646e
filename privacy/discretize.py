"""Float vector to integers and back: what secure aggregation adds up."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class FixedPoint:
    """A uniform grid: step ``2**-fraction_bits``, values saturated at ±``limit``.

    For vectors that already carry their noise (``privacy.noise = "local"``) or claim none: rounding is then
    post-processing and costs no privacy.

    Args:
        fraction_bits: binary digits after the point, 0 to 24.
        limit: the largest magnitude a coordinate keeps. Larger ones saturate.

    Guarantees:
        Every integer that ``encode`` returns has magnitude at most ``bound`` = floor(limit · 2**fraction_bits): it
        clips before it rounds, and rounding a number of magnitude ≤ b, b an integer, never exceeds b. So the sum of n
        encodings has magnitude at most n · bound, and a modulus above 2 · n · bound holds it without wrapping.
        ``decode`` checks that at run time. Between grid points the error is at most half a step a client.
    """

    fraction_bits: int
    limit: float

    def __post_init__(self) -> None:
        if not 0 <= self.fraction_bits <= 24:
            raise ValueError(f"fraction_bits must be in 0..24, got {self.fraction_bits}")
        if not (math.isfinite(self.limit) and 1 <= self.limit / self.step <= 2**53):
            raise ValueError(
                f"limit must be from one step (2**-{self.fraction_bits}) to 2**53 steps, which float64 counts one by "
                f"one, got {self.limit}"
            )

    @property
    def step(self) -> float:
        return 2.0**-self.fraction_bits

    @property
    def bound(self) -> int:
        """The largest magnitude of an encoded coordinate."""
        return math.floor(self.limit / self.step)

    def encode(self, vector: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.int64]:
        """int64[d] on the grid.

        Raises:
            ValueError: a coordinate is not finite. It would otherwise turn into an arbitrary integer in silence.
        """
        values = np.asarray(vector, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("the update has coordinates that are not finite: lower the learning rate, check the loss")
        scaled = np.clip(values, -self.limit, self.limit) / self.step  # the largest floats would overflow unclipped
        grid: NDArray[np.int64] = np.rint(np.clip(scaled, -self.bound, self.bound)).astype(np.int64)
        return grid

    def decode(self, total: NDArray[np.int64], *, summands: int) -> NDArray[np.float64]:
        """float64[d]: the mean of ``summands`` encoded vectors whose integer sum is ``total``.

        Raises:
            ValueError: the sum is larger than ``summands`` honest clients could make it.
        """
        if summands < 1:
            raise ValueError(f"summands must be at least 1, got {summands}")
        # From both sides: the absolute value of the most negative integer overflows.
        if total.size and max(int(total.max()), -int(total.min())) > summands * self.bound:
            raise ValueError(f"the sum exceeds {summands} × {self.bound}: some client sent more than its bound")
        return total.astype(np.float64) * (self.step / summands)
