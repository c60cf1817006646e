"""Skellam shares: the law, the sum of shares, and the divergence bound against the exact one.

Distributions at a level of 1e-4, on fixed keys: a failure is a change and not bad luck.
"""

import math

import mpmath
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as dp_pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import ive

from privfed.privacy import noise, rdp, selftest, skellam
from privfed.privacy.accountant import Accountant
from privfed.privacy.events import Charge, Gaussian, Skellam

KEY = bytes(range(32))
RARE = 1e-4


def event(variance: int, *, l2: int = 1, dim: int = 1, l1: int | None = None, **changes: object) -> Skellam:
    fields = {"share_variance": variance, "shares": 1, "colluders": 0, "dim": dim, "l2_squared": l2**2}
    return Skellam(**{**fields, "l1": l1 or min(l2**2, math.isqrt(dim * l2**2)), **changes})  # type: ignore[arg-type]


# The sampler


def test_the_keystream_is_that_of_the_mechanisms_generator() -> None:
    words = noise.generator(KEY).bit_generator.random_raw(64)
    stream = skellam.Keystream(KEY)
    assert np.concatenate([stream.words(10), stream.words(54)]).tolist() == words.tolist()
    with pytest.raises(ValueError, match="32 bytes"):
        skellam.Keystream(bytes(16))


@pytest.mark.parametrize("variance", [1, 7, 400, 10**6])
def test_thresholds_are_the_distribution_function_to_a_hundred_bits(variance: int) -> None:
    """P(|X| ≤ k) from modified Bessel functions to 60 digits: P(X = j) = e^(−μ)·I_j(μ)."""
    table = skellam.table(variance)
    with mpmath.workdps(60):
        mu, total = mpmath.mpf(variance), mpmath.mpf(0)
        for k in range(min(60, table.largest)):
            mass = mpmath.exp(-mu) * mpmath.besseli(k, mu)
            total += mass if k == 0 else 2 * mass
            ours = (int(table.high[k]) << 64) + int(table.low[k])
            assert abs(mpmath.mpf(ours) / 2**127 - total) < mpmath.mpf(2) ** -100
    assert int(table.high[-1]) << 64 == 1 << 127


@pytest.mark.parametrize("variance", [1, 3, 50, 5000, 10**8])
def test_samples_follow_the_skellam_law(variance: int) -> None:
    x = skellam.share(KEY, 200_000, variance)
    assert x.dtype == np.int64
    assert RARE < selftest.shape_p_value(x, variance)
    # A second law that knows nothing of our table: KS against Bessel functions, or the normal law where it is as good
    if variance <= 5000:
        k = np.arange(-40 * math.isqrt(variance) - 40, 40 * math.isqrt(variance) + 41)
        law = np.cumsum(ive(np.abs(k), variance))
        # KS on integers is conservative, so its p-value is a bound
        gap = np.abs(np.searchsorted(np.sort(x), k, side="right") / len(x) - law).max()
        assert stats.kstwobign.sf(gap * math.sqrt(len(x))) > RARE
    else:
        assert stats.kstest(x / math.sqrt(variance), "norm").pvalue > RARE
    score = (np.mean(x.astype(float) ** 2) / variance - 1) * math.sqrt(len(x) / (2 + 1 / variance))
    assert abs(score) < 3.9  # two-sided 1e-4
    assert np.abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 3.9 / math.sqrt(len(x))


def test_a_word_that_equals_a_threshold_is_decided_by_the_next_one() -> None:
    table = skellam.table(9)

    class Scripted(skellam.Keystream):
        def __init__(self, *words: int) -> None:
            self._words = list(words)

        def words(self, count: int) -> np.ndarray:
            return np.array([self._words.pop(0) for _ in range(count)], dtype=np.uint64)

    for k in (0, 1, 5, 12):
        high, low = int(table.high[k]), int(table.low[k])
        assert table.sample(1, Scripted(high << 1, low - 1)).tolist() == [k]
        assert table.sample(1, Scripted(high << 1, low)).tolist() == [k + 1]
        assert table.sample(1, Scripted(high << 1 | 1, low)).tolist() == [-k - 1]
        assert table.sample(1, Scripted((high - 1) << 1)).tolist() == [k]
        assert table.sample(1, Scripted((high + 1) << 1)).tolist() == [k + 1]
    largest = table.sample(1, Scripted(2**64 - 1, 2**64 - 1))
    assert largest.tolist() == [-table.largest]


