"""The round loop over the engine: sums, dropouts at every step, refusals, retirements, and the ε that is reported."""

import json
import math
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dp_accounting
import msgspec
import pytest
import torch
from dp_accounting.pld import PLDAccountant

import privfed
from privfed import wire
from privfed.api import Run
from privfed.cohort import cohort_of
from privfed.config import Aggregation, Config, Evaluation, Outage, Policy, Privacy, Simulation
from privfed.data.sources import BreastCancer
from privfed.engines.local import LocalEngine
from privfed.errors import ConfigError
from privfed.federation import RoundReport
from privfed.methods import FedAvg, Fomaml, Local, Reptile
from privfed.privacy.events import PrivacyUnit

from .house import SIZE, House, Tap, changed, config, fit

STEPS = ("advertise", "share", "mask", "consistency", "unmask")


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def run(house: House, settings: Config, **options: Any) -> tuple[list[RoundReport], torch.Tensor]:
    federation = house.federation(settings, **options)
    return list(federation.rounds()), federation.state["theta"]


# Sums


@pytest.mark.parametrize("method", [FedAvg(local_steps=2), Reptile(), Fomaml()], ids=lambda m: type(m).__name__)
def test_masked_and_plain_runs_give_the_same_model_under_the_same_noise(method: Any, tmp_path: Path) -> None:
    models = {}
    for kind in ("masked", "plain"):
        (tmp_path / kind).mkdir()
        house = House(tmp_path / kind, insecure=True)
        settings = changed(config(method=method, aggregation=Aggregation(kind=kind)), "privacy", insecure_seed=5)
        reports, models[kind] = run(house, settings)
        assert [len(report.contributed) for report in reports] == [5, 5, 5]
    # Both add the same integers: not even the fixed-point step of 2⁻¹⁶ lies between them.
    assert (models["masked"] - models["plain"]).abs().max() <= 2**-16
    assert models["plain"].abs().max() > 0.01


@pytest.mark.parametrize("lost", [set(), {"b"}, {"a", "e"}], ids=lambda lost: "-".join(sorted(lost)) or "nobody")
def test_the_coordinator_gets_the_mean_of_what_arrived(house: House, lost: set[str]) -> None:
    settings = config(rounds=1, method=FedAvg(local_steps=1, lr=1.0), aggregation=Aggregation(kind="plain"))
    tap = Tap(LocalEngine(house.sites), lambda site, request, reply: None if site in lost else reply)
    _, theta = run(house, settings, engine=tap)
    from privfed.crypto.packing import decode, unpack
    from privfed.terms import encoding_of

    answers = [wire.decode_reply(reply) for site, _, reply in tap.log if site not in lost]
    bits = (2 * 5 * encoding_of(settings, cohort_of(settings, 5), SIZE, 0.0).bound).bit_length()
    vectors = [
        decode(unpack(msgspec.msgpack.decode(answer.payload)[-1], dim=8, bits=bits), bits)
        for answer in answers
        if isinstance(answer, wire.Answer)
    ]
    assert len(vectors) == 5 - len(lost)
    torch.testing.assert_close(theta, torch.from_numpy(sum(vectors) * 2.0**-16 / len(vectors)).float())


def test_the_server_of_a_masked_run_sees_no_update(house: House, tmp_path: Path) -> None:
    """No vector that travels is the one that the same site sends in the clear under the same noise."""
    for name in ("masked", "plain"):
        (tmp_path / name).mkdir()
    clear, hidden = House(tmp_path / "plain", insecure=True), House(tmp_path / "masked", insecure=True)
    sent = {}
    for kind, where in (("plain", clear), ("masked", hidden)):
        settings = config(rounds=1, aggregation=Aggregation(kind=kind))
        tap = Tap(LocalEngine(where.sites))
        run(where, changed(settings, "privacy", insecure_seed=5), engine=tap)
        sent[kind] = [reply for _, _, reply in tap.log]
    in_the_clear = [
        msgspec.msgpack.decode(answer.payload)[-1]
        for answer in map(wire.decode_reply, sent["plain"])
        if isinstance(answer, wire.Answer)
    ]
    assert len(in_the_clear) == 5
    assert not any(vector in reply for vector in in_the_clear for reply in sent["masked"])


