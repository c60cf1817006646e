"""Is the noise there, and is it what is booked? Statistical tests that a broken mechanism does not pass.

A hash chain proves that nobody edited the ledger, not that noise was added. These checks need no secret beyond what
their caller holds: a site tests its own sampler, an auditor with test keys tests shares, sums and settings.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, norm

from .errors import PrivacyError
from .events import Skellam
from .noise import new_key
from .skellam import share, table

_FALSE_ALARM = 1e-6  # probability that a sound mechanism fails one check
_CELLS = 16
_MIN_EXPECTED = 20.0  # of a cell, for χ² to be near its limit law


class SelfTestFailed(PrivacyError):
    """The noise is not what the ledger says. Stop: what was released may be worth no protection at all."""


def check_sampler(variance: int, key: bytes, *, size: int = 1 << 16) -> None:
    """Draws a share that is thrown away, and tests its law.

    Args:
        variance: of a share.
        key: 32 bytes, of no other use.

    Raises:
        SelfTestFailed: with the check that failed.
    """
    check_noise(share(key, size, variance), variance, what="the sampler")


class SelfTest:
    """`check_encoding` of each way of making a share, once. Simulated sites have one in common: it tests no secret."""

    def __init__(self) -> None:
        self._passed: set[tuple[type, int]] = set()

    def ensure(self, kind: type, encode: Callable[[bytes], NDArray[np.int64]], variance: int) -> None:
        """Returns if encodings of this kind, with a share of this variance, pass or have passed.

        Raises:
            SelfTestFailed: they do not.
        """
        if (kind, variance) not in self._passed:
            check_encoding(encode, variance)
            self._passed.add((kind, variance))


def check_encoding(encode: Callable[[bytes], NDArray[np.int64]], variance: int, *, size: int = 1 << 11) -> None:
    """Tests that what a site sends carries its share of noise, and another one under another key.

    Args:
        encode: a key of 32 bytes → the encoding of a vector of zeros, which is its share and nothing else.
        variance: of a share, as it is booked.
        size: coordinates that are looked at, at least.

    Raises:
        SelfTestFailed: twice in a row, with the check that failed. A sound mechanism does so once in 10¹⁰ times.
    """
    try:
        _check_encoding(encode, variance, size)
    except SelfTestFailed:
        _check_encoding(encode, variance, size)


def _check_encoding(encode: Callable[[bytes], NDArray[np.int64]], variance: int, size: int) -> None:
    streams: list[list[NDArray[np.int64]]] = [[], []]
    while sum(map(len, streams[0])) < size / 2:
        for stream in streams:
            stream.append(encode(new_key()))
    one, other = map(np.concatenate, streams)
    check_noise(np.concatenate([one, other]), variance, what="a site's encoding of nothing")
    check_independence([one, other], what="two releases")


def check_noise(residual: NDArray[np.int64], variance: int, *, what: str = "the noise") -> None:
    """Tests integers that should be Skellam(variance): their variance, their mean and their shape.

    For a sum of shares, the residual is the released sum minus the sum of the un-noised vectors, and the variance that
    of all shares together: a missing share, a doubled one, or a seed that two sites share show in it.

    Raises:
        SelfTestFailed: with the check that failed. A sound mechanism fails with a probability of about 3e-6.
    """
    size = len(residual)
    threshold = float(norm.isf(_FALSE_ALARM / 2))
    wide = residual.astype(np.float64)
    spread = float(np.mean(wide**2)) / variance
    # Var(X²) = μ²·(2 + 1/μ) for Skellam(μ)
    score = (spread - 1) * math.sqrt(size / (2 + 1 / variance))
    if abs(score) > threshold:
        raise SelfTestFailed(f"{what} has {spread:.4g} times the variance booked ({score:+.1f} standard errors)")
    score = float(np.mean(wide)) * math.sqrt(size / variance)
    if abs(score) > threshold:
        raise SelfTestFailed(f"{what} has a mean of {score:+.1f} standard errors, and should have none")
    chance = shape_p_value(residual, variance)
    if chance < _FALSE_ALARM:
        raise SelfTestFailed(f"{what} does not follow the Skellam law of its variance (χ²: p = {chance:.1g})")


def shape_p_value(residual: NDArray[np.int64], variance: int) -> float:
    """p of a χ² test over cells of |x| of about equal probability, each but 0 halved by its sign."""
    law = table(variance)
    below = (law.high.astype(np.float64) * 2.0**64 + law.low.astype(np.float64)) / 2.0**127  # P(|X| ≤ k)
    quantiles = np.searchsorted(below, np.arange(1, _CELLS) / _CELLS)
    edges = [-1, *sorted({int(k) for k in quantiles if k < law.largest}), law.largest]
    probabilities = [below[high] - (below[low] if low >= 0 else 0.0) for low, high in pairwise(edges)]
    magnitude = np.abs(residual)
    if int(magnitude.max(initial=0)) > law.largest:
        return 0.0
    cells = np.digitize(magnitude, edges[1:-1], right=True)
    observed, expected = [], []
    for cell, probability in enumerate(probabilities):
        here = residual[cells == cell]
        only_zero = edges[cell + 1] == 0
        counts = [len(here)] if only_zero else [int((here > 0).sum()), int((here < 0).sum())]
        zeros = len(here) - sum(counts)
        total = probability * len(residual)
        if not only_zero and edges[cell] < 0:  # the first cell holds 0 together with other numbers
            counts, share_of = [*counts, zeros], float(below[0]) * len(residual)
            expectations = [(total - share_of) / 2, (total - share_of) / 2, share_of]
        else:
            expectations = [total] if only_zero else [total / 2, total / 2]
        observed += counts
        expected += expectations
    seen, due = np.array(observed, dtype=np.float64), np.array(expected)
    large = due >= _MIN_EXPECTED
    if not large.all():  # small cells together
        seen, due = np.append(seen[large], seen[~large].sum()), np.append(due[large], due[~large].sum())
    statistic = float(np.sum((seen - due) ** 2 / np.maximum(due, 1e-12)))
    return float(chi2.sf(statistic, max(1, len(due) - 1)))


def check_independence(streams: Sequence[NDArray[np.int64]], *, what: str = "the shares") -> None:
    """Tests that no two sites' noise is correlated: one seed in two places, or noise that cancels.

    Raises:
        SelfTestFailed: with the largest correlation. A sound mechanism fails with a probability of about 1e-6.
    """
    if len(streams) < 2:
        return
    size = len(streams[0])
    with np.errstate(invalid="ignore", divide="ignore"):  # a stream without any noise correlates with all
        matrix = np.asarray(np.corrcoef(np.stack(streams).astype(np.float64)))
    np.fill_diagonal(matrix, 0.0)
    pairs = len(streams) * (len(streams) - 1) / 2
    largest = float(np.abs(np.nan_to_num(matrix, nan=1.0)).max())
    if largest * math.sqrt(size) > float(norm.isf(_FALSE_ALARM / pairs / 2)):
        raise SelfTestFailed(f"{what} of two sites have a correlation of {largest:.3f}: a seed stands in two places")


def check_released_sum(
    released: NDArray[np.int64], vectors: Sequence[NDArray[np.int64]], event: Skellam, *, what: str = "the sum"
) -> None:
    """Tests a released sum of known vectors against its event.

    Raises:
        SelfTestFailed: the residual is not the noise that is booked.
    """
    residual = released - np.sum(np.stack(vectors), axis=0)
    check_noise(residual, event.share_variance * event.shares, what=what)


def check_sensitivity(
    with_unit: Sequence[NDArray[np.int64]], without_unit: Sequence[NDArray[np.int64]], event: Skellam
) -> None:
    """Tests un-noised integer vectors of neighbouring data sets, made with the same randomness, pair by pair.

    Raises:
        SelfTestFailed: one unit moves a vector by more than is booked.
    """
    for one, other in zip(with_unit, without_unit, strict=True):
        moved = [int(x) for x in one - other]
        l2_squared, l1 = sum(x * x for x in moved), sum(abs(x) for x in moved)
        if l2_squared > event.l2_squared or l1 > event.l1:
            raise SelfTestFailed(
                f"one unit moves the vector by Δ₂ = {math.sqrt(l2_squared):.4g}, Δ₁ = {l1}; booked are "
                f"{math.sqrt(event.l2_squared):.4g} and {event.l1}"
            )


def check_clip(with_unit: NDArray[np.float64], without_unit: NDArray[np.float64], max_grad_norm: float) -> None:
    """Tests two clipped sums of neighbouring data sets, before any noise.

    Raises:
        SelfTestFailed: one unit moves the sum by more than the clip.
    """
    moved = float(np.linalg.norm(np.asarray(with_unit, np.float64) - np.asarray(without_unit, np.float64)))
    if not moved <= max_grad_norm * (1 + 1e-5):  # the sums themselves are float32
        raise SelfTestFailed(f"one unit moves the clipped sum by {moved:.4g}; the clip is {max_grad_norm:g}")


def check_public_constants(settings_for: Callable[[int], object], records: int) -> None:
    """Tests that nothing in a mechanism's settings is computed from the private number of records.

    Args:
        settings_for: builds the settings that a site with so many records would use, such as its `DoorSettings`.
        records: a number of records to try; its neighbours and a few others are tried too.

    Raises:
        SelfTestFailed: the settings change with the number of records.
    """
    reference = settings_for(records)
    for other in (records - 1, records + 1, 2 * records, max(1, records // 2)):
        if settings_for(other) != reference:
            raise SelfTestFailed(
                f"the settings for {records} records differ from those for {other}: a rate, a number of steps or a "
                "denominator is computed from the private number of records"
            )
