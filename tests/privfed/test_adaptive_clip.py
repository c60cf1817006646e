"""`privacy.clip = "adaptive"`: a run whose clip follows its sites' updates, and what it costs."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

import privfed
from privfed import wire
from privfed.api import prepare
from privfed.cohort import cohort_of
from privfed.config import Aggregation, Config, Privacy
from privfed.crypto.errors import AggregationError
from privfed.errors import ConfigError
from privfed.noise_levels import noise_levels
from privfed.privacy.clipping import AdaptiveSum
from privfed.privacy.events import NoiseSite, PrivacyUnit, Skellam
from privfed.terms import encoding_of, plan_encoding

from .house import ACCOUNTANT, SCHEMA, SIZE, House, changed, config, state_of
from .test_shared_noise import drive

FAINT = 0.05
COUNT_NOISE = 0.25 / 5  # of the share of five units below the clip: σ_b is a twentieth of the units, however faint z is


def adaptive(**privacy: Any) -> Config:
    fields = {"unit": PrivacyUnit.CLIENT, "noise": NoiseSite.DISTRIBUTED, "target_epsilon": 2.0, "clip": "adaptive"}
    return config(rounds=3, privacy=Privacy(**{**fields, **privacy}))


@pytest.mark.parametrize(("noise", "kind"), [("distributed", "masked"), ("central", "masked"), ("central", "plain")])
def test_a_run_costs_its_target_with_the_count_in_every_event(tmp_path: Path, noise: str, kind: str) -> None:
    settings = msgspec.structs.replace(adaptive(noise=NoiseSite(noise)), aggregation=Aggregation(kind=kind))
    cohort = cohort_of(settings, 5)
    level, _ = noise_levels(settings, cohort, SCHEMA, ACCOUNTANT)
    settings = changed(settings, "privacy", noise_multiplier=level)
    house = House(tmp_path)
    reports = list(house.federation(settings).rounds())
    assert [len(report.contributed) for report in reports] == [5, 5, 5]
    clips = [report.clip for report in reports]
    assert clips[0] == 1.0 and len(set(clips)) > 1  # it moves, if only by the noise
    encoding = encoding_of(settings, cohort, SIZE, level)
    fixed = encoding_of(changed(settings, "privacy", clip="fixed"), cohort, SIZE, level)
    assert isinstance(encoding, AdaptiveSum) and encoding.dim == fixed.dim + 1
    for name in house.names:
        booked = [line.entry for line in house.ledger.entries(name) if line.entry.kind in ("charge", "reserve")]
        assert [entry.charges[0].event for entry in booked] == [encoding.event()] * 3
        worst = [charge for entry in booked for charge in entry.charges]
        assert 2.0 * 0.99 <= ACCOUNTANT.epsilon(worst, 1e-5).value <= 2.0


def test_the_clip_follows_the_paper_round_by_round(tmp_path: Path) -> None:
    """At a clip far above all updates every site is below it, far below none is; within six σ of the count."""
    house = House(tmp_path)
    for start, sign in ((1e3, -1), (1e-5, 1)):
        settings = adaptive(
            noise_multiplier=FAINT, target_epsilon=math.inf, max_update_norm=start, clip_quantile=0.4, clip_rate=1.0
        )
        settings = msgspec.structs.replace(settings, aggregation=Aggregation(kind="plain"))
        settings = changed(settings, "privacy", noise=NoiseSite.CENTRAL)
        clips = [report.clip for report in house.federation(settings, run=f"from {start}").rounds()]
        share = 1.0 if sign < 0 else 0.0
        for rounds in (1, 2):
            moved = math.log(clips[rounds] / start)
            assert moved == pytest.approx(-rounds * (share - 0.4), abs=6 * COUNT_NOISE * math.sqrt(rounds))


def test_a_coordinator_that_lies_about_the_clip_pays_the_same_and_can_not_lie_to_some(tmp_path: Path) -> None:
    house, settings = House(tmp_path), adaptive(noise_multiplier=5.0, target_epsilon=50.0)
    events = set()
    for number, clip in enumerate((1.0, 1e-6, 1e6)):
        plan = house.plan(settings, run=f"r{number}", clip=clip)
        result, refused, _ = drive(house, plan, state_of())
        assert refused == {} and not isinstance(result, AggregationError)
        events |= {
            charge.event
            for line in house.ledger.entries("a")
            if line.entry.kind == "reserve"
            for charge in line.entry.charges
        }
    assert len(events) == 1
    # Another clip is another session: nothing adds up
    plans = [wire.encode_plan(house.plan(settings, clip=clip)) for clip in (1.0, 2.0)]
    assert wire.context(plans[0], state_of()) != wire.context(plans[1], state_of())


@pytest.mark.parametrize(("clip", "kind"), [(None, "adaptive"), (1.0, "fixed")])
def test_a_plan_whose_clip_is_not_its_configurations_is_refused(tmp_path: Path, clip: float | None, kind: str) -> None:
    house, settings = House(tmp_path), adaptive(noise_multiplier=5.0, clip=kind)
    result, refused, _ = drive(house, house.plan(settings, clip=clip), state_of())
    assert isinstance(result, AggregationError) and "clip" in refused["a"]


@pytest.mark.parametrize("unit", [PrivacyUnit.RECORD, PrivacyUnit.PATIENT, PrivacyUnit.NONE])
def test_it_is_refused_where_it_would_count_something_else(tmp_path: Path, unit: PrivacyUnit) -> None:
    settings = adaptive(unit=unit, noise=NoiseSite.LOCAL, noise_multiplier=5.0)
    house = House(tmp_path)
    with pytest.raises(ConfigError, match="adaptive"):
        list(house.federation(settings).rounds())
    plan = house.plan(adaptive(noise_multiplier=5.0), clip=1.0)
    lie = msgspec.structs.replace(plan, config=settings)
    with pytest.raises(Exception, match="adaptive"):
        plan_encoding(lie, SIZE)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("privacy.clip='adaptive'", "not offered"),
        ("privacy.clip_rate=0.5", "privacy.clip = 'adaptive'"),
        ("privacy.clip='quantile'", "privacy.clip"),
    ],
)
def test_a_user_is_told_what_it_needs(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        prepare(privfed.load_config(overrides=[override]))


def test_a_resumed_run_goes_on_with_its_clip(tmp_path: Path) -> None:
    overrides = [
        *("privacy.unit=client", "privacy.noise=distributed", "privacy.clip=adaptive", "privacy.insecure_seed=3"),
        *("rounds=3", "evaluation.local_steps=1", "method.name=fedavg", "privacy.max_update_norm=0.1"),
    ]
    whole = privfed.run(privfed.load_config(overrides=overrides), out=tmp_path / "whole")

    class Cut(Exception):
        pass

    def cut(report: Any) -> None:
        raise Cut

    with pytest.raises(Cut):
        privfed.run(privfed.load_config(overrides=overrides), out=tmp_path / "cut", observer=cut)
    resumed = privfed.api.resume(tmp_path / "cut")
    assert [report.clip for report in resumed.reports] == [report.clip for report in whole.reports]
    assert len({report.clip for report in whole.reports}) == 3
    events = {
        charge.event.dim
        for line in privfed.privacy.ledger.Ledger(tmp_path / "cut" / "ledger.db").entries()
        for charge in line.entry.charges
        if isinstance(charge.event, Skellam)
    }
    assert len(events) == 1
