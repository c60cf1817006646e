"""Skellam noise beside rounded Gaussian noise: the lemma against the exact law, and what the accountant makes of it."""

import math
from itertools import pairwise

import mpmath
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as dp_pld
from numpy.typing import NDArray

from privfed.privacy import accountant as accounting
from privfed.privacy import closeness, opinions, skellam
from privfed.privacy.accountant import Accountant
from privfed.privacy.errors import UnsupportedEvent
from privfed.privacy.events import Charge, Gaussian, PoissonGaussian, Skellam

SHARED = Accountant()
NODES, WEIGHTS = np.polynomial.legendre.leggauss(8)


def event(variance: int, *, l2: int, dim: int = 1, **changes: object) -> Skellam:
    l1 = min(l2**2, math.isqrt(dim * l2**2))
    fields = {"share_variance": variance, "shares": 1, "colluders": 0, "dim": dim, "l2_squared": l2**2, "l1": l1}
    return Skellam(**{**fields, **changes})  # type: ignore[arg-type]


def exact_law(variance: int) -> NDArray[np.float64]:
    """P(S = k), k = 0, 1, …, from the differences of the sampler's integers: full precision in the tails too."""
    table = skellam.table(variance)
    reached = [0, *((int(high) << 64) + int(low) for high, low in zip(table.high, table.low, strict=True))]
    folded = np.array([(b - a) / 2**127 for a, b in pairwise(reached)])
    return np.concatenate([folded[:1], folded[1:] / 2])


def rounded_gaussian(variance: int, count: int) -> NDArray[np.float64]:
    """P(R = k), k < count, by quadrature of the density over a cell: a difference of two distribution functions would
    lose the digits that matter here."""
    sigma = math.sqrt(variance - 1 / 12)
    x = (np.arange(count)[:, None] + NODES / 2) / sigma
    density: NDArray[np.float64] = np.exp(-(x**2) / 2) @ WEIGHTS / 2 / (sigma * math.sqrt(2 * math.pi))
    return density


# The lemma


@pytest.mark.parametrize("variance", [4000, 4001, 10_000, 123_456, 10**6, 10**7])
def test_divergence_is_below_the_lemmas_bound_and_not_far(variance: int) -> None:
    law = exact_law(variance)
    kept = np.flatnonzero(law > 1e-30)  # 2⁻¹²⁷ is 6e-39; what is left out is nothing beside 1e-16
    p, r = law[kept], rounded_gaussian(variance, len(law))[kept]
    ratio = r / p - 1
    # Σ p·(r/p − 1 − log(r/p)): every term is positive, nothing cancels
    terms = np.where(np.abs(ratio) < 1e-3, ratio**2 / 2 - ratio**3 / 3, ratio - np.log1p(ratio))
    divergence = float(np.sum(np.where(kept == 0, 1, 2) * p * terms))
    bound = closeness.divergence(event(variance, l2=1))
    assert bound == pytest.approx(1 / (40 * variance**2))
    assert divergence <= bound
    assert divergence == pytest.approx(1 / (48 * variance**2), rel=0.02)  # what Edgeworth promises: 40 is not idle


@pytest.mark.parametrize("variance", [4000, 30_000])
def test_the_proofs_bounds_hold_point_by_point(variance: int) -> None:
    """log P(S = k) from above, by its parts, and log P(R = k) from below; out to ten standard deviations."""
    mu, sigma_squared = mpmath.mpf(variance), mpmath.mpf(variance) - mpmath.mpf(1) / 12
    with mpmath.workdps(40):
        for k in [0, 1, 7, *(int(s * math.sqrt(variance)) for s in (0.5, 1, 2, 3, 5, 10))]:
            w, x = mpmath.sqrt(mu**2 + k**2), k / mu
            series = mu * (-(x**2) / 2 + x**4 / 24 - x**6 / 80 + 5 * x**8 / 896)
            above = (
                series
                - mpmath.log(2 * mpmath.pi * mu) / 2
                - x**2 / 4
                + x**4 / 8
                + (1 - x**2 / 2 + 3 * x**4 / 8) / (8 * mu)
                + 1 / (16 * w**2)
                + 7 / w**3
                - k**2 / 2 * mpmath.mpf(5) / 12 * (1 - 3 * x**2 / 2) / mu**3
                + k**2 / 2 * mpmath.mpf(5) / 12 / (6 * w**4)
                + 120 * k**4 / w**6
            )
            exact = mpmath.log(mpmath.besseli(k, mu, maxterms=10**6)) - mu
            assert exact <= above < exact + mpmath.mpf(10) / variance
            density = -mpmath.log(2 * mpmath.pi * sigma_squared) / 2 - k**2 / (2 * sigma_squared)
            below = density - 1 / (24 * sigma_squared) + k**2 / (24 * sigma_squared**2)
            below -= k**4 / (960 * sigma_squared**4)
            cell = mpmath.quad(lambda u, k=k: mpmath.exp(-((k + u) ** 2) / (2 * sigma_squared)), [-0.5, 0, 0.5])
            assert below <= mpmath.log(cell) - mpmath.log(2 * mpmath.pi * sigma_squared) / 2


