"""Runs with homomorphic aggregation: one word in the configuration, the same model, the key holder's own role."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import privfed
from privfed import wire
from privfed.architecture import build_model
from privfed.config import Aggregation, Config, Evaluation, Outage, Policy, Privacy, Simulation
from privfed.crypto.homomorphic.messages import KEY_HOLDER_STEPS
from privfed.crypto.journal import MemoryJournal
from privfed.crypto.roster import FIRST_PREVIOUS, Identity, Roster
from privfed.engines.contract import Engine
from privfed.engines.local import LocalEngine
from privfed.errors import ConfigError
from privfed.federation import Federation, RoundReport, cohort_of
from privfed.key_holder import KeyHolder
from privfed.methods import FedAvg
from privfed.parameters import to_vector
from privfed.simulation.faults import FaultyEngine
from privfed.terms import KEY_HOLDER
from tests.crypto.consortium import stream

from .house import SCHEMA, House, Tap, changed, config, fit, records, state_of

HOMOMORPHIC = Aggregation(kind="homomorphic")


class KeyHouse(House):
    """The house, and a key holder next door."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.identities[KEY_HOLDER] = Identity.generate(KEY_HOLDER, stream(KEY_HOLDER))
        members = tuple(identity.member for identity in self.identities.values())
        self.roster = Roster(version=1, previous=FIRST_PREVIOUS, members=members)
        self.sites = {name: self.start(name, journal=MemoryJournal()) for name in self.names}
        self.key_holder = KeyHolder(
            identity=self.identities[KEY_HOLDER], roster=self.roster, journal=MemoryJournal(), policy=self.policy
        )

    @property
    def engine(self) -> Engine:
        return LocalEngine({**self.sites, KEY_HOLDER: self.key_holder})

    def run(
        self, settings: Config, alter: Any = None, *, engine: Engine | None = None
    ) -> tuple[list[RoundReport], torch.Tensor, Tap]:
        tap = Tap(engine or self.engine, alter)
        federation = Federation(
            config=settings,
            run="r",
            roster=self.roster,
            engine=tap,
            noise_multiplier=settings.privacy.noise_multiplier or 0.0,
            schema=SCHEMA,
            state=settings.method.init_server(to_vector(build_model(settings, SCHEMA))),
            clock=lambda: 0.0,
        )
        return list(federation.rounds()), federation.state["theta"], tap


def small(**changes: Any) -> Config:
    fields: dict[str, Any] = {
        "rounds": 2,
        "method": FedAvg(local_steps=1),
        "privacy": Privacy(noise_multiplier=1.0, target_epsilon=50.0, insecure_seed=3),
        "evaluation": Evaluation(local_steps=1, every=2),
    }
    return Config(**{**fields, **changes})


def test_one_word_of_the_configuration_gives_the_same_model(tmp_path: Path) -> None:
    masked = privfed.run(small(), out=tmp_path / "masked")
    name = privfed.api.prepare(small()).data.sites
    for kind, holder in (("alone", None), ("a site", list(name)[2])):
        settings = small(aggregation=Aggregation(kind="homomorphic", key_holder=holder))
        encrypted = privfed.run(settings, out=tmp_path / kind)
        torch.testing.assert_close(encrypted.theta, masked.theta, rtol=0, atol=0)
        assert encrypted.summary.aggregation.aborted_rounds == 0
        assert "The key holder" in (tmp_path / kind / "report.html").read_text()


def test_the_key_holder_is_invited_to_no_round_and_measures_nothing(tmp_path: Path) -> None:
    house = KeyHouse(tmp_path)
    reports, _, tap = house.run(config(aggregation=HOMOMORPHIC))
    assert all(report.invited == report.contributed == tuple("abcde") for report in reports)
    for site, request, _ in tap.log:
        message = wire.decode_request(request)
        assert (message.step in KEY_HOLDER_STEPS) == (site == KEY_HOLDER)
        # It gets the plan and the model once a round, to know what it decrypts for.
        assert isinstance(message, wire.Begin) == (message.step in ("key", "commit"))


def test_sites_may_drop_out_and_the_key_holder_may_not(tmp_path: Path) -> None:
    outages = (Outage(round=0, site="a", step="commit"), Outage(round=1, site="b", step="send"))
    settings = config(aggregation=HOMOMORPHIC, simulation=Simulation(outages=outages))
    house = KeyHouse(tmp_path)
    reports, _, _ = house.run(settings, engine=FaultyEngine(house.engine, settings.simulation, seed=0))
    assert [report.contributed for report in reports] == [tuple("bcde"), tuple("acde"), tuple("abcde")]
    assert [dict(report.dropped) for report in reports] == [{"commit": ("a",)}, {"send": ("b",)}, {}]


