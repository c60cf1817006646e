"""Thousands of simulated sites: what grows with their number, counted; what is refused at once; what is shown."""

import io
import sys
from collections.abc import Mapping
from math import floor, log2
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest
from rich.console import Console

from privfed import api, wire
from privfed.api import prepare
from privfed.cli.display import Display
from privfed.config import Aggregation, Config, Evaluation
from privfed.config_io import load_config
from privfed.data.arrays import Arrays
from privfed.data.partition import Alike
from privfed.data.sources import BreastCancer
from privfed.engines.contract import Progress
from privfed.errors import ConfigError
from privfed.federation import RoundReport
from privfed.grid import check_grid, finest, grid_of
from privfed.simulation import durable
from privfed.simulation.durable import DurableEngine
from tests.privfed.house import House, config, state_of

PLAIN = config(aggregation=Aggregation(kind="plain"))


class Counted(int):
    """A number that counts how often anything looks at it."""

    looks = 0

    def __eq__(self, other: object) -> bool:
        Counted.looks += 1
        return int(self) == other

    def __lt__(self, other: int) -> bool:
        Counted.looks += 1
        return int(self) < int(other)

    def __hash__(self) -> int:
        Counted.looks += 1
        return hash(int(self))


def large_plan(house: House, sites: int, number: type[int] = int) -> wire.RoundPlan:
    return house.plan(PLAIN, cohort=tuple(map(number, range(sites))), run=f"of {sites} {number.__name__}")


def begin(plan: bytes) -> bytes:
    return wire.encode(wire.Begin(0, "submission", plan, state_of(), b""))


# What grows


def test_of_so_many_sites_each_looks_at_few_places_of_the_cohort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house, sites = House(tmp_path), 4096
    plan = large_plan(house, sites, Counted)
    encoded = b"what it is decoded to stands below"
    monkeypatch.setattr(wire, "decode_plan", lambda data: plan)
    house.sites["a"].handle(begin(encoded))  # the first one checks the session, for all of this process
    Counted.looks = 0
    assert isinstance(wire.decode_reply(house.sites["b"].handle(begin(encoded))), wire.Refusal)  # b"" is no invitation
    # Itself among the invited, at the site and at its client: two searches, each ⌊log₂ n⌋ + 1 steps and a last look
    assert 0 < Counted.looks <= 2 * (floor(log2(sites)) + 2)


def test_the_calls_of_a_site_do_not_depend_on_how_many_are_invited(tmp_path: Path) -> None:
    house = House(tmp_path)

    def calls(sites: int, site: str) -> int:
        counted, message = 0, begin(wire.encode_plan(large_plan(house, sites)))

        def count(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal counted
            counted += event in ("call", "c_call")

        house.sites["a"].handle(message)
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            house.sites[site].handle(message)
        finally:
            sys.setprofile(before)
        return counted

    calls(8, "b")  # imports, and the chain of this site
    few, many = calls(16, "c"), calls(4096, "d")
    assert abs(many - few) <= 10


def test_a_plan_is_decoded_once_a_round_for_all_simulated_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    class Decoder:
        def decode(self, data: bytes) -> wire.RoundPlan:
            decoded.append(data)
            return msgspec.msgpack.decode(data, type=wire.RoundPlan)

    monkeypatch.setattr(wire, "_plans", Decoder())
    run = api.run(simulated(12), out=tmp_path / "run", report=False)
    assert run.summary.complete and len(run.reports[0].contributed) == 12
    assert len(decoded) == len(run.reports) == 2


def test_no_more_requests_exist_than_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "AT_ONCE", 4)
    taken: list[str] = []
    answered: list[str] = []

    class Requests(wire.Requests):
        def __getitem__(self, name: str) -> bytes:
            taken.append(name)
            return super().__getitem__(name)

    class Answering:
        def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
            assert len(taken) - len(answered) == len(requests) <= 4
            answered.extend(requests)
            return dict(requests)

    names = [f"site-{number}" for number in range(10)]
    replies = DurableEngine(Answering()).exchange(Requests({name: wire.Step(0, "mask", b"x") for name in names}), 1.0)
    assert list(replies) == taken == answered == names


# What is refused


