"""Mechanisms broken on purpose, one of each kind: the self-test catches them, and lets the sound one pass."""

import numpy as np
import pytest

from privfed.privacy import noise, selftest, skellam
from privfed.privacy.events import Skellam
from privfed.privacy.oracle.door import DoorSettings
from privfed.privacy.rotation import record_l2_bound, round_at_random

KEY = bytes(range(32))
SITES, DIM, VARIANCE = 10, 16384, 900


def keys(count: int = SITES) -> list[bytes]:
    return [noise.derive_key(KEY, b"site", bytes([site])) for site in range(count)]


def event(shares: int = SITES) -> Skellam:
    return Skellam(share_variance=VARIANCE, shares=shares, colluders=0, dim=DIM, l2_squared=900, l1=900)


VECTORS = [np.random.default_rng(site).integers(-50, 50, DIM) for site in range(SITES)]


def released(shares: list[np.ndarray]) -> np.ndarray:
    return np.sum(VECTORS, axis=0) + np.sum(shares, axis=0)


def test_a_sound_mechanism_passes() -> None:
    shares = [skellam.share(key, DIM, VARIANCE) for key in keys()]
    selftest.check_released_sum(released(shares), VECTORS, event())
    selftest.check_independence(shares)
    selftest.check_independence(shares[:1])
    for variance in (1, 4, 900, 10**7):
        selftest.check_sampler(variance, KEY)


def test_a_sound_mechanism_passes_under_many_keys() -> None:
    for seed in range(40):
        for variance in (1, 30, 5000):
            selftest.check_noise(skellam.share(noise.insecure_key(seed), 4096, variance), variance)


def test_a_missing_share_is_caught() -> None:
    shares = [skellam.share(key, DIM, VARIANCE) for key in keys()[:-1]]
    with pytest.raises(selftest.SelfTestFailed, match=r"0\.9\d* times the variance"):
        selftest.check_released_sum(released(shares), VECTORS, event())


def test_a_shared_seed_is_caught_between_sites_and_in_the_sum() -> None:
    shares = [skellam.share(key, DIM, VARIANCE) for key in [*keys()[:-1], keys()[0]]]
    with pytest.raises(selftest.SelfTestFailed, match=r"correlation of 1\.000"):
        selftest.check_independence(shares)
    with pytest.raises(selftest.SelfTestFailed, match="variance"):
        selftest.check_released_sum(released(shares), VECTORS, event())
    with pytest.raises(selftest.SelfTestFailed, match="correlation"):
        selftest.check_independence([shares[0], -shares[0]])


def test_noise_that_is_no_noise_is_caught() -> None:
    for broken in (np.zeros(DIM, dtype=np.int64), np.full(DIM, 30)):
        with pytest.raises(selftest.SelfTestFailed):
            selftest.check_noise(broken, VARIANCE)
    with pytest.raises(selftest.SelfTestFailed, match="correlation"):
        selftest.check_independence([np.zeros(DIM, dtype=np.int64), skellam.share(KEY, DIM, VARIANCE)])


def test_another_law_of_the_same_variance_is_caught() -> None:
    random = np.random.default_rng(0)
    two_point = random.choice([-30, 30], DIM)
    uniform = random.integers(-51, 52, DIM)  # variance 884
    shifted = skellam.share(KEY, DIM, VARIANCE) + 3
    for broken in (two_point, uniform, shifted):
        with pytest.raises(selftest.SelfTestFailed):
            selftest.check_noise(broken, VARIANCE)


def test_noise_between_the_integers_of_a_coarser_grid_is_caught() -> None:
    """Rounding the noise to a grid of 8 loses the low bits, and with them what hides a single step."""
    coarse = (skellam.share(KEY, DIM, VARIANCE) + 4) // 8 * 8
    with pytest.raises(selftest.SelfTestFailed):
        selftest.check_noise(coarse, 4)


def test_a_wrong_sensitivity_is_caught() -> None:
    """One record inside a site's rounded sum moves it by up to Cs + √d; a claim of Cs is found out."""
    scale, d = 4.0, 4096
    random = np.random.default_rng(1)
    others, record = random.normal(0, 1, d), random.normal(0, 1, d)
    record *= 1 / np.linalg.norm(record)
    pairs = []
    for seed in range(5):
        dither = [np.random.default_rng(seed) for _ in range(2)]
        pairs.append([round_at_random(x * scale, r) for x, r in zip((others + record, others), dither, strict=True)])
    sound = skellam.SharedNoise(
        noise_multiplier=1.0,
        steps=scale,
        dim=d,
        l2_bound=record_l2_bound(1.0, scale, d),
        minimum_cohort=2,
        colluders=0,
    )
    with_record, without = zip(*pairs, strict=True)
    selftest.check_sensitivity(with_record, without, sound.event())
    naive = skellam.SharedNoise(noise_multiplier=1.0, steps=scale, dim=d, l2_bound=scale, minimum_cohort=2, colluders=0)
    with pytest.raises(selftest.SelfTestFailed, match="moves the vector"):
        selftest.check_sensitivity(with_record, without, naive.event())


def test_a_rate_derived_from_the_number_of_records_is_caught() -> None:
    def sound(records: int) -> DoorSettings:
        return DoorSettings(
            sample_rate=0.1, expected_batch_size=40.0, max_grad_norm=1.0, noise_multiplier=1.0, part_fractions={}
        )

    def leaking(records: int) -> DoorSettings:
        """Opacus's own choice: q = 1 / ⌈n / B⌉."""
        return DoorSettings(
            sample_rate=1 / -(-records // 40),
            expected_batch_size=40.0,
            max_grad_norm=1.0,
            noise_multiplier=1.0,
            part_fractions={},
        )

    selftest.check_public_constants(sound, 400)
    with pytest.raises(selftest.SelfTestFailed, match="private number of records"):
        selftest.check_public_constants(leaking, 400)
