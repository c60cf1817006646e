"""Counts, standardisation and the adaptive clip: sensitivities, and what comes out."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.privacy import selftest, skellam
from privfed.privacy.accountant import Accountant
from privfed.privacy.events import Charge, Gaussian
from privfed.privacy.releases import Counts, Standardisation

KEY = bytes(range(32))


def test_counts_cost_what_one_unit_moves() -> None:
    accuracy = Counts(cells=2, cells_per_unit=2)
    event = accuracy.event(share_variance=accuracy.variance(50.0), shares=1, colluders=0)
    assert (event.l2_squared, event.l1, event.dim) == (2, 2, 2)
    selftest.check_sensitivity([np.array([101, 80])], [np.array([100, 79])], event)
    got = Accountant().epsilon([Charge(event)], 1e-5).value
    # z = 50 once: the Gaussian's, and hardly more
    assert got == pytest.approx(Accountant().rdp_epsilon([Charge(Gaussian(50.0))], 1e-5), rel=0.02)


def test_a_patient_with_k_test_records_moves_a_cell_by_k() -> None:
    histogram = Counts(cells=20, cells_per_unit=1, most_per_cell=4)
    event = histogram.event(share_variance=100, shares=2, colluders=1)
    assert (event.l2_squared, event.l1) == (16, 4)
    moved = np.zeros(20, dtype=np.int64)
    moved[3] = 4
    selftest.check_sensitivity([moved], [moved * 0], event)
    moved[3] = 5
    with pytest.raises(selftest.SelfTestFailed, match="Δ₂ = 5"):
        selftest.check_sensitivity([moved], [moved * 0], event)
    for cells, per_unit, most in ((2, 3, 1), (2, 0, 1), (2, 1, 0)):
        with pytest.raises(ValueError, match="must be"):
            Counts(cells=cells, cells_per_unit=per_unit, most_per_cell=most)


LOWER, UPPER = np.array([0.0, -5.0, 30.0]), np.array([1.0, 5.0, 45.0])
rows = st.lists(st.tuples(*[st.floats(-100, 100) | st.just(math.nan) | st.just(math.inf)] * 3), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(rows)
def test_no_record_moves_the_standardising_sums_beyond_their_event(table: list[tuple[float, ...]]) -> None:
    standard = Standardisation(lower=LOWER, upper=UPPER, steps=32)
    event = standard.event(share_variance=1, shares=1, colluders=0)
    with_record, without = standard.encode(np.array(table)), standard.encode(np.array(table)[:-1].reshape(-1, 3))
    selftest.check_sensitivity([with_record], [without], event)
    assert event.l2_squared == 7 * 32**2
    assert standard.event(share_variance=1, shares=1, colluders=0, max_records=3).l2_squared == 9 * 7 * 32**2


def test_noised_sums_give_back_mean_and_deviation() -> None:
    random = np.random.default_rng(0)
    table = np.column_stack([random.beta(2, 3, 4000), random.normal(1, 1.5, 4000), random.normal(37, 2, 4000)])
    standard = Standardisation(lower=LOWER, upper=UPPER)
    variance = standard.variance(10.0)
    total = standard.encode(table) + skellam.share(KEY, standard.dim, variance)
    mean, deviation = standard.decode(total)
    held = np.clip(table, LOWER, UPPER)
    # noise of 10·√7 records on 4000: 0.7 % of half a range, a few times that on a deviation
    assert np.allclose(mean, held.mean(0), atol=0.03 * (UPPER - LOWER))
    assert np.allclose(deviation, held.std(0), rtol=0.2)
    nothing = standard.decode(np.full(7, -5))
    assert np.isfinite(nothing[0]).all() and (nothing[1] > 0).all()


def test_ranges_must_be_public_and_finite() -> None:
    for lower, upper in (([0.0], [0.0]), ([0.0, 1.0], [1.0]), ([-math.inf], [1.0])):
        with pytest.raises(ValueError, match=r"lower|range"):
            Standardisation(lower=np.array(lower), upper=np.array(upper))
    with pytest.raises(ValueError, match="steps"):
        Standardisation(lower=LOWER, upper=UPPER, steps=0)
