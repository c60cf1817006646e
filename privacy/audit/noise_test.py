"""Level 2: is the noise what is booked? The self-tests of selftest.py, and one for real numbers, as an audit."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, kstest, norm

from ..selftest import SelfTestFailed
from .result import Audit, verdict_of

_FALSE_ALARM = 1e-6  # of one statistic, as in selftest.py
STATISTICS = 4  # of one stream of noise: mean, spread, shape, each coordinate


def check_gaussian(residual: NDArray[np.float64], deviation: float, *, what: str = "the noise") -> None:
    """Tests numbers that should be N(0, deviation²): their variance, their mean and their shape.

    Raises:
        SelfTestFailed: with the check that failed. Sound noise fails with a probability of about 3e-6.
    """
    values = np.asarray(residual, np.float64) / deviation
    threshold = float(norm.isf(_FALSE_ALARM / 2))
    spread = float(np.mean(values**2))
    size = len(values)
    if not chi2.ppf(_FALSE_ALARM / 2, size) <= spread * size <= chi2.isf(_FALSE_ALARM / 2, size):
        raise SelfTestFailed(f"{what} has {spread:.4g} times the variance booked")
    score = float(np.mean(values)) * math.sqrt(size)
    if abs(score) > threshold:
        raise SelfTestFailed(f"{what} has a mean of {score:+.1f} standard errors, and should have none")
    chance = float(kstest(values, "norm").pvalue)
    if chance < _FALSE_ALARM:
        raise SelfTestFailed(f"{what} does not follow the normal law (Kolmogorov–Smirnov: p = {chance:.1g})")


def check_coordinates(releases: NDArray[np.float64], deviation: float, *, what: str = "the noise") -> None:
    """Tests that no coordinate of releases float64[k, P] has less noise than N(0, deviation²): a head without any hides
    among the many numbers of a body. For shares of noise of a variance of 100 and more, which are as good as normal.

    Raises:
        SelfTestFailed: with the number of coordinates. Sound noise fails with a probability of about 1e-6.
    """
    count, size = releases.shape
    spread = np.sum((releases / deviation) ** 2, axis=0)
    quiet = int((spread < chi2.ppf(_FALSE_ALARM / size, count)).sum())
    if quiet:
        raise SelfTestFailed(f"{what} is missing or too small in {quiet} of {size} coordinates")


def check_streams(streams: Sequence[NDArray[np.float64]], *, what: str = "the noises") -> None:
    """Tests that no two parties' noise is correlated: a seed in two places, or noise that cancels.

    Raises:
        SelfTestFailed: with the largest correlation. Sound noise fails with a probability of about 1e-6.
    """
    if len(streams) < 2:
        return
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = np.asarray(np.corrcoef(np.stack(streams)))
    np.fill_diagonal(matrix, 0.0)
    pairs = len(streams) * (len(streams) - 1) / 2
    largest = float(np.abs(np.nan_to_num(matrix, nan=1.0)).max())
    # √n artanh r is normal at any length; √n r only at great ones
    score = math.atanh(min(largest, 1 - 1e-15)) * math.sqrt(max(1, len(streams[0]) - 3))
    if score > float(norm.isf(_FALSE_ALARM / pairs / 2)):
        raise SelfTestFailed(f"{what} of two sites have a correlation of {largest:.3f}: a seed stands in two places")


def audit(
    checks: Mapping[str, Callable[[], None]],
    *,
    name: str,
    size: int,
    statistics: int,
    claimed_epsilon: float | None,
    delta: float | None,
    seed: int,
    note: str = "",
) -> Audit:
    """All checks as one audit: a violation if one fails. It gives no bound of ε.

    Args:
        checks: name → raises `SelfTestFailed`.
        size: coordinates of noise in the smallest check; the power is computed from it.
        statistics: how many all checks together look at: each is wrong about sound noise with a probability of 1e-6.

    Guarantees:
        Sound noise is called a violation with probability at most 1 − confidence.
    """
    failed = []
    for what, check in checks.items():
        try:
            check()
        except SelfTestFailed as failure:
            failed.append(f"{what}: {failure}")
    power = _power(size)
    said = "; ".join(failed) if failed else f"{len(checks)} checks passed: {', '.join(checks)}"
    return Audit(
        level=2,
        name=name,
        claimed_epsilon=claimed_epsilon,
        delta=delta,
        epsilon_lower=0.0,
        confidence=1 - min(1.0, _FALSE_ALARM * statistics),
        trials=size,
        verdict=verdict_of(rejected=bool(failed), claimed_epsilon=claimed_epsilon, power=power),
        note=f"{said}. {note}".strip(),
        seeds=(seed,),
        power=power,
        figures={"checks": len(checks), "failed": len(failed)},
    )


def _power(size: int) -> float:
    """P that the variance test rejects noise of half the deviation."""
    return float(chi2.cdf(4 * chi2.ppf(_FALSE_ALARM / 2, size), size))