# Dropouts


@pytest.mark.parametrize("step", STEPS)
def test_a_dropout_at_any_step_does_not_stop_the_round(house: House, step: str) -> None:
    outage = Outage(round=1, site="b", step=step)
    reports, theta = run(house, config(simulation=Simulation(outages=(outage,))))
    assert [report.aborted for report in reports] == [None] * 3
    # A site whose input arrived is in the sum, though it vanished afterwards.
    there = set("abcde") if step in ("consistency", "unmask") else set("acde")
    assert set(reports[1].contributed) == there
    assert reports[1].dropped == {step: ("b",)}
    assert set(reports[2].contributed) == set("abcde")
    assert theta.isfinite().all()
    # It answered the mask step before its reply was lost: an outage never makes ε smaller.
    charged = {recorded.entry.round for recorded in house.charged("b")}
    assert charged == ({0, 2} if step in ("advertise", "share") else {0, 1, 2})


@pytest.mark.parametrize("step", STEPS)
def test_too_many_dropouts_release_nothing_and_the_run_goes_on(house: House, step: str) -> None:
    outages = tuple(Outage(round=1, site=site, step=step) for site in "bc")
    federation = house.federation(config(simulation=Simulation(outages=outages)))
    models, reports = [], []
    for report in federation.rounds():
        reports.append(report)
        models.append(federation.state["theta"].clone())
    assert reports[1].aborted is not None and f"{step}: 3 clients answered, 4 are needed" in reports[1].aborted
    assert reports[1].contributed == () and reports[1].bytes_up == 0
    assert torch.equal(models[1], models[0])
    assert not torch.equal(models[2], models[1])
    assert reports[2].aborted is None
    assert federation.retired == {}


def test_a_lost_evaluation_loses_its_figures_alone(house: House) -> None:
    outage = Outage(round=2, site="b", step="evaluate")
    reports, _ = run(house, config(simulation=Simulation(outages=(outage,))))
    assert set(reports[2].contributed) == set("abcde")
    assert set(reports[2].measurements) == set("acde")


def test_chance_outages_depend_on_the_public_seed_alone(tmp_path: Path) -> None:
    def contributed(seed: int, where: str) -> list[tuple[str, ...]]:
        (tmp_path / where).mkdir()
        settings = config(seed=seed, rounds=6, simulation=Simulation(dropout=0.3))
        return [report.contributed for report in run(House(tmp_path / where), settings)[0]]

    first = contributed(1, "x")
    assert first == contributed(1, "y") != contributed(2, "z")
    assert any(len(sites) < 5 for sites in first)


def test_a_site_that_sends_nonsense_is_left_out_of_its_round(house: House) -> None:
    def alter(site: str, request: wire.Request, reply: bytes) -> bytes:
        if site == "b" and request.step == "mask" and request.round == 0:
            return wire.encode(wire.Answer(b"nonsense"))
        if site == "c" and request.step == "mask" and request.round == 1:
            return b"nonsense"
        return reply

    reports, _ = run(house, config(), engine=Tap(LocalEngine(house.sites), alter))
    assert set(reports[0].contributed) == set("acde") and "invalid message" in reports[0].refused["b"]
    assert set(reports[1].contributed) == set("abde") and "not a message" in reports[1].refused["c"]
    assert set(reports[2].contributed) == set("abcde")


# Budgets


def test_a_site_without_budget_retires_and_the_others_go_on(house: House) -> None:
    house.sites["b"] = house.start("b", policy=Policy(max_epsilon=1.0))  # one round at σ = 2, q = .5 costs 1.9
    federation = house.federation(config())
    reports = list(federation.rounds())
    assert set(federation.retired) == {"b"} and "has spent ε = 0 of 1 " in federation.retired["b"]
    assert [report.invited for report in reports] == [tuple("abcde"), tuple("acde"), tuple("acde")]
    assert [report.aborted for report in reports] == [None] * 3
    assert set(reports[0].refused) == {"b"}
    assert house.charged("b") == ()


