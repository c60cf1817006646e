"""A clip that follows the updates: Andrew, Thakkar, McMahan and Ramaswamy 2021, "Differentially Private Learning with
Adaptive Clipping", Algorithm 1.

Beside the clipped sum, each round releases how many units were below the clip. That count is a release like any other:
it is noised, and its cost is part of the round's event. Here it is one more coordinate of the vector that the secure
sum adds up: a site sends ±a, and every coordinate gets the same noise.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .noise import derive_key, generator
from .rotation import Floats
from .shared import ClientSum, client_sum

SMALLEST, LARGEST = 1e-6, 1e6  # what a clip is held to, as one that is configured


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """The public constants of an adaptive clip.

    Args:
        noise_multiplier: z, of the whole round: what the sum and the count cost together.
        count_noise: σ_b, the standard deviation of the noise on the count, in units.
        quantile: γ, the share of units that shall be below the clip.
        learning_rate: η, of the logarithm of the clip.

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

    def __post_init__(self) -> None:
        for name in ("noise_multiplier", "count_noise", "learning_rate"):
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

    @classmethod
    def for_units(cls, units: int, noise_multiplier: float, *, quantile: float, learning_rate: float) -> Self:
        """With the paper's σ_b, a twentieth of the units, and never less than z: among few units the count would take
        most of the round. At σ_b = z it takes a quarter, and the sum gets 15 % more noise."""
        return cls(
            noise_multiplier=noise_multiplier,
            count_noise=max(units / 20, noise_multiplier),
            quantile=quantile,
            learning_rate=learning_rate,
        )

    @property
    def sum_noise_multiplier(self) -> float:
        """z_Δ, above z: what the sum's noise must be so that the round costs z."""
        return 1 / math.sqrt(self.noise_multiplier**-2 - (2 * self.count_noise) ** -2)

    def next_clip(self, clip: float, noised_count: float, units: int) -> float:
        """C · exp(−η · (b̄ − γ)), with b̄ = noised_count / units + ½ held to [0, 1].

        Args:
            clip: C of this round.
            noised_count: Σ(b − ½) plus noise, as released.
            units: how many are counted: public.
        """
        fraction = min(1.0, max(0.0, noised_count / units + 0.5))
        return min(LARGEST, max(SMALLEST, clip * math.exp(-self.learning_rate * (fraction - self.quantile))))


@dataclass(frozen=True, kw_only=True)
class AdaptiveSum(ClientSum):
    """Sums of whole sites' vectors in units of a clip, and of how many of them were shorter than it.

    Args:
        clip: C of this round. No cost depends on it.
        count_steps: a; a site's last coordinate is +a if its vector was at most C long, −a otherwise.

    Guarantees:
        As of `SharedSum`. One site moves the integers by at most ‖·‖₂² ≤ ⌊l2_bound²⌋ of the rounded vector and a²
        of the count, which is what `event` has: with noise μ in every coordinate, a is what makes σ_b = √μ / 2a.
    """

    clip: float
    count_steps: int

    @property
    def dim(self) -> int:
        return self.rotation.padded_dim + 1

    def encode(self, vector: Floats, key: bytes) -> NDArray[np.int64]:
        wide = np.asarray(vector, dtype=np.float64) / self.clip
        if not np.isfinite(wide).all():
            wide = np.zeros_like(wide)
        rounded = self.rounding.encode(wide, generator(derive_key(key, b"rounding")))
        count = self.count_steps if np.linalg.norm(wide) <= 1.0 else -self.count_steps
        return self._noised(np.append(rounded, count), key)

    def encode_nothing(self, key: bytes) -> NDArray[np.int64]:
        share = self.encode(np.zeros(self.rotation.dim), key)
        share[-1] -= self.count_steps
        return share

    def decode(self, total: NDArray[np.int64], *, summands: int) -> NDArray[np.float64]:
        return super().decode(total[:-1], summands=summands) * self.clip

    def count(self, total: NDArray[np.int64]) -> float:
        """Σ(b − ½) over the sites of a noised sum int64[dim], with noise of standard deviation σ_b or more."""
        return float(total[-1]) / (2 * self.count_steps)


def adaptive_sum(
    parameters: int,
    *,
    clip: float,
    rule: AdaptiveClip,
    minimum_cohort: int,
    colluders: int,
    sites: int,
    most_bits: int,
    seed: bytes,
    at_server: bool = False,
) -> AdaptiveSum:
    """`client_sum` with a count. Vectors are scaled to a clip of 1 first, so that every C gives the same integers.

    Raises:
        NoGuarantee: as of `client_sum`.
    """
    plain = client_sum(
        parameters,
        noise_multiplier=rule.sum_noise_multiplier,
        max_update_norm=1.0,
        minimum_cohort=minimum_cohort,
        colluders=colluders,
        sites=sites,
        most_bits=most_bits,
        seed=seed,
        at_server=at_server,
    )
    # Rounded down, so that the count has σ_b or a little more noise, and the sum a little more of the round
    steps = max(1, math.floor(rule.sum_noise_multiplier * plain.noise.steps / (2 * rule.count_noise)))
    noise = replace(
        plain.noise,
        dim=plain.noise.dim + 1,
        l2_bound=math.sqrt(math.floor(plain.noise.l2_bound**2) + steps**2),
        l1_bound=plain.rounding.l1_bound + steps,
    )
    return AdaptiveSum(
        rotation=plain.rotation,
        scale=plain.scale,
        noise=noise,
        limit=plain.limit,
        at_server=at_server,
        rounding=plain.rounding,
        clip=clip,
        count_steps=steps,
    )
