"""`privacy.schedule = "spend"`: what earlier rounds did not need, and who makes sure that nobody exceeds the target."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from privfed import folder, verification, wire
from privfed.api import resume, run
from privfed.architecture import build_model
from privfed.cohort import cohort_of
from privfed.config import Aggregation, Config, Evaluation, Outage, Privacy, Simulation
from privfed.engines.local import LocalEngine
from privfed.errors import ConfigError
from privfed.federation import Federation, RoundReport
from privfed.methods import FedSGD
from privfed.noise_levels import meets_training, noise_levels, side_plan
from privfed.parameters import to_vector
from privfed.privacy.events import NoiseSite, PrivacyUnit
from privfed.privacy.ledger import Ledger
from privfed.schedule import Spending, check_schedule, shares_of
from privfed.simulation.faults import FaultyEngine
from privfed.verification import Spends

from .house import ACCOUNTANT, SCHEMA, SIZE, House, changed, state_of
from .test_resume import child, configure, die_in

TARGET, DELTA, ROUNDS = 1.0, 1e-5, 6
SPEND = Config(
    name="toy",
    rounds=ROUNDS,
    method=FedSGD(lr=0.1, personal_steps=1),
    privacy=Privacy(
        noise=NoiseSite.DISTRIBUTED, target_epsilon=TARGET, delta=DELTA, expected_batch_size=10.0, schedule="spend"
    ),
    evaluation=Evaluation(local_steps=1, every=100),
)
CONSTANT = changed(SPEND, "privacy", schedule="constant")


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path, n=7)


def outages(*lost: tuple[int, str, str]) -> Config:
    return msgspec.structs.replace(
        SPEND, simulation=Simulation(outages=tuple(Outage(round=r, site=s, step=t) for r, s, t in lost))
    )


def federation(house: House, config: Config, done: tuple[RoundReport, ...] = ()) -> Federation:
    cohort = cohort_of(config, house.n)
    first, side = noise_levels(config, cohort, SCHEMA, ACCOUNTANT)
    beside = meets_training(config, side_plan(config, cohort, SCHEMA, side))
    spending = Spending(config, SIZE, first, beside, ACCOUNTANT) if config.privacy.schedule == "spend" else None
    return Federation(
        config=config,
        run="r",
        roster=house.roster,
        engine=FaultyEngine(LocalEngine(house.sites), config.simulation, seed=0),
        noise_multiplier=first,
        side_noise=side,
        spending=spending,
        done=done,
        schema=SCHEMA,
        state=config.method.init_server(to_vector(build_model(config, SCHEMA))),
    )


def bookings(house: House, site: str) -> Iterator[float]:
    """ε of a site's chain after every entry: what stands in its ledger if it is killed there."""
    chain = house.ledger.entries(site)
    spends = Spends(chain, house.sites[site].book.dataset)
    for line in chain:
        yield ACCOUNTANT.epsilon(spends.upto(line.sequence), DELTA).value


def test_without_dropouts_every_round_has_the_same_smaller_noise_and_little_is_left(
    house: House, tmp_path: Path
) -> None:
    constant, _ = noise_levels(CONSTANT, cohort_of(CONSTANT, house.n), SCHEMA, ACCOUNTANT)
    reports = list(federation(house, SPEND).rounds())
    levels = {report.noise_multiplier for report in reports}
    assert len(levels) == 1 and len(reports) == ROUNDS
    # 7 sites, sums of at least 5, 2 of them known: all together carry 5/3 of the least noise, so that five rounds at
    # 3/5 and one in full cost as much as 4 of 6
    assert levels.pop() == pytest.approx(constant * (4 / 6) ** 0.5, rel=0.01)
    for name in house.names:
        booked = list(bookings(house, name))
        assert max(booked) <= TARGET * (1 + 1e-6)
        assert booked[-1] > 0.93 * TARGET  # √(3.6/4)
    (tmp_path / "other").mkdir()
    other = House(tmp_path / "other", n=7)
    list(federation(other, CONSTANT).rounds())
    assert max(bookings(other, "a")) < 0.8 * TARGET