def test_a_run_ends_cleanly_when_too_few_sites_are_left(house: House) -> None:
    for site in "abc":
        house.sites[site] = house.start(site, policy=Policy(max_epsilon=1.0))
    federation = house.federation(config())
    reports = list(federation.rounds())
    assert len(reports) == 1 and reports[0].aborted is not None
    assert set(federation.retired) == set("abc")
    assert not torch.any(federation.state["theta"])
    assert house.charged() == ()  # nobody paid for a round that could not be


@dataclass(frozen=True)
class Finished:
    run: Run
    folder: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A real run on the embedded records, with parts, dropouts and rounds without evaluation."""
    folder = tmp_path_factory.mktemp("run") / "out"
    settings = Config(
        name="whole",
        rounds=3,
        method=Fomaml(inner_steps=2),
        privacy=Privacy(noise_multiplier=2.0, target_epsilon=20.0),
        evaluation=Evaluation(every=2, local_steps=2),
        simulation=Simulation(
            outages=(
                Outage(round=0, site="hospital-2", step="share"),
                Outage(round=2, site="hospital-3", step="evaluate"),
            )
        ),
    )
    return Finished(privfed.run(settings, out=folder), folder)


def by_another_path(ledger: Path, site: str, delta: float) -> float:
    """ε of a site from the raw file by dp-accounting alone: the worst of every combination of a split's parts."""
    parts: dict[str, list[tuple[float, float, int]]] = {"all": []}
    database = sqlite3.connect(ledger)
    for (body,) in database.execute("SELECT body FROM entries WHERE site = ?", (site,)):
        for charge in json.loads(body)["entry"]["charges"]:
            event = charge["event"]
            line = (event["sample_rate"], event["noise_multiplier"], charge.get("count", 1))
            parts.setdefault(charge.get("group", "all"), []).append(line)
    database.close()
    worst = 0.0
    for part in [name for name in parts if name != "all"] or ["all"]:
        accountant = PLDAccountant(value_discretization_interval=1e-3)
        for rate, sigma, count in parts["all"] + (parts[part] if part != "all" else []):
            event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
            accountant.compose(event, count)
        worst = max(worst, accountant.get_epsilon(delta))
    return float(worst)


def test_the_reported_epsilon_is_that_of_the_ledger_by_another_path(finished: Finished) -> None:
    reported = finished.run.summary.privacy.epsilon
    assert len(reported.per_site) == 5
    for site, epsilon in reported.per_site.items():
        # two grids of 1e-3 or finer, each pessimistic by a fraction of a percent
        assert epsilon == pytest.approx(by_another_path(finished.folder / "ledger.db", site, 1e-5), rel=0.01)
    assert reported.max == max(epsilon for epsilon in reported.per_site.values() if epsilon is not None)
    # hospital-2 missed the paid step of one round in three
    assert reported.per_site["hospital-2"] < reported.per_site["hospital-1"] == reported.max


def test_a_lost_last_measurement_does_not_make_epsilon_smaller(finished: Finished) -> None:
    """hospital-3 measured after two rounds and paid for three."""
    reported = finished.run.summary.privacy.epsilon.per_site
    assert "hospital-3" not in finished.run.reports[2].measurements
    assert reported["hospital-3"] == reported["hospital-1"]


def test_a_run_leaves_what_it_says(finished: Finished) -> None:
    assert finished.run.summary.complete
    lines = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    # every second round, and always the last
    assert [sorted(line["sites"]) != [] for line in lines] == [False, True, True]
    assert json.loads((finished.folder / "summary.json").read_text()) == json.loads(finished.run.summary.to_json())
    assert privfed.load_config(finished.folder / "config.toml").name == "whole"
    for name in ("ledger.db", "ledger.db.key"):
        assert (finished.folder / name).stat().st_mode & 0o077 == 0


