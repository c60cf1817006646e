"""The command line: exit codes, one JSON object, clear messages, and an ε that survives a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import privfed
from privfed.cli import main
from privfed.config import Config
from privfed.privacy.accountant import Accountant
from privfed.privacy.events import Charge
from privfed.privacy.ledger import Ledger

QUICK = ("--set", "rounds=2", "--set", "evaluation.local_steps=1", "--set", "privacy.noise_multiplier=2.0")


@dataclass(frozen=True)
class Done:
    code: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """`privfed …` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["privfed", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        shown = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Done(end.value.code, shown.out, shown.err)

    return call


def test_a_run_ends_with_code_0_and_exactly_one_object_on_stdout(command: Command) -> None:
    done = command("run", "--json", *QUICK, "--out", "out [a]")
    assert done.code == 0
    summary: dict[str, Any] = json.loads(done.stdout)
    documented = {"run", "rounds", "sites", "seconds", "refusals", "privacy", "utility", "aggregation"}
    assert documented <= set(summary)
    assert {"unit", "noise", "delta", "epsilon", "accountant"} <= set(summary["privacy"])
    assert set(summary["privacy"]["epsilon"]) == {"max", "per_site"}
    assert {"metric", "global", "personalized", "local_only", "fraction_hurt"} <= set(summary["utility"])
    for figure in ("global", "personalized", "local_only"):
        assert {"mean", "worst_decile"} <= set(summary["utility"][figure])
    assert {"kind", "bytes_up_per_site_per_round", "dropouts"} <= set(summary["aggregation"])
    assert (summary["rounds"], summary["sites"], summary["refusals"]) == (2, 5, {})
    assert summary["privacy"]["epsilon"]["max"] > 0
    # progress is on stderr; brackets in a name are not markup
    assert "round 2" in done.stderr and "out [a]" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(Path("out [a]", "summary.json").read_text()) == summary


def test_without_json_the_figures_stand_on_stdout_with_their_labels(command: Command) -> None:
    done = command("run", *QUICK, "--set", "aggregation.kind=plain", "--set", "privacy.insecure_seed=1")
    assert (done.code, done.stderr) == (0, "")
    for label in (
        "simulated",
        "internal, not DP",
        "ε = ",
        "δ = 1e-05",
        "record unit",
        "pld accountant",
        "VOID",
        "WARNING",
    ):
        assert label in done.stdout, label
    assert len(list(Path("runs").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "--nope"], "--nope"),
        (["frobnicate"], "frobnicate"),
        (["run", "one.toml", "two.toml"], "two.toml"),
        (["run", "absent.toml"], "can not read the configuration absent.toml"),
        (["run", "--set", "rounds"], "--set takes key=value"),
        (["run", "--set", "method.name=fomalm"], "did you mean 'fomaml'?"),
        (["run", "--set", "privacy.target_epsilom=3"], "did you mean privacy.target_epsilon?"),
        (["run", "--set", "rounds=ten"], "rounds = 'ten'"),
        (["run", "--set", "aggregation.threshold=9"], "threshold = 9 is above the cohort of 5"),
        (
            ["run", "--set", "aggregation.limit=1e6", "--set", "aggregation.fraction_bits=16"],
            "fraction_bits to 8 or less",
        ),
        (["run", "--set", "privacy.unit=client"], "unit = 'client'"),
        (["run", "--ledger", "absent.db"], "there is no ledger at absent.db"),
        (["run", "--resume", "absent"], "absent"),
        ([], "Usage"),
    ],
)
def test_bad_usage_ends_with_code_2_and_says_what_to_do(command: Command, arguments: list[str], told: str) -> None:
    done = command(*arguments, *(["--json"] if arguments[:1] == ["run"] else []))
    assert (done.code, done.stdout) == (2, "")
    assert told in done.stderr
    assert "privfed: " in done.stderr
    assert "Traceback" not in done.stderr
    assert list(Path().iterdir()) == []


def test_a_folder_in_use_is_refused_with_code_2(command: Command) -> None:
    Path("out").mkdir()
    Path("out", "notes.txt").write_text("mine")
    done = command("run", *QUICK, "--out", "out")
    assert done.code == 2 and "out is not empty: nothing was changed" in done.stderr
    assert [path.name for path in Path("out").iterdir()] == ["notes.txt"]


