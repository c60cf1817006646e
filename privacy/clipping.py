"""A clip that follows the gradients: Andrew, Thakkar, McMahan and Ramaswamy 2021, "Differentially Private Learning with
Adaptive Clipping", Algorithm 1.

Beside the clipped sum, each round releases how many units were below the clip. That count is a release like any other:
it is noised, and its cost is part of the round's event.
"""

import math
from dataclasses import dataclass

from .events import PoissonGaussian


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """The public constants of an adaptive clip.

    Args:
        noise_multiplier: z, of the whole round: what the sum and the count cost together.
        count_noise: σ_b, the standard deviation of the noise on the count, in units. The paper takes a twentieth of
            the expected batch size.
        quantile: γ, the share of units that shall be below the clip.
        learning_rate: η, of the logarithm of the clip.
        expected_batch_size: the public denominator; never the number of units drawn.

    Guarantees:
        One unit moves the pair (Σ clipped/C, 2·Σ(b − ½)) by at most 1 in each part: b − ½ is ±½, where b itself would
        be 0 or 1 and an absent unit would count as one above the clip. With z_Δ = (z⁻² − (2σ_b)⁻²)^(−1/2) on the sum
        and σ_b on the count, both together are one Gaussian release of noise multiplier z. The clip of the next round
        is a function of releases alone.
    """

    noise_multiplier: float
    count_noise: float
    quantile: float = 0.5
    learning_rate: float = 0.2
    expected_batch_size: float

    def __post_init__(self) -> None:
        for name in ("noise_multiplier", "count_noise", "learning_rate", "expected_batch_size"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile must be in (0, 1), got {self.quantile}")
        if 2 * self.count_noise <= self.noise_multiplier:
            raise ValueError(
                f"count_noise must be above noise_multiplier / 2 = {self.noise_multiplier / 2:g}, got "
                f"{self.count_noise:g}: the count alone would spend the whole round"
            )

    @property
    def sum_noise_multiplier(self) -> float:
        """z_Δ, above z: what the sum's noise must be so that the round costs z."""
        return 1 / math.sqrt(self.noise_multiplier**-2 - (2 * self.count_noise) ** -2)

    def event(self, sample_rate: float) -> PoissonGaussian:
        """What one round costs, count included."""
        return PoissonGaussian(sample_rate, self.noise_multiplier)

    @staticmethod
    def count(below: int, above: int) -> float:
        """Σ(b − ½) over the units of a draw: the number to which noise of standard deviation σ_b is added."""
        return (below - above) / 2

    def next_clip(self, clip: float, noised_count: float) -> float:
        """C · exp(−η · (b̄ − γ)), with b̄ = noised_count / expected_batch_size + ½ held to [0, 1].

        Args:
            clip: C of this round.
            noised_count: `count` plus noise, as released.
        """
        fraction = min(1.0, max(0.0, noised_count / self.expected_batch_size + 0.5))
        return clip * math.exp(-self.learning_rate * (fraction - self.quantile))