def test_a_replay_is_the_same_share_and_another_key_another() -> None:
    assert (skellam.share(KEY, 100, 50) == skellam.share(KEY, 100, 50)).all()
    assert (skellam.share(KEY, 100, 50)[:40] == skellam.share(KEY, 40, 50)).all()
    assert not (skellam.share(KEY, 100, 50) == skellam.share(KEY[::-1], 100, 50)).all()


@pytest.mark.parametrize("variance", [0, -1, 2**40 + 1])
def test_variances_without_a_table_are_refused(variance: int) -> None:
    with pytest.raises(ValueError, match="variance"):
        skellam.table(variance)


def test_shares_add_up_to_the_variance_that_was_asked_for() -> None:
    """12 sites, at least 8 in a sum, 3 colluding: any 8 − 3 honest shares carry μ."""
    mu = 1001
    each = skellam.share_variance(mu, minimum_cohort=8, colluders=3)
    assert each == 201 and 5 * each >= mu
    keys = [noise.derive_key(KEY, b"share", bytes([site])) for site in range(5)]
    total = np.sum([skellam.share(key, 100_000, each) for key in keys], axis=0)
    selftest.check_noise(total, 5 * each)
    for cohort, colluders in ((3, 3), (3, -1), (0, 0)):
        with pytest.raises(ValueError, match="colluders"):
            skellam.share_variance(mu, minimum_cohort=cohort, colluders=colluders)


def test_a_noised_vector_never_leaves_its_bound() -> None:
    vector = np.array([10**9, -(10**9), 5, 0] * 1000)
    out = skellam.add_share(vector, limit=100, variance=50, key=KEY)
    assert np.abs(out).max() <= skellam.coordinate_bound(100, 50)
    # The range comes before the noise: what is at the edge still shows all of it
    assert out[out > 100].size > 0
    selftest.check_noise(out - np.clip(vector, -100, 100), 50)


@given(st.lists(st.integers(-500, 500), min_size=1, max_size=20), st.data())
def test_holding_coordinates_to_a_range_moves_no_two_vectors_apart(one: list[int], data: st.DataObject) -> None:
    other = data.draw(st.lists(st.integers(-500, 500), min_size=len(one), max_size=len(one)))
    a, b = np.array(one), np.array(other)
    assert (np.abs(np.clip(a, -100, 100) - np.clip(b, -100, 100)) <= np.abs(a - b)).all()


# The bound


def exact_divergence(mu: int, shift: int, order: int) -> float:
    """D_α(Skellam(μ) + shift ‖ Skellam(μ)) in one dimension, by summing the series."""
    reach = 40 * math.isqrt(mu) + 60 * order * shift + 60
    k = np.arange(-reach, reach + 1)
    with np.errstate(divide="ignore"):
        here, moved = np.log(ive(np.abs(k), mu)), np.log(ive(np.abs(k - shift), mu))
    usable = np.isfinite(here) & np.isfinite(moved)
    terms = order * moved[usable] + (1 - order) * here[usable]
    return float(np.logaddexp.reduce(terms) / (order - 1))


@pytest.mark.parametrize("mu", [20, 200, 5000])
@pytest.mark.parametrize("shift", [1, 3])
def test_the_bound_is_above_the_exact_divergence_and_close(mu: int, shift: int) -> None:
    bound = rdp.divergences(event(mu, l2=shift))
    for order in (2, 3, 8, 20):
        exact = exact_divergence(mu, shift, order)
        ours = bound[np.searchsorted(rdp.ORDERS, order)]
        assert exact <= ours
        if mu >= 200 and order <= 8:
            assert ours <= exact * 1.15


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=6).filter(any), st.sampled_from([30, 300]))
def test_the_bound_is_above_the_exact_divergence_of_vectors(shift: list[int], mu: int) -> None:
    """Independent coordinates: the exact divergence of a vector is the sum over its coordinates."""
    l2_squared, l1 = sum(x * x for x in shift), sum(abs(x) for x in shift)
    release = Skellam(share_variance=mu, shares=1, colluders=0, dim=len(shift), l2_squared=l2_squared, l1=l1)
    for order in (2, 5, 16):
        exact = sum(exact_divergence(mu, abs(x), order) for x in shift if x)
        assert exact <= rdp.divergences(release)[np.searchsorted(rdp.ORDERS, order)]


