"""Vectors as integers with their share of the noise: what is booked, what is sent, and what is read from the sum."""

import math
from typing import Any

import numpy as np
import pytest

from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import Skellam
from privfed.privacy.releases import Counts, Standardisation
from privfed.privacy.selftest import (
    SelfTest,
    SelfTestFailed,
    check_encoding,
    check_independence,
    check_noise,
    check_sensitivity,
)
from privfed.privacy.shared import (
    MOST_SHARE_VARIANCE,
    ClientSum,
    CountSum,
    RecordSum,
    SharedSum,
    client_sum,
    record_sum,
)

SEED = b"public"


def client(**changes: Any) -> ClientSum:
    fields: dict[str, Any] = {
        "noise_multiplier": 3.0,
        "max_update_norm": 2.0,
        "minimum_cohort": 4,
        "colluders": 1,
        "sites": 5,
        "most_bits": 32,
        "seed": SEED,
    }
    return client_sum(**{"parameters": 12, **fields, **changes})


def record(**changes: Any) -> RecordSum:
    fields: dict[str, Any] = {
        "noise_multiplier": 3.0,
        "max_grad_norm": 2.0,
        "expected_batch_size": 10.0,
        "sample_rate": 1.0,
        "minimum_cohort": 4,
        "colluders": 1,
        "sites": 5,
        "most_bits": 32,
        "seed": SEED,
    }
    return record_sum(**{"parameters": 12, **fields, **changes})


def counts(**changes: Any) -> CountSum:
    fields: dict[str, Any] = {
        "release": Counts(cells=6, cells_per_unit=2),
        "noise_multiplier": 30.0,
        "minimum_cohort": 4,
        "colluders": 1,
        "sites": 5,
        "most_bits": 32,
    }
    return CountSum(**{**fields, **changes})


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


# Events


def test_the_event_of_a_whole_site_is_exact() -> None:
    """12 parameters are padded to 16, so √d = 4; 10·√d steps in C; share: ⌈(3·40)²/(4 − 1)⌉."""
    shared = client()
    assert (shared.dim, shared.scale) == (16, 20.0)
    probable = 40**2 + 16 / 4 + math.sqrt(2 * 0.5) * (40 + 4 / 2)  # β = e^(−1/2)
    l2_squared = math.floor(min(44**2, probable))
    l1 = math.floor(min(4 * math.sqrt(probable), probable))
    expected = Skellam(share_variance=4800, shares=4, colluders=1, dim=16, l2_squared=l2_squared, l1=l1)
    assert shared.event() == expected
    assert shared.event(5).variance == 4 * 4800
    assert (shared.limit, shared.divisor) == (math.floor(math.sqrt(probable)), 1.0)


def test_the_event_of_a_record_counts_what_rounding_the_sum_moves() -> None:
    """100·√d = 400 steps in C; Δ₂ = 400 + √16; Δ₁ ≤ √16·404; share: (3·400)²/3."""
    shared = record(sample_rate=0.25)
    expected = Skellam(
        share_variance=480_000, shares=4, colluders=1, dim=16, l2_squared=404**2, l1=4 * 404, sample_rate=0.25
    )
    assert shared.event() == expected
    assert (shared.scale, shared.divisor, shared.limit) == (200.0, 10.0, 400 * 8 * 10 // 4)


def test_the_event_of_counts_is_that_of_their_release() -> None:
    shared = counts()  # μ = 30²·2; a share is a third
    assert shared.event() == Skellam(share_variance=600, shares=4, colluders=1, dim=6, l2_squared=2, l1=2)
    assert shared.event(5).shares == 5


@pytest.mark.parametrize("shared", [client(), record(), counts()], ids=lambda s: type(s).__name__)
def test_a_sum_of_fewer_sites_has_no_event(shared: SharedSum | CountSum) -> None:
    with pytest.raises(ValueError, match="at least minimum_cohort = 4, got 3"):
        shared.event(3)


def test_noise_of_the_server_is_one_share_however_many_contribute() -> None:
    shared = client(at_server=True)
    assert shared.event() == shared.event(5)
    assert (shared.event().shares, shared.event().colluders) == (1, 0)
    assert shared.event().variance == 120**2


# What is sent


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e3, 1e30])
def test_no_coordinate_is_beyond_the_bound(size: float) -> None:
    for number in range(20):
        vector = size * np.random.default_rng(number).normal(size=12)
        for shared in (client(), record(), client(at_server=True)):
            assert isinstance(shared, ClientSum | RecordSum)
            if isinstance(shared, RecordSum) and size > 1e9:
                continue  # a clipped sum is none of that size
            encoded = shared.encode(vector, key(number))
            assert encoded.shape == (16,) and int(np.abs(encoded).max()) <= shared.bound
    table = counts()
    assert int(np.abs(table.encode(np.full(6, 2**62), key(1))).max()) <= table.bound


