"""Tasks: targets, losses and figures worked by hand; which losses a private door refuses; whole runs."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import privfed
import privfed.api
from privfed import config_io
from privfed.data.tables import TableLabels
from privfed.errors import ConfigError, DataError
from privfed.models import mlp
from privfed.prediction import predict
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.oracle.door import ALL, DoorSettings, Records
from privfed.privacy.oracle.opacus import OpacusDoor
from privfed.report import render
from privfed.simulation.together import meeting
from privfed.tasks import Classification, Cox, Rating, Regression, Survival, Task
from privfed.tasks.classification import calibration_error
from privfed.tasks.times import concordance

CLASSES = Classification()
PAIRS = torch.tensor([0, 0, 1, 1])
MARGINS = torch.stack([torch.zeros(4), torch.tensor([-2.0, 1.0, -1.0, 3.0])], 1)


def labels(**columns: list[str]) -> TableLabels:
    return TableLabels(pd.DataFrame(columns, dtype=str), "y", {}, frozenset({"", "?"}))


# Classes


def test_accuracy_counts_and_areas_rank() -> None:
    # predicted 0 1 0 1: two of four right; of the four pairs (negative, positive), (1, −1) alone is in the wrong order
    assert CLASSES.score(MARGINS, PAIRS, "accuracy") == 0.5
    assert CLASSES.score(MARGINS, PAIRS, "auroc") == 0.75
    assert CLASSES.score(MARGINS + 100, PAIRS, "auroc") == 0.75
    # from the top: +, −, +, −: precision 1/1 at the first half of recall, 2/3 at the second
    assert CLASSES.score(MARGINS, PAIRS, "auprc") == pytest.approx((1 + 2 / 3) / 2)


def test_areas_of_several_classes_are_of_the_positive_one_against_all_others() -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.5], [0.5, 0.45, 0.05], [0.6, 0.3, 0.1]])
    # p(class 1) is .4, .45, .3: the record of class 1, .4, is above one of two others
    assert CLASSES.score(probabilities.log(), torch.tensor([1, 0, 2]), "auroc") == 0.5


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    def sure(p: float) -> list[float]:
        return [0.0, math.log(p / (1 - p))]

    outputs = torch.tensor([sure(0.9), sure(0.9), sure(0.7), sure(0.7)])
    # .9 and one of two right: |.9 − .5|; .7 and both right: |.7 − 1|; half of the records each
    assert calibration_error(outputs, torch.tensor([1, 0, 1, 1])) == pytest.approx((0.4 + 0.3) / 2)


def test_what_can_not_be_measured_is_none() -> None:
    outputs = torch.randn(3, 2)
    for metric in CLASSES.metrics:
        assert CLASSES.score(outputs[:0], torch.zeros(0, dtype=torch.long), metric) is None
    for label in (0, 1):
        one_class = torch.full((3,), label)
        assert CLASSES.score(outputs, one_class, "auroc") is None and CLASSES.score(outputs, one_class, "auprc") is None
        assert CLASSES.score(outputs, one_class, "accuracy") is not None
    assert Regression(range=(0.0, 1.0)).score(outputs[:0, :1], torch.zeros(0), "mae") is None
    assert Cox(event="e").score(torch.zeros(2, 1), torch.tensor([-1.0, -2.0]), "c-index") is None


# Numbers


def test_a_number_is_scaled_by_its_public_range_and_measured_in_its_own_unit() -> None:
    task = Regression(range=(0.0, 40.0), typical=10.0)
    targets = task.targets(labels(y=["10", "20", "?", "99", "-5"]))
    # 4 (y − 10) / 40, y clipped to [0, 40]
    np.testing.assert_allclose(targets, [0.0, 1.0, math.nan, 3.0, -1.0])
    outputs = torch.tensor([[0.0], [2.0], [9.0]])
    # said: 10, 30, 40 (the range's end); so: 10, 20, 40. Errors 0, 10, 0
    assert task.score(outputs, torch.tensor([0.0, 1.0, 3.0]), "mae") == pytest.approx(10 / 3)
    assert task.score(outputs, torch.tensor([0.0, 1.0, 3.0]), "rmse") == pytest.approx(math.sqrt(100 / 3))
    assert task.predictions(outputs, ())["prediction"].tolist() == [10.0, 30.0, 40.0]
    assert task.loss(outputs, torch.tensor([0.0, 1.0, 3.0])).tolist() == [0.0, 0.5, 18.0]
    assert Rating(scale=(1.0, 5.0)).targets(labels(y=["1", "3", "5"])).tolist() == [-2.0, 0.0, 2.0]


def test_figures_are_numbers_whatever_the_model_says() -> None:
    outputs = torch.tensor([[math.inf], [-math.inf], [math.nan]])
    assert Regression(range=(0.0, 4.0)).score(outputs, torch.zeros(3), "mae") == pytest.approx(4 / 3)  # 4, 0 and 2 of 2


# Times

BINS = Survival(event="e", events=("1", "dead"), bins=(1.0, 2.0, 4.0))


def test_times_carry_their_event_as_a_sign_and_end_at_the_horizon() -> None:
    read = BINS.targets(labels(y=["0", "1.5", "3", "9", "9", "?", "2"], e=["1", "dead", "0", "1", "0", "1", "?"]))
    np.testing.assert_allclose(read, [1e-6, 1.5, -3.0, -4.0, -4.0, math.nan, math.nan])


@pytest.mark.parametrize(
    ("target", "terms"),
    [
        (0.5, [(0, True)]),
        (1.0, [(0, True)]),  # an interval has its end
        (1.5, [(0, False), (1, True)]),
        (4.0, [(0, False), (1, False), (2, True)]),
        (-0.5, []),  # lost before the first interval was over: it tells nothing
        (-1.0, [(0, False)]),
        (-3.0, [(0, False), (1, False)]),
        (-4.0, [(0, False), (1, False), (2, False)]),
    ],
)
def test_the_hazard_loss_by_hand(target: float, terms: list[tuple[int, bool]]) -> None:
    hazards = [0.2, 0.5, 0.9]
    outputs = torch.tensor([[math.log(h / (1 - h)) for h in hazards]])
    expected = sum(-math.log(hazards[k] if struck else 1 - hazards[k]) for k, struck in terms)
    assert float(BINS.loss(outputs, torch.tensor([target]))) == pytest.approx(expected, rel=1e-5)


def test_survival_chances_and_expected_time_by_hand() -> None:
    outputs = torch.zeros(1, 3)  # every hazard one half: S = 1/2, 1/4, 1/8 at 1, 2, 4
    said = BINS.predictions(outputs, ())
    assert [said[f"S({end})"][0] for end in (1, 2, 4)] == [0.5, 0.25, 0.125]
    # (1 + .5)/2 · 1 + (.5 + .25)/2 · 1 + (.25 + .125)/2 · 2
    assert said["prediction"][0] == pytest.approx(0.75 + 0.375 + 0.375)
    riskier = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    assert BINS.score(riskier, torch.tensor([0.5, 3.0]), "c-index") == 1.0


def test_concordance_by_hand() -> None:
    times = np.array([2.0, -3.0, 4.0, -4.0])
    # known pairs: (2, 3), (2, 4), (2, 4), and of the two at 4 the event came first
    assert concordance(np.array([4.0, 3.0, 2.0, 1.0]), times) == 1.0
    assert concordance(np.array([1.0, 2.0, 3.0, 4.0]), times) == 0.0
    assert concordance(np.array([3.0, 3.0, 1.0, 2.0]), times) == pytest.approx((0.5 + 1 + 1 + 0) / 4)
    assert concordance(np.zeros(2), np.array([-1.0, 2.0])) is None  # who was lost at 1 is not known to live beyond 2


def test_concordance_of_classes_is_auroc(randomness: int = 3) -> None:
    random = np.random.default_rng(randomness)
    risk, positive = random.normal(size=60), random.random(60) < 0.4
    # everybody positive has an event at 1, everybody else is lost at 2: the known pairs are those of AUROC
    c = concordance(risk, np.where(positive, 1.0, -2.0))
    outputs = torch.tensor(np.column_stack([np.zeros(60), risk]))
    assert c == pytest.approx(CLASSES.score(outputs, torch.from_numpy(positive.astype(np.int64)), "auroc"))


def test_the_cox_loss_by_hand_with_ties() -> None:
    risk = torch.tensor([0.3, -0.2, 0.5, 0.1])
    targets = torch.tensor([2.0, -1.0, 2.0, -3.0])
    # at 2 all but the second are at risk, both of the tied events among them (Breslow)
    at_risk = math.log(math.exp(0.3) + math.exp(0.5) + math.exp(0.1))
    expected = [at_risk - 0.3, 0.0, at_risk - 0.5, 0.0]
    np.testing.assert_allclose(Cox(event="e").loss(risk.unsqueeze(1), targets).numpy(), expected, rtol=1e-5)


# What a private door takes

TASKS: dict[str, tuple[Task, torch.Tensor]] = {
    "classification": (Classification(), torch.tensor([0, 1, 2, 1, 0])),
    "regression": (Regression(range=(0.0, 4.0)), torch.tensor([0.1, 1.0, -1.5, 2.0, 0.0])),
    "rating": (Rating(), torch.tensor([0.1, 1.0, -1.5, 2.0, 0.0])),
    "survival": (BINS, torch.tensor([0.5, -1.0, 3.0, -4.0, 1.5])),
    "cox": (Cox(event="e"), torch.tensor([0.5, -1.0, 3.0, -4.0, 1.5])),
}


def door(task: Task, targets: torch.Tensor) -> OpacusDoor:
    records = Records(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), targets, {ALL: torch.arange(5)})
    settings = DoorSettings(
        sample_rate=1.0, expected_batch_size=5.0, max_grad_norm=1e6, noise_multiplier=1e-12, part_fractions={}
    )
    model = mlp(3, (4,), task.outputs(3), seed=0)
    return OpacusDoor(
        model=model, loss=task.loss, records=records, settings=settings, randomness=np.random.default_rng(0)
    )


@pytest.mark.parametrize("name", [name for name in TASKS if name != "cox"])
def test_the_gradient_of_records_is_the_sum_of_theirs(name: str) -> None:
    task, targets = TASKS[name]
    assert not task.coupled
    asked = door(task, targets)
    theta = 0.3 * torch.randn(1, asked._size, generator=torch.Generator().manual_seed(1))
    together = sums(asked, theta, range(5))
    alone = sum(sums(asked, theta, [row]) for row in range(5))
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


def sums(asked: OpacusDoor, theta: torch.Tensor, rows: Any) -> torch.Tensor:
    nn.utils.vector_to_parameters(theta[0].double(), asked._parameters)
    return asked._sum_over(torch.tensor(list(rows)))


def test_a_private_door_refuses_coxs_loss() -> None:
    task, targets = TASKS["cox"]
    assert task.coupled
    with pytest.raises(NoGuarantee, match="lets one record move another record's gradient"):
        door(task, targets)


# Configurations

TABLE: dict[str, Any] = {
    "name": "toy",
    "rounds": 2,
    "data": {
        "source": "csv",
        "file": "t.csv",
        "site": "site",
        "label": "y",
        "numeric": [{"name": "x", "range": [-3, 3]}],
    },
    "evaluation": {"local_steps": 30},
}
SECTIONS: dict[str, dict[str, Any]] = {
    "regression": {"name": "regression", "range": [-10, 10]},
    "rating": {"name": "rating", "scale": [-10, 10]},
    "survival": {"name": "survival", "event": "e", "bins": [1, 2, 4, 8]},
    "cox": {"name": "cox", "event": "e"},
}


def config(task: str, **changes: Any) -> privfed.Config:
    return config_io.decode({**TABLE, "task": SECTIONS[task], **changes})


def write(folder: Path, task: str, sites: str = "ABC", n: int = 40) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=n * len(sites))
    y = 2 * x + 0.1 * random.normal(size=len(x))
    happened = np.ones(len(x), dtype=int)
    if task in ("survival", "cox"):
        y, lost = random.exponential(3 * np.exp(-1.5 * x)), random.exponential(12, size=len(x))
        happened, y = (y <= lost).astype(int), np.minimum(y, lost)
    frame = pd.DataFrame({"site": np.repeat(list(sites), n), "x": x, "y": y, "e": happened})
    frame.to_csv(folder / "t.csv", index=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"name": "regresion", "range": [0, 1]}}, "did you mean 'regression'"),
        ({"task": {"name": "regression"}}, "range"),
        ({"task": {"name": "regression", "range": [3, 3]}}, "low < high"),
        ({"task": {"name": "regression", "range": [0, 1], "typical": 2}}, "task.typical"),
        ({"task": {"name": "survival", "event": "e", "bins": [2, 1]}}, "ascending"),
        ({"task": {"name": "survival", "event": "e", "bins": []}}, "task.bins"),
        ({"task": {"name": "survival", "event": "x", "bins": [1]}}, "column 'x' can not be an input"),
        ({"task": SECTIONS["regression"], "evaluation": {"metric": "auroc"}}, "task 'regression' has mae, rmse"),
        ({}, "data.classes must name at least two classes"),
        ({"task": SECTIONS["cox"]}, "has no guarantee: each record moves the loss of others"),
        ({"task": SECTIONS["cox"], "privacy": {"unit": "patient"}}, "Use task.name = 'survival'"),
        (
            {"task": SECTIONS["rating"], "data": {**TABLE["data"], "classes": {"a": ["1"], "b": ["2"]}}},
            "data.classes names classes",
        ),
        ({"data": {"source": "breast-cancer"}, "task": SECTIONS["regression"]}, "it predicts a number"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_io.decode({**TABLE, **changes})


def test_a_task_is_read_back_from_what_was_written(tmp_path: Path) -> None:
    for task in SECTIONS:
        asked = config(task, **({"privacy": {"unit": "none"}} if task == "cox" else {}))
        (tmp_path / "c.toml").write_text(config_io.to_toml(asked))
        assert config_io.load_config(tmp_path / "c.toml") == asked


def test_records_without_a_target_are_refused_by_number_or_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("site,x,y,e\n" + "A,1,5,1\nA,1,,1\nB,2,3,\nC,0,1,0\n")
    survival = config("survival")
    with pytest.raises(DataError, match="rows 2, 3 have none"):
        survival.data.load(seed=0, task=survival.task)
    dropped = config("survival", data={**TABLE["data"], "other_labels": "drop"})
    sites = dropped.data.load(seed=0, task=dropped.task).sites
    assert {name: site.targets.tolist() for name, site in sites.items()} == {"A": [5.0], "C": [-1.0]}
    text = config("regression")
    (tmp_path / "t.csv").write_text("site,x,y\nA,1,Xk7Planted\n")
    with pytest.raises(DataError, match="row 1 hold no finite number") as refusal:
        text.data.load(seed=0, task=text.task)
    assert "Planted" not in str(refusal.value)


@pytest.mark.parametrize("metric", ["auprc", "ece"])
def test_figures_that_are_no_counts_are_not_released(metric: str, tmp_path: Path) -> None:
    asked = config_io.load_config(overrides=["evaluation.release=private", f"evaluation.metric={metric}"])
    with pytest.raises(ConfigError, match=f"{metric} is no such count"):
        privfed.run(asked, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Whole runs


def finished(folder: Path, task: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> privfed.Run:
    monkeypatch.chdir(folder)
    write(folder, task)
    return privfed.run(config(task, **changes), out=folder / "run")


EXACT = {"privacy": {"unit": "none"}, "method": {"name": "fedavg", "local_steps": 10, "lr": 0.3}, "rounds": 10}


@pytest.mark.parametrize(
    ("task", "metric", "least", "most"),
    # y = 2 x + noise of .1, in the label's unit; for times the order of the true risks gives about .8
    [("regression", "mae", 0.0, 0.5), ("survival", "c-index", 0.72, 1.0), ("cox", "c-index", 0.72, 1.0)],
)
def test_a_run_learns_its_task(
    task: str, metric: str, least: float, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tmp_path, task, monkeypatch, **EXACT)
    found = run.summary.utility
    assert found.metric == metric and found.global_.mean is not None and least <= found.global_.mean <= most
    assert (found.global_.worst_decile or 0) >= found.global_.mean if metric == "mae" else True
    pd.DataFrame({"x": [-2.0, 2.0]}).to_csv(tmp_path / "new.csv", index=False)
    table = predict(run.folder, tmp_path / "new.csv").table
    low, high = table["prediction"]
    assert low > high if task == "survival" else low < high  # expected time falls with x; risk and y rise
    page = render(run.folder)
    assert {"mae": "Mean absolute error over the sites", "c-index": "C-index over the sites"}[metric] in page


@pytest.mark.parametrize("task", ["regression", "rating", "survival"])
def test_a_run_of_each_separable_task_is_private_by_record(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tmp_path, task, monkeypatch)
    assert run.summary.complete and run.summary.privacy.epsilon.max is not None
    assert run.summary.privacy.epsilon.max <= 4.0
    assert run.summary.utility.global_.mean is not None


def test_cox_runs_at_client_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    privacy = {"unit": "client", "noise": "central", "target_epsilon": 8.0}
    run = finished(tmp_path, "cox", monkeypatch, privacy=privacy, method={"name": "fedavg"})
    assert run.summary.complete and run.summary.privacy.unit == "client"


def test_where_less_is_better_the_best_round_is_the_lowest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(tmp_path, "regression", monkeypatch, **{**EXACT, "evaluation": {"keep": "best", "local_steps": 1}})
    errors = [found.mean for report in run.reports if (found := report.figures("global_score")) is not None]
    assert run.summary.kept_round == int(np.argmin(errors))


@pytest.mark.parametrize("task", ["regression", "survival"])
def test_sites_answered_in_one_pass_learn_what_each_learns_alone(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, task, n=20)
    found = {}
    for engine in ("opacus", "cohort"):
        asked = config(task, simulation={"engine": engine}, privacy={"insecure_seed": 0})
        found[engine] = privfed.run(asked, out=tmp_path / engine).theta
    torch.testing.assert_close(found["cohort"], found["opacus"], rtol=1e-4, atol=1e-4)


def test_coxs_sites_are_not_answered_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "cox", sites="ABCDEFGHIJ", n=6)
    asked = config("cox", **EXACT)
    ready = privfed.api.prepare(asked)
    assert meeting(asked, ready.data, ready.schema) is None
    forced = config("cox", **EXACT, simulation={"engine": "cohort"})
    with pytest.raises(ConfigError, match="mix the sites' records"):
        meeting(forced, ready.data, ready.schema)
