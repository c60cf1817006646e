"""Sites that take no part in training and adapt the model that the others have made."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import privfed
from privfed import config_io, parameters, wire
from privfed.api import prepare
from privfed.cli.display import Display
from privfed.cohort import held_out
from privfed.config import Config, Evaluation
from privfed.doors import few, split
from privfed.engines.local import LocalEngine
from privfed.errors import ConfigError
from privfed.evaluation import paired, spread
from privfed.methods import MRMTL, Scaffold
from privfed.summary import metrics_line, report_of

from .house import SIZE, House, Tap, changed, config, key, records, state_of

NAMES = list("abcdefghij")


def unseen(*sites: str, **more: object) -> Config:
    return config(evaluation=Evaluation(local_steps=1, unseen_sites=sites, **more))  # type: ignore[arg-type]


def test_who_is_held_out_follows_from_names_and_the_public_seed_alone() -> None:
    some = changed(config(), "evaluation", unseen_fraction=0.3)
    assert len(held_out(some, NAMES)) == 3 and held_out(some, NAMES) == held_out(some, NAMES[::-1])
    seeds = {held_out(Config(seed=seed, evaluation=some.evaluation), NAMES) for seed in range(8)}
    assert len(seeds) > 1
    both = changed(some, "evaluation", unseen_sites=("a",), unseen_fraction=0.34)
    assert "a" in held_out(both, NAMES) and len(held_out(both, NAMES)) == 4  # a, and .34 of nine others
    assert held_out(config(), NAMES) == frozenset()
    with pytest.raises(ConfigError, match="no site 'x'; sites are a, b"):
        held_out(unseen("x"), ["a", "b"])


def test_held_out_sites_are_asked_for_figures_alone_and_spend_nothing(tmp_path: Path) -> None:
    house = House(tmp_path)
    tap = Tap(LocalEngine(house.sites))
    reports = list(house.federation(unseen("b"), engine=tap).rounds())
    assert all(set(report.contributed) == set(report.measurements) == set("acde") for report in reports)
    assert all(set(report.unseen) == {"b"} and not report.refused for report in reports)
    asked = [wire.decode_request(request) for site, request, _ in tap.log if site == "b"]
    assert asked and all(isinstance(request, wire.Evaluate) for request in asked)
    assert house.charged("b") == () and len(house.charged("a")) == 3
    measured = reports[-1].unseen["b"]
    assert measured.epsilon == 0.0 and measured.personalized is not None and measured.seal == b""
    line = json.loads(json.dumps(metrics_line("r", reports[-1])))
    assert report_of(line).unseen == reports[-1].unseen


def test_a_held_out_site_refuses_to_train_whatever_the_coordinator_says(tmp_path: Path) -> None:
    house = House(tmp_path)
    settings = unseen("b")
    plan = wire.encode_plan(house.plan(settings))  # it names every site as invited
    reply = wire.decode_reply(house.sites["b"].handle(wire.encode(wire.Begin(0, "advertise", plan, state_of(), b""))))
    assert isinstance(reply, wire.Refusal) and "held out of the training" in reply.reason
    assert house.charged("b") == ()


def test_a_held_out_site_answers_once_a_round(tmp_path: Path) -> None:
    """Exact figures on models of someone's choice would be an oracle for single records."""
    house = House(tmp_path)
    plan = wire.encode_plan(house.plan(unseen("b"), cohort=(0, 2, 3, 4)))
    request = wire.encode(wire.Evaluate(0, "evaluate", plan, state_of()))
    assert isinstance(wire.decode_reply(house.sites["b"].handle(request)), wire.Measurement)
    reply = wire.decode_reply(house.sites["b"].handle(request))
    assert isinstance(reply, wire.Refusal) and "has measured round 0 already" in reply.reason


def test_a_held_out_site_answers_for_no_round_beyond_the_run(tmp_path: Path) -> None:
    """It spends nothing, so no budget would end it."""
    house = House(tmp_path)
    plan = wire.encode_plan(house.plan(unseen("b"), cohort=(0, 2, 3, 4), round=3))  # the run has rounds 0, 1 and 2
    reply = wire.decode_reply(house.sites["b"].handle(wire.encode(wire.Evaluate(3, "evaluate", plan, state_of()))))
    assert isinstance(reply, wire.Refusal) and "round 3 of a run of 3" in reply.reason


