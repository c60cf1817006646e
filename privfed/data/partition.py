"""Cutting one table into simulated sites."""

import numpy as np
from numpy.typing import NDArray


def skewed_sites(labels: NDArray[np.int64], sites: int, *, skew: float, seed: int) -> NDArray[np.int64]:
    """int64[n]: a site for each record, with unequal sizes and shifted label rates.

    Site sizes fall linearly (the first is three times the last); the odds of label 1 rise from the first to the last
    site by a factor ``skew``. Real hospitals differ in both.

    Args:
        labels: int64[n] in {0, 1}.
        sites: number of sites.
        skew: ≥ 1; 1 is none.
        seed: public.
    """
    randomness = np.random.default_rng(seed)
    size = np.linspace(3.0, 1.0, sites)
    tilt = skew ** np.linspace(-0.5, 0.5, sites)
    site = np.empty(len(labels), dtype=np.int64)
    for label, odds in ((0, 1 / np.sqrt(tilt)), (1, np.sqrt(tilt))):
        rows = np.flatnonzero(labels == label)
        share = size * odds
        site[rows] = randomness.choice(sites, size=len(rows), p=share / share.sum())
    return site
