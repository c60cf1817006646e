"""Claims as trade-off curves: which pairs of error rates an adversary can reach, for a claim and for less noise.

A claim is one member of a family, at strength 1; at strength s its noise is divided by s. An audit rejects members, and
what it reports is the ε of the strongest one that it rejects.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from dp_accounting.pld import privacy_loss_distribution
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from ..errors import UnsupportedEvent
from ..events import Charge, Event, Gaussian, PatientMixture, PoissonGaussian, Skellam, record_probabilities
from .bounds import gaussian_epsilon, gaussian_mu, largest

_Floats = NDArray[np.float64]

MOST_STRENGTH = 64.0
_STEP, _STRENGTHS = 1.02, 200  # of a curve without a closed form: 0.019 to 52
_LINES = 256  # (ε, δ) pairs of a curve without a closed form
_GRID = 1e-3  # of a privacy loss; refined below ε = 1
_SMALLEST_NOISE = 0.02  # a loss distribution of less is no better than a certainty


class Curve(Protocol):
    """A family of claims, the claim itself at strength 1. Frozen and hashable: what is computed for it is kept."""

    def fnr(self, strength: float, fpr: float) -> float:
        """The least false-negative rate at a false-positive rate, or less. Symmetric: its own inverse."""
        ...

    def strongest(self, rejected: Callable[[float], bool]) -> float:
        """The largest strength that is rejected, rounded down; 0 if none. Weaker ones must be rejected with it."""
        ...

    def epsilon(self, strength: float, delta: float) -> float:
        """ε at δ."""
        ...

    def __hash__(self) -> int: ...

    def scores(self, strength: float, included: NDArray[np.bool_], randomness: np.random.Generator) -> _Floats:
        """float64[n]: what an ideal adversary sees of n units, each in the data or not."""
        ...


@dataclass(frozen=True)
class GaussianCurve:
    """Sums of unsampled Gaussian releases: μ-GDP, μ² = Σ (C/σ)². Exact (Dong, Roth and Su 2022, Theorem 2.7)."""

    mu: float

    @classmethod
    def of(cls, epsilon: float, delta: float) -> "GaussianCurve":
        """The Gaussian mechanism that has this ε at δ."""
        return cls(gaussian_mu(epsilon, delta))

    def fnr(self, strength: float, fpr: float) -> float:
        return float(ndtr(-ndtri(fpr) - strength * self.mu))

    def strongest(self, rejected: Callable[[float], bool]) -> float:
        return _bisected(rejected)

    def epsilon(self, strength: float, delta: float) -> float:
        return float(gaussian_epsilon(strength * self.mu, delta))

    def scores(self, strength: float, included: NDArray[np.bool_], randomness: np.random.Generator) -> _Floats:
        scores: _Floats = randomness.standard_normal(len(included)) + strength * self.mu * included
        return scores


@dataclass(frozen=True)
class ApproximateCurve:
    """(ε, δ) and nothing else. Strength s multiplies ε. Kairouz, Oh and Viswanath 2015, Theorem 2.1."""

    epsilon_at_one: float
    delta: float

    def fnr(self, strength: float, fpr: float) -> float:
        grown = math.exp(min(700.0, strength * self.epsilon_at_one))
        return max(0.0, 1 - self.delta - grown * fpr, (1 - self.delta - fpr) / grown)

    def strongest(self, rejected: Callable[[float], bool]) -> float:
        return _bisected(rejected)

    def epsilon(self, strength: float, delta: float) -> float:
        return strength * self.epsilon_at_one

    def scores(self, strength: float, included: NDArray[np.bool_], randomness: np.random.Generator) -> _Floats:
        """Randomised response, which reveals the unit with probability δ: no (ε, δ) mechanism says more."""
        truth = randomness.random(len(included)) < 1 / (1 + math.exp(-strength * self.epsilon_at_one))
        shown = np.where(randomness.random(len(included)) < self.delta, 2.0, np.where(truth, 1.0, -1.0))
        return np.where(included, shown, -shown) + 1e-6 * randomness.random(len(included))


@dataclass(frozen=True)
class ComposedCurve:
    """Any composition of the ledger's Gaussian events, by its privacy loss distribution.

    Guarantees:
        ``fnr`` is below the true curve: it is the largest that the (ε, δ) pairs of a pessimistic discretisation imply,
        in both directions. So a rejection of it is one of the composition. Skellam noise stands as the Gaussian of its
        variance, whose ε is never above what the accountant charges for it; at the variances in use, thousands of
        integer steps, no audit of feasible size tells the two apart.
    """

    events: tuple[tuple[Event, int], ...]

    def fnr(self, strength: float, fpr: float) -> float:
        slopes, deltas = _lines(self.events, strength)
        down = 1 - deltas - slopes * fpr
        across = (1 - deltas - fpr) / slopes
        return max(0.0, float(down.max()), float(across.max()))

    def strongest(self, rejected: Callable[[float], bool]) -> float:
        """On a fixed grid of strengths, two percent apart: each has a distribution, which is kept."""
        low, high = -_STRENGTHS - 1, _STRENGTHS + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if rejected(_STEP**middle) else (low, middle)
        return _STEP**low if low >= -_STRENGTHS else 0.0

    def epsilon(self, strength: float, delta: float) -> float:
        if strength <= 0:
            return 0.0
        return min(700.0, float(_distribution(self.events, strength).get_epsilon_for_delta(delta)))

    def scores(self, strength: float, included: NDArray[np.bool_], randomness: np.random.Generator) -> _Floats:
        """The sum of the releases, each divided by its noise's variance."""
        total = np.zeros(len(included))
        for event, count in self.events:
            rate, most, sigma = _sampled(event)
            moved = randomness.binomial(count * most, rate, len(included))
            noise = math.sqrt(count) * randomness.standard_normal(len(included))
            total += (included * moved * strength / sigma + noise) / sigma
        return total


