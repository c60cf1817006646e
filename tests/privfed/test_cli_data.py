"""`privfed data` and bad data at the command line: exit codes, next steps, nothing spent, no cell shown."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from privfed.cli.app import main

SECRET = "Xk7Plantedcell"
Command = Callable[..., tuple[int, str, str]]
ROWS = "".join(f"{'ABC'[i % 3]},{20 + i % 31},{i // 3 % 2}\n" for i in range(60))
CONFIG = """
name = "mine"
[data]
source = "csv"
file = "t.csv"
site = "hospital"
label = "out"
[data.classes]
no = ["0"]
yes = ["1"]
[[data.numeric]]
name = "age"
range = [0, 100]
"""


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """`privfed …` in an empty folder without known data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRIVFED_DATA", str(tmp_path / "store"))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["privfed", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        shown = capsys.readouterr()
        assert SECRET not in shown.out + shown.err and "Traceback" not in shown.err
        return int(str(end.value.code)), shown.out, shown.err

    return call


def test_list_tells_what_is_here(command: Command, tmp_path: Path) -> None:
    code, out, _ = command("data", "list")
    assert code == 0 and "ist" in out and "missing" in out and str(tmp_path / "store") in out
    (tmp_path / "store" / "ist").mkdir(parents=True)
    (tmp_path / "store" / "ist" / "IST.csv.gz").write_bytes(b"something else")
    code, out, _ = command("data", "list", "--json")
    states = {row["name"]: row["state"] for row in json.loads(out)}
    assert code == 0 and states["ist"] == "another version" and states["heart-disease"] == "missing"


def test_describe_says_where_to_get_a_set(command: Command) -> None:
    code, out, _ = command("data", "describe", "ist")
    assert code == 0 and "doi 10.7488/ds/104" in out and "leak the outcome" in out and "sha256 64e7e6e8" in out
    code, out, _ = command("data", "describe", "heart-disease", "--json")
    assert code == 0 and json.loads(out)["state"]["heart_disease/processed.va.data"] == "missing"


def test_an_unknown_set_is_bad_usage_with_the_nearest(command: Command) -> None:
    code, out, err = command("data", "describe", "hart-disease")
    assert (code, out) == (2, "") and "did you mean 'heart-disease'?" in err


def test_check_prints_findings_on_stderr_and_the_proposal_on_stdout(command: Command, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("hospital,age,out\n" + ROWS)
    code, out, err = command("data", "check", "t.csv", "--label", "out")
    assert code == 0 and out.startswith('name = "t"\n\n[data]\n') and "3 sites of 20 to 20 records" in err
    (tmp_path / "t.csv").write_text("hospital,age,out\n" + ROWS + f"A,{SECRET},1\n")
    code, out, err = command("data", "check", "t.csv", "--label", "out")
    assert code == 1 and "PROBLEM column 'age' is numeric, but row 61 hold text" in err
    code, out, err = command("data", "check", "t.csv", "--label", "out", "--json")
    assert code == 1 and json.loads(out)["problems"] == 1 and err == ""
    assert command("data", "check", "none.csv")[0] == 1


BAD = {
    "missing": (None, "no file 't.csv'"),
    "missing column": ("hospital,out\n" + "A,1\n", "no column 'age'"),
    "empty": ("", "is empty"),
    "header only": ("hospital,age,out\n", "has no records"),
    "html": (f"<html>{SECRET}</html>", "HTML"),
    "semicolons": (f"hospital;age;out\nA;1;{SECRET}\n", "data.separator"),
    "headerless": (f"A,22,{SECRET}\n", "data.header"),
    "text in numbers": ("hospital,age,out\n" + ROWS + f"A,{SECRET},1\n", "row 61"),
    "unknown label": ("hospital,age,out\n" + ROWS + f"A,5,{SECRET}\n", "other_labels"),
    "no site": ("hospital,age,out\n" + ROWS + ",5,1\n", "row 61 name no site"),
    "one class": ("hospital,age,out\n" + "A,1,1\nB,1,1\nC,1,1\n", "every record is of one class"),
    "ragged": ("hospital,age,out\n" + ROWS + f"A,5,1,{SECRET}\n", "row 61 has 4 cells"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_end_with_code_1_before_anything_is_written(command: Command, tmp_path: Path, case: str) -> None:
    text, message = BAD[case]
    (tmp_path / "my.toml").write_text(CONFIG)
    if text is not None:
        (tmp_path / "t.csv").write_text(text)
    code, _, err = command("run", "my.toml", "--out", "result", "--json")
    assert code == 1 and message in err
    assert not (tmp_path / "result").exists()


def test_two_sites_are_too_few_for_masked_aggregation(command: Command, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(CONFIG)
    (tmp_path / "t.csv").write_text("hospital,age,out\n" + ROWS.replace("C,", "A,"))
    code, _, err = command("run", "my.toml", "--out", "result", "--json")
    assert code == 2 and "at least 3 sites" in err and not (tmp_path / "result").exists()


def test_a_run_copes_with_sites_of_one_record_one_class_or_no_test_record(command: Command, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(
        CONFIG + "[evaluation]\nmetric = 'auroc'\nlocal_steps = 1\n[privacy]\nnoise_multiplier = 5.0\n"
    )
    odd = "lonely,50,1\n" + "uniform,50,1\n" * 12 + "two,20,0\ntwo,30,1\n"
    (tmp_path / "t.csv").write_text("hospital,age,out\n" + ROWS + odd)
    code, out, err = command("run", "my.toml", "--set", "rounds=1", "--out", "result", "--json")
    summary = json.loads(out)
    assert code == 0 and summary["sites"] == 6 and summary["complete"]
    assert "site 'lonely' has one record" in err and "site 'uniform' has one class only" in err
    code, out, _ = command("run", "my.toml", "--set", "method.name=local", "--set", "rounds=1", "--json")
    assert code == 0 and json.loads(out)["complete"]


def test_a_cell_stands_in_no_file_that_a_run_leaves_but_the_models(command: Command, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(CONFIG + "[evaluation]\nlocal_steps = 1\n[privacy]\nnoise_multiplier = 5.0\n")
    rows = ROWS.replace(",20,", ",20.7193551,")
    lines = [f"{line},{SECRET}{number}" for number, line in enumerate(rows.splitlines())]
    (tmp_path / "t.csv").write_text("hospital,age,out,who\n" + "\n".join(lines) + "\n")
    with open(tmp_path / "my.toml") as file:
        text = file.read().replace('label = "out"', 'label = "out"\nid = "who"')
    (tmp_path / "my.toml").write_text(text)
    code, _, _ = command("run", "my.toml", "--set", "rounds=2", "--out", "result", "--json")
    assert code == 0
    for file in (tmp_path / "result").iterdir():
        content = file.read_bytes()
        assert SECRET.encode() not in content and b"20.7193551" not in content, file.name
