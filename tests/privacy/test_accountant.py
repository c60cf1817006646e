"""ε against the reference table, closed forms, dp-accounting's own composition, and its own properties."""

import math
import random

import mpmath
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from privfed.privacy import accountant, rdp
from privfed.privacy.accountant import Accountant
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import Adjacency, Charge, Event, Gaussian, PoissonGaussian, to_dp_event

SHARED = Accountant()  # the tests share its caches, and so test them too

# design/privacy.md, section 5: σ, q, T, δ, RDP, PLD on a grid of 1e-4
REFERENCE = {
    "A1": (1.1, 256 / 60000, 14063, 1e-5, 2.5967, 2.3818),
    "A2": (1.3, 250 / 60000, 3600, 1e-5, 0.9422, 0.8530),
    "A3": (1.0, 0.01, 1000, 1e-5, 2.1014, 1.8282),
    "A4": (10.0, 1.0, 100, 1e-5, 4.7285, 4.3772),
    "A5": (2.0, 0.1, 100, 1e-5, 2.5806, 2.3374),
    "A6": (5.0, 0.5, 200, 1e-5, 7.2310, 6.7012),
    "A7": (0.6, 0.001, 10000, 1e-6, 3.9991, 3.1522),
    "A9": (0.8, 0.001, 100000, 1e-6, 3.1878, 2.9151),
    "A11": (0.4, 0.005, 1000, 1e-5, 19.796, 16.892),
    "A12": (30.0, 0.2, 1000, 1e-5, 0.8431, 0.7700),
}


def epsilon(event: Event, count: int = 1, delta: float = 1e-5) -> float:
    return SHARED.epsilon([Charge(event, count)], delta).value


@pytest.mark.parametrize("case", REFERENCE)
def test_reference_table(case: str) -> None:
    sigma, rate, steps, delta, by_rdp, by_pld = REFERENCE[case]
    charges = [Charge(PoissonGaussian(rate, sigma), steps)]
    got = SHARED.epsilon(charges, delta)
    assert got.accountant == "pld"
    assert got.tolerance < 0.005
    # the table's grid is 1e-4, ours stops within 0.1 % of the limit; the table has four decimals
    assert got.value == pytest.approx(by_pld, rel=1e-3, abs=5e-5)
    # RDP depends on the orders that are tried. The table's fractional orders are dp-accounting's, up to 1e-4 too high
    assert by_rdp * (1 - 2e-4) - 1e-4 <= SHARED.rdp_epsilon(charges, delta) <= by_rdp * 1.001


def test_unsampled_gaussian_is_the_analytic_one() -> None:
    """Balle and Wang 2018, Theorem 8: δ = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) with μ² = Σ 1/σ²; to 1e-4."""
    for sigma, steps in ((10.0, 100), (1.0, 1), (200.0, 50), (3.0, 400)):
        mu = math.sqrt(steps) / sigma
        for event in (Gaussian(sigma), PoissonGaussian(1.0, sigma)):
            eps = epsilon(event, steps)
            delta = norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)
            assert delta <= 1e-5
            lower = eps * (1 - 1e-4)
            assert norm.cdf(mu / 2 - lower / mu) - math.exp(lower) * norm.cdf(-mu / 2 - lower / mu) > 1e-5


def test_nearly_unsampled_approaches_the_analytic_gaussian_from_the_grid() -> None:
    """q = 1 is answered in closed form; this holds the convolution to it. q = 1 − 1e-12 moves ε by less than 1e-9."""
    for sigma, steps in ((10.0, 100), (3.0, 40)):
        on_grid = SHARED.epsilon([Charge(PoissonGaussian(1 - 1e-12, sigma), steps)], 1e-5)
        assert on_grid.tolerance > 0
        assert on_grid.value == pytest.approx(epsilon(Gaussian(sigma), steps), rel=1e-4)


MIXED = [
    Charge(PoissonGaussian(0.1, 2.0), 60),
    Charge(PoissonGaussian(0.02, 0.9), 300),
    Charge(Gaussian(20.0), 10),
    Charge(PoissonGaussian(0.1, 2.0), 40),
]