def test_the_sum_of_all_sites_fits_the_modulus() -> None:
    for shared in (client(), record(), counts()):
        assert (2 * 5 * shared.bound).bit_length() <= 32


@pytest.mark.parametrize("shared", [client(), record()], ids=lambda s: type(s).__name__)
def test_one_key_is_one_vector(shared: ClientSum | RecordSum) -> None:
    update = np.linspace(-0.1, 0.3, 12)
    assert (shared.encode(update, key(1)) == shared.encode(update, key(1))).all()
    assert (shared.encode(update, key(1)) != shared.encode(update, key(2))).any()


def test_an_update_that_is_not_finite_counts_as_zero() -> None:
    """A refusal would tell, without noise, that the site's update is one of these."""
    shared, nothing = client(), np.zeros(12)
    for value in (np.nan, np.inf, -np.inf):
        broken = nothing.copy()
        broken[3] = value
        assert (shared.encode(broken, key(1)) == shared.encode(nothing, key(1))).all()


def test_a_whole_site_moves_the_integers_by_no_more_than_is_booked() -> None:
    """Without noise (at the server), by the exact lengths of the integer vectors."""
    shared = client(at_server=True)
    vectors = [10.0 * np.random.default_rng(n).normal(size=12) for n in range(200)]
    encoded = [shared.encode(vector, key(n)) for n, vector in enumerate(vectors)]
    check_sensitivity(encoded, [np.zeros(16, dtype=np.int64)] * len(encoded), shared.event())
    longest = max(int((vector**2).sum()) for vector in encoded)
    assert longest > 0.95 * 40**2  # the test is one: they are as long as the clip allows


def test_a_record_moves_the_integers_by_no_more_than_is_booked() -> None:
    """The noise of one key is the same for both, so that the difference is the record's alone."""
    shared = record()
    with_it, without = [], []
    for number in range(200):
        others, own = np.random.default_rng(number).normal(size=(2, 12))
        own *= 2.0 / np.linalg.norm(own)
        with_it.append(shared.encode(others + own, key(number)))
        without.append(shared.encode(others, key(number)))
    check_sensitivity(with_it, without, shared.event())
    moved = max(int(((one - two) ** 2).sum()) for one, two in zip(with_it, without, strict=True))
    assert 400**2 < moved <= 404**2  # more than C·s: the rounding of the sum counts
    # a mechanism that forgets to clip is caught by the same check
    with pytest.raises(SelfTestFailed, match="booked"):
        twice = [shared.encode(4.0 * np.eye(12)[0], key(1))]
        check_sensitivity(twice, [shared.encode(np.zeros(12), key(1))], shared.event())


# What is read


@pytest.mark.parametrize("build", [client, record])
def test_the_mean_comes_back_but_for_the_noise(build: Any) -> None:
    shared = build(noise_multiplier=1e-3, parameters=40)
    updates = [0.1 * np.random.default_rng(n).normal(size=40) for n in range(5)]
    total = np.sum([shared.encode(update, key(n)) for n, update in enumerate(updates)], axis=0)
    mean = np.mean(updates, axis=0) / shared.divisor
    # one coordinate: five roundings of variance ≤ 1/4 and five shares, in steps of 1/scale, over 5·divisor
    deviation = math.sqrt(5 * (0.25 + shared.noise.share_variance)) / (shared.scale * 5 * shared.divisor)
    assert np.abs(shared.decode(total, summands=5) - mean).max() < 6 * deviation
    assert np.abs(mean).max() > 6 * deviation  # so that nothing at all would not do
    with pytest.raises(ValueError, match="summands"):
        shared.decode(total, summands=0)


@pytest.mark.parametrize("build", [client, record])
def test_the_noise_of_a_sum_is_that_of_all_its_shares(build: Any) -> None:
    shared = build(parameters=4000)
    nothing = np.zeros(4000)
    shares = [shared.encode(nothing, key(n)) for n in range(5)]
    check_noise(np.sum(shares, axis=0), 5 * shared.noise.share_variance)
    check_independence(shares)
    assert shared.event(5).variance == 4 * shared.noise.share_variance  # one of them known
    # the deviation in the mean: z·√(5/3)/5 of C, over the divisor: five shares where three must do
    mean = shared.decode(np.sum(shares, axis=0), summands=5)
    expected = 3.0 * 2.0 * math.sqrt(5 / 3) / 5 / shared.divisor
    assert float(np.std(mean)) == pytest.approx(expected, rel=0.06)  # 4000 numbers: 1.1 % each way, times five


