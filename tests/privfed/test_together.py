"""Simulated sites whose gradients are computed in one pass: the runs are the same, and no site holds up another."""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import privfed
from privfed import wire
from privfed.architecture import Schema, build_model
from privfed.config import Aggregation, Config, Evaluation, Outage, Policy, Privacy, Simulation
from privfed.data.records import SiteData
from privfed.data.sources import BreastCancer
from privfed.engines.contract import Handler
from privfed.engines.local import LocalEngine
from privfed.federation import RoundReport
from privfed.methods import FedAvg, FedSGD, Fomaml, Local, Maml, PerFedAvg, Reptile, Scaffold
from privfed.models import MLP
from privfed.privacy.errors import PrivacyError
from privfed.privacy.events import NoiseSite, PrivacyUnit
from privfed.privacy.ledger import Ledger
from privfed.privacy.oracle.stacked import StackedNetwork
from privfed.privacy.oracle.together import StackedOracle
from privfed.simulation import together
from privfed.simulation.durable import DurableEngine
from privfed.simulation.faults import FaultyEngine
from privfed.simulation.rendezvous import MOST, Cancelled, Rendezvous
from privfed.simulation.together import CohortEngine, Meeting, meeting
from privfed.tasks import Classification

from .house import SCHEMA, House, changed, config, records, state_of

# One of each way to ask a door; tests/privfed/test_matrix.py has the others
METHODS = (FedAvg(), FedSGD(), Fomaml(), Local(), Maml(), PerFedAvg(difference=0.1), Scaffold())
CLAIMS = [*itertools.product(PrivacyUnit, NoiseSite)]
HIDDEN = MLP(hidden=(4,))