def test_one_fourier_pass_agrees_with_dp_accountings_own_composition() -> None:
    other = PLDAccountant(value_discretization_interval=2e-4)
    for charge in MIXED:
        other.compose(to_dp_event(charge.event), charge.count)
    # both are above the exact value, by at most the 0.1 % of their grids
    assert SHARED.epsilon(MIXED, 1e-5).value == pytest.approx(other.get_epsilon(1e-5), rel=1e-3)


def test_rdp_agrees_with_dp_accounting() -> None:
    other = RdpAccountant(orders=[float(order) for order in rdp.ORDERS if order == int(order)])
    for charge in MIXED:
        other.compose(to_dp_event(charge.event), charge.count)
    whole = np.flatnonzero(rdp.ORDERS == np.round(rdp.ORDERS))
    for charge in MIXED:
        one = RdpAccountant(orders=rdp.ORDERS[whole]).compose(to_dp_event(charge.event)).rdp
        np.testing.assert_allclose(rdp.divergences(charge.event)[whole], one, rtol=2e-11)
    # where the best order is fractional, ours is the smaller by a little
    assert SHARED.rdp_epsilon(MIXED, 1e-5) == pytest.approx(other.get_epsilon(1e-5), rel=1e-3)


def test_order_and_grouping_of_charges_do_not_matter() -> None:
    expected = Accountant().epsilon(MIXED, 1e-5)
    shuffled = [Charge(c.event) for c in MIXED for _ in range(c.count)]
    random.Random(1).shuffle(shuffled)
    assert Accountant().epsilon(shuffled, 1e-5) == expected  # to the last bit


sigmas = st.sampled_from([0.7, 1.0, 1.5, 3.0, 8.0])
rates = st.sampled_from([0.001, 0.01, 0.1, 0.5, 1.0])
counts = st.sampled_from([1, 7, 50, 400])


@settings(max_examples=15, deadline=None)
@given(sigmas, rates, counts)
def test_monotone_in_steps_rate_and_noise_and_never_above_rdp(sigma: float, rate: float, count: int) -> None:
    base = epsilon(PoissonGaussian(rate, sigma), count)
    # two grids may differ by a tenth of a percent; the real differences here are larger, or nothing
    assert epsilon(PoissonGaussian(rate, sigma), 2 * count) >= base * 0.999
    assert epsilon(PoissonGaussian(min(1.0, 2 * rate), sigma), count) >= base * 0.999
    assert epsilon(PoissonGaussian(rate, sigma * 2), count) <= base * 1.001
    assert base <= SHARED.rdp_epsilon([Charge(PoissonGaussian(rate, sigma), count)], 1e-5)
    assert base <= epsilon(Gaussian(sigma), count) * 1.001  # sampling never hurts


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert SHARED.epsilon([], 1e-5).value == 0.0
    assert SHARED.rdp_epsilon([], 1e-5) == 0.0
    for event in (Gaussian(0.0), PoissonGaussian(0.01, 0.0)):
        assert epsilon(event) == math.inf
        assert SHARED.rdp_epsilon([*MIXED, Charge(event)], 1e-5) == math.inf
        part = SHARED.epsilon([*MIXED, Charge(event, group="s/query")], 1e-5)
        assert part.value == part.per_group["s/query"] == math.inf


