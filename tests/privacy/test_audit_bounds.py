"""The bounds behind every audit: closed forms, other people's figures, and that none of them claims too much."""

import math

import dp_accounting
import numpy as np
import pytest
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from privfed.privacy.audit import bounds
from privfed.privacy.audit.bounds import clopper_pearson_lower, clopper_pearson_upper
from privfed.privacy.audit.curves import ApproximateCurve, ComposedCurve, GaussianCurve, curve_of, strength_at
from privfed.privacy.errors import UnsupportedEvent
from privfed.privacy.events import Charge, Gaussian, PatientMixture, PoissonGaussian, Skellam

DELTA = 1e-5


def test_rates_are_bounded_as_by_clopper_and_pearson() -> None:
    # No hit in 100: 1 − 0.05^(1/100); all of 100: nothing is excluded from above
    assert clopper_pearson_upper(0, 100, 0.05) == pytest.approx(1 - 0.05**0.01, rel=1e-12)
    assert clopper_pearson_upper(100, 100, 0.05) == 1.0
    assert clopper_pearson_lower(100, 100, 0.05) == pytest.approx(0.05**0.01, rel=1e-12)
    assert clopper_pearson_lower(0, 100, 0.05) == 0.0
    upper = float(clopper_pearson_upper(7, 50, 0.025))
    assert binom.cdf(7, 50, upper) == pytest.approx(0.025, rel=1e-9)
    with pytest.raises(ValueError, match="hits must be from 0 to trials"):
        clopper_pearson_upper(5, 4, 0.05)


@pytest.mark.parametrize("rate", [0.003, 0.1, 0.5, 0.9])
def test_a_bounded_rate_is_missed_at_most_as_often_as_stated(rate: float) -> None:
    hits = np.arange(201)
    missed = clopper_pearson_upper(hits, 200, 0.05) < rate
    assert float(binom.pmf(hits[missed], 200, rate).sum()) <= 0.05  # exact: a sum over all outcomes


def test_rates_that_say_nothing_give_no_mu() -> None:
    """jax-privacy 2.0 took the absolute value here, and reported 6.9 where 0 is true."""
    assert bounds.mu_lower(0.9, 0.9) == 0.0
    assert bounds.mu_lower(1.0, 0.0) == 0.0
    assert bounds.mu_lower(0.5, 0.5) == 0.0
    assert bounds.mu_lower(0.999, 0.002) == 0.0
    # A threshold half-way between N(0, 1) and N(2, 1) errs Φ(−1) on both sides
    assert bounds.mu_lower(ndtr(-1), ndtr(-1)) == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 2.0, 4.0, 8.0, 20.0])
def test_the_gaussian_curve_is_that_of_the_accountant(epsilon: float) -> None:
    mu = bounds.gaussian_mu(epsilon, DELTA)
    assert dp_accounting.get_epsilon_gaussian(1 / mu, DELTA) == pytest.approx(epsilon, rel=1e-6)
    assert float(bounds.gaussian_epsilon(mu, DELTA)) == pytest.approx(epsilon, rel=1e-9)
    assert float(bounds.gaussian_epsilon(0.0, DELTA)) == 0.0


def test_a_bound_without_assumptions_is_below_that_of_the_gaussian() -> None:
    for fpr, fnr in ((0.2, 0.2), (0.01, 0.6), (0.6, 0.01), (0.001, 0.001)):
        assert bounds.epsilon_lower(fpr, fnr, DELTA) <= bounds.gaussian_epsilon(bounds.mu_lower(fpr, fnr), DELTA)
    # Randomised response at ε errs with 1/(1 + e^ε) on both sides
    rate = 1 / (1 + math.exp(3))
    assert bounds.epsilon_lower(rate, rate, 0.0) == pytest.approx(3.0)
    assert bounds.epsilon_lower(1.0, 1.0, 0.0) == 0.0


def test_the_p_value_of_one_run_is_the_binomial_tail_without_delta() -> None:
    # The example of Steinke et al. 2023: 75 of 100 right at ε = ln 3, where 75 % are expected
    assert bounds.one_run_p_value(math.log(3), 0.0, canaries=100, guesses=100, correct=75) == pytest.approx(
        binom.sf(74, 100, 0.75)
    )
    with_delta = bounds.one_run_p_value(math.log(3), 1e-4, canaries=1000, guesses=100, correct=75)
    assert with_delta > binom.sf(74, 100, 0.75)


def test_delta_adds_to_the_p_value_what_the_loop_of_the_paper_adds() -> None:
    m, r, v, epsilon, delta = 300, 120, 100, 1.3, 1e-3
    right, slope, total = 1 / (1 + math.exp(-epsilon)), 0.0, 0.0
    for i in range(1, v + 1):  # Appendix D, literally
        total += float(binom.pmf(v - i, r, right))
        slope = max(slope, total / i)
    expected = float(binom.sf(v - 1, r, right)) + slope * delta * 2 * m
    assert bounds.one_run_p_value(epsilon, delta, canaries=m, guesses=r, correct=v) == pytest.approx(expected)


def test_randomised_response_is_never_found_out_beyond_its_epsilon() -> None:
    """The mechanism for which the theorem of Steinke et al. is exact."""
    epsilon, m, alarms = 1.0, 400, 0
    for correct, weight in zip(range(m + 1), binom.pmf(np.arange(m + 1), m, 1 / (1 + math.exp(-epsilon))), strict=True):
        if weight > 1e-6 and bounds.one_run_epsilon(0.0, canaries=m, guesses=m, correct=correct, alpha=0.05) > epsilon:
            alarms += weight
    assert alarms <= 0.05