def test_the_server_adds_all_of_its_noise_and_the_sites_none() -> None:
    shared = client(at_server=True, parameters=4000)
    nothing = shared.encode(np.zeros(4000), key(1))
    assert not nothing.any()
    noised = shared.add_noise(nothing, key(2))
    check_noise(noised, math.ceil((3.0 * shared.scale * 2.0) ** 2))
    assert (shared.add_noise(nothing, key(2)) == noised).all()
    for sites_add in (client(), record(), counts()):
        total = np.arange(sites_add.dim)
        assert (sites_add.add_noise(total, key(2)) == total).all()


# Which scale


def test_a_scale_is_as_fine_as_the_bits_allow() -> None:
    chosen = [record(most_bits=bits).scale * 2.0 / 4 for bits in (18, 17, 16, 15)]
    assert chosen[0] == 100.0 and chosen == sorted(chosen, reverse=True) and len(set(chosen)) == 4
    # a coarser one costs more: the rounding is a larger part of what a record moves
    relative = [math.sqrt(record(most_bits=bits).event().l2_squared) / (4 * c) for bits, c in ((18, 100), (15, 12.5))]
    assert relative == [pytest.approx(1.01, rel=1e-3), pytest.approx(1.08, rel=1e-3)]


@pytest.mark.parametrize("build", [client, record])
def test_what_does_not_fit_is_refused(build: Any) -> None:
    with pytest.raises(NoGuarantee, match="more than 12 bits a coordinate"):
        build(most_bits=12)
    with pytest.raises(NoGuarantee, match=r"beyond 2\^36"):
        build(noise_multiplier=1e6, most_bits=60)


def test_no_plan_asks_for_a_table_that_takes_all_memory() -> None:
    fits = record(noise_multiplier=500.0, most_bits=60)
    assert fits.noise.share_variance <= MOST_SHARE_VARIANCE < 2**37


# Counts


def test_counts_are_held_to_their_half_of_the_modulus() -> None:
    shared = counts(sites=1000)  # 10 bits for the sites: 2^19
    assert shared.limit == 2**19
    noiseless = counts(sites=1000, noise_multiplier=1e-9)  # variance 1
    assert abs(int(noiseless.encode(np.full(6, 10**9), key(1))[0]) - 2**19) < 40


def test_moments_go_through_the_same_sum() -> None:
    release = Standardisation(lower=-np.ones(3), upper=np.ones(3), steps=64)
    shared = counts(release=release)
    assert shared.dim == 7
    # z² · 7 · 64², in three shares
    assert shared.event() == Skellam(
        share_variance=-(-(30**2 * 7 * 64**2) // 3), shares=4, colluders=1, dim=7, l2_squared=7 * 64**2, l1=7 * 64
    )


# The self-test that a site runs first


@pytest.mark.parametrize("shared", [client(), record()], ids=lambda s: type(s).__name__)
def test_sound_encodings_pass_and_are_asked_once(shared: ClientSum | RecordSum) -> None:
    asked: list[bytes] = []

    def encode(secret: bytes) -> Any:
        asked.append(secret)
        return shared.encode(np.zeros(12), secret)

    test = SelfTest()
    test.ensure(type(shared), encode, shared.noise.share_variance)
    assert len(set(asked)) == len(asked) > 0
    before = len(asked)
    test.ensure(type(shared), encode, shared.noise.share_variance)
    assert len(asked) == before
    test.ensure(type(shared), lambda secret: record(noise_multiplier=2.0).encode(np.zeros(12), secret), 213334)
    with pytest.raises(SelfTestFailed):  # another variance is another mechanism
        test.ensure(type(shared), encode, 2 * shared.noise.share_variance)


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda secret: np.zeros(16, dtype=np.int64), id="missing share"),
        pytest.param(lambda secret: record().encode(np.zeros(12), key(1)), id="shared seed"),
        pytest.param(lambda secret: record(minimum_cohort=5).encode(np.zeros(12), secret), id="share too small"),
        pytest.param(
            lambda secret: np.clip(record().encode(np.zeros(12), secret), -600, 600), id="cut after the noise"
        ),
    ],
)
def test_a_broken_encoding_fails_the_self_test(broken: Any) -> None:
    # Its keys are the system's. A share with 3/4 of the variance passes the test of a site, of 2048 numbers, once in
    # 15,000 times; of 4096 it is (1 − 4.9·√(2/4096) − 3/4) / (3/4·√(2/4096)) = 8.5 σ below what passes.
    with pytest.raises(SelfTestFailed):
        check_encoding(broken, record().noise.share_variance, size=1 << 12)
