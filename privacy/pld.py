"""Privacy loss distributions of the Gaussian events, on a grid of multiples of `step`, and their composition.

One event's loss distribution is rounded pessimistically onto the grid: the probability between two points is moved to
both, so that P's and Q's mass are kept (Doroshenko, Ghazi, Kamath, Kumar and Manurangsi 2022, "Connect the Dots"). A
composition is a convolution: all events of a ledger are convolved in one Fourier pass. dp-accounting builds and
convolves the same distributions one by one; a test holds both to the same ε.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, rfft
from scipy.signal import lfilter
from scipy.special import ndtr

from .events import Event, Gaussian, PatientMixture, PoissonGaussian, Skellam, record_probabilities

_Floats = NDArray[np.float64]
_Complex = NDArray[np.complex128]

MIN_DELTA = 1e-11  # below it, the rounding errors of float64 Fourier transforms are no longer small against δ
MAX_GRID = 2**22  # points of a composition
MAX_EVENT_GRID = 2**19  # points of one event
_SIGMAS = 9.0  # a normal number is beyond with probability 1.1e-19
_TAIL_MASS = 1e-15  # probability that the composed window may miss; counted as certain disclosure
_NEGLIGIBLE = 1e-24  # a Fourier coefficient of the composition below it is left out; counted likewise, per point
_ROUNDING = 2.0**-48  # error of a Fourier power per event (measured: 2⁻⁵⁰, against longdouble); counted likewise
_ORDERS = 2.0 ** np.arange(-5, 14)  # of Chernoff's bound; each is the square of the one before, as exponentials go
_CACHED_BYTES = 2**27  # of spectra
_AT_ONCE = 8  # factors of the composition multiplied together before the negligible ones are looked for


class Losses(NamedTuple):
    """Distribution of the privacy loss of one event in one direction (a unit removed, or added)."""

    lowest: int  # grid index of probs[0]
    probs: _Floats
    infinity: float  # probability of an infinite loss
    rising: _Floats  # log E exp(order · loss) at each Chernoff order, the loss in units of 1
    falling: _Floats  # log E exp(−order · loss)


class Mixed(NamedTuple):
    """Events whose loss distributions lie between those of two: `share` of the first and the rest of the second.

    A sample at rate q = share · q₁ + (1 − share) · q₀ hides at least as well as a public coin that samples at q₁ or at
    q₀, whose loss distribution is the mixture of theirs.
    """

    first: Event
    second: Event
    shares: tuple[float, ...]  # one for each event
    counts: tuple[int, ...]


def supports(event: Event) -> bool:
    """Whether the event's loss distribution can be built. A vector's Skellam noise has none of one dimension."""
    return not isinstance(event, Skellam)


@lru_cache(maxsize=4096)
def span(event: Event) -> float:
    """The difference between the largest loss and the smallest; infinite if float64 cannot tell."""
    weights, sigma = _mixture(event)
    x = np.array([-_SIGMAS * sigma, len(weights) - 1 + _SIGMAS * sigma])
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = _loss(x, weights, sigma)
    wide = float(high - low)
    return wide if math.isfinite(wide) else math.inf


class Composer:
    """Composes events on grids, and keeps the distributions and spectra it has computed, at most some 200 MB."""

    def __init__(self) -> None:
        self._losses = lru_cache(maxsize=1024)(_losses_of)
        self._spectra: OrderedDict[tuple[Event, float, int, bool], _Complex] = OrderedDict()
        self._held_bytes = 0

    def epsilon(self, events: Sequence[tuple[Event, int]], mixed: Sequence[Mixed], step: float, delta: float) -> float:
        """ε at `delta` of the composition, in the worse direction; infinite if it cannot be computed on this grid."""
        removed = self._in_direction(events, mixed, step, delta, added=False)
        if not mixed and all(isinstance(event, Gaussian) for event, _ in events):
            return removed
        return max(removed, self._in_direction(events, mixed, step, delta, added=True))

    def _in_direction(
        self, events: Sequence[tuple[Event, int]], mixed: Sequence[Mixed], step: float, delta: float, *, added: bool
    ) -> float:
        """The window of losses misses at most the tail mass by Chernoff's bound. What lies outside wraps into it, and
        is counted again as infinite loss: both errors are on the safe side."""

        def losses(event: Event) -> Losses:
            return self._losses(event, step, added)

        single = [(losses(event), count) for event, count in events]
        pairs = [(losses(group.first), losses(group.second), group) for group in mixed]
        rising, falling = np.zeros_like(_ORDERS), np.zeros_like(_ORDERS)
        for one, count in single:
            rising += count * one.rising
            falling += count * one.falling
        longest = max((len(one.probs) for one, _ in single), default=1)
        lowest = sum(count * one.lowest for one, count in single)
        highest = sum(count * (one.lowest + len(one.probs) - 1) for one, count in single)
        infinity = sum(count * math.log1p(-one.infinity) for one, count in single)
        number = sum(count for _, count in single)
        for first, second, group in pairs:
            total = sum(group.counts)
            rising += total * np.maximum(first.rising, second.rising)
            falling += total * np.maximum(first.falling, second.falling)
            longest = max(longest, len(first.probs), len(second.probs))
            lowest += total * min(first.lowest, second.lowest)
            highest += total * max(one.lowest + len(one.probs) - 1 for one in (first, second))
            infinity += total * math.log1p(-max(first.infinity, second.infinity))
            number += total
        allowance = math.log(2 / _TAIL_MASS)
        reach_up = np.nanmin((rising + allowance) / _ORDERS) / step
        reach_down = np.nanmax(-(falling + allowance) / _ORDERS) / step
        top = highest if reach_up >= highest else math.ceil(reach_up)
        bottom = lowest if reach_down <= lowest else math.floor(reach_down)
        size = _round_size(max(top - bottom + 1, longest))
        if size > MAX_GRID:
            return math.inf

        spectrum = self._composed_spectrum(events, mixed, step, size, added=added)
        probs = np.roll(irfft(spectrum, size), -(bottom % size))[: top - bottom + 1]
        infinite = -math.expm1(infinity) + _TAIL_MASS + _ROUNDING * number + _NEGLIGIBLE * size
        return _smallest_epsilon(bottom, np.maximum(probs, 0.0), infinite, step, delta)

    def _composed_spectrum(
        self, events: Sequence[tuple[Event, int]], mixed: Sequence[Mixed], step: float, size: int, *, added: bool
    ) -> _Complex:
        """Product over all events. A coefficient is dropped as soon as it is negligible: no factor exceeds 1, and of a
        long composition, which is nearly normal, few coefficients remain."""
        active = np.arange(size // 2 + 1)
        product = np.ones(len(active), dtype=np.complex128)

        def multiply(factor: _Complex) -> None:
            nonlocal active, product
            product = product * factor
            kept = np.abs(product) >= _NEGLIGIBLE
            if not kept.all():
                active, product = active[kept], product[kept]

        for group in sorted(mixed, key=lambda group: -sum(group.counts)):
            first = self._cached_spectrum(group.first, step, size, added)
            difference = first - self._cached_spectrum(group.second, step, size, added)
            for start in range(0, len(group.shares), _AT_ONCE):
                rest = np.array([1 - share for share in group.shares[start : start + _AT_ONCE]])[:, None]
                factors = first[active] - rest * difference[active]
                for count in {count for count in group.counts[start : start + _AT_ONCE] if count > 1}:
                    rows = [i for i, c in enumerate(group.counts[start : start + _AT_ONCE]) if c == count]
                    factors[rows] = _power(factors[rows], count)
                multiply(np.prod(factors, axis=0))
        for event, count in events:
            multiply(_power(self._cached_spectrum(event, step, size, added)[active], count))
        spectrum = np.zeros(size // 2 + 1, dtype=np.complex128)
        spectrum[active] = product
        return spectrum

    def _cached_spectrum(self, event: Event, step: float, size: int, added: bool) -> _Complex:
        key = (event, step, size, added)
        spectrum = self._spectra.get(key)
        if spectrum is None:
            spectrum = self._compute_spectrum(event, step, size, added)
            self._spectra[key] = spectrum
            self._held_bytes += spectrum.nbytes
            while self._held_bytes > _CACHED_BYTES:
                self._held_bytes -= self._spectra.popitem(last=False)[1].nbytes
        else:
            self._spectra.move_to_end(key)
        return spectrum

    def _compute_spectrum(self, event: Event, step: float, size: int, added: bool) -> _Complex:
        one = self._losses(event, step, added)
        placed = np.zeros(size)
        start = one.lowest % size
        fits = min(len(one.probs), size - start)
        placed[start : start + fits] = one.probs[:fits]
        placed[: len(one.probs) - fits] += one.probs[fits:]
        spectrum: _Complex = rfft(placed)
        return spectrum


def _power(base: _Complex, exponent: int) -> _Complex:
    """base ** exponent, and 0 where that is negligible: most of a long composition, and the slow part of a power."""
    if exponent == 1:
        return base
    result = np.zeros_like(base)
    large = np.abs(base) >= _NEGLIGIBLE ** (1 / exponent)
    result[large] = base[large] ** exponent
    return result


def _round_size(points: int) -> int:
    """2^k or 3·2^(k−1): few sizes, so that ledgers of about the same length share their spectra."""
    power = 1 << max(8, (points - 1).bit_length())
    return 3 * power // 4 if points <= 3 * power // 4 else power


# One event: P = Σ_i w_i·N(i, σ²) against Q = N(0, σ²), in units of the clip


def _mixture(event: Event) -> tuple[_Floats, float]:
    match event:
        case Gaussian(noise_multiplier=sigma):
            return np.array([0.0, 1.0]), sigma
        case PoissonGaussian(sample_rate=rate, noise_multiplier=sigma):
            return np.array([1 - rate, rate]), sigma
        case PatientMixture(sample_rate=rate, max_records=k, noise_multiplier=sigma):
            return np.array(record_probabilities(k, rate)), sigma
        case Skellam():
            raise ValueError("Skellam noise has no loss distribution here; only its Rényi divergence is bounded")


def _loss(x: _Floats, weights: _Floats, sigma: float) -> _Floats:
    """log dP/dQ at x, increasing in x."""
    if len(weights) == 2:
        with np.errstate(divide="ignore"):
            rest, rate = np.log(weights)
        both: _Floats = np.logaddexp(rest, rate + (2 * x - 1) / (2 * sigma**2))
        return both
    shifts = np.arange(len(weights))[:, None]
    with np.errstate(divide="ignore"):
        tilted = np.log(weights)[:, None] + (2 * shifts * x - shifts**2) / (2 * sigma**2)
    loss: _Floats = np.logaddexp.reduce(tilted, axis=0)
    return loss


def _where_loss_is(losses: _Floats, weights: _Floats, sigma: float, low: float, high: float) -> _Floats:
    """x with loss(x) = each of `losses`, within [low, high]."""
    if len(weights) == 2:
        rest, rate = weights
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            # e^ε − (1−q) = expm1(ε) + q, and for large ε the exponential would overflow: take it out
            inner = np.where(
                losses > 1.0, losses + np.log1p(-rest * np.exp(-losses)), np.log(np.expm1(np.minimum(losses, 1)) + rate)
            )
        x = 0.5 + sigma**2 * (inner - math.log(rate))
        return np.clip(np.where(np.isnan(x), low, x), low, high)
    left, right = np.full_like(losses, low), np.full_like(losses, high)
    for _ in range(60):
        middle = (left + right) / 2
        below = _loss(middle, weights, sigma) < losses
        left, right = np.where(below, middle, left), np.where(below, right, middle)
    return (left + right) / 2


def _losses_of(event: Event, step: float, added: bool) -> Losses:
    weights, sigma = _mixture(event)
    low, high = -_SIGMAS * sigma, len(weights) - 1 + _SIGMAS * sigma
    ends = _loss(np.array([low, high]), weights, sigma)
    first, last = math.floor(ends[0] / step), math.ceil(ends[1] / step)
    edges = _where_loss_is(step * np.arange(first, last + 1), weights, sigma, low, high)
    # Losses below the grid may be moved up to it; losses beyond its top count as infinite
    if added:
        edges[0], edges[-1], beyond = low, math.inf, float(ndtr(low / sigma))
    else:
        edges[0], edges[-1] = -math.inf, high
        beyond = sum(float(w * ndtr((i - high) / sigma)) for i, w in enumerate(weights))

    z = edges / sigma
    base = _masses(z)  # of N(0, σ²) in every cell
    if len(weights) == 2:
        mixture = weights[0] * base + weights[1] * _masses(z - 1 / sigma)
    else:
        mixture = np.sum([w * _masses(z - i / sigma) for i, w in enumerate(weights)], axis=0)
    if added:  # the loss changes its sign, and the cells their order
        return _connect(base[::-1], mixture[::-1], -last, step, infinity=beyond)
    return _connect(mixture, base, first, step, infinity=beyond)


def _masses(z: _Floats) -> _Floats:
    """P(z_i < N(0,1) ≤ z_(i+1)), to full relative precision in both tails."""
    left, right = ndtr(z), ndtr(-z)
    masses: _Floats = np.where(z[1:] <= 0, np.diff(left), -np.diff(right))
    return np.maximum(masses, 0.0)


def _connect(p: _Floats, q: _Floats, first: int, step: float, *, infinity: float) -> Losses:
    """Moves the masses p, q of the cell of losses ((i−1)·step, i·step] to its ends: a at the lower and b at the upper
    with a + b = p and a·e^(−lower) + b·e^(−upper) = q. Losses under the lowest point are moved up to it."""
    lower = step * np.arange(first, first + len(p))
    with np.errstate(over="ignore", invalid="ignore"):
        upper_share = (p - q * np.exp(lower)) / -math.expm1(-step)
    upper_share = np.clip(np.where(np.isnan(upper_share), p, upper_share), 0.0, p)
    probs = np.append(p - upper_share, 0.0)
    probs[1:] += upper_share
    losses: _Floats = step * np.arange(first, first + len(probs), dtype=np.float64)
    return Losses(first, probs, infinity, _log_moments(probs, losses), _log_moments(probs[::-1], -losses[::-1]))


def _log_moments(probs: _Floats, losses: _Floats) -> _Floats:
    """log Σ p · exp(order · loss) at every Chernoff order; losses increase."""
    highest = losses[-1]
    power = np.exp(_ORDERS[0] * (losses - highest))
    sums = np.empty_like(_ORDERS)
    for i in range(len(_ORDERS)):
        sums[i] = probs @ power
        power *= power
    with np.errstate(divide="ignore"):
        moments: _Floats = np.log(sums) + _ORDERS * highest
    return np.where(sums > 0, moments, math.inf)  # a sum that vanished says nothing


def _smallest_epsilon(lowest: int, probs: _Floats, infinity: float, step: float, delta: float) -> float:
    """Smallest ε ≥ 0 whose hockey-stick divergence is at most δ.

    δ(ε) = infinity + Σ_{loss > ε} p · (1 − exp(ε − loss)). At grid point k this is above[k] − weighted[k], with
    above[k] = infinity + Σ_{i>k} p_i and weighted[k] = Σ_{i>k} p_i · exp(−(i − k) · step): a first-order filter.
    """
    if infinity > delta:
        return math.inf
    from_k = infinity + np.cumsum(probs[::-1])[::-1]  # Σ_{i≥k}
    discounted = lfilter([1.0], [1.0, -math.exp(-step)], probs[::-1])[::-1]  # Σ_{i≥k} p_i · exp(−(i − k) · step)
    divergence = from_k - probs - (discounted - probs)
    k = int(np.argmax(divergence <= delta))  # the last point always qualifies: only `infinity` lies above it
    loss = (lowest + k) * step
    if from_k[k] <= delta:  # only at k = 0, up to rounding
        return max(0.0, loss) if k else 0.0
    return max(0.0, loss + math.log((from_k[k] - delta) / discounted[k]))


def events_of(mixed: Iterable[Mixed]) -> list[Event]:
    """The events that the mixtures lie between."""
    return [event for group in mixed for event in (group.first, group.second)]