def test_sites_that_never_measured_are_reported_with_what_they_spent(tmp_path: Path, finished: Finished) -> None:
    """A second run on the ledger retires everyone at once; between evaluations, nobody measures anything."""
    settings = Config(
        rounds=3,
        method=Fomaml(inner_steps=2),
        privacy=Privacy(noise_multiplier=2.0, target_epsilon=0.5),
        evaluation=Evaluation(every=5, local_steps=1),
    )
    again = privfed.run(settings, out=tmp_path / "again", ledger=finished.folder / "ledger.db")
    assert not again.summary.complete
    assert again.reports[0].measurements == {}
    assert again.summary.privacy.epsilon == finished.run.summary.privacy.epsilon
    assert all("has spent" in reason for reason in again.summary.refusals.values())


def test_no_claim_reports_no_epsilon(tmp_path: Path) -> None:
    settings = Config(
        rounds=1, privacy=Privacy(unit=PrivacyUnit.NONE, target_epsilon=math.inf), evaluation=Evaluation(local_steps=1)
    )
    privacy = privfed.run(settings, out=tmp_path / "out").summary.privacy
    assert (privacy.unit, privacy.accountant, privacy.epsilon.max) == ("none", "none", None)
    assert set(privacy.epsilon.per_site.values()) == {None}


@pytest.mark.parametrize("sites", [1, 2])
def test_the_local_method_needs_no_cohort_and_spends_nothing(tmp_path: Path, sites: int) -> None:
    settings = Config(rounds=2, method=Local(steps=2), data=BreastCancer(sites=sites))
    summary = privfed.run(settings, out=tmp_path / "out").summary
    assert summary.complete and summary.refusals == {}
    assert (summary.privacy.epsilon.max, summary.aggregation.kind) == (0.0, "none")
    assert summary.utility.personalized.mean is not None and summary.utility.personalized.mean > 0.8


# Cohorts


@pytest.mark.parametrize(
    ("n", "aggregation", "told"),
    [
        (2, Aggregation(), "needs at least 3 sites, there are 2"),
        (5, Aggregation(threshold=6), "threshold = 6 is above the cohort of 5"),
        (5, Aggregation(minimum_cohort=6), "minimum_cohort = 6 is above the cohort of 5"),
        (5, Aggregation(threshold=2), "too small for 5 sites"),
        (5, Aggregation(threshold=4, colluders=3), "too small for 5 sites and 3 colluders.*at least 5"),
        (5, Aggregation(kind="plain", colluders=9), "colluders must be in"),
        (0, Aggregation(kind="plain"), "above the cohort of 0"),
        (5, Aggregation(limit=1e6, fraction_bits=16), "set aggregation.fraction_bits to 8 or less"),  # 10e6·2⁹ > 2³²
        (5, Aggregation(kind="plain", limit=2000.0, fraction_bits=20), "fraction_bits to 17 or less"),
        (5, Aggregation(limit=1e-6, fraction_bits=0), "limit"),
    ],
)
def test_a_cohort_that_can_not_be_is_a_configuration_error(n: int, aggregation: Aggregation, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        fit(config(aggregation=aggregation), n)


@pytest.mark.parametrize("n", [3, 4, 5, 8, 40])
def test_the_defaults_fit_every_cohort(n: int) -> None:
    cohort = fit(config(), n)
    assert 2 * cohort.threshold > n + cohort.colluders
    assert cohort.minimum_cohort >= 3
    assert cohort.tolerated_dropouts >= (1 if n >= 4 else 0)


def test_figures_that_are_not_finite_leave_the_metrics_readable(house: House, tmp_path: Path) -> None:
    from privfed.folder import RunFolder
    from privfed.summary import metrics_line

    measured = wire.Measurement(5, math.nan, 0.5, 0.5, None, math.inf)
    report = RoundReport(0, ("a",), (), {}, {}, None, 0.0, {"a": measured}, 0.0)
    RunFolder(tmp_path).add_metrics(metrics_line("r", report))

    def no_constants(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    line: Mapping[str, Any] = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=no_constants)
    assert line["loss"] is None and line["sites"]["a"]["loss"] is None


def test_above_128_sites_the_masks_run_over_a_sparse_graph() -> None:
    cohort = cohort_of(config(), 200)
    assert cohort.degree is not None and cohort.degree < 199
    assert (cohort.minimum_cohort, cohort.colluders, cohort.tolerated_dropouts) == (180, 20, 20)
    assert cohort_of(config(), 128).degree is None