def test_the_formula_by_hand() -> None:
    """α = 4, Δ₂² = 9, Δ₁ = 5, μ = 10: 4·9/20 + min(((7)·9 + 30)/400, 15/20) = 1.8 + 0.2325."""
    got = rdp.divergences(event(10, dim=3, l2=3, l1=5))[np.searchsorted(rdp.ORDERS, 4.0)]
    assert got == pytest.approx(2.0325, rel=1e-10)
    # At a large order the second bound is the smaller: 200·9/20 + 15/20
    got = rdp.divergences(event(10, dim=3, l2=3, l1=5))[np.searchsorted(rdp.ORDERS, 128.0)]
    assert got == pytest.approx(128 * 9 / 20 + 0.75, rel=1e-10)
    # (α − 1)·D lies on a line between integers: at 3.1, 2·1.5375 + 0.1·(3·2.0325 − 2·1.5375), over 2.1
    fractional = rdp.divergences(event(10, dim=3, l2=3, l1=5))[np.searchsorted(rdp.ORDERS, 3.1 - 1e-9)]
    assert fractional == pytest.approx((3.075 + 0.1 * (6.0975 - 3.075)) / 2.1, rel=1e-9)


@pytest.mark.parametrize(("scale", "reference"), [(64, 5.529), (256, 4.265), (1024, 4.170)])
def test_reference_values_of_the_design(scale: int, reference: float) -> None:
    """design/privacy.md, section 4: z = 5, T = 20, C = 1, d = 1e4, β = e^(−1/2)."""
    d = 10_000
    l2 = min(scale + math.sqrt(d), math.sqrt(scale**2 + d / 4 + (scale + math.sqrt(d) / 2)))
    shared = skellam.SharedNoise(noise_multiplier=5.0, steps=scale, dim=d, l2_bound=l2, minimum_cohort=1, colluders=0)
    got = Accountant().epsilon([Charge(shared.event(), 20)], 1e-5)
    assert got.accountant == "rdp"
    # the reference's orders are fewer: ours may be a little below; Δ₂² is rounded down to an integer
    assert reference * 0.997 <= got.value <= reference + 5e-4


def test_one_dimension_against_an_exact_loss_distribution() -> None:
    """The second accountant: dp-accounting's PLD of the two probability mass functions themselves."""
    mu, steps, delta = 400, 10, 1e-6
    k = range(-400, 401)
    lower = {j: math.log(float(ive(abs(j), mu))) for j in k if float(ive(abs(j), mu)) > 0}
    upper = {j: math.log(float(ive(abs(j - 20), mu))) for j in k if float(ive(abs(j - 20), mu)) > 0}
    both = {j for j in lower if j in upper}
    exact = dp_pld.from_two_probability_mass_functions(
        {j: lower[j] for j in both}, {j: upper[j] for j in both}, value_discretization_interval=1e-3
    )
    reference = exact.self_compose(steps).get_epsilon_for_delta(delta)
    ours = Accountant().epsilon([Charge(event(mu, l2=20), steps)], delta).value
    gaussian = Accountant().rdp_epsilon([Charge(Gaussian(1.0), steps)], delta)
    assert reference <= ours
    assert ours <= gaussian * 1.05  # σ = Δ: the excess over the Gaussian is small


@settings(max_examples=30, deadline=None)
@given(st.integers(100, 10**6), st.integers(1, 30), st.integers(1, 10_000))
def test_skellam_costs_more_than_gaussian_and_approaches_it(mu: int, l2: int, dim: int) -> None:
    skell, gauss = rdp.divergences(event(mu, l2=l2, dim=dim)), rdp.ORDERS * l2**2 / (2 * mu)
    assert (skell >= gauss).all()
    finer = rdp.divergences(event(mu * 10**4, l2=l2 * 100, dim=dim))
    whole = rdp.ORDERS == np.round(rdp.ORDERS)
    assert (finer / gauss)[whole].max() <= (skell / gauss)[whole].max() * (1 + 1e-9)


# Shares in events