def test_the_printed_configuration_is_the_effective_one_and_loads_again(command: Command) -> None:
    done = command("run", "--print-config", "--set", "rounds=7", "--set", "method.name=fomaml")
    assert (done.code, done.stderr) == (0, "")
    Path("printed.toml").write_text(done.stdout)
    config = privfed.load_config("printed.toml")
    assert (config.rounds, type(config.method).__name__) == (7, "Fomaml")
    assert command("run", "printed.toml", "--print-config").stdout == done.stdout
    Path("default.toml").write_text(command("run", "--print-config").stdout)
    assert privfed.load_config("default.toml") == Config()


def test_a_second_run_on_the_ledger_counts_what_was_spent_and_ends_with_code_3(command: Command) -> None:
    first = command("run", "--json", *QUICK, "--out", "first")
    assert first.code == 0
    spent = json.loads(first.stdout)["privacy"]["epsilon"]
    second = command(
        "run", "--json", *QUICK, "--out", "second", "--ledger", "first/ledger.db", "--set", "privacy.target_epsilon=2.0"
    )
    assert second.code == 3
    summary = json.loads(second.stdout)
    assert not summary["complete"]
    assert summary["privacy"]["epsilon"] == spent
    assert set(summary["refusals"]) == set(spent["per_site"])
    assert all(f"has spent ε = {spent['max']:.6g} of 2 at δ = 1e-05" in why for why in summary["refusals"].values())
    assert "INCOMPLETE" in second.stderr and "Traceback" not in second.stderr
    # with room in the budget the third run goes on, from what the first one spent
    third = command(
        "run", "--json", *QUICK, "--out", "third", "--ledger", "first/ledger.db", "--set", "privacy.target_epsilon=9.0"
    )
    assert third.code == 0
    assert json.loads(third.stdout)["privacy"]["epsilon"]["max"] > spent["max"] * 1.2


def test_a_damaged_ledger_ends_with_code_4(command: Command) -> None:
    assert command("run", *QUICK, "--out", "first").code == 0
    ledger = Path("first", "ledger.db")
    data = bytearray(ledger.read_bytes())
    where = data.index(b'"noise_multiplier":2.0')
    data[where : where + 22] = b'"noise_multiplier":9.0'
    ledger.write_bytes(data)
    done = command("run", *QUICK, "--out", "second", "--ledger", ledger)
    assert done.code == 4
    assert "its hash does not follow" in done.stderr and "Traceback" not in done.stderr


def test_version_and_help(command: Command) -> None:
    assert command("--version").stdout == f"privfed {privfed.__version__}\n"
    done = command("run", "--help")
    assert done.code == 0 and "--ledger" in done.stdout


def test_a_killed_run_has_spent_what_it_spent(tmp_path: Path) -> None:
    """SIGKILL in the middle of the rounds; the next run on the ledger sees every round that was paid, and goes on."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "privfed", "run", "--json", *QUICK]
    killed = subprocess.Popen(
        [*command, "--set", "rounds=5000", "--set", "privacy.target_epsilon=900.0", "--out", str(tmp_path / "killed")],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        metrics = tmp_path / "killed" / "metrics.jsonl"
        for _ in range(30_000):  # polled; how long it takes is not the question
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= 2:
                break
            assert killed.poll() is None, "the run ended by itself"
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        output = killed.communicate()[0]
    finally:
        killed.kill()
        killed.wait()
    assert (killed.returncode, output) == (-signal.SIGKILL, b"")

    path = tmp_path / "killed" / "ledger.db"
    paid: dict[str, list[Charge]] = {}
    with Ledger(path) as ledger:
        ledger.verify()
        for recorded in ledger.entries():
            if recorded.entry.kind != "witness":  # the coordinator's chain: it spends nothing
                paid.setdefault(recorded.entry.site, []).extend(recorded.entry.charges)
    assert len(paid) == 5 and all(len(charges) >= 2 for charges in paid.values())
    before = {site: Accountant().epsilon(charges, 1e-5).value for site, charges in paid.items()}

    after = subprocess.run(
        [*command, "--set", "privacy.target_epsilon=0.5", "--out", str(tmp_path / "after"), "--ledger", str(path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert after.returncode == 3, after.stderr
    summary = json.loads(after.stdout)
    # 1e-6: the last bits of a Fourier transform depend on the process
    assert summary["privacy"]["epsilon"]["per_site"] == pytest.approx(before, rel=1e-6)
    assert all("has spent" in reason for reason in summary["refusals"].values())
    assert "Traceback" not in after.stderr