def test_a_method_with_state_begins_at_the_servers_model_at_a_new_site(tmp_path: Path) -> None:
    house = House(tmp_path)
    method = MRMTL(local_steps=1, personal_steps=1, personal_lr=1e-9)
    settings = config(method=method, evaluation=Evaluation(local_steps=1, unseen_sites=("b",)))
    federation = house.federation(settings)
    list(federation.rounds())
    torch.testing.assert_close(house.sites["b"].private_state["theta"], federation.state["theta"])
    assert not torch.allclose(house.sites["a"].private_state["theta"], federation.state["theta"])


def test_few_records_to_adapt_with_and_all_of_them_to_measure_on() -> None:
    settings = unseen("a", unseen_records=7)
    data = records(1)
    whole = split(settings, data, key("a", "split"))
    less = few(settings, whole, 7, key("a", "split"))
    assert len(less.train) == 7 and set(less.train.ids) <= set(whole.train.ids)
    assert torch.equal(less.test.inputs, whole.test.inputs) and len(less.parts["all"]) == 7
    assert len(few(settings, whole, 10_000, key("a", "split")).train) == len(whole.train)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["evaluation.unseen_records=3"], "evaluation.unseen_records does nothing"),
        (["evaluation.unseen_fraction=0.2", "evaluation.release='private'"], "figures of single sites"),
        (["model.norm='group'"], "model.norm = 'group' does nothing"),
    ],
)
def test_settings_that_nothing_reads_are_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config_io.check_used(config_io.load_config(None, overrides))


@pytest.mark.parametrize(
    ("override", "told"),
    [("evaluation.unseen_fraction=0.05", "of 5 sites is none"), ("evaluation.unseen_fraction=0.95", "none is left")],
)
def test_a_share_that_holds_out_nobody_or_everybody_is_refused(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        prepare(config_io.load_config(None, [override]))


def test_a_whole_run_reports_both_kinds_of_sites(tmp_path: Path) -> None:
    overrides = ["rounds=2", "evaluation.unseen_sites=['hospital-2']", "evaluation.unseen_records=10"]
    settings = config_io.load_config(None, overrides)
    run = privfed.run(settings, out=tmp_path / "run")
    found = run.summary.utility.unseen
    assert run.summary.complete and run.summary.sites == 4 and "hospital-2" not in run.summary.privacy.epsilon.per_site
    assert found is not None and found.sites == 1 and found.personalized.mean is not None
    assert run.summary.utility.personalized.weighted_mean is not None
    text = io.StringIO()
    display = Display(to_stderr=False, console=Console(file=text, width=200))
    display.start(prepare(settings))
    display.finish(run)
    adapted, plain, alone = (one.mean for one in (found.personalized, found.global_, found.local_only))
    line = next(line for line in text.getvalue().splitlines() if line.startswith("1 site that took no part"))
    assert line.endswith(
        f"{adapted:.4f} after adapting the model to itself; {plain:.4f} without adapting, {alone:.4f} alone"
    )


def test_weights_count_in_the_weighted_mean_alone() -> None:
    got = spread([0.5, None, 1.0], [3.0, 100.0, 1.0])
    assert got is not None and (got.mean, got.weighted_mean) == (0.75, 0.625)  # (3·.5 + 1)/4
    bare = spread([0.5, 1.0])
    assert bare is not None and bare.weighted_mean == bare.mean


def test_a_paired_interval_is_students_over_the_differences() -> None:
    # differences .1, .2, .3: mean .2, sd .1, t of 97.5 % at two degrees of freedom 4.3027
    got = paired([0.6, 0.8, 0.9], [0.5, 0.6, 0.6])
    assert got.mean == pytest.approx(0.2) and got.pairs == 3
    assert got.half_width == pytest.approx(4.30265 * 0.1 / 3**0.5, rel=1e-4)
    assert paired([0.5], [0.4]).half_width != paired([0.5], [0.4]).half_width  # NaN: one pair has no interval


def test_what_a_method_adds_to_the_model_is_held_to_its_range(tmp_path: Path) -> None:
    """Control variates of a million lead a step's model as far as a model of a million."""
    house = House(tmp_path)
    settings = config(method=Scaffold(local_steps=1))
    state = parameters.encode({"theta": torch.zeros(SIZE), "control": torch.full((SIZE,), 1e6)})
    plan = wire.encode_plan(house.plan(settings))
    reply = wire.decode_reply(house.sites["a"].handle(wire.encode(wire.Begin(0, "advertise", plan, state, b""))))
    assert isinstance(reply, wire.Refusal) and "control beyond" in reply.reason and house.charged("a") == ()