@pytest.mark.parametrize(("rate", "sigma"), [(0.01, 1.0), (0.5, 5.0), (0.001, 0.6), (0.9, 0.3), (1e-8, 30.0)])
@pytest.mark.parametrize("order", [1.1, 2.0, 2.5, 7.3, 30.0, 64.0])
def test_rdp_is_the_integral_that_defines_it(rate: float, sigma: float, order: float) -> None:
    """30 digits of E_{N(0,σ²)}[(1 − q + q·e^((2x−1)/2σ²))^α]. dp-accounting is up to 54 % above it at α < 3."""
    with mpmath.workdps(30):
        q, s, a = mpmath.mpf(rate), mpmath.mpf(sigma), mpmath.mpf(order)
        places = [-12 * s, -4 * s, 0, 1, 3, 6, a + 3 * s, a + 6 * s, a + 14 * s]
        moment = mpmath.quad(
            lambda x: mpmath.npdf(x, 0, s) * (1 - q + q * mpmath.exp((2 * x - 1) / (2 * s * s))) ** a, sorted(places)
        )
        exact = float(mpmath.log(moment) / (a - 1))
    ours = rdp.divergences(PoissonGaussian(rate, sigma))[np.searchsorted(rdp.ORDERS, order - 1e-9)]
    # a sample this rare leaves 1e-5 to rounding at fractional orders
    assert exact <= ours <= exact * (1 + (2e-8 if rate > 1e-6 else 1e-4))


def test_divergences_lost_to_rounding_are_not_called_zero() -> None:
    """dp-accounting's RDP of this event is negative at some orders, by rounding: it reports ε = 0 for any count."""
    tiny = Charge(PoissonGaussian(1e-3, 1e6), 10**18)
    other = RdpAccountant()
    other.compose(to_dp_event(tiny.event), tiny.count)
    assert other.get_epsilon(1e-9) == 0.0
    assert SHARED.rdp_epsilon([tiny], 1e-9) > 0


def test_tiny_deltas_are_answered_by_rdp() -> None:
    charges = [Charge(PoissonGaussian(0.01, 1.0), 1000)]
    got = SHARED.epsilon(charges, 1e-12)
    assert got.accountant == "rdp"
    assert got.value == SHARED.rdp_epsilon(charges, 1e-12)
    assert SHARED.epsilon(charges, 2e-11).accountant == "pld"


def test_tiny_noise_is_answered_without_a_huge_grid() -> None:
    got = SHARED.epsilon([Charge(PoissonGaussian(0.5, 1e-3), 3)], 1e-5)
    assert 1e5 < got.value < 1e8


def test_rare_sampling_is_not_left_to_rdp() -> None:
    """RDP says 0.12 here. The loss of a rarely sampled record is small, and so is the grid that it needs."""
    got = SHARED.epsilon([Charge(PoissonGaussian(0.001, 2.0))], 1e-5)
    assert got.accountant == "pld"
    assert got.value == pytest.approx(0.0015068, rel=1e-3)  # dp-accounting on a grid of 1e-6


def test_replace_one_is_refused() -> None:
    with pytest.raises(NoGuarantee, match="add-or-remove-one"):
        Accountant(Adjacency.REPLACE_ONE)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_out_of_range_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        SHARED.epsilon(MIXED, delta)


# Parallel composition

SUPPORT, QUERY = PoissonGaussian(0.1, 2.0), PoissonGaussian(0.2, 2.5)


def test_parts_of_one_split_cost_their_maximum() -> None:
    both = [Charge(SUPPORT, 50, "s/support"), Charge(QUERY, 40, "s/query")]
    got = SHARED.epsilon(both, 1e-5)
    assert got.per_group == {"s/query": epsilon(QUERY, 40), "s/support": epsilon(SUPPORT, 50)}
    assert got.value == max(got.per_group.values())


def test_charges_to_all_records_add_to_every_part() -> None:
    charges = [Charge(SUPPORT, 30), Charge(SUPPORT, 50, "s/support"), Charge(QUERY, 10, "s/query")]
    got = SHARED.epsilon(charges, 1e-5)
    assert got.per_group["s/support"] == epsilon(SUPPORT, 80)
    assert got.per_group["s/query"] == SHARED.epsilon([Charge(SUPPORT, 30), Charge(QUERY, 10)], 1e-5).value


def test_different_splits_compose_sequentially() -> None:
    """A record is in one part of each split: here some record is in s1's support and in s2's query."""
    charges = [Charge(SUPPORT, 50, "s1/support"), Charge(QUERY, 40, "s2/query")]
    together = SHARED.epsilon([Charge(SUPPORT, 50), Charge(QUERY, 40)], 1e-5).value
    assert SHARED.epsilon(charges, 1e-5).value == together > max(epsilon(SUPPORT, 50), epsilon(QUERY, 40))


