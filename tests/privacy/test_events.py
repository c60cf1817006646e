"""Events: ranges, one spelling, and the translation for dp-accounting."""

import math

import dp_accounting
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfed.privacy.errors import UnsupportedEvent
from privfed.privacy.events import (
    Charge,
    Event,
    Gaussian,
    PoissonGaussian,
    from_canonical_json,
    to_canonical_json,
    to_dp_event,
)

multipliers = st.floats(0, 1e300)
events = st.one_of(
    st.builds(Gaussian, multipliers),
    st.builds(PoissonGaussian, st.floats(0, 1, exclude_min=True), multipliers),
)
charges = st.builds(Charge, events, st.integers(1, 2**62), st.sampled_from(["all", "s1/support", "s1/query"]))


@given(charges)
def test_canonical_json_reads_back_exactly(charge: Charge) -> None:
    assert from_canonical_json(to_canonical_json(charge), Charge) == charge


def test_canonical_json_is_spelled_out() -> None:
    charge = Charge(PoissonGaussian(0.1, 2), count=3, group="s1/support")
    assert to_canonical_json(charge) == (
        b'{"count":3,"event":{"noise_multiplier":2.0,"sample_rate":0.1,"type":"poisson-gaussian"},"group":"s1/support"}'
    )


@pytest.mark.parametrize("data", [b'{"count":1, "event":{}}', b"{}", b"\xff"])
def test_other_spellings_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        from_canonical_json(data, Charge)
    spaced = to_canonical_json(Charge(Gaussian(1.0))).replace(b":", b": ")
    with pytest.raises(ValueError, match="canonical"):
        from_canonical_json(spaced, Charge)


def test_equal_numbers_make_equal_events() -> None:
    plain = PoissonGaussian(1.0, 0.0)
    for event in (PoissonGaussian(1, 0), PoissonGaussian(np.float64(1), -0.0)):
        assert event == plain
        assert to_canonical_json(event) == to_canonical_json(plain)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0000001, math.nan, math.inf])
def test_sample_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="sample_rate must be"):
        PoissonGaussian(rate, 1.0)


@pytest.mark.parametrize("noise_multiplier", [-1e-9, math.nan, math.inf])
def test_noise_multiplier_out_of_range_is_refused(noise_multiplier: float) -> None:
    with pytest.raises(ValueError, match="noise_multiplier must be"):
        Gaussian(noise_multiplier)
    with pytest.raises(ValueError, match="noise_multiplier must be"):
        PoissonGaussian(0.5, noise_multiplier)


def test_wrong_types_are_refused() -> None:
    for wrong in ("1", True, None):
        with pytest.raises(TypeError):
            Gaussian(wrong)  # type: ignore[arg-type]
    for count in (1.0, True):
        with pytest.raises(TypeError):
            Charge(Gaussian(1.0), count=count)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Charge("gaussian")  # type: ignore[arg-type]


@pytest.mark.parametrize("group", ["", "support", "/support", "s1/", "s1/a/b", "s 1/a", "All"])
def test_groups_are_all_or_a_part_of_a_split(group: str) -> None:
    with pytest.raises(ValueError, match="group"):
        Charge(Gaussian(1.0), group=group)
    with pytest.raises(ValueError, match="count"):
        Charge(Gaussian(1.0), count=0)


def test_dp_accounting_sees_the_same_event() -> None:
    assert to_dp_event(Gaussian(2.0)) == dp_accounting.GaussianDpEvent(2.0)
    assert to_dp_event(PoissonGaussian(0.1, 2.0)) == dp_accounting.PoissonSampledDpEvent(
        0.1, dp_accounting.GaussianDpEvent(2.0)
    )


def test_an_unknown_event_is_refused() -> None:
    class Tree(msgspec.Struct, frozen=True):
        noise_multiplier: float

    unknown: Event = Tree(1.0)  # type: ignore[assignment]
    with pytest.raises(UnsupportedEvent, match="Tree"):
        to_dp_event(unknown)
    with pytest.raises(ValueError, match="tree"):
        from_canonical_json(b'{"count":1,"event":{"noise_multiplier":1.0,"type":"tree"},"group":"all"}', Charge)
