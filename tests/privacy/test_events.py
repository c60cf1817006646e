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
    PatientMixture,
    PoissonGaussian,
    Skellam,
    from_canonical_json,
    to_canonical_json,
    to_dp_event,
)

multipliers = st.floats(0, 1e300)
events = st.one_of(
    st.builds(Gaussian, multipliers),
    st.builds(PoissonGaussian, st.floats(0, 1, exclude_min=True), multipliers),
    st.builds(PatientMixture, st.floats(0, 1, exclude_min=True), st.integers(1, 1000), multipliers),
    st.builds(
        Skellam,
        share_variance=st.integers(1, 2**40),
        shares=st.integers(6, 1000),
        colluders=st.integers(0, 5),
        dim=st.integers(1, 2**30),
        l2_squared=st.integers(5, 2**40),
        l1=st.integers(1, 2),
        sample_rate=st.floats(0, 1, exclude_min=True),
    ),
)
charges = st.builds(Charge, events, st.integers(1, 2**62), st.sampled_from(["all", "s1/support", "s1/query"]))


@given(charges)
def test_canonical_json_reads_back_exactly(charge: Charge) -> None:
    assert from_canonical_json(to_canonical_json(charge), Charge) == charge


def test_ledgers_written_before_the_new_events_still_decode() -> None:
    """Bytes as the first release wrote them: hashes cover these very spellings."""
    old = {
        b'{"count":3,"event":{"noise_multiplier":2.0,"sample_rate":0.1,"type":"poisson-gaussian"},"group":"all"}': (
            PoissonGaussian(0.1, 2.0)
        ),
        b'{"count":3,"event":{"noise_multiplier":0.0,"type":"gaussian"},"group":"all"}': Gaussian(0.0),
    }
    for data, event in old.items():
        assert from_canonical_json(data, Charge) == Charge(event, 3)


def test_the_new_events_are_spelled_out() -> None:
    shared = Skellam(share_variance=5, shares=4, colluders=1, dim=9, l2_squared=7, l1=6)
    assert to_canonical_json(Charge(shared)) == (
        b'{"count":1,"event":{"colluders":1,"dim":9,"l1":6,"l2_squared":7,"sample_rate":1.0,"share_variance":5,'
        b'"shares":4,"type":"skellam"},"group":"all"}'
    )
    assert to_canonical_json(Charge(PatientMixture(0.5, 2, 1))) == (
        b'{"count":1,"event":{"max_records":2,"noise_multiplier":1.0,"sample_rate":0.5,"type":"patient-mixture"},'
        b'"group":"all"}'
    )


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


def test_the_patient_mixture_in_dp_accountings_words_and_skellam_has_none() -> None:
    event = to_dp_event(PatientMixture(0.5, 2, 3.0))
    assert isinstance(event, dp_accounting.dp_event.MixtureOfGaussiansDpEvent)
    assert (event.standard_deviation, event.sensitivities) == (3.0, [0, 1, 2])
    assert event.sampling_probs == pytest.approx([0.25, 0.5, 0.25], rel=1e-14)
    with pytest.raises(UnsupportedEvent, match="Skellam"):
        to_dp_event(Skellam(share_variance=5, shares=4, colluders=1, dim=9, l2_squared=7, l1=6))


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (1001, ValueError), (1.0, TypeError), (True, TypeError)])
def test_impossible_numbers_of_records_are_refused(k: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        PatientMixture(0.5, k, 1.0)  # type: ignore[arg-type]


def test_an_unknown_event_is_refused() -> None:
    class Tree(msgspec.Struct, frozen=True):
        noise_multiplier: float

    unknown: Event = Tree(1.0)  # type: ignore[assignment]
    with pytest.raises(UnsupportedEvent, match="Tree"):
        to_dp_event(unknown)
    with pytest.raises(ValueError, match="tree"):
        from_canonical_json(b'{"count":1,"event":{"noise_multiplier":1.0,"type":"tree"},"group":"all"}', Charge)
