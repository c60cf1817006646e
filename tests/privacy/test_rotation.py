import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.privacy.rotation import ConditionalRounding, Rotation, _squares, record_l2_bound, round_at_random

SEED = b"round 1"


@settings(max_examples=30, deadline=None)
@given(dim=st.integers(1, 9000), seed=st.integers(0, 1000))
def test_rotation_keeps_the_norm_and_is_undone(dim: int, seed: int) -> None:
    rotation = Rotation(dim, seed.to_bytes(4, "big"))
    vector = np.random.default_rng(seed).normal(size=dim)
    rotated = rotation.rotate(vector)
    assert rotated.shape == (rotation.padded_dim,) and rotation.padded_dim % rotation.side**2 == 0
    # float64 sums of up to 4096 terms: relative errors near 4096·2^−53 ≈ 5e-13.
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(vector), rel=1e-12)
    np.testing.assert_allclose(rotation.restore(rotated), vector, atol=1e-11)


def test_the_transform_is_the_hadamard_matrix_of_signed_coordinates() -> None:
    # Sylvester: entry (i, j) is (−1)^popcount(i & j), over √B.
    rotation = Rotation(16, SEED)
    unit = np.eye(16)
    rotated = np.stack([rotation.rotate(row) for row in unit])
    signs = rotated[:, 0] * 4
    expected = np.array([[(-1) ** (i & j).bit_count() for j in range(16)] for i in range(16)]) / 4
    assert set(signs.tolist()) == {1.0, -1.0}
    np.testing.assert_array_equal(rotated, signs[:, None] * expected)


def test_padding_is_below_a_block_and_small_vectors_have_small_blocks() -> None:
    assert [Rotation(d, SEED).padded_dim for d in (1, 2, 4, 5, 17, 4096, 4097, 10**6)] == [
        1, 4, 4, 16, 64, 4096, 8192, 245 * 4096,
    ]  # fmt: skip


def test_a_spike_is_spread_over_its_block() -> None:
    spike = np.zeros(4096)
    spike[17] = 1.0
    # One coordinate of one block gives exactly ±1/√4096 everywhere.
    np.testing.assert_array_equal(np.abs(Rotation(4096, SEED).rotate(spike)), 1 / 64)


def test_seeds_give_other_signs_and_one_seed_the_same() -> None:
    vector = np.random.default_rng(0).normal(size=100)
    one, two = Rotation(100, b"one"), Rotation(100, b"two")
    assert not np.allclose(one.rotate(vector), two.rotate(vector))
    np.testing.assert_array_equal(one.rotate(vector), Rotation(100, b"one").rotate(vector))


@settings(max_examples=60, deadline=None)
@given(
    dim=st.integers(1, 300),
    scale=st.floats(0.5, 1e5),
    norm=st.floats(0, 1e6),
    beta=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**32),
)
def test_the_integer_norm_never_exceeds_the_bound(dim: int, scale: float, norm: float, beta: float, seed: int) -> None:
    rounding = ConditionalRounding(Rotation(dim, SEED), max_norm=1.0, scale=scale, beta=beta)
    rng = np.random.default_rng(seed)
    vector = rng.normal(size=dim)
    vector *= norm / np.linalg.norm(vector)
    encoded = rounding.encode(vector, rng)
    assert sum(value * value for value in encoded.tolist()) <= rounding.l2_bound**2
    assert max(map(abs, encoded.tolist())) <= rounding.bound
    assert sum(map(abs, encoded.tolist())) <= rounding.l1_bound


