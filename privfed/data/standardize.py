"""Numbers on a common scale, from ranges that are public.

Means and deviations of the records would be a release of their own. A declared range is not: it comes from a data
dictionary or from medicine, the same for every site, whoever is in the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Numeric:
    """A numeric column.

    Args:
        name: its header.
        low, high: the public range. Values outside are taken as the nearer end.
        typical: a public typical value; the middle of the range where none is known.
    """

    name: str
    low: float
    high: float
    typical: float | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"column {self.name!r}: range must be [low, high] with low < high")


def standardize(values: NDArray[np.float64], columns: Sequence[Numeric]) -> NDArray[np.float32]:
    """float32[n, F]: 4 (x − typical) / (high − low) with x clipped to the range: unit spread where it spans 4 sd."""
    low = np.array([column.low for column in columns])
    high = np.array([column.high for column in columns])
    typical = np.array([(c.low + c.high) / 2 if c.typical is None else c.typical for c in columns])
    scaled: NDArray[np.float32] = (4 * (np.clip(values, low, high) - typical) / (high - low)).astype(np.float32)
    return scaled
