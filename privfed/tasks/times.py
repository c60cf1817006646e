"""Times to an event, of which some were cut short."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .task import Labels

SOONEST = 1e-6
"""The earliest time that is told from none: an event at time 0 comes right after the start."""


def signed_times(labels: Labels, event: str, events: Sequence[str]) -> NDArray[np.float32]:
    """float32[n]: the time of an event as t, that of a record lost before it as −t (the convention of XGBoost's
    ``survival:cox``); NaN where time or event is missing.
    """
    times = np.maximum(labels.numbers(), SOONEST)
    happened = labels.among(event, events)
    signed: NDArray[np.float32] = np.where(happened == 1, times, -times).astype(np.float32)
    signed[~(np.isfinite(happened) & np.isfinite(times))] = np.nan
    return signed


def concordance(risk: NDArray[np.float64], times: NDArray[np.float64]) -> float | None:
    """Harrell's C: of the pairs whose order is known, the share in which the earlier event had the higher risk.

    A pair is known if the earlier time is an event's, or if of equal times one is an event's and the other is not.
    Equal risks count half. Harrell et al. 1982.

    Args:
        risk: float64[n].
        times: float64[n], signed as of `signed_times`.

    Returns:
        None where no pair is known.
    """
    at, happened = np.abs(times), times > 0
    right = known = 0.0
    for one in np.flatnonzero(happened):
        later = (at > at[one]) | ((at == at[one]) & ~happened)
        known += int(later.sum())
        right += float((risk[one] > risk[later]).sum() + 0.5 * (risk[one] == risk[later]).sum())
    return right / known if known else None
