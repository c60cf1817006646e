"""The adaptive clip: what sum and count cost together, what a site sends, and where the clip goes."""

import math
from typing import Any

import numpy as np
import pytest

from privfed.privacy.accountant import Accountant
from privfed.privacy.clipping import LARGEST, SMALLEST, AdaptiveClip, AdaptiveSum, adaptive_sum
from privfed.privacy.events import Charge, Gaussian
from privfed.privacy.selftest import check_encoding, check_sensitivity

CLIP = AdaptiveClip(noise_multiplier=1.0, count_noise=5.0)
KEY = bytes(range(32))


def adaptive(**changes: Any) -> AdaptiveSum:
    fields = {
        "clip": 2.0,
        "rule": CLIP,
        "minimum_cohort": 4,
        "colluders": 1,
        "sites": 6,
        "most_bits": 60,
        "seed": b"test",
    }
    return adaptive_sum(**{"parameters": 12, **fields, **changes})


def sent(shared: AdaptiveSum, update: Any) -> Any:
    """int64[dim]: what a site sends, less its noise, which is the same under the same key."""
    return shared.encode(np.asarray(update, dtype=np.float64), KEY) - shared.encode_nothing(KEY)


def test_sum_and_count_together_cost_the_booked_noise() -> None:
    """The count has sensitivity ½ and noise σ_b: a Gaussian of multiplier 2σ_b beside one of z_Δ."""
    both = Accountant().epsilon([Charge(Gaussian(CLIP.sum_noise_multiplier)), Charge(Gaussian(10.0))], 1e-5).value
    assert both == pytest.approx(Accountant().epsilon([Charge(Gaussian(1.0))], 1e-5).value, rel=1e-9)
    assert CLIP.sum_noise_multiplier == pytest.approx(1 / math.sqrt(1 - 1 / 100))
    with pytest.raises(ValueError, match="count_noise"):
        AdaptiveClip(noise_multiplier=1.0, count_noise=0.5)


def test_among_few_units_the_count_takes_a_quarter_of_the_round_and_not_more() -> None:
    few = AdaptiveClip.for_units(5, 3.0, quantile=0.5, learning_rate=0.2)
    assert few.count_noise == 3.0
    assert few.sum_noise_multiplier == pytest.approx(3.0 * math.sqrt(4 / 3))
    assert AdaptiveClip.for_units(1000, 3.0, quantile=0.5, learning_rate=0.2).count_noise == 50.0


@pytest.mark.parametrize("noise_multiplier", [2.0, 8.0])
@pytest.mark.parametrize("parameters", [12, 5000])
def test_the_rounds_event_is_that_of_one_gaussian_of_its_noise_multiplier(
    noise_multiplier: float, parameters: int
) -> None:
    rule = AdaptiveClip.for_units(50, noise_multiplier, quantile=0.5, learning_rate=0.2)
    shared = adaptive(rule=rule, parameters=parameters)
    event, steps = shared.event(), shared.count_steps
    assert event.dim == shared.dim == shared.rotation.padded_dim + 1
    assert event.l2_squared == math.floor(shared.rounding.l2_bound**2) + steps**2
    assert event.l1 <= math.floor(shared.rounding.l1_bound) + steps
    noise = math.sqrt(event.variance)  # of the shares that count
    assert noise / (2 * steps) >= rule.count_noise  # σ_b, or more where a was rounded down
    # ε of the event is that of the Gaussian of z, but for what rounding to integers adds: some % at this s of 10√d
    ours = Accountant().rdp_epsilon([Charge(event, 20)], 1e-5)
    gaussian = Accountant().rdp_epsilon([Charge(Gaussian(noise_multiplier), 20)], 1e-5)
    assert 0.99 * gaussian <= ours <= 1.06 * gaussian


def test_a_site_moves_the_integers_by_no_more_than_is_booked_whatever_its_length() -> None:
    shared = adaptive()
    random = np.random.default_rng(0)
    for length in (0.0, 1e-9, 1.9, 2.0, 2.1, 1e6, 1e30):
        direction = random.normal(size=12)
        update = length * direction / np.linalg.norm(direction)
        moved = sent(shared, update)
        check_sensitivity([moved], [np.zeros_like(moved)], shared.event())
        if abs(length - 2.0) > 0.01:
            assert moved[-1] == (shared.count_steps if length < 2.0 else -shared.count_steps)


def test_the_count_is_half_of_those_below_less_those_above() -> None:
    """Norms 0, 1, 2 and 3, 4 at a clip of 2.5: (3 − 2) / 2."""
    shared = adaptive(clip=2.5)
    total = np.sum([sent(shared, norm * np.eye(12)[0]) for norm in range(5)], axis=0)
    assert shared.count(total) == 0.5
    mean = shared.decode(total, summands=5)
    assert mean[0] == pytest.approx((0 + 1 + 2 + 2.5 + 2.5) / 5, abs=0.05)


def test_no_cost_and_no_integer_depends_on_where_the_clip_is() -> None:
    """What a coordinator says of the clip buys it nothing."""
    small, large = adaptive(clip=SMALLEST), adaptive(clip=LARGEST)
    assert small.event() == large.event()
    assert (small.bound, small.dim, small.noise) == (large.bound, large.dim, large.noise)
    assert (sent(small, np.full(12, 1e-7)) == sent(large, np.full(12, 1e5))).all()


def test_an_update_that_is_not_finite_counts_as_nothing() -> None:
    shared = adaptive()
    for bad in (math.nan, math.inf):
        assert (sent(shared, np.full(12, bad)) == sent(shared, np.zeros(12))).all()


def test_a_share_of_noise_is_on_the_count_too() -> None:
    shared = adaptive(parameters=3)
    check_encoding(shared.encode_nothing, shared.noise.share_variance)
    counts = np.array([shared.encode_nothing(number.to_bytes(32, "big"))[-1] for number in range(400)], dtype=float)
    assert counts.var() == pytest.approx(shared.noise.share_variance, rel=0.35)


def test_noise_of_the_server_covers_the_count() -> None:
    shared = adaptive(at_server=True)
    total = np.zeros(shared.dim, dtype=np.int64)
    noised = np.array([shared.add_noise(total, number.to_bytes(32, "big"))[-1] for number in range(400)], dtype=float)
    assert noised.var() == pytest.approx(shared.event().variance, rel=0.35)
    assert np.abs(shared.encode_nothing(KEY)).max() == 0


def test_the_clip_finds_the_quantile() -> None:
    random = np.random.default_rng(3)
    norms, clip = random.lognormal(1.0, 0.5, 100), 20.0
    for _ in range(200):
        count = (int((norms <= clip).sum()) - int((norms > clip).sum())) / 2
        clip = CLIP.next_clip(clip, count + random.normal(0, 5.0), 100)
    assert clip == pytest.approx(np.median(norms), rel=0.15)
    assert CLIP.next_clip(1.0, 1e9, 100) == pytest.approx(math.exp(-0.1))  # noise cannot push the share beyond 1
    assert CLIP.next_clip(2.0, 0.0, 100) == 2.0  # as many below as above
    assert CLIP.next_clip(SMALLEST, 1e9, 1) == SMALLEST
    assert CLIP.next_clip(LARGEST, -1e9, 1) == LARGEST
    for changes in ({"quantile": 1.0}, {"learning_rate": 0.0}, {"noise_multiplier": math.inf}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            AdaptiveClip(**{"noise_multiplier": 1.0, "count_noise": 5.0, **changes})
