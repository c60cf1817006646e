"""Rényi divergences of the events, at many orders at once: the quick route, and the only one for Skellam noise.

A divergence at order α is for the worse of the two directions (a unit added, a unit removed). Where an event has a
formula at integer orders only, a fractional order lies between them: (α − 1) times the divergence is convex in α, and 0
at α = 1 (it is the logarithm of a moment).
"""

import math
from typing import assert_never

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from .events import Event, Gaussian, PatientMixture, PoissonGaussian, Skellam, record_probabilities

_Floats = NDArray[np.float64]

_FRACTIONS = np.arange(11, 110) / 10
_INTEGERS = np.array(
    [*range(2, 65), *range(68, 129, 4), *range(144, 257, 16), 320, 384, 448, 512, 640, 768, 1024], dtype=np.int64
)
ORDERS: _Floats = np.unique(np.concatenate([_FRACTIONS, _INTEGERS.astype(np.float64)]))
_FRACTIONAL = np.flatnonzero(ORDERS != np.round(ORDERS))

# All terms (order, k ≥ 2) of the binomial expansions, one order after the other
_TERM_ORDER = np.repeat(_INTEGERS, _INTEGERS - 1)
_TERM_K = np.concatenate([np.arange(2, order + 1) for order in _INTEGERS])
_TERM_START = np.concatenate([[0], np.cumsum(_INTEGERS - 1)[:-1]])
_LOG_BINOMIAL = gammaln(_TERM_ORDER + 1) - gammaln(_TERM_K + 1) - gammaln(_TERM_ORDER - _TERM_K + 1)

_QUADRATURE_ERROR = 1e-8  # relative; the trapezoid rule is far better, the rounding of its sum is not
_CANCELLATION = 1e-14  # relative to the size of r − 1, whose first-order term cancels
_QUADRATURE_SIGMAS = (0.2, 100.0)  # outside, points are too many, or what is summed drowns in rounding


def divergences(event: Event) -> _Floats:
    """float64[len(ORDERS)]: RDP of one event; infinite for a release without noise."""
    match event:
        case Gaussian(noise_multiplier=sigma):
            return _gaussian(sigma, 1)
        case PoissonGaussian(sample_rate=rate, noise_multiplier=sigma):
            return _poisson_gaussian(rate, sigma)
        case PatientMixture(sample_rate=rate, max_records=k, noise_multiplier=sigma):
            return _patient_mixture(rate, k, sigma)
        case Skellam():
            return _skellam(event)
    assert_never(event)


def epsilon(divergence: _Floats, delta: float) -> float:
    """ε at `delta` from the divergence at every order (Canonne, Kamath and Steinke 2020, Proposition 12)."""
    if not divergence.any():
        return 0.0
    # With δ² ≥ 1 − e^(−KL), Bretagnolle and Huber's bound gives ε = 0 outright
    if np.any(delta**2 + np.expm1(-divergence) > 0):
        return 0.0
    by_order = divergence + np.log1p(-1 / ORDERS) - np.log(delta * ORDERS) / (ORDERS - 1)
    return max(0.0, float(np.min(by_order)))


def between(upper: _Floats, lower: _Floats, share: float) -> _Floats:
    """float64[len(ORDERS)]: RDP at rate q = share · q₁ + (1 − share) · q₀, from the divergences at q₁ and q₀.

    Sampling at rate q is no worse than tossing a public coin and sampling at q₁ or at q₀: the moment
    exp((α−1)·RDP) of the coin's mechanism is the mean of the two.
    """
    exponent = ORDERS - 1
    # Around zero by expm1: a divergence of 1e-12 must not be lost in a moment of 1
    excess = share * np.expm1(np.minimum(exponent * upper, 1.0)) + (1 - share) * np.expm1(
        np.minimum(exponent * lower, 1.0)
    )
    with np.errstate(divide="ignore"):
        large = np.logaddexp(np.log(share) + exponent * upper, np.log1p(-share) + exponent * lower)
    mixed: _Floats = np.where(exponent * upper <= 1.0, np.log1p(excess), large) / exponent * (1 + 1e-12)
    return mixed


def _gaussian(sigma: float, sensitivity: float) -> _Floats:
    if sigma == 0:
        return np.full_like(ORDERS, math.inf)
    with np.errstate(over="ignore"):
        return ORDERS * (sensitivity / sigma) ** 2 / 2