def test_the_bound_is_the_papers_and_often_redraws() -> None:
    # Kairouz, Liu, Steinke 2021, Theorem 1 with C·s = 100, d = 4096, β = e^(−1/2): √(2 ln(1/β)) = 1, so the
    # squared bound is 10000 + 1024 + 100 + 32 = 11156; the other is 100 + 64 = 164 > √11156 ≈ 105.6.
    rounding = ConditionalRounding(Rotation(4096, SEED), max_norm=1.0, scale=100.0)
    assert rounding.l2_bound == pytest.approx(math.sqrt(11156))
    assert rounding.l1_bound == pytest.approx(64 * math.sqrt(11156)) and rounding.bound == 105
    # The worst input lies halfway between integers, where rounding lengthens most; some draws must be refused.
    half = np.full(4096, 0.5)
    rng = np.random.default_rng(0)
    lengths = [float(np.sum(round_at_random(half, rng).astype(float) ** 2)) for _ in range(200)]
    assert np.mean(lengths) == pytest.approx(2048, rel=0.02)  # E⌊.5+u⌋² = 1/2; σ of the mean is 2.3


class OnlyUp(np.random.Generator):
    """Rounds everything up for the first draws: the longest rounding there is."""

    def __init__(self, draws: int) -> None:
        super().__init__(np.random.PCG64(0))
        self.left = draws

    def random(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        return np.ones(args[0]) - 2**-20 if self.left >= 0 else super().random(*args, **kwargs)


def test_a_rounding_that_came_out_too_long_is_drawn_again() -> None:
    rounding = ConditionalRounding(Rotation(4096, SEED), max_norm=1.0, scale=10.0)
    rng = OnlyUp(draws=3)
    encoded = rounding.encode(np.random.default_rng(1).normal(size=4096), rng)
    assert rng.left == -1  # three refused, the fourth taken
    assert int(encoded @ encoded) <= rounding.l2_bound**2


def test_decoding_gives_the_mean_back() -> None:
    dim, n = 1000, 40
    rounding = ConditionalRounding(Rotation(dim, SEED), max_norm=1.0, scale=3000.0)
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(n, dim))
    vectors /= 2 * np.linalg.norm(vectors, axis=1, keepdims=True)
    total = np.sum([rounding.encode(vector, rng) for vector in vectors], axis=0)
    error = rounding.decode(total, summands=n) - vectors.mean(axis=0)
    # Rounding noise of variance ≤ 1/4 a coordinate and client: σ ≤ 1/(2·3000·√40) = 2.6e-5; six of them over 1000.
    assert np.abs(error).max() < 6 * 2.7e-5


def test_rounding_at_random_is_unbiased_and_differs_by_less_than_one_more() -> None:
    values = np.full(200_000, 0.3)
    mean = round_at_random(values, np.random.default_rng(0)).mean()
    assert mean == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 200_000))
    base = np.random.default_rng(1).normal(scale=50, size=5000)
    record = np.random.default_rng(2).normal(size=5000)
    record *= 7.0 / np.linalg.norm(record)
    a = round_at_random(base, np.random.default_rng(3))
    b = round_at_random(base + record, np.random.default_rng(3))
    assert np.all(np.abs(b - a) < np.abs(record) + 1)
    assert np.linalg.norm(b - a) <= record_l2_bound(0.7, 10.0, 5000) == 7.0 + math.sqrt(5000)


def test_squares_are_summed_exactly_where_int64_would_wrap() -> None:
    values = np.full(64, 2**30 - 1, dtype=np.int64)
    assert sum(_squares(values)) == 64 * (2**30 - 1) ** 2 > 2**63


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"max_norm": 0.0}, "max_norm"),
        ({"scale": math.inf}, "scale"),
        ({"beta": 1.0}, "beta"),
        ({"scale": 1e10}, "scale"),
    ],
)
def test_settings_that_bound_nothing_are_refused(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must"):
        ConditionalRounding(Rotation(10, SEED), **{"max_norm": 1.0, "scale": 100.0, **changes})


@pytest.mark.parametrize("bad", [np.full(10, np.nan), np.full(10, np.inf), np.zeros(9)])
def test_vectors_that_cannot_be_encoded_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"finite|shape"):
        ConditionalRounding(Rotation(10, SEED), max_norm=1.0, scale=100.0).encode(bad, np.random.default_rng(0))
    with pytest.raises(ValueError, match="dim"):
        Rotation(0, SEED)
