"""New records through a finished run: the numbers that the evaluation had, and clear refusals."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import privfed
from privfed import folder
from privfed.api import Run
from privfed.cli.app import main
from privfed.data.records import keyed_fraction, public_split_key
from privfed.errors import ConfigError, DataError, RunFolderError
from privfed.prediction import predict

SECRET = "Xk7Plantedcell"
Command = Callable[..., tuple[int, str, str]]


def records() -> pd.DataFrame:
    randomness = np.random.default_rng(0)
    y = np.arange(160) // 4 % 2
    return pd.DataFrame(
        {
            "patient": [f"p{i}" for i in range(160)],
            "ward": [("north", "south", "east", "west")[i % 4] for i in range(160)],
            "x": (randomness.normal(size=160) + y).round(3).astype(str),
            "kind": randomness.choice(["u", "v", ""], size=160),
            "y": y.astype(str),
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("run")
    records().to_csv(home / "t.csv", index=False)
    config = privfed.load_config(
        overrides=[
            *('data.source="csv"', f'data.file="{home / "t.csv"}"', 'data.site="ward"', 'data.label="y"'),
            *('data.id="patient"', 'data.classes={no=["0"], yes=["1"]}', "rounds=2", "evaluation.local_steps=1"),
            'data.numeric=[{name="x", range=[-3, 4], missing=true}]',
            'data.categorical=[{name="kind", values=["u", "v"]}]',
            *("privacy.noise_multiplier=1.0", "privacy.target_epsilon=100", "privacy.insecure_seed=1"),
        ]
    )
    return privfed.run(config, out=home / "run")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "new.csv"
    records().to_csv(path, index=False)
    return path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["privfed", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        shown = capsys.readouterr()
        assert SECRET not in shown.out + shown.err and "Traceback" not in shown.err
        return int(str(end.value.code)), shown.out, shown.err

    return call


def test_predictions_have_the_accuracy_that_the_evaluation_measured(run: Run, table: Path) -> None:
    config = privfed.load_config(run.folder / folder.CONFIG)
    sites = config.data.load(seed=config.seed).sites
    frame = records()
    for name, data in sites.items():
        test = (
            keyed_fraction(data.ids, key=public_split_key(config.seed), label="test") < config.evaluation.test_fraction
        )
        here = (frame["ward"] == name).to_numpy()
        truth = frame["y"][here].map({"0": "no", "1": "yes"}).to_numpy()[test]
        measured = run.reports[-1].measurements[name]
        for site, figure in ((None, measured.global_score), (name, measured.personalized)):
            said = predict(run.folder, table, site=site).table["prediction"].to_numpy()[here][test]
            assert (said == truth).mean() == pytest.approx(figure, abs=1e-12)


def test_probabilities_sum_to_one_and_the_largest_is_the_prediction(run: Run, table: Path) -> None:
    said = predict(run.folder, table).table
    assert list(said) == ["row", "prediction", "p(no)", "p(yes)"] and said["row"].tolist() == list(range(1, 161))
    np.testing.assert_allclose(said["p(no)"] + said["p(yes)"], 1.0, atol=2e-6)  # each is rounded to six digits
    assert ((said["p(yes)"] > said["p(no)"]) == (said["prediction"] == "yes")).all()


def test_column_order_further_columns_and_parquet_change_nothing(run: Run, table: Path, tmp_path: Path) -> None:
    expected = predict(run.folder, table).table
    other = records()[["y", "kind", "ward", "x"]].assign(extra=SECRET)
    other.to_csv(tmp_path / "other.csv", index=False)
    records()[["x", "kind"]].astype({"x": float}).to_parquet(tmp_path / "other.parquet")
    assert predict(run.folder, tmp_path / "other.csv").table.equals(expected)
    assert predict(run.folder, tmp_path / "other.parquet").table.equals(expected)


def test_global_and_personal_models_differ(run: Run, table: Path) -> None:
    whole, north = predict(run.folder, table), predict(run.folder, table, site="north")
    assert not np.allclose(whole.table["p(yes)"], north.table["p(yes)"])


def test_unseen_categories_are_noted_by_row_and_missing_ones_are_not(run: Run, tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text(f"x,kind\n1,u\n1,{SECRET}\n1,?\n,v\n")
    said = predict(run.folder, tmp_path / "n.csv")
    assert said.notes == ("column 'kind': row 2 hold no listed value",)
    assert len(said.table) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"x\n{SECRET}\n", "no column 'kind'; it has 'x'"),
        (f"x,kind\n1,u\n{SECRET},u\n", "column 'x' is numeric, but row 2"),
        ("x,kind\n", "has no records"),
        (f"1.5,{SECRET}\n2,u\n", "looks like a record"),
        (f"x;kind\n1;{SECRET}\n", "separator"),
    ],
)
def test_unfit_tables_are_refused(run: Run, tmp_path: Path, command: Command, text: str, message: str) -> None:
    (tmp_path / "n.csv").write_text(text)
    code, out, err = command("predict", run.folder, tmp_path / "n.csv", "--out", tmp_path / "p.csv")
    assert (code, out) == (1, "") and message in err and not (tmp_path / "p.csv").exists()


def test_a_missing_file_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        predict(run.folder, tmp_path / "none.csv")


def test_an_unknown_site_is_refused_with_the_known_ones(run: Run, table: Path, command: Command) -> None:
    with pytest.raises(ConfigError, match="no site 'nord' in this run; its sites are 'east', 'north', 'south', 'west'"):
        predict(run.folder, table, site="nord")
    assert command("predict", run.folder, table, "--site", "nord")[0] == 2


def test_an_unfinished_or_damaged_run_is_refused(run: Run, table: Path, tmp_path: Path) -> None:
    import shutil

    home = tmp_path / "home"
    shutil.copytree(run.folder, home)
    (home / folder.MODEL).rename(home / "away")
    with pytest.raises(RunFolderError, match=r"has not finished; go on with --resume"):
        predict(home, table)
    content = bytearray((home / "away").read_bytes())
    content[-3] ^= 64  # one bit of one weight
    (home / folder.MODEL).write_bytes(content)
    with pytest.raises(RunFolderError, match=r"model\.safetensors is damaged"):
        predict(home, table)
    with pytest.raises(RunFolderError, match="there is no folder"):
        predict(tmp_path / "none", table)


def test_output_goes_to_a_new_file_only(run: Run, table: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "p.csv"
    assert command("predict", run.folder, table, "--out", out)[0] == 0
    pd.testing.assert_frame_equal(pd.read_csv(out), predict(run.folder, table).table, check_dtype=False)
    out.write_text("mine")
    code, _, err = command("predict", run.folder, table, "--out", out)
    assert code == 2 and "exists already" in err and out.read_text() == "mine"
    assert command("predict", run.folder, table, "--out", tmp_path / "no" / "folder.csv")[0] == 1


def test_json_and_csv_on_stdout_say_the_same(run: Run, table: Path, command: Command) -> None:
    _, text, _ = command("predict", run.folder, table)
    code, listed, _ = command("predict", run.folder, table, "--json", "--site", "north")
    rows = json.loads(listed)
    assert code == 0 and len(rows) == 160 and set(rows[0]) == set(text.splitlines()[0].split(","))
    assert len(text.splitlines()) == 161


def test_a_run_on_files_without_header_predicts_from_a_file_with_one(tmp_path: Path) -> None:
    frame = records()
    names = {}
    for ward in ("north", "south", "east"):
        names[ward] = str(tmp_path / f"{ward}.data")
        frame.loc[frame["ward"] == ward, ["x", "kind", "y"]].to_csv(names[ward], index=False, header=False)
    files = ", ".join(f'{ward}="{path}"' for ward, path in names.items())
    config = privfed.load_config(
        overrides=[
            *('data.source="csv"', f"data.files={{{files}}}", 'data.header=["x", "kind", "y"]', 'data.label="y"'),
            *('data.classes={no=["0"], yes=["1"]}', "rounds=1", "evaluation.local_steps=1"),
            *('data.numeric=[{name="x", range=[-3, 4]}]', "privacy.noise_multiplier=1.0"),
            "privacy.target_epsilon=100",
        ]
    )
    run = privfed.run(config, out=tmp_path / "run")
    (tmp_path / "new.csv").write_text("kind,x\nu,1.5\nv,-1\n")  # new records have no label
    (tmp_path / "same.data").write_text("1.5,u,0\n-1,v,0\n")
    assert predict(run.folder, tmp_path / "new.csv").table.equals(predict(run.folder, tmp_path / "same.data").table)