def test_a_variance_below_the_lemmas_has_no_bound() -> None:
    assert closeness.divergence(event(3999, l2=1)) == math.inf
    assert closeness.nearest([(event(3999, l2=1), 1)], 1.0) == ()
    with pytest.raises(UnsupportedEvent, match="small a variance"):
        closeness.stand_in([Charge(event(3999, l2=1))], 1e-5, 1.0)


def test_only_the_noise_that_the_adversary_does_not_know_counts() -> None:
    shares = event(1000, l2=30, shares=10, colluders=4)
    assert closeness.divergence(shares) == pytest.approx(1 / (40 * 6000**2))
    assert closeness.twin(shares).noise_multiplier == pytest.approx(math.sqrt(6000 - 1 / 12) / 30)


# What the accountant makes of it


def laws(variance: int, shift: int, rate: float) -> tuple[dict[int, float], dict[int, float]]:
    """log P of one release with a unit in the data, and of one without."""

    by_size = np.log(exact_law(variance)[: int(10 * math.sqrt(variance))])

    def log(k: int) -> float:
        return float(by_size[abs(k)])

    reach = int(9 * math.sqrt(variance))
    support = range(-reach, reach + 1)
    present = {k: float(np.logaddexp(math.log(rate) + log(k - shift), np.log1p(-rate) + log(k))) for k in support}
    return present, {k: log(k) for k in support}


@pytest.mark.parametrize(("rate", "rounds"), [(1 - 1e-12, 10), (0.1, 60)])
def test_one_dimension_against_an_exact_loss_distribution(rate: float, rounds: int) -> None:
    """dp-accounting's PLD of the two Skellam laws themselves; at δ = 1e-3, for which this noise is near enough."""
    present, absent = laws(10**6, 300, rate)
    exact = dp_pld.from_two_probability_mass_functions(
        absent, present, pessimistic_estimate=True, value_discretization_interval=1e-4
    )
    optimistic = dp_pld.from_two_probability_mass_functions(
        absent, present, pessimistic_estimate=False, value_discretization_interval=1e-4
    )
    low = optimistic.self_compose(rounds).get_epsilon_for_delta(1e-3)
    high = exact.self_compose(rounds).get_epsilon_for_delta(1e-3)
    charges = [Charge(event(10**6, l2=300, sample_rate=1.0 if rate > 0.5 else rate), rounds)]
    got = SHARED.epsilon(charges, 1e-3)
    assert got.accountant == "pld" and "within" in got.notes[0]
    assert low <= got.value <= high * 1.02
    assert got.value < 0.93 * SHARED.rdp_epsilon(charges, 1e-3)
    assert got.value <= SHARED.quick_epsilon(charges, 1e-3) <= got.value * 1.01


def test_delta_pays_for_the_distance() -> None:
    """By hand: T = 20, d = 4096, μ = 10⁹, Δ₂ = √μ/5: η = √(T·d/80)/μ = 3.2e-8, and (1 + e^ε)·η = 2.1e-6 out of 1e-5."""
    charges = [Charge(event(10**9, l2=6324, dim=4096), 20)]
    most = SHARED.rdp_epsilon(charges, 1e-5)
    reserved = (1 + math.exp(most)) * math.sqrt(20 * 4096 / 80) / 1e9
    assert reserved == pytest.approx(2.1e-6, rel=0.02)
    same = Charge(Gaussian(math.sqrt(1e9 - 1 / 12) / 6324), 20)
    got = SHARED.epsilon(charges, 1e-5).value
    assert got == pytest.approx(SHARED.epsilon([same], 1e-5 - reserved).value, rel=1e-6)
    assert got > SHARED.epsilon([same], 1e-5).value * 1.005
    # At a hundred times the scale there is nothing left to pay for
    near = SHARED.epsilon([Charge(event(10**13, l2=632_400, dim=4096), 20)], 1e-5).value
    assert near == pytest.approx(SHARED.epsilon([same], 1e-5).value, rel=1e-4)


