"""The fixed-point grid: a bound that holds for every float, a sum that never wraps, an error of half a step."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfed.privacy.discretize import FixedPoint

FINITE = st.floats(allow_nan=False, allow_infinity=False)
VECTORS = st.lists(FINITE, min_size=1, max_size=20).map(np.array)


@st.composite
def grids(draw: st.DrawFn) -> FixedPoint:
    bits = draw(st.integers(0, 24))
    return FixedPoint(bits, draw(st.floats(2.0**-bits, 2.0 ** (53 - bits))))


@given(grids(), VECTORS)
def test_no_coordinate_exceeds_the_bound(grid: FixedPoint, vector: np.ndarray) -> None:
    extremes = np.array([grid.limit, -grid.limit, np.nextafter(grid.limit, math.inf), 1.7e308, -1.7e308, 5e-324, -0.0])
    integers = grid.encode(np.concatenate([vector, extremes]))
    assert integers.dtype == np.int64
    assert max(abs(int(value)) for value in integers) <= grid.bound


@given(st.lists(st.lists(FINITE, min_size=3, max_size=3), min_size=1, max_size=8))
def test_the_sum_of_clients_stays_below_half_the_modulus_and_decodes(vectors: list[list[float]]) -> None:
    grid = FixedPoint(16, 16.0)
    n = len(vectors)
    total = sum(grid.encode(np.array(vector)) for vector in vectors)
    modulus = 1 << (2 * n * grid.bound).bit_length()  # crypto's choice for n clients
    assert int(np.abs(total).max()) <= n * grid.bound < modulus // 2
    mean = grid.decode(total, summands=n)
    expected = np.clip(np.array(vectors), -16, 16).mean(0)
    assert np.abs(mean - expected).max() <= grid.step / 2 + 1e-12  # 1e-12: the float mean itself


@given(st.floats(-16, 16))
def test_the_error_is_at_most_half_a_step(value: float) -> None:
    grid = FixedPoint(16, 16.0)
    assert abs(grid.decode(grid.encode(np.array([value])), summands=1)[0] - value) <= grid.step / 2


def test_values_beyond_the_limit_saturate() -> None:
    grid = FixedPoint(4, 1.9)  # ⌊1.9 · 16⌋ = 30
    assert grid.bound == 30
    assert grid.encode(np.array([5.0, -5.0, 1.9, 0.03, 0.04], dtype=np.float32)).tolist() == [30, -30, 30, 0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_coordinate_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        FixedPoint(16, 16.0).encode(np.array([0.0, bad], dtype=np.float32))


def test_a_sum_that_no_honest_clients_make_is_refused() -> None:
    grid = FixedPoint(2, 1.0)  # bound 4
    assert grid.decode(np.array([12, -12]), summands=3).tolist() == [1.0, -1.0]
    for total in (13, -13, np.iinfo(np.int64).min, np.iinfo(np.int64).max):
        with pytest.raises(ValueError, match="exceeds 3"):
            grid.decode(np.array([total, 0]), summands=3)
    with pytest.raises(ValueError, match="summands"):
        grid.decode(np.array([0]), summands=0)


@pytest.mark.parametrize(
    ("bits", "limit"), [(-1, 1.0), (25, 1.0), (0, 0.5), (16, math.inf), (16, math.nan), (24, 1e300)]
)
def test_a_grid_that_can_not_keep_its_promise_is_refused(bits: int, limit: float) -> None:
    with pytest.raises(ValueError, match=r"fraction_bits|limit"):
        FixedPoint(bits, limit)