LOST = {
    "one is late to unmask": [(1, "a", "unmask")],
    "two never reach their input": [(0, "b", "advertise"), (0, "c", "share")],
    "one may have sent its input": [(2, "d", "mask")],
    "the same one every round": [(number, "a", "consistency") for number in range(ROUNDS)],
    "others every round": [(number, "abcdefg"[number], "unmask") for number in range(ROUNDS)],
    "all but four": [(3, site, "mask") for site in "abc"],  # five are needed: no sum
    "in the last round": [(ROUNDS - 1, "g", "unmask")],
}


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
def test_whoever_drops_out_nobody_exceeds_the_target_and_nobody_is_left_behind(
    house: House, lost: list[tuple[int, str, str]]
) -> None:
    reports = list(federation(house, outages(*lost)).rounds())
    assert len(reports) == ROUNDS
    assert not any(report.refused for report in reports)
    assert all(report.aborted is None or len(lost) == 3 for report in reports)
    for name in house.names:
        assert max(bookings(house, name)) <= TARGET * (1 + 1e-6)
    assert max(max(bookings(house, name)) for name in house.names) > 0.93 * TARGET
    levels = [report.noise_multiplier for report in reports]
    assert levels == sorted(levels)  # what is lost is paid for in noise
    if lost[0][0] < ROUNDS - 1:
        assert levels[-1] > levels[0]


def test_a_coordinator_can_not_spend_ahead(house: House) -> None:
    """A plan with less noise than the schedule's is refused at once, long before the budget would be."""
    honest, _ = noise_levels(SPEND, cohort_of(SPEND, house.n), SCHEMA, ACCOUNTANT)
    site = house.sites["a"]

    def begin(noise_multiplier: float, number: int = 0) -> wire.Reply:
        plan = wire.encode_plan(house.plan(SPEND, noise_multiplier=noise_multiplier, round=number))
        return wire.decode_reply(site.handle(wire.encode(wire.Begin(number, "advertise", plan, state_of(), b""))))

    for less in (0.95 * honest, 0.6 * honest):
        answer = begin(less)
        assert isinstance(answer, wire.Refusal) and answer.kind == "policy" and answer.final
        assert "leaves too little" in answer.reason
    answer = begin(honest)
    assert isinstance(answer, wire.Refusal) and answer.kind == "protocol"  # the opening is empty: the plan was fine
    # At the end of the run one round alone may take all, and not more
    answer = begin(0.3 * honest, ROUNDS - 1)
    assert isinstance(answer, wire.Refusal) and answer.final
    answer = begin(0.6 * honest, ROUNDS)
    assert isinstance(answer, wire.Refusal) and answer.kind == "policy"
    assert house.ledger.charges("a", site.book.dataset) == ()


def test_a_coordinator_that_forgets_dropouts_ends_in_the_budget(house: House) -> None:
    """Levels as if everybody had settled: who has not is refused before it exceeds the target, not after."""
    config = outages(*((number, "a", "consistency") for number in range(ROUNDS)))
    run_ = federation(house, config)
    assert run_._spending is not None
    first = run_._spending.first

    class Forgetful:
        def level(self, *of_no_interest: object) -> float:
            return first

    run_._spending = Forgetful()  # type: ignore[assignment]
    reports = list(run_.rounds())
    assert any("a" in report.refused for report in reports)
    for name in house.names:
        assert max(bookings(house, name)) <= TARGET * (1 + 1e-6)


def test_levels_follow_from_the_rounds_before(house: House) -> None:
    config = outages((1, "a", "unmask"), (3, "b", "mask"))
    whole = federation(house, config)
    reports = tuple(whole.rounds())
    for number in range(ROUNDS):
        assert whole._spending is not None
        fresh = Spending(config, SIZE, reports[0].noise_multiplier, (), ACCOUNTANT)
        cohort = cohort_of(config, house.n)
        assert fresh.level(cohort, reports[:number], house.names) == reports[number].noise_multiplier


