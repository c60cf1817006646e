"""Releases beside the model: evaluation counts, and the mean and variance that features are standardised by.

Both are sums of small integer vectors, one for each record, so they go through the same secure sum with the same
shares of Skellam noise as an update does. No rotation and no random rounding: every record's own vector is rounded
before it is added, and its norm is known exactly.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .events import Skellam

_LEAST_VARIANCE = 1e-4  # of a feature scaled to [−1, 1]; noise can make an estimate negative


@dataclass(frozen=True, kw_only=True)
class Counts:
    """A table of counts over test records, such as (records, correct) or a histogram of scores by label.

    Args:
        cells: numbers in the table.
        cells_per_unit: how many of them one unit can move: 2 for (records, correct), 1 for a histogram.
        most_per_cell: by how much each: 1 for a record, k for a patient with at most k test records.

    Guarantees:
        One unit added or removed moves the counts by at most Δ₂² = cells_per_unit · most_per_cell² and Δ₁ =
        cells_per_unit · most_per_cell. What is computed from noised counts (accuracy, AUROC, a mean over sites, the
        choice of a round) is post-processing. Not covered: figures from un-noised counts beside them.
    """

    cells: int
    cells_per_unit: int
    most_per_cell: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.cells_per_unit <= self.cells:
            raise ValueError(f"cells_per_unit must be from 1 to cells = {self.cells}, got {self.cells_per_unit}")
        if self.most_per_cell < 1:
            raise ValueError(f"most_per_cell must be at least 1, got {self.most_per_cell}")

    @property
    def dim(self) -> int:
        return self.cells

    def event(self, *, share_variance: int, shares: int, colluders: int) -> Skellam:
        """What one release of the sum over sites is."""
        return Skellam(
            share_variance=share_variance,
            shares=shares,
            colluders=colluders,
            dim=self.cells,
            l2_squared=self.cells_per_unit * self.most_per_cell**2,
            l1=self.cells_per_unit * self.most_per_cell,
        )

    def variance(self, noise_multiplier: float) -> int:
        """μ for a noise of z times what one unit can move."""
        return math.ceil(noise_multiplier**2 * self.cells_per_unit * self.most_per_cell**2)


@dataclass(frozen=True, kw_only=True)
class Standardisation:
    """Noised mean and standard deviation of every feature over all sites.

    A record counts as (1, u, 2u² − 1), with u each feature scaled from its public range to [−1, 1] and held there; an
    empty value counts as the middle of its range. Each part is rounded to `steps` integer steps on its own.

    Args:
        lower, upper: float64[features], public ranges; never the smallest and largest value seen.
        steps: integer steps per unit.

    Guarantees:
        With f features, one record added or removed moves the sum by at most Δ₂ = steps · √(2f + 1), Δ₁ = steps ·
        (2f + 1). A patient with at most k records moves it by k times that. `decode` sees the noised sum alone.
    """

    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    steps: int = 64

    def __post_init__(self) -> None:
        if self.lower.shape != self.upper.shape or self.lower.ndim != 1:
            raise ValueError(f"lower and upper must be float64[features], got {self.lower.shape}, {self.upper.shape}")
        if not (np.isfinite(self.lower).all() and np.isfinite(self.upper).all() and (self.lower < self.upper).all()):
            raise ValueError("every feature needs a finite public range with lower < upper")
        if not 1 <= self.steps <= 2**20:
            raise ValueError(f"steps must be from 1 to 2^20, got {self.steps}")

    @property
    def dim(self) -> int:
        return 2 * len(self.lower) + 1

    def encode(self, table: NDArray[np.float64]) -> NDArray[np.int64]:
        """int64[dim]: the sum over the records of `table` float64[n, features], NaN for an empty value."""
        middle, half = (self.upper + self.lower) / 2, (self.upper - self.lower) / 2
        with np.errstate(over="ignore"):
            scaled = np.clip((np.asarray(table, dtype=np.float64) - middle) / half, -1.0, 1.0)
        scaled = np.nan_to_num(scaled, nan=0.0)
        parts = np.concatenate([np.ones((len(scaled), 1)), scaled, 2 * scaled**2 - 1], axis=1)
        rounded = np.rint(parts * self.steps).astype(np.int64)
        total: NDArray[np.int64] = rounded.sum(axis=0)
        return total

    def event(self, *, share_variance: int, shares: int, colluders: int, max_records: int = 1) -> Skellam:
        """What one release of the sum over sites is, for one record, or for a patient with at most `max_records`."""
        most = self.steps * max_records
        return Skellam(
            share_variance=share_variance,
            shares=shares,
            colluders=colluders,
            dim=self.dim,
            l2_squared=self.dim * most**2,
            l1=self.dim * most,
        )

    def variance(self, noise_multiplier: float, max_records: int = 1) -> int:
        """μ for a noise of z times what one unit can move."""
        return math.ceil(noise_multiplier**2 * self.dim * (self.steps * max_records) ** 2)

    def decode(self, total: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation float64[features] each, in the features' own units, from the noised sum."""
        features = len(self.lower)
        scaled = total.astype(np.float64) / self.steps
        number = max(1.0, float(scaled[0]))
        mean = np.clip(scaled[1 : features + 1] / number, -1.0, 1.0)
        square = (np.clip(scaled[features + 1 :] / number, -1.0, 1.0) + 1) / 2
        deviation = np.sqrt(np.maximum(square - mean**2, _LEAST_VARIANCE))
        middle, half = (self.upper + self.lower) / 2, (self.upper - self.lower) / 2
        return middle + half * mean, half * deviation