def _from_integers(at_integers: _Floats) -> _Floats:
    log_moments = np.concatenate([[0.0], (_INTEGERS - 1) * at_integers])
    if not np.isfinite(log_moments).all():  # no line between an infinite end and another: take the order above
        return at_integers[np.searchsorted(_INTEGERS, ORDERS - 1e-9)]
    at_orders: _Floats = np.interp(ORDERS, np.concatenate([[1], _INTEGERS]), log_moments) / (ORDERS - 1) * (1 + 1e-12)
    return at_orders


def _log_sum(log_terms: _Floats) -> _Floats:
    """log Σ over the terms of each integer order."""
    largest = np.maximum.reduceat(log_terms, _TERM_START)
    safe = np.where(np.isfinite(largest), largest, 0.0)
    scaled = np.exp(log_terms - np.repeat(safe, _INTEGERS - 1))
    with np.errstate(divide="ignore"):
        logs: _Floats = safe + np.log(np.add.reduceat(scaled, _TERM_START))
    return logs


def _log_expm1(value: _Floats) -> _Floats:
    with np.errstate(divide="ignore", over="ignore"):
        logs: _Floats = np.where(value > 1, value + np.log1p(-np.exp(-value)), np.log(np.expm1(np.minimum(value, 1))))
    return logs


def _log_weights(rate: float) -> _Floats:
    """log of C(α, k)·(1 − q)^(α − k)·q^k for every term."""
    logs: _Floats = _LOG_BINOMIAL + (_TERM_ORDER - _TERM_K) * math.log1p(-rate) + _TERM_K * math.log(rate)
    return logs


def _log1p_exp(value: _Floats) -> _Floats:
    logs: _Floats = np.logaddexp(0.0, value)
    return logs


def _poisson_gaussian(rate: float, sigma: float) -> _Floats:
    """At integer α, E[(1−q+qr)^α] − 1 = Σ_k Binom(α,q)(k)·(e^(k(k−1)/2σ²)−1).

    Source: Mironov, Talwar and Zhang 2019, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", section 3.3.
    The direction in which a unit is removed is the worse one (their Theorem 5). All terms are positive: nothing
    cancels, however small the divergence.
    """
    unsampled = _gaussian(sigma, 1)
    if rate == 1.0 or sigma == 0:
        return unsampled
    exponents = _TERM_K * (_TERM_K - 1.0) / (2 * sigma**2)
    at_integers = _log1p_exp(_log_sum(_log_weights(rate) + _log_expm1(exponents))) / (_INTEGERS - 1)
    result = _from_integers(at_integers * (1 + 1e-11))
    if _QUADRATURE_SIGMAS[0] <= sigma <= _QUADRATURE_SIGMAS[1]:
        orders = ORDERS[_FRACTIONAL]
        moments = _excess_moments(np.array([1 - rate, rate]), sigma, orders)
        result[_FRACTIONAL] = np.fmin(result[_FRACTIONAL], _of_moments(moments, orders, rate / sigma))
    return np.fmin(result, unsampled)


def _patient_mixture(rate: float, max_records: int, sigma: float) -> _Floats:
    """Both directions by quadrature where that is exact; at other orders, the unsampled release of all k records."""
    unsampled = _gaussian(sigma, max_records)
    if max_records == 1:
        return _poisson_gaussian(rate, sigma)
    if rate == 1.0 or not _QUADRATURE_SIGMAS[0] <= sigma <= _QUADRATURE_SIGMAS[1]:
        return unsampled
    weights = np.array(record_probabilities(max_records, rate))
    tried = np.flatnonzero(max_records * ORDERS <= 512)
    orders = ORDERS[tried]
    removed = _of_moments(_excess_moments(weights, sigma, orders), orders, rate / sigma)
    added = _of_moments(_excess_moments(weights, sigma, 1 - orders), orders, rate / sigma)
    result = unsampled.copy()
    result[tried] = np.fmin(np.maximum(removed, added), unsampled[tried])
    return result


def _of_moments(excess: _Floats, orders: _Floats, size: float) -> _Floats:
    """RDP of E[…] − 1, where r − 1 is of about `size`, raised by what rounding may have taken from it.

    An excess that rounding made nought or less says nothing, and is left out as NaN.
    """
    usable = np.where(excess > 0, excess, np.nan)
    divergence: _Floats = np.log1p(usable) / (orders - 1) * (1 + _QUADRATURE_ERROR + _CANCELLATION / size)
    return divergence