@pytest.mark.parametrize("step", sorted(KEY_HOLDER_STEPS))
def test_without_the_key_holder_a_round_is_aborted_and_the_run_goes_on(tmp_path: Path, step: str) -> None:
    def lose(site: str, request: wire.Request, reply: bytes) -> bytes | None:
        return None if (request.round, request.step) == (1, step) else reply

    reports, _, _ = KeyHouse(tmp_path).run(config(aggregation=HOMOMORPHIC), lose)
    assert [report.aborted is None for report in reports] == [True, False, True]
    assert f"{step}: no valid answer from the key holder" in str(reports[1].aborted)


def test_the_key_holder_demands_its_own_smallest_cohort(tmp_path: Path) -> None:
    house = KeyHouse(tmp_path)
    house.key_holder = KeyHolder(
        identity=house.identities[KEY_HOLDER],
        roster=house.roster,
        journal=MemoryJournal(),
        policy=Policy(minimum_cohort=4),
    )
    reports, _, _ = house.run(config(aggregation=HOMOMORPHIC, rounds=1))
    assert "policy.minimum_cohort = 4, the plan would release a sum of 3" in reports[0].refused[KEY_HOLDER]
    assert len(house.run(config(aggregation=HOMOMORPHIC, rounds=3))[0]) == 1  # nothing goes on without it
    reports, _, _ = house.run(changed(config(aggregation=HOMOMORPHIC, rounds=1), "aggregation", minimum_cohort=4))
    assert reports[0].aborted is not None  # a site never takes another configuration for the same run


@pytest.mark.parametrize(
    ("policy", "line"),
    [
        (Policy(key_holders=()), "policy.key_holders = none, the plan has 'key-holder'"),
        (Policy(aggregations=("masked",)), "policy.aggregations = masked, the plan has 'homomorphic'"),
        (Policy(key_holders=(KEY_HOLDER,)), None),
    ],
)
def test_nobody_holds_a_key_whose_own_policy_does_not_say_so(tmp_path: Path, policy: Policy, line: str | None) -> None:
    house = KeyHouse(tmp_path)
    house.key_holder = KeyHolder(
        identity=house.identities[KEY_HOLDER], roster=house.roster, journal=MemoryJournal(), policy=policy
    )
    reports, _, _ = house.run(config(aggregation=HOMOMORPHIC, rounds=1))
    assert reports[0].refused.get(KEY_HOLDER) == line


def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="homomorphic aggregation needs at least 3 sites, there are 2"):
        cohort_of(config(aggregation=HOMOMORPHIC), 2)
    with pytest.raises(ConfigError, match="at most 64 clients within its noise budget, got 65"):
        fit(config(aggregation=HOMOMORPHIC), 65)
    with pytest.raises(ConfigError, match="belong to masked aggregation"):
        cohort_of(changed(config(aggregation=HOMOMORPHIC), "aggregation", threshold=3), 5)
    with pytest.raises(ConfigError, match="key_holder belongs to homomorphic aggregation"):
        cohort_of(config(aggregation=Aggregation(key_holder="a")), 5)
    with pytest.raises(ConfigError, match="no site 'nobody'"):
        privfed.run(small(aggregation=Aggregation(kind="homomorphic", key_holder="nobody")), out=tmp_path / "run")
    with pytest.raises(ConfigError, match="the roster has no member named 'key-holder'"):
        House(tmp_path).federation(config(aggregation=HOMOMORPHIC))


def test_a_site_refuses_a_plan_with_another_key_holder(tmp_path: Path) -> None:
    house = KeyHouse(tmp_path)
    reports, _, tap = house.run(config(aggregation=HOMOMORPHIC, rounds=1))
    begin = next(
        message
        for site, request, _ in tap.log
        if site == "a" and isinstance(message := wire.decode_request(request), wire.Begin)
    )
    assert reports[0].aborted is None
    plan = wire.decode_plan(begin.plan)
    for forged in (None, 1):
        altered = wire.encode_plan(msgspec.structs.replace(plan, round=7, key_holder=forged))
        reply = wire.decode_reply(
            house.sites["a"].handle(wire.encode(wire.Begin(7, "commit", altered, begin.state, begin.opening)))
        )
        assert isinstance(reply, wire.Refusal)
        assert "another key holder" in reply.reason


# Coordinators that lie


def begins(tap: Tap) -> dict[tuple[str, str], wire.Begin]:
    """(party, step) → how the last round began there."""
    messages = [(site, wire.decode_request(request)) for site, request, _ in tap.log]
    return {(site, message.step): message for site, message in messages if isinstance(message, wire.Begin)}