def test_the_worst_part_of_each_split_counts() -> None:
    charges = [
        Charge(event, 20, f"{split}/{event.sample_rate}") for split in ("s1", "s2") for event in (SUPPORT, QUERY)
    ]
    got = SHARED.epsilon(charges, 1e-5)
    assert len(got.per_group) == 3  # both supports, both queries, one of each
    assert got.value == max(
        epsilon(SUPPORT, 40), epsilon(QUERY, 40), SHARED.epsilon([Charge(SUPPORT, 20), Charge(QUERY, 20)], 1e-5).value
    )


def test_too_many_splits_to_enumerate_are_bounded_by_rdp() -> None:
    many = [
        Charge(PoissonGaussian(rate, 2.0 + split / 10), 5, f"s{split}/{rate}")
        for split in range(6)
        for rate in (0.1, 0.2)
    ]
    got = SHARED.epsilon(many, 1e-5)
    worst = [Charge(c.event, c.count) for c in many if c.group.endswith("0.2")]  # more often sampled: worse
    assert got.accountant == "rdp"
    assert got.value == SHARED.rdp_epsilon(many, 1e-5) == pytest.approx(SHARED.rdp_epsilon(worst, 1e-5), rel=1e-12)


# Many rates


def test_many_rates_cost_what_they_cost_one_by_one() -> None:
    """1000 distinct rates go by 92 nodes. The coin between two of them costs a 2000th of ε; nothing is lost below."""
    rates = np.random.default_rng(0).uniform(0.02, 0.3, 30)
    charges = [Charge(PoissonGaussian(float(rate), 3.0), 6) for rate in rates]
    other = PLDAccountant(value_discretization_interval=1e-3)
    for charge in charges:
        other.compose(to_dp_event(charge.event), charge.count)
    exact = other.get_epsilon(1e-5)
    got = SHARED.epsilon(charges, 1e-5)
    assert got.accountant == "pld"
    assert exact * (1 - 5e-4) <= got.value <= exact * (1 + 2e-3)
    one_by_one = sum(charge.count * rdp.divergences(charge.event) for charge in charges)
    by_rdp = rdp.epsilon(np.asarray(one_by_one), 1e-5)
    assert by_rdp <= SHARED.rdp_epsilon(charges, 1e-5) <= by_rdp * (1 + 5e-4)


def test_a_rate_on_a_node_and_a_rate_next_to_one_are_between_the_right_nodes() -> None:
    rates = [2.0 ** (-j / 16) for j in range(1, 30)] + [math.nextafter(2.0**-1, 0), math.nextafter(2.0**-1, 1), 0.999]
    single, mixed = accountant._between_nodes(tuple((PoissonGaussian(rate, 2.0), 1) for rate in rates))
    assert not single
    placed = []
    for group in mixed:
        assert isinstance(group.first, PoissonGaussian) and isinstance(group.second, PoissonGaussian)
        high, low = group.first.sample_rate, group.second.sample_rate
        placed += [share * high + (1 - share) * low for share in group.shares]
    assert sorted(placed) == pytest.approx(sorted(rates), rel=1e-12)
    assert all(upper >= exact * (1 - 1e-15) for upper, exact in zip(sorted(placed), sorted(rates), strict=True))


def test_the_quick_bound_is_never_below_and_hardly_above() -> None:
    for charges in ([Charge(PoissonGaussian(0.1, 2.0), 100)], MIXED, [Charge(Gaussian(3.0), 4)]):
        fine = SHARED.epsilon(charges, 1e-5).value
        assert fine <= SHARED.quick_epsilon(charges, 1e-5) <= fine * 1.01


def test_mutating_an_answer_does_not_change_the_next() -> None:
    SHARED.epsilon(MIXED, 1e-5).per_group.clear()
    assert SHARED.epsilon(MIXED, 1e-5).per_group