def grouped(seed: int) -> SiteData:
    """Sites of different sizes, whose patients have two records each."""
    data = records(seed, n=20 + 5 * (seed % 4))
    return SiteData(data.ids, data.inputs, data.targets, np.arange(len(data), dtype=np.uint64) // 2)


class Simulated:
    """A house, with one engine or the other."""

    def __init__(self, path: Path, settings: Config, engine: str, **options: Any) -> None:
        path.mkdir(parents=True, exist_ok=True)
        defaults: dict[str, Any] = {"insecure": True, "data": lambda name: grouped(ord(name))}
        self.house = House(path, **{**defaults, **options})
        self.settings = settings
        self.meeting: Meeting | None = None
        if engine == "cohort":
            model = build_model(settings, SCHEMA)
            shapes = records(0).inputs[:1], records(0).targets[:1]
            dtypes = torch.float64, torch.float32
            self.meeting = Meeting(
                StackedOracle(*(StackedNetwork(model, Classification().loss, *shapes, dtype=dtype) for dtype in dtypes))
            )
            self.house.sites = {name: self.house.start(name, oracle=self.meeting) for name in self.house.names}

    def run(self, name: str = "r", **handlers: Handler) -> tuple[list[RoundReport], Tensor]:
        """All rounds; ``handlers`` stand in for sites."""
        sites = {**self.house.sites, **handlers}
        engine = LocalEngine(sites) if self.meeting is None else CohortEngine(sites, self.meeting)
        lossy = FaultyEngine(engine, self.settings.simulation, seed=0)
        federation = self.house.federation(self.settings, engine=lossy, run=name)
        federation._server_key = bytes(32)  # a server that adds noise adds the same
        reports = list(federation.rounds())
        return reports, federation.state["theta"]


def both(path: Path, settings: Config, **options: Any) -> tuple[Simulated, Simulated]:
    return tuple(Simulated(path / engine, settings, engine, **options) for engine in ("opacus", "cohort"))  # type: ignore[return-value]


def claimed(method: Any, unit: PrivacyUnit, noise: NoiseSite) -> Config:
    privacy = Privacy(
        unit=unit, noise=noise, noise_multiplier=3.0, target_epsilon=1e4, expected_batch_size=10.0, insecure_seed=1
    )
    kind = "masked" if noise is NoiseSite.DISTRIBUTED else "plain"
    return config(rounds=2, method=method, privacy=privacy, model=HIDDEN, aggregation=Aggregation(kind=kind))


# Whole runs


@pytest.mark.parametrize("unit, noise", CLAIMS, ids=lambda value: value.value)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_run_is_the_same_whoever_computes_its_gradients(
    method: Any, unit: PrivacyUnit, noise: NoiseSite, tmp_path: Path
) -> None:
    settings = claimed(method, unit, noise)
    if unit is PrivacyUnit.NONE and noise is not NoiseSite.LOCAL:
        pytest.skip("nobody adds noise")
    if (reason := settings.method.guarantee(unit, noise)) is not None:
        pytest.skip(reason)
    alone, joint = both(tmp_path, settings)
    (reports, theta), (others, other) = alone.run(), joint.run()
    assert [report.contributed for report in reports] == [report.contributed for report in others]
    assert [report.refused for report in reports] == [report.refused for report in others] == [{}, {}]
    # Plain means are float32, whose rounding a step size of 2 carries on; updates then lie on a grid of 2⁻¹⁶.
    torch.testing.assert_close(theta, other, rtol=1e-4, atol=1e-4)
    for name in alone.house.names:
        mine, theirs = (s.house.sites[name].private_state for s in (alone, joint))
        assert mine.keys() == theirs.keys()
        for key in mine:
            torch.testing.assert_close(mine[key], theirs[key], rtol=1e-3, atol=1e-3)
    spends = [[line.entry.charges for line in s.house.ledger.entries()] for s in (alone, joint)]
    assert spends[0] == spends[1]
    assert any(spends[0]) == settings.method.sends


def test_updates_under_local_noise_agree_to_the_grid(tmp_path: Path) -> None:
    """Both in float64: only a value that lies on the very edge between two steps of the grid could differ."""
    alone, joint = both(tmp_path, claimed(FedSGD(), PrivacyUnit.RECORD, NoiseSite.LOCAL))
    assert torch.equal(alone.run()[1], joint.run()[1])


def test_runs_agree_in_distribution_over_keys(tmp_path: Path) -> None:
    settings = changed(
        claimed(FedAvg(local_steps=2), PrivacyUnit.RECORD, NoiseSite.LOCAL), "privacy", insecure_seed=None
    )
    settings = msgspec.structs.replace(settings, rounds=1)
    found: dict[str, list[Tensor]] = {"opacus": [], "cohort": []}
    for engine in found:
        run = Simulated(tmp_path / engine, settings, engine, insecure=False)
        for name, site in run.house.sites.items():  # another key for each engine: their noise is independent
            site._noise_key = f"{engine} {name}".encode().ljust(32, b".")
        found[engine] = [run.run(str(number))[1] for number in range(30)]
    one, other = (torch.stack(found[engine]).numpy() for engine in found)
    p_values = [stats.ks_2samp(one[:, column], other[:, column]).pvalue for column in range(one.shape[1])]
    assert min(p_values) > 1e-3 / len(p_values)
    # 29 degrees of freedom in each of 8 parameters and more: the ratio of spreads is good to 1/√(29 · 8) = 6.6 %; six σ
    spreads = [np.sqrt(found.var(axis=0, ddof=1).mean()) for found in (one, other)]
    assert 2 / 3 < spreads[0] / spreads[1] < 3 / 2


def test_outages_change_nothing_else(tmp_path: Path) -> None:
    lost = Simulation(outages=(Outage(round=0, site="b", step="mask"),), dropout=0.2)
    settings = msgspec.structs.replace(claimed(Reptile(), PrivacyUnit.RECORD, NoiseSite.LOCAL), simulation=lost)
    settings = msgspec.structs.replace(settings, aggregation=Aggregation(kind="masked"))
    alone, joint = both(tmp_path, settings)
    (reports, theta), (others, other) = alone.run(), joint.run()
    assert [report.dropped for report in reports] == [report.dropped for report in others]
    assert any(report.dropped for report in reports)
    torch.testing.assert_close(theta, other, rtol=1e-5, atol=1e-5)


# One site's trouble is no other's


def test_a_site_that_refuses_in_the_middle_of_a_round_holds_up_nobody(tmp_path: Path) -> None:
    """Its budget does not allow the second round: it refuses while the others wait for their gradients."""
    settings = claimed(FedAvg(local_steps=3), PrivacyUnit.RECORD, NoiseSite.LOCAL)
    alone, joint = both(tmp_path, settings)
    for run in (alone, joint):
        spare = run.house.start("c", policy=Policy(max_epsilon=1.5), oracle=run.meeting)
        run.house.sites["c"] = spare
    (reports, theta), (others, other) = alone.run(), joint.run()
    assert [report.refused for report in reports] == [report.refused for report in others]
    assert [len(report.contributed) for report in others] == [5, 4]
    assert "max_epsilon" in others[1].refused["c"]
    torch.testing.assert_close(theta, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("moment", [0, 1, 4])
def test_an_exception_in_one_sites_method_is_that_sites_refusal(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from privfed.privacy.oracle.door import NoisedDoor

    original, asked = NoisedDoor.gradient, iter(range(1000))

    def sometimes(self: NoisedDoor, theta: Tensor, batch: Any) -> Tensor:
        if next(asked) == moment:
            raise RuntimeError("a bug that met a record")
        return original(self, theta, batch)

    monkeypatch.setattr(NoisedDoor, "gradient", sometimes)
    joint = Simulated(tmp_path, claimed(FedAvg(local_steps=3), PrivacyUnit.RECORD, NoiseSite.LOCAL), "cohort")
    reports, _ = joint.run()
    assert [len(report.contributed) for report in reports] == [4, 5]
    assert list(reports[0].refused.values()) == ["unexpected RuntimeError at the site"]


def test_records_that_fit_no_other_site_fail_at_their_own(tmp_path: Path) -> None:
    """A label beyond the classes breaks the loss: of that site alone, as it does without the others."""

    def data(name: str) -> SiteData:
        held = grouped(ord(name))
        return SiteData(held.ids, held.inputs, held.targets + (9 if name == "d" else 0), held.patients)

    settings = claimed(FedAvg(local_steps=1), PrivacyUnit.RECORD, NoiseSite.LOCAL)
    alone, joint = both(tmp_path, settings, data=data)
    (reports, theta), (others, other) = alone.run(), joint.run()
    for report in (reports[0], others[0]):
        assert set(report.refused) == {"d"}
        assert len(report.contributed) == 4
    torch.testing.assert_close(theta, other, rtol=1e-5, atol=1e-5)


def test_an_interrupt_leaves_no_site_waiting(tmp_path: Path) -> None:
    class Interrupted:
        def handle(self, request: bytes) -> bytes:
            raise KeyboardInterrupt

    joint = Simulated(tmp_path, claimed(FedAvg(local_steps=3), PrivacyUnit.RECORD, NoiseSite.LOCAL), "cohort")
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        joint.run(e=Interrupted())
    assert joint.meeting is not None
    joint.meeting.__exit__(None, None, None)  # would wait for a site that waits
    assert set(threading.enumerate()) <= before


# Which engine runs


def sites_of(count: int, **options: Any) -> tuple[Config, Any, Schema]:
    settings = Config(data=BreastCancer(sites=count), simulation=Simulation(**options))
    data = settings.data.load(seed=0)
    return settings, data, Schema(features=len(data.inputs), classes=2)


@pytest.mark.parametrize(
    "engine, count, joint",
    [("auto", 3, False), ("auto", 7, False), ("auto", 8, True), ("opacus", 30, False), ("cohort", 3, True)],
)
def test_few_sites_compute_for_themselves(engine: str, count: int, joint: bool) -> None:
    assert (meeting(*sites_of(count, engine=engine)) is not None) == joint


def test_auto_leaves_networks_that_it_would_take_apart_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unknown(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(30, 2))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs @ self.weight

    monkeypatch.setattr(together, "build_model", lambda config, schema: Unknown())
    assert meeting(*sites_of(8)) is None
    assert meeting(*sites_of(8, engine="cohort")) is not None


def test_a_run_of_eight_sites_is_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = StackedOracle.answer

    def counted(self: StackedOracle, queries: Sequence[Any]) -> Any:
        asked.append(len(queries))
        return original(self, queries)

    monkeypatch.setattr(StackedOracle, "answer", counted)
    settings = Config(
        rounds=1,
        data=BreastCancer(sites=8),
        method=FedAvg(local_steps=3, personal_steps=2),
        privacy=Privacy(noise_multiplier=3.0, target_epsilon=50.0),
        evaluation=Evaluation(local_steps=4),
    )
    run = privfed.run(settings, out=tmp_path / "run")
    assert run.summary.complete
    assert asked == [8] * (3 + 2 + 4)


# The rendezvous itself


def met(*bodies: Callable[[Callable[[int], int]], Any], answer: Any = None) -> tuple[list[Any], list[list[int]]]:
    """What tasks that get `ask` return, and which questions were answered together."""
    seen: list[list[int]] = []

    def answered(questions: Sequence[int]) -> list[Any]:
        seen.append(list(questions))
        return [answer(question) if answer else 10 * question for question in questions]

    rendezvous: Rendezvous[int, int] = Rendezvous(answered)
    try:
        return rendezvous.run([lambda body=body: body(rendezvous.ask) for body in bodies]), seen  # type: ignore[misc]
    finally:
        rendezvous.close()


def test_questions_of_all_tasks_are_answered_together() -> None:
    results, seen = met(lambda ask: ask(1) + ask(2), lambda ask: ask(3), lambda ask: "asks nothing")
    assert results == [30, 30, "asks nothing"]
    assert seen == [[1, 3], [2]]


def test_tasks_never_run_at_the_same_time() -> None:
    running: list[int] = []

    def body(ask: Callable[[int], int]) -> int:
        total = 0
        for question in range(20):
            running.append(1)
            assert len(running) == 1
            sum(range(1000))
            running.pop()
            total += ask(question)
        return total

    results, _ = met(*[body] * 20)
    assert results == [10 * sum(range(20))] * 20


def test_more_tasks_than_threads_meet_in_groups() -> None:
    results, seen = met(*[lambda ask: ask(1)] * (MOST + 3))
    assert results == [10] * (MOST + 3)
    assert [len(questions) for questions in seen] == [MOST, 3]


def test_an_exception_as_answer_is_raised_where_it_was_asked() -> None:
    def careful(ask: Callable[[int], int]) -> str:
        try:
            ask(2)
        except ValueError as error:
            return str(error)
        return "no error"

    results, _ = met(careful, lambda ask: ask(1), answer=lambda q: ValueError("two") if q == 2 else q)
    assert results == ["two", 1]


def test_a_task_that_fails_is_raised_when_the_others_have_ended() -> None:
    ended: list[int] = []

    def fails(ask: Callable[[int], int]) -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        met(fails, lambda ask: ended.append(ask(1)))
    assert ended == [10]


def test_a_failing_answer_unwinds_every_task() -> None:
    unwound: list[str] = []

    def body(ask: Callable[[int], int]) -> None:
        try:
            ask(1)
        except Cancelled:
            unwound.append("yes")
            raise

    def fails(question: int) -> int:
        raise MemoryError

    with pytest.raises(MemoryError):
        met(body, body, answer=fails)
    assert unwound == ["yes", "yes"]


# The books are on disk before a reply is out


def test_no_reply_leaves_before_what_it_says_is_on_disk(tmp_path: Path) -> None:
    house = House(tmp_path)

    class Asked:
        """Looks into the file as others see it, when the site has answered and when the engine has."""

        def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
            with Ledger(house.ledger.path) as other:
                replies = LocalEngine(house.sites).exchange(requests, deadline_seconds)
                assert house.ledger.sites() == ("a", "b", "c", "d", "e")
                assert other.sites() == ()
            return replies

    plain = config(aggregation=Aggregation(kind="plain"))
    plan = wire.encode_plan(house.plan(plain))
    requests = {name: wire.encode(wire.Begin(0, "submission", plan, state_of(), b"")) for name in house.names}
    DurableEngine(Asked(), house.ledger.together).exchange(requests, 1.0)
    with Ledger(house.ledger.path) as other:
        assert other.sites() == ("a", "b", "c", "d", "e")


def test_sites_whose_books_can_not_be_written_say_nothing(tmp_path: Path) -> None:
    @contextmanager
    def full() -> Iterator[None]:
        yield
        raise PrivacyError("the disk is full")

    engine = LocalEngine(House(tmp_path).sites)
    with pytest.raises(PrivacyError, match="full"):
        DurableEngine(engine, full).exchange({"a": b""}, 1.0)