def test_the_recursion_never_rejects_a_mechanism_that_has_the_curve() -> None:
    """m independent Gaussians of μ: every canary alone, the best that an adversary can have."""
    mu, m, guesses, alarms, runs = 1.5, 200, 60, 0, 400
    curve, random = GaussianCurve(mu), np.random.default_rng(0)
    for _ in range(runs):
        included = random.integers(0, 2, m).astype(bool)
        order = np.argsort(curve.scores(1.0, included, random))
        correct = int(included[order[-30:]].sum() + (~included[order[:30]]).sum())
        alarms += bounds.curve_rejected(
            lambda x: curve.fnr(1.0, x), canaries=m, guesses=guesses, correct=correct, alpha=0.05
        )
    assert alarms / runs <= 0.05


def test_the_recursion_is_tighter_than_the_bound_for_any_mechanism() -> None:
    curve = GaussianCurve(1.0)

    def rejects(strength: float) -> bool:
        return strength > 0 and bounds.curve_rejected(
            lambda x: curve.fnr(strength, x), canaries=1000, guesses=500, correct=440, alpha=0.05
        )

    mine = curve.epsilon(bounds.largest(rejects, most=10.0), DELTA)
    theirs = bounds.one_run_epsilon(DELTA, canaries=1000, guesses=500, correct=440, alpha=0.05)
    assert mine > 1.3 * theirs > 0


@pytest.mark.parametrize("curve", [GaussianCurve(1.0), ApproximateCurve(2.0, DELTA)])
def test_a_perfect_score_is_bounded_and_half_right_is_nothing(curve: GaussianCurve | ApproximateCurve) -> None:
    def rejects(correct: int) -> bool:
        return bounds.curve_rejected(
            lambda x: curve.fnr(1.0, x), canaries=500, guesses=500, correct=correct, alpha=0.05
        )

    assert rejects(500)
    assert not rejects(250)
    assert not rejects(0)


def test_guesses_that_can_not_be_are_refused() -> None:
    for canaries, guesses, correct in ((10, 11, 5), (10, 5, 6), (10, 5, -1), (0, 0, 0)):
        with pytest.raises(ValueError, match="correct ≤ guesses ≤ canaries"):
            bounds.one_run_p_value(1.0, 0.0, canaries=canaries, guesses=guesses, correct=correct)


def test_a_composed_curve_is_the_gaussian_one_where_nothing_is_sampled() -> None:
    events = ((Gaussian(2.0), 3), (PoissonGaussian(1.0, 4.0), 2))
    exact = GaussianCurve(math.sqrt(3 / 4 + 2 / 16))
    assert curve_of(tuple(Charge(event, count) for event, count in events)) == exact
    composed = ComposedCurve(events)
    for strength in (0.5, 1.0, 2.0):
        for fpr in (0.001, 0.05, 0.3, 0.7):
            value = composed.fnr(strength, fpr)
            assert value <= exact.fnr(strength, fpr) + 1e-9  # below: a rejection is never one too many
            assert value == pytest.approx(exact.fnr(strength, fpr), abs=4e-3)
        assert composed.epsilon(strength, DELTA) == pytest.approx(exact.epsilon(strength, DELTA), rel=5e-3)
    assert strength_at(composed, 0.1, 0.1) == pytest.approx(strength_at(exact, 0.1, 0.1), rel=0.03)


def test_the_curve_of_one_sampled_release_is_below_what_thresholds_reach() -> None:
    """fnr = (1 − q)(1 − fpr) + q Φ(Φ⁻¹(1 − fpr) − μ), in closed form, is a point of some adversary."""
    rate, sigma = 0.2, 0.7
    curve = curve_of((Charge(PoissonGaussian(rate, sigma)),))
    for fpr in (0.001, 0.02, 0.2, 0.6):
        reached = (1 - rate) * (1 - fpr) + rate * ndtr(-ndtri(fpr) - 1 / sigma)
        assert curve.fnr(1.0, fpr) <= reached + 1e-9
        if fpr < 0.1:  # beyond, whoever removes the unit instead of adding it reaches less
            assert curve.fnr(1.0, fpr) == pytest.approx(reached, abs=0.01)


def test_patients_with_several_records_and_skellam_shares_have_curves() -> None:
    one = curve_of((Charge(PatientMixture(0.2, 1, 4.0), 1),))
    assert one.fnr(1.0, 0.1) == pytest.approx(curve_of((Charge(PoissonGaussian(0.2, 4.0), 1),)).fnr(1.0, 0.1), abs=1e-3)
    assert curve_of((Charge(PatientMixture(0.2, 2, 4.0), 1),)).fnr(1.0, 0.1) < one.fnr(1.0, 0.1)
    # Variance 4e6 over Δ₂² = 1e6: σ = 2 in units of what one unit moves
    shares = Skellam(share_variance=10**6, shares=5, colluders=1, dim=64, l2_squared=10**6, l1=8000)
    assert curve_of((Charge(shares, 4),)) == GaussianCurve(1.0)


def test_a_release_without_noise_is_no_claim() -> None:
    with pytest.raises(UnsupportedEvent, match="without noise"):
        curve_of((Charge(Gaussian(0.0)),))
    with pytest.raises(UnsupportedEvent, match="no claim"):
        curve_of(())