def strength_at(curve: Curve, fpr_upper: float, fnr_upper: float) -> float:
    """The largest strength whose curve lies above these rates, that is, which they reject; 0 if none."""
    return curve.strongest(lambda strength: fnr_upper < curve.fnr(strength, fpr_upper))


def curve_of(charges: tuple[Charge, ...]) -> GaussianCurve | ComposedCurve:
    """The claim that these charges make about one unit that is behind all of them.

    Raises:
        UnsupportedEvent: a release without noise claims nothing that could be audited.
    """
    events: dict[Event, int] = {}
    for charge in charges:
        events[charge.event] = events.get(charge.event, 0) + charge.count
    parts = [(_sampled(event), count) for event, count in events.items()]
    if not parts:
        raise UnsupportedEvent("nothing was released: there is no claim to audit")
    if all(rate == 1 and most == 1 for (rate, most, _), _ in parts):
        return GaussianCurve(math.sqrt(sum(count / sigma**2 for (_, _, sigma), count in parts)))
    return ComposedCurve(tuple(events.items()))


def _bisected(rejected: Callable[[float], bool]) -> float:
    return largest(lambda strength: strength > 0 and rejected(strength), most=MOST_STRENGTH)


def _sampled(event: Event) -> tuple[float, int, float]:
    """Sample rate, the most draws of one unit, and the noise multiplier."""
    match event:
        case Gaussian(noise_multiplier=sigma) if sigma > 0:
            return 1.0, 1, sigma
        case PoissonGaussian(sample_rate=rate, noise_multiplier=sigma) if sigma > 0:
            return rate, 1, sigma
        case PatientMixture(sample_rate=rate, max_records=most, noise_multiplier=sigma) if sigma > 0:
            return rate, most, sigma
        case Skellam():
            return event.sample_rate, 1, math.sqrt(event.variance / event.l2_squared)
    raise UnsupportedEvent("a release without noise claims nothing that could be audited")


@lru_cache(maxsize=64)
def _distribution(
    events: tuple[tuple[Event, int], ...], strength: float
) -> privacy_loss_distribution.PrivacyLossDistribution:
    composed = None
    parts = [(*_sampled(event), count) for event, count in events]
    # Coarser where losses are large: the grid has then as many points
    grid = _GRID * max(1.0, *((strength / sigma) ** 2 for _, _, sigma, _ in parts))
    for rate, most, planned, count in parts:
        sigma = max(_SMALLEST_NOISE, planned / strength)
        if most > 1:
            one = privacy_loss_distribution.from_mixture_gaussian_mechanism(
                sigma, list(range(most + 1)), record_probabilities(most, rate), value_discretization_interval=grid
            )
        else:
            one = privacy_loss_distribution.from_gaussian_mechanism(
                sigma, sampling_prob=rate, value_discretization_interval=grid
            )
        one = one.self_compose(count)
        composed = one if composed is None else composed.compose(one)
    return composed


@lru_cache(maxsize=1024)
def _lines(events: tuple[tuple[Event, int], ...], strength: float) -> tuple[_Floats, _Floats]:
    """e^ε and δ(ε) at many ε ≥ 0, dense near 0."""
    distribution = _distribution(events, strength)
    most = min(100.0, float(distribution.get_epsilon_for_delta(1e-12)))
    if not math.isfinite(most):
        most = 100.0
    epsilons = max(most, 1e-3) * np.linspace(0.0, 1.0, _LINES) ** 2
    deltas = np.asarray(distribution.get_delta_for_epsilon(epsilons), np.float64)
    return np.exp(epsilons), deltas
