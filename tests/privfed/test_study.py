"""A study: what it asks, what survives a kill, what it says."""

import errno
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import privfed
from privfed import folder
from privfed.cli.app import app
from privfed.errors import ConfigError, PrivfedError, RunFolderError
from privfed.study import Cell, Study, cells, collect, load_study, results, run_study
from privfed.study.backends import ended
from privfed.study.page import page
from privfed.study.runner import CELLS, FAILURE

COMMON: dict[str, Any] = {
    "rounds": 1,
    "evaluation.local_steps": 1,
    "privacy.target_epsilon": 50,
    "privacy.noise_multiplier": 3.0,
}
TEXT = """
name = "small"
seeds = [0, 1]
[common]
rounds = 1
"evaluation.local_steps" = 1
"privacy.noise_multiplier" = 3.0
[grid]
"privacy.target_epsilon" = [40, 50]
[cases]
average = {"method.name" = "fedavg", "method.local_steps" = 1}
shared = {"method.name" = "fedsgd", "privacy.noise" = "distributed"}
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, tuple[Cell, ...], Path]:
    """A finished study of eight runs."""
    home = tmp_path_factory.mktemp("study")
    (home / "study.toml").write_text(TEXT)
    study = load_study(home / "study.toml")
    todo = cells(study, home)
    finished = run_study(todo, home, backend="sequential")
    assert all(cell.error is None and not cell.resumed for cell in finished)
    return study, todo, home


def test_runs_on_the_same_records_read_them_once_and_share_exact_baselines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(
        seeds=(0, 1),
        common={
            "rounds": 1,
            "aggregation.kind": "plain",
            "privacy.noise_multiplier": 3.0,
            "privacy.target_epsilon": 50,
        },
        grid={"evaluation.local_steps": (1, 5)},
        cases={"average": {"method.name": "fedavg"}, "reptile": {"method.name": "reptile"}},
    )
    todo = cells(study, tmp_path)
    read, load = [], type(todo[0].config.data).load

    def loading(source: Any, **settings: Any) -> Any:
        read.append(settings["seed"])
        return load(source, **settings)

    monkeypatch.setattr(type(todo[0].config.data), "load", loading)
    assert [done.cell for done in run_study(todo, tmp_path / "shared", backend="sequential")] == list(todo)
    assert sorted(read) == [0, 1]

    def alone(home: Path) -> list[float]:
        (line,) = map(json.loads, (home / folder.METRICS).read_text().splitlines())
        return [measured["local_only"] for _, measured in sorted(line["sites"].items())]

    seen = {}
    for cell in todo:
        privfed.run(cell.config, out=tmp_path / cell.id, report=False)
        seen[cell.id] = alone(tmp_path / cell.id)
        assert alone(tmp_path / "shared" / CELLS / cell.id) == seen[cell.id]  # as without the others
    assert len(set(map(tuple, seen.values()))) == 4  # 2 seeds · 2 numbers of steps; the methods have the same ones


def test_every_combination_is_a_cell_with_its_own_settings(tmp_path: Path) -> None:
    grid: Any = {"rounds": (1, 2), "privacy.sample_rate": (0.5,)}
    study = Study(seeds=(0, 1), common=COMMON, grid=grid, cases={"a": {}, "b": {"method.name": "fedavg"}})
    found = cells(study, tmp_path)
    assert len(found) == len({cell.id for cell in found}) == 8
    assert {(cell.case, cell.config.rounds, cell.config.seed) for cell in found} == {
        (case, rounds, seed) for case in "ab" for rounds in (1, 2) for seed in (0, 1)
    }
    assert all(cell.config.simulation.threads == 1 for cell in found)
    again = cells(Study(seeds=(1,), common=COMMON, grid={"rounds": (2,), "privacy.sample_rate": (0.5,)}), tmp_path)
    assert again[0].id in {cell.id for cell in found}  # the same run, whatever else the study holds


@pytest.mark.parametrize(
    ("study", "told"),
    [
        (Study(grid={"privacy.sample_rat": (0.5,)}), r"privacy.sample_rat.*did you mean"),
        (Study(grid={"rounds": (0,)}), "rounds"),
        (Study(common={"rounds": 1}, cases={"a": {}, "b": {}}), "same run"),
        (Study(base="nowhere.toml"), "can not read the configuration"),
    ],
)
def test_what_no_run_could_have_is_refused_before_any(study: Study, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        cells(study, tmp_path)


@pytest.mark.parametrize("text", ["seeds = []", "sedes = [1]", "grid = 3", "name = 'a b'", "x = ["])
def test_a_file_that_is_no_study_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(ConfigError):
        load_study(tmp_path / "s.toml")
    with pytest.raises(ConfigError, match="can not read the study"):
        load_study(tmp_path / "no.toml")


def test_one_row_a_run_and_one_line_a_setting(done: tuple[Study, tuple[Cell, ...], Path]) -> None:
    study, todo, home = done
    found = collect(study, todo, home)
    assert len(found.runs) == 8 and found.runs["error"].isna().all()
    assert list(found.runs.columns[:3]) == ["case", "privacy.target_epsilon", "seed"]
    assert len(found.table) == 4 and (found.table["runs"] == 2).all()
    own = found.runs[(found.runs["case"] == "average") & (found.runs["privacy.target_epsilon"] == 40)]
    line = found.table.iloc[0]
    assert line["personalized"] == pytest.approx(own["personalized"].mean())
    half = 12.7062 * own["personalized"].std(ddof=1) / math.sqrt(2)  # t of 97.5 % at one degree of freedom
    assert line["personalized_ci"] == pytest.approx(half, rel=1e-4)
    assert len(found.sites) == 8 * 5 and found.sites["personalized"].notna().all()
    assert "Papernot and Steinke 2022" in found.choosing and "ε = " in found.choosing


def test_results_are_read_back_as_they_were_written(done: tuple[Study, tuple[Cell, ...], Path]) -> None:
    study, todo, home = done
    found = collect(study, todo, home)
    found.write(home)
    pd.testing.assert_frame_equal(pd.read_parquet(home / "results.parquet"), found.runs, check_dtype=False)
    assert len(pd.read_csv(home / "results.csv")) == 8
    assert (home / "table.md").read_text().count("\n") == 6
    assert r"$\pm$" in (home / "table.tex").read_text() and "_" not in (home / "table.tex").read_text().replace(
        r"\_", ""
    )


def test_the_page_stands_alone(done: tuple[Study, tuple[Cell, ...], Path]) -> None:
    study, todo, home = done
    text = page(study, collect(study, todo, home))
    assert text.count("<svg") == 5 and 'aria-label="' in text
    fetched = re.findall(r'(?:src|href)="(?!#)([^"]+)"', text)
    assert [link for link in fetched if not link.startswith("#")] == [] and "<script" not in text


def test_a_second_call_does_nothing_again_and_goes_on_where_a_kill_came(
    done: tuple[Study, tuple[Cell, ...], Path], tmp_path: Path
) -> None:
    study, todo, home = done
    copy = Path(shutil.copytree(home, tmp_path / "copy"))
    before = collect(study, todo, copy).runs
    gone, young = (copy / CELLS / cell.id for cell in todo[:2])
    shutil.rmtree(gone)
    for name in ("run.json", "summary.json", "checkpoint.safetensors", "metrics.jsonl", "ledger.db", "ledger.db.key"):
        (young / name).unlink(missing_ok=True)  # killed before the run had begun
    finished = run_study(todo, copy, backend="sequential")
    assert [cell.resumed for cell in finished] == [False, False, *[True] * 6]
    assert not list(copy.glob(f"{CELLS}/*/{folder.REPORT}"))  # `privfed report` makes one where it is wanted
    after = collect(study, todo, copy).runs
    untouched = before.columns.difference(["seconds"])
    pd.testing.assert_frame_equal(before[untouched][2:], after[untouched][2:])
    assert after["error"].isna().all()


def test_a_cell_that_fails_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    study = Study(common=COMMON, cases={"good": {"method.name": "fedavg"}, "bad": {"privacy.unit": "patient"}})
    todo = cells(study, tmp_path)
    told: list[str | None] = []
    run_study(todo, tmp_path, backend="sequential", observer=lambda cell: told.append(cell.error))
    assert told[0] is None and "data.patient" in (told[1] or "")
    found = collect(study, todo, tmp_path)
    assert found.table["failed"].tolist() == [0, 1] and "(1 failed)" in results.markdown(found.table)
    assert "data.patient" in page(study, found)
    assert json.loads((tmp_path / CELLS / todo[1].id / FAILURE).read_text())["traceback"] is None


def test_what_a_seed_does_to_all_settings_is_not_between_them() -> None:
    runs = pd.DataFrame(
        {"case": list("aabb"), "seed": [0, 1, 0, 1], "error": None, "personalized": [0.7, 0.9, 0.6, 0.8]}
    )
    table = results._table(runs, ["case"])
    assert (table["personalized_ci"] > 1).all() and np.allclose(table["personalized_within"], 0)
    moved = runs.assign(personalized=[0.7, 0.9, 0.6, 0.84])
    # Within seeds: ±.05 and ±.03 about 0; times √2 for two settings; t of one degree of freedom, over √2 seeds
    half = 12.7062 * np.std([0.05, 0.03], ddof=1) * math.sqrt(2) / math.sqrt(2)
    assert np.allclose(results._table(moved, ["case"])["personalized_within"], half, rtol=1e-4)
    lost = runs.drop(index=3)
    assert "personalized_within" not in results._table(lost, ["case"])


def test_the_page_says_what_its_epsilon_means(done: tuple[Study, tuple[Cell, ...], Path]) -> None:
    study, todo, home = done
    found = collect(study, todo, home)
    assert len(found.claims) == 2 and all("δ = 1e-05 for one record" in claim for claim in found.claims)
    local, shared = found.claims
    assert "against everybody;" in local and "against the server and up to 2 sites" in shared
    assert all(claim in page(study, found) for claim in found.claims)


def test_a_table_of_one_seed_has_no_interval() -> None:
    assert math.isnan(results._half_width(np.array([0.5])))


def test_a_backend_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be one of loky"):
        run_study((), tmp_path, backend="slurm")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the clusters' own
@pytest.mark.parametrize(("backend", "package"), [("ray", "ray"), ("dask", "distributed")])
def test_a_cluster_runs_the_cells(backend: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    study = Study(seeds=(0, 1), common={**COMMON, "method.name": "fedavg"}, cases={"good": {}})
    todo = (*cells(study, tmp_path), *cells(Study(common={**COMMON, "privacy.unit": "patient"}), tmp_path))
    told: list[str] = []
    done = run_study(todo, tmp_path, jobs=2, backend=backend, observer=lambda cell: told.append(cell.cell.id))
    assert [cell.cell for cell in done] == list(todo) and sorted(told) == sorted(cell.id for cell in todo)
    assert [cell.error is None for cell in done] == [True, True, False] and "data.patient" in (done[2].error or "")
    assert collect(study, todo[:2], tmp_path).runs["error"].isna().all()


def test_a_killed_worker_ends_the_study_with_what_to_do() -> None:
    def work(task: int) -> int:  # local: it travels as code, for workers know nothing of tests
        if task == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    with pytest.raises(PrivfedError, match="fewer --jobs"):
        list(ended("loky", None, 2, work, [0, 1]))


def test_two_at_once_in_one_folder_are_one(done: tuple[Study, tuple[Cell, ...], Path]) -> None:
    _, todo, home = done
    with folder.locked(home), pytest.raises(RunFolderError, match="another process"):
        run_study(todo, home, backend="sequential")


def test_a_folder_that_takes_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="can not write"):
        run_study((), tmp_path / "file", backend="sequential")


def test_a_cell_whose_failure_can_not_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr("privfed.api.run", full)
    (told,) = run_study(cells(Study(common=COMMON), tmp_path), tmp_path, backend="sequential")
    assert told.error is not None and "No space left" in told.error


def test_a_run_that_ended_and_was_not_cleared_is_cleared(
    done: tuple[Study, tuple[Cell, ...], Path], tmp_path: Path
) -> None:
    _, todo, home = done
    shutil.copytree(home / CELLS / todo[0].id, tmp_path / CELLS / todo[0].id)
    left = tmp_path / CELLS / todo[0].id / folder.JOURNAL
    left.write_bytes(b"seeds of the last round")  # killed between the summary and the end
    (ended_,) = run_study(todo[:1], tmp_path, backend="sequential")
    assert ended_.error is None and ended_.resumed and not left.exists()


def test_the_command_lists_runs_and_prints_one_object(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(TEXT.replace("seeds = [0, 1]", "seeds = [0]").replace("[40, 50]", "[50]"))
    listed = CliRunner().invoke(app, ["study", str(tmp_path / "s.toml"), "--dry-run"])
    assert "2 runs" in listed.stdout and "average, target_epsilon=50, seed 0" in listed.stdout
    ran = CliRunner().invoke(
        app, ["study", str(tmp_path / "s.toml"), "--out", str(tmp_path / "o"), "-j", "1", "--json"]
    )
    assert ran.exit_code == 0, ran.output
    answer = json.loads(ran.stdout)
    assert (answer["runs"], answer["failed"]) == (2, 0) and len(answer["table"]) == 2
    assert (tmp_path / "o" / "study.html").exists()