@pytest.mark.parametrize("sites", [3, 50, 1_000, 2_047, 2_048, 10_000, 100_000])
def test_the_default_grid_is_the_finest_that_a_sum_of_so_many_has_room_for(sites: int) -> None:
    grid = grid_of(Aggregation(), sites)
    assert (2 * sites * grid.bound).bit_length() <= 32
    assert grid.fraction_bits == 16 or (2 * sites * grid.bound * 2).bit_length() > 32
    if sites <= 2_047:  # 2 · 2047 · 2²⁰ < 2³²
        assert grid.fraction_bits == 16


def test_10000_sites_have_13_digits_after_the_point() -> None:
    # 2 · 10⁴ · 16 · 2¹³ = 2.6e9 < 2³² = 4.3e9 < 5.2e9
    assert grid_of(Aggregation(), 10_000).fraction_bits == finest(16.0, 10_000) == 13


def test_what_the_message_says_fits() -> None:
    asked = config(aggregation=Aggregation(kind="plain", fraction_bits=16))
    with pytest.raises(ConfigError, match=r"35 bits, and 32 are there; set aggregation\.fraction_bits to 13 or less"):
        check_grid(asked, 10_000)
    check_grid(config(aggregation=Aggregation(kind="plain", fraction_bits=13)), 10_000)
    shares = load_config(None, ["aggregation.fraction_bits=12", "method.name=fedsgd", "privacy.noise=distributed"])
    with pytest.raises(ConfigError, match=r"fraction_bits does nothing in this run: noise in shares"):
        check_grid(shares, 5)
    with pytest.raises(ConfigError, match="13 or less"):
        check_grid(config(aggregation=Aggregation(kind="plain", fraction_bits=14)), 10_000)
    with pytest.raises(ConfigError, match=r"aggregation\.limit = 1e\+06.*lower it to 21474 or less"):
        check_grid(config(aggregation=Aggregation(kind="plain", limit=1e6)), 100_000)
    check_grid(config(aggregation=Aggregation(kind="plain", limit=21474.0)), 100_000)


def test_too_many_digits_are_refused_before_a_record_is_read() -> None:
    data = Arrays(file="there is no such file.npz", partition=Alike(sites=10_000), range=(0.0, 1.0), labels=("a", "b"))
    asked = Config(data=data, aggregation=Aggregation(kind="plain", fraction_bits=16))
    with pytest.raises(ConfigError, match=r"set aggregation\.fraction_bits to 13 or less"):
        prepare(asked)
    # Held-out sites add nothing to the sum: of 10,000 a fifth is left, and 2,000 have room for 16 digits
    held_out = msgspec.structs.replace(asked, evaluation=Evaluation(unseen_fraction=0.8))
    with pytest.raises(Exception, match="there is no such file"):
        prepare(held_out)


# What is shown


def test_a_run_tells_which_step_has_reached_how_many_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "AT_ONCE", 4)
    told: list[Progress] = []
    api.run(simulated(10, rounds=1), out=tmp_path / "run", report=False, watch=told.append)
    steps = [(one.what, one.done) for one in told if one.what.startswith("round")]
    assert steps == [(f"round 1: {step}", done) for step in ("submission", "evaluate") for done in (0, 4, 8)]
    assert {one.of for one in told} == {10}
    assert told[0].what == "opening the sites" and told[-1].what == "writing what the run leaves"


def test_a_terminal_shows_the_step_and_the_sites() -> None:
    display = Display(to_stderr=False, console=Console(file=io.StringIO(), force_terminal=True, width=120))
    display.start(prepare(simulated(10)))
    text = io.StringIO()
    with display:
        for done in (0, 4, 8):
            display.step(Progress("round 1: submission", done, 10))
        Console(file=text, width=120).print(display.picture())
    assert "round 1: submission" in text.getvalue() and "8/10" in text.getvalue() and "0/2" in text.getvalue()


def test_the_bar_of_a_run_that_goes_on_begins_where_it_stopped(tmp_path: Path) -> None:
    rounds: list[RoundReport] = []
    api.run(simulated(10), out=tmp_path / "run", report=False, observer=rounds.append)
    display = Display(to_stderr=False, console=Console(file=io.StringIO(), force_terminal=True, width=120))
    display.start(prepare(simulated(10)))
    text = io.StringIO()
    with display:
        display.round(rounds[-1])  # the second of two, and the first that this command sees
        Console(file=text, width=120).print(display.picture())
    assert "2/2" in text.getvalue()


def simulated(sites: int, rounds: int = 2) -> Config:
    return Config(
        rounds=rounds,
        data=BreastCancer(sites=sites),
        aggregation=Aggregation(kind="plain"),
        evaluation=Evaluation(local_steps=1),
    )