def test_noise_that_is_not_near_enough_stays_with_rdp() -> None:
    coarse = [Charge(event(10**6, l2=200, dim=4096), 20)]
    got = SHARED.epsilon(coarse, 1e-5)
    assert got.accountant == "rdp" and not got.notes
    assert got.value == SHARED.rdp_epsilon(coarse, 1e-5) == SHARED.quick_epsilon(coarse, 1e-5)
    fine = [Charge(event(10**12, l2=200_000, dim=4096), 20)]
    assert SHARED.epsilon(fine, 1e-12).accountant == "rdp"  # δ is too small for any grid


def test_mixed_ledgers_price_fine_noise_with_the_gaussian_and_coarse_noise_apart() -> None:
    fine, coarse = Charge(event(10**12, l2=200_000, dim=64), 10), Charge(event(900, l2=3, dim=2), 4)
    gauss, sampled = Charge(Gaussian(20.0), 3), Charge(PoissonGaussian(0.1, 3.0), 5)
    together = SHARED.epsilon([fine, gauss], 1e-5)
    assert together.accountant == "pld"
    as_gaussian = SHARED.epsilon([Charge(Gaussian(5.0), 10), gauss], 1e-5).value
    assert as_gaussian <= together.value <= as_gaussian * (1 + 1e-4)
    for charges in ([fine, coarse], [fine, coarse, gauss], [fine, coarse, gauss, sampled]):
        got = SHARED.epsilon(charges, 1e-5)
        assert got.value <= SHARED.rdp_epsilon(charges, 1e-5)
        assert got.value >= SHARED.epsilon([c for c in charges if c != coarse], 1e-5).value
        assert got == SHARED.epsilon(charges[::-1], 1e-5)


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_more_noise_fewer_rounds_and_a_smaller_rate_never_cost_more(rate: float) -> None:
    """Across the place where the price goes from RDP to Gaussian."""
    scales = [3, 10, 30, 100, 300, 1000, 3000]
    for rounds in (5, 20):
        costs = [
            SHARED.epsilon([Charge(event(64 * scale**2, l2=scale, dim=256, sample_rate=rate), rounds)], 1e-5)
            for scale in scales
        ]
        values = [cost.value for cost in costs]
        assert values == sorted(values, reverse=True)
        assert {cost.accountant for cost in costs} >= {"rdp", "pld"} if rate == 1.0 else {"pld"}
    noisier = [
        SHARED.epsilon([Charge(event(v, l2=10**4, sample_rate=rate), 9)], 1e-5).value for v in (10**9, 2 * 10**9)
    ]
    assert noisier[0] > noisier[1]


def test_very_many_levels_of_sampled_noise_are_priced_in_groups() -> None:
    charges = [Charge(event(10**12 + 10**9 * n, l2=200_000, sample_rate=0.1)) for n in range(100)]
    got = SHARED.epsilon(charges, 1e-5).value
    assert len(accounting._twins([(c.event, 1) for c in charges if isinstance(c.event, Skellam)])) <= 32
    least = SHARED.epsilon([Charge(event(10**12 + 10**9 * 99, l2=200_000, sample_rate=0.1), 100)], 1e-5).value
    most = SHARED.epsilon([Charge(event(10**12, l2=200_000, sample_rate=0.1), 100)], 1e-5).value
    assert least <= got <= most


def test_dp_accounting_agrees_on_the_noise_that_stands_in() -> None:
    for charges in (
        [Charge(event(10**12, l2=200_000, dim=64), 10)],
        [Charge(event(10**12, l2=200_000, dim=64, sample_rate=0.2), 10), Charge(Gaussian(9.0), 2)],
    ):
        ours, theirs, *_ = opinions.opinions(charges, 1e-5, SHARED)
        assert theirs.accountant == "PLD, dp-accounting"
        assert theirs.epsilon == pytest.approx(ours.epsilon, rel=2e-3)
    coarse = opinions.opinions([Charge(event(900, l2=3, dim=2), 4)], 1e-5, SHARED)[1]
    assert coarse.epsilon is None and "small a variance" in coarse.note