class Lying:
    """An engine whose coordinator tells some parties something else."""

    def __init__(self, house: KeyHouse, lie: Callable[[str, wire.Request], wire.Request]) -> None:
        self._house, self._lie = house, lie

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        told = {name: wire.encode(self._lie(name, wire.decode_request(sent))) for name, sent in requests.items()}
        return self._house.engine.exchange(told, deadline_seconds)


@pytest.mark.parametrize("victim", [KEY_HOLDER, "b"])
@pytest.mark.parametrize("what", ["plan", "state"])
def test_parties_that_are_told_different_things_add_up_nothing_together(tmp_path: Path, victim: str, what: str) -> None:
    def lie(name: str, message: wire.Request) -> wire.Request:
        if name != victim or not isinstance(message, wire.Begin):
            return message
        if what == "state":
            return msgspec.structs.replace(message, state=state_of(0.25))
        plan = msgspec.structs.replace(wire.decode_plan(message.plan), cohort=(0, 1, 2))
        return msgspec.structs.replace(message, plan=wire.encode_plan(plan))

    house = KeyHouse(tmp_path)
    reports, _, _ = house.run(config(aggregation=HOMOMORPHIC, rounds=1), engine=Lying(house, lie))
    assert "the server is in another session" in reports[0].refused[victim]
    assert reports[0].contributed == (() if victim == KEY_HOLDER else tuple("acde"))


def test_a_key_holder_that_is_begun_anew_releases_no_second_set(tmp_path: Path) -> None:
    """The coordinator needs no crash to claim one: all five, then all but e, and the difference is e's update."""
    house = KeyHouse(tmp_path)
    settings = config(aggregation=HOMOMORPHIC, rounds=1)
    first, _, _ = house.run(settings)
    assert first[0].contributed == tuple("abcde")
    without, _, _ = house.run(settings, lambda site, request, reply: None if site == "e" else reply)
    assert without[0].aborted is not None
    assert "another set or sum" in without[0].refused[KEY_HOLDER]
    # That refusal ended the attempt: the true sum is not given a second time either.
    assert house.run(settings)[0][0].aborted is not None
    assert len(house.charged()) == 5


def test_a_key_holder_has_one_key_at_a_time(tmp_path: Path) -> None:
    house = KeyHouse(tmp_path)

    def silent(site: str, request: wire.Request, reply: bytes) -> bytes | None:
        return None if request.step == "commit" else reply

    settings = config(aggregation=HOMOMORPHIC, rounds=1)
    assert house.run(settings, silent)[0][0].aborted is not None
    left = house.key_holder._machine
    assert left is not None and left._key is not None
    assert house.run(settings, silent)[0][0].aborted is not None
    assert left._key is None and house.key_holder._machine is not left


def test_a_key_holder_that_is_begun_anew_gives_the_same_sum_and_it_costs_nothing_more(tmp_path: Path) -> None:
    house = KeyHouse(tmp_path)
    settings = config(aggregation=HOMOMORPHIC, rounds=1)
    torch.testing.assert_close(house.run(settings)[1], house.run(settings)[1], rtol=0, atol=0)
    assert len(house.charged()) == 5


def test_a_site_with_other_records_than_before_the_crash_is_left_out(tmp_path: Path) -> None:
    house = KeyHouse(tmp_path)
    settings = config(aggregation=HOMOMORPHIC, rounds=1)

    def silent(site: str, request: wire.Request, reply: bytes) -> bytes | None:
        return None if (site, request.step) == (KEY_HOLDER, "close") else reply

    assert house.run(settings, silent)[0][0].aborted is not None
    house.sites["a"] = house.start("a", data=records(99))
    reports, _, _ = house.run(settings)
    assert reports[0].contributed == tuple("bcde") and "a" in reports[0].refused


def test_a_key_holder_survives_what_nobody_foresaw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = KeyHouse(tmp_path)
    _, _, tap = house.run(config(aggregation=HOMOMORPHIC, rounds=1))
    begin = wire.encode(begins(tap)[KEY_HOLDER, "key"])
    with monkeypatch.context() as patch:
        patch.setattr("privfed.parameters.decode", lambda data: 1 // 0)
        reply = wire.decode_reply(house.key_holder.handle(begin))
    assert isinstance(reply, wire.Refusal) and "unexpected ZeroDivisionError" in reply.reason


def test_a_key_holder_refuses_a_model_beyond_its_policy_before_anyone_pays(tmp_path: Path) -> None:
    house = KeyHouse(tmp_path, policy=Policy(max_parameters=7))
    reports, _, _ = house.run(config(aggregation=HOMOMORPHIC, rounds=1))
    assert "policy.max_parameters = 7, the plan's model has 8" in reports[0].refused[KEY_HOLDER]
    assert not house.charged()