def _excess_moments(weights: _Floats, sigma: float, exponents: _Floats) -> _Floats:
    """E_{x ~ N(0, σ²)}[r^e − 1 − e·(r − 1)] with r(x) = Σ_i wᵢ·exp((2ix − i²)/2σ²); E[r] = 1, so it is E[r^e] − 1.

    The trapezoid rule converges exponentially for an integrand analytic in a strip: the zeros of r lie πσ²/k away.
    """
    shifts = np.arange(len(weights))
    reach = 10 * sigma
    last = len(weights) - 1
    highest = max(0.0, float(exponents.max())) * last + last + reach
    step = min(sigma / 4, 0.6 * sigma**2 / last)
    x = np.arange(-reach - last, highest + step, step)
    with np.errstate(divide="ignore", over="ignore"):
        tilts = (2 * shifts[:, None] * x - shifts[:, None] ** 2) / (2 * sigma**2)
        log_ratio = np.logaddexp.reduce(np.log(weights)[:, None] + tilts, axis=0)
        log_density = -(x**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
        lifted = exponents[:, None] * log_ratio
        small = np.abs(lifted) < 1e-2
        powers = np.exp(log_density + lifted)
        # Where r is near 1 the three terms nearly cancel: there, their density is multiplied after the subtraction
        direct = (
            powers - np.exp(log_density) - exponents[:, None] * (np.exp(log_density + log_ratio) - np.exp(log_density))
        )
        gentle = np.exp(log_density) * (
            np.expm1(np.where(small, lifted, 0.0)) - exponents[:, None] * np.expm1(np.minimum(log_ratio, 1.0))
        )
        excess: _Floats = np.sum(np.where(small, gentle, direct), axis=1) * step
    return excess


def _skellam(event: Skellam) -> _Floats:
    """Agarwal, Kairouz and Liu 2021, "The Skellam Mechanism", at integer α, with μ the variance per coordinate:

        α·Δ₂²/2μ + min{((2α−1)·Δ₂² + 6·Δ₁)/4μ², 3·Δ₁/2μ}

    The coordinates are independent, so their divergences add up: this is the bound of one shift, summed. Tests hold it
    to the exact divergence.
    """
    alpha = _INTEGERS.astype(np.float64)
    mu, l2_squared, l1 = float(event.variance), float(event.l2_squared), float(event.l1)
    gaussian = alpha * l2_squared / (2 * mu)
    excess = np.minimum(((2 * alpha - 1) * l2_squared + 6 * l1) / (4 * mu**2), 3 * l1 / (2 * mu))
    unsampled = (gaussian + excess) * (1 + 1e-12)
    if event.sample_rate == 1.0:
        return _from_integers(unsampled)
    return _from_integers(_subsampled(unsampled, event.sample_rate))


def _subsampled(unsampled: _Floats, rate: float) -> _Floats:
    """A bound for any mechanism M under Poisson sampling, from M's RDP at integer orders. Valid, and loose.

    With r the likelihood ratio of the unit's presence, E[r] = 1:
    removed: E[(1−q+qr)^α] = Σ_l C(α,l)·(1−q)^(α−l)·q^l·E[r^l], and E[r^l] ≤ e^((l−1)·RDP(l));
    added: (1−q+qr)^(1−α) ≤ 1 − (α−1)·q·(r−1) + ½·α·(α−1)·q²·(1−q)^(−α−1)·(r−1)² by Taylor, as the second derivative
    falls with r ≥ 0, so E[…] ≤ 1 + ½·α·(α−1)·q²·(1−q)^(−α−1)·(e^RDP(2) − 1).
    Neither is above the unsampled divergence (joint convexity).
    """
    # E[r^l] at orders that the list leaves out: RDP of the next order that is in it
    at_k = unsampled[np.searchsorted(_INTEGERS, _TERM_K)]
    removed = _log1p_exp(_log_sum(_log_weights(rate) + _log_expm1((_TERM_K - 1) * at_k)))
    alpha = _INTEGERS.astype(np.float64)
    log_factor = np.log(alpha * (alpha - 1) / 2) + 2 * math.log(rate) - (alpha + 1) * math.log1p(-rate)
    added = _log1p_exp(log_factor + _log_expm1(unsampled[:1]))
    return np.minimum(np.maximum(removed, added) / (alpha - 1) * (1 + 1e-11), unsampled)