def test_the_event_prices_itself_against_its_colluders() -> None:
    accountant = Accountant()

    def cost(shares: int, colluders: int) -> float:
        release = event(400, l2=20, shares=shares, colluders=colluders)
        return accountant.epsilon([Charge(release)], 1e-5).value

    assert cost(5, 4) == cost(1, 0) > cost(5, 2) == cost(3, 0) > cost(5, 0)


def test_a_planned_release_reserves_the_fewest_and_settles_on_the_realised_shares() -> None:
    shared = skellam.SharedNoise(
        noise_multiplier=5.0, steps=1000.0, dim=4096, l2_bound=1064.0, minimum_cohort=8, colluders=3
    )
    assert shared.share_variance == 5_000_000
    assert shared.event().shares == 8
    assert shared.event().variance == 25_000_000 == (5 * 1000) ** 2
    assert shared.event(10).variance == 35_000_000
    with pytest.raises(ValueError, match="minimum_cohort"):
        shared.event(7)
    bound = skellam.coordinate_bound(2000, shared.share_variance)
    assert 2 ** (shared.bits(2000, 10) - 1) <= 2 * 10 * bound < 2 ** shared.bits(2000, 10)


@pytest.mark.parametrize(
    "changes",
    [
        {"colluders": 1},
        {"l1": 100},
        {"share_variance": 0},
        {"l2_squared": 0},
        {"dim": 0},
        {"sample_rate": 0.0},
        {"shares": 0},
    ],
)
def test_impossible_events_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        event(10, **{"l2": 3, "dim": 100, **changes})  # type: ignore[arg-type]


# Sampling


def test_the_subsampled_bound_holds_and_is_flagged() -> None:
    """Exact moments in one dimension, both directions, at q = 0.05."""
    mu, shift, q = 200, 10, 0.05
    bound = rdp.divergences(event(mu, l2=shift, sample_rate=q))
    k = np.arange(-600, 601)
    p, moved = ive(np.abs(k), mu), ive(np.abs(k - shift), mu)
    mixture = (1 - q) * p + q * moved
    usable = (p > 1e-290) & (mixture > 1e-290)
    for order in (2, 4, 8):
        for a, b in ((mixture, p), (p, mixture)):
            terms = order * np.log(a[usable]) + (1 - order) * np.log(b[usable])
            assert np.logaddexp.reduce(terms) / (order - 1) <= bound[np.searchsorted(rdp.ORDERS, order)]
    assert (bound <= rdp.divergences(event(mu, l2=shift))).all()
    got = Accountant().epsilon([Charge(event(mu, l2=shift, sample_rate=q), 100)], 1e-5)
    assert "loose" in got.notes[0]
    assert got.value < Accountant().epsilon([Charge(event(mu, l2=shift), 100)], 1e-5).value


# Mixed ledgers


def test_a_mixed_ledger_costs_the_smaller_of_all_rdp_and_a_split_delta() -> None:
    accountant = Accountant()
    gaussian, shared = Charge(Gaussian(5.0), 20), Charge(event(400, l2=4), 20)
    got = accountant.epsilon([gaussian, shared], 1e-5)
    alone = [accountant.epsilon([charge], 1e-5).value for charge in (gaussian, shared)]
    assert max(alone) < got.value <= accountant.rdp_epsilon([gaussian, shared], 1e-5)
    halves = [accountant.epsilon([charge], 0.5e-5).value for charge in (gaussian, shared)]
    assert got.value <= sum(halves) * (1 + 1e-6)
    # With one of them tiny, splitting wins: RDP would give up the PLD of the large one
    big, tiny = Charge(Gaussian(1.0), 10), Charge(event(10**12, l2=1), 1)
    split = accountant.epsilon([big, tiny], 1e-5)
    assert split.accountant == "pld+rdp" and split.value < accountant.rdp_epsilon([big, tiny], 1e-5)


def test_the_samplers_error_is_part_of_delta() -> None:
    """2⁻¹⁰⁰ per coordinate and share vanishes against any δ in use, and is not forgotten when it does not."""
    huge = Charge(event(10**6, l2=1, dim=2**30, shares=2**20), 2**20)
    assert Accountant().epsilon([huge], 1e-12).value == math.inf
    assert Accountant().epsilon([huge], 1e-2).value < math.inf