def test_what_a_site_has_settled_a_round_at() -> None:
    dropped = {"advertise": ("b",), "share": ("c",), "mask": ("d",), "consistency": ("e",), "unmask": ("f",)}
    done = RoundReport(0, tuple("abcdef"), tuple("aef"), dropped, {}, None, 0.0, {}, 0.0)
    assert [shares_of(done, site) for site in "abcdefz"] == [3, 0, 0, None, None, None, 0]
    aborted = RoundReport(0, tuple("abc"), (), {}, {}, "too few", 0.0, {}, 0.0)
    assert [shares_of(aborted, site) for site in "abz"] == [None, None, 0]


def test_figures_beside_the_updates_are_planned_for(house: House) -> None:
    """Clients hold both: what is released about the test records costs them too."""
    client = changed(
        changed(SPEND, "privacy", unit=PrivacyUnit.CLIENT, target_epsilon=4.0),
        "evaluation",
        release="private",
        every=2,
        local_steps=1,
    )
    reports = list(federation(house, client).rounds())
    assert len(reports) == ROUNDS and not any(report.refused for report in reports)
    for name in house.names:
        assert 3.5 < list(bookings(house, name))[-1] <= 4.0 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (changed(SPEND, "privacy", noise=NoiseSite.LOCAL), "noise = 'distributed'"),
        (changed(SPEND, "privacy", unit=PrivacyUnit.NONE), "noise = 'distributed'"),
        (changed(SPEND, "privacy", noise_multiplier=3.0), "leave privacy.noise_multiplier away"),
        (msgspec.structs.replace(SPEND, aggregation=Aggregation(kind="homomorphic")), "never learns who"),
    ],
)
def test_where_nothing_is_given_back_it_is_refused(asked: Config, told: str) -> None:
    check_schedule(CONSTANT)
    with pytest.raises(ConfigError, match=told):
        check_schedule(asked)


SETTINGS = (
    "privacy.noise='distributed'",
    "method.name='fedsgd'",
    "privacy.schedule='spend'",
    "privacy.target_epsilon=2",
    "rounds=4",
    'simulation.outages=[{round=0, site="a", step="consistency"}, {round=2, site="b", step="mask"}]',
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Any, Path]:
    base = tmp_path_factory.mktemp("schedule")
    rows = [f"{'abcd'[i % 4]},{i % 13 / 5 + i // 4 % 2:.1f},{i // 4 % 2}" for i in range(120)]
    (base / "t.csv").write_text("\n".join(["site,x,y", *rows]) + "\n")
    config = configure(base / "t.csv", *SETTINGS)
    config = changed(config, "privacy", noise_multiplier=None)
    return config, run(config, out=base / "whole"), base / "whole"


@pytest.mark.parametrize("step", ["advertise", "mask", "unmask", "evaluate"])
def test_a_run_that_was_killed_goes_on_with_the_same_levels(
    whole: tuple[Config, Any, Path], tmp_path: Path, step: str
) -> None:
    config, expected, _ = whole
    home = tmp_path / "run"
    status = child(lambda: run(config, out=home), prepare=lambda: die_in(step))
    assert status == signal.SIGKILL
    done = resume(home)
    assert [r.noise_multiplier for r in done.reports] == [r.noise_multiplier for r in expected.reports]
    assert len({r.noise_multiplier for r in done.reports}) > 1
    # The rotation is another in every run, and so is the model: what is spent is the same
    assert done.summary.complete and done.summary.privacy.epsilon == expected.summary.privacy.epsilon
    assert [r.contributed for r in done.reports] == [r.contributed for r in expected.reports]


def test_a_run_with_many_levels_verifies(whole: tuple[Config, Any, Path]) -> None:
    config, done, home = whole
    found = verification.verify(verification.find_book(home), delta=config.privacy.delta, accountant=ACCOUNTANT)
    values = [site.epsilon.value for site in found.sites if site.epsilon is not None]
    assert max(values) == pytest.approx(done.summary.privacy.epsilon.max)
    assert max(values) <= 2.0 * (1 + 1e-6)
    with Ledger(home / folder.LEDGER) as book:
        reserves = [line.entry for line in book.entries() if line.entry.kind == "reserve"]
    assert len({charge.event for entry in reserves for charge in entry.charges}) == len(
        {r.noise_multiplier for r in done.reports}
    )
