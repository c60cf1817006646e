"""Ctrl-C and kill in the commands that an auditor uses: nothing half done, and what to do next."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import privfed
from privfed import audit_report, auditing, exports, keyring, verification
from privfed.cli import app, output
from privfed.errors import RunFolderError
from privfed.privacy.ledger import Ledger
from privfed.seals import COORDINATOR

QUICK = ("rounds=1", "evaluation.local_steps=1", "privacy.noise_multiplier=4")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:  # an audit below tests the noise of this key
        patch.setattr(keyring, "new_key", lambda: bytes(range(32)))
        out = tmp_path_factory.mktemp("interrupted") / "run"
        return privfed.run(privfed.load_config(overrides=QUICK), out=out).folder


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def halfway(path: Path) -> Iterator[str]:
    yield "the first line"
    raise KeyboardInterrupt


def entered(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["privfed", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


ACCOUNTANT = "interrupted; no ledger was changed: give the command again"
AUDIT = "interrupted; no result was recorded unless it says so above: give the command again, its seed makes the same"


@pytest.mark.parametrize(
    ("arguments", "place", "what", "says"),
    [
        (["audit", "RUN", "--level", "2", "--out", "OUT"], auditing, "audit", AUDIT),
        (["audit", "RUN", "--level", "2", "--out", "OUT"], os, "replace", AUDIT),
        (["accountant", "report", "RUN", "--out", "OUT"], audit_report, "build", ACCOUNTANT),
        (["accountant", "report", "RUN", "--out", "OUT"], os, "replace", ACCOUNTANT),
        (["accountant", "report", "RUN", "--out", "OUT"], os, "fsync", ACCOUNTANT),
        (["accountant", "export", "RUN", "--out", "OUT"], exports, "lines", ACCOUNTANT),
        (["accountant", "export", "RUN", "--out", "OUT"], os, "replace", ACCOUNTANT),
        (["accountant", "verify", "RUN"], verification, "verify", ACCOUNTANT),
    ],
)
def test_ctrl_c_leaves_no_file_and_says_what_to_do(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], place: Any, what: str, says: str,
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (tmp_path / "out").mkdir()
    before = entries(folder)
    given = [{"RUN": str(folder), "OUT": str(tmp_path / "out" / "result")}.get(word, word) for word in arguments]
    with monkeypatch.context() as broken:
        broken.setattr(place, what, halfway if what == "lines" else interrupted)
        assert entered(broken, *given) == 130
    said = capsys.readouterr().err
    assert f"privfed: {says}" in said
    assert not list((tmp_path / "out").iterdir())
    recorded = what == "replace" and arguments[0] == "audit"  # into the ledger first
    assert len(entries(folder)) == len(before) + recorded
    assert ("stands in the ledger, signed" in said) == recorded
    assert entered(monkeypatch, *given) == 0  # the command again, as advised
    capsys.readouterr()


def entries(folder: Path) -> list[str]:
    with Ledger(folder / "ledger.db") as ledger:
        return [line.hash for line in ledger.entries(COORDINATOR)]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_in_an_audit_has_recorded_nothing(
    run: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    folder, out = Path(shutil.copytree(run, tmp_path / "run")), tmp_path / "audit.json"
    before = entries(folder)
    command = [sys.executable, "-m", "privfed", "audit", str(folder), "--level", "1", "--out", str(out)]
    # A shell's background job ignores Ctrl-C, and so would all that this suite starts there
    before_test = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with subprocess.Popen([*command, "--trials", "100000"], stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("level 1"):
                    process.send_signal(kind)
                    break
            said = process.stderr.read()
    finally:
        signal.signal(signal.SIGINT, before_test)
    assert process.returncode == (130 if kind is signal.SIGINT else -kind)
    assert (AUDIT in said) == (kind is signal.SIGINT)
    assert not out.exists() and not (folder / "audit.json").exists() and entries(folder) == before
    assert entered_verify(folder) == 0


def entered_verify(folder: Path) -> int:
    return int(app.app(["accountant", "verify", str(folder)], standalone_mode=False) or 0)


def test_a_file_is_replaced_whole_and_keeps_who_may_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    path.chmod(0o600)
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(os, "fsync", interrupted)
        output.write_whole(path, b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    output.write_whole(path, b"new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "link").symlink_to(path)
    output.write_whole(tmp_path / "link", b"through")
    assert path.read_text() == "through" and (tmp_path / "link").is_symlink()
    output.write_whole(Path(os.devnull), b"no file, and none is made")
    with pytest.raises(RunFolderError, match="give another place with --out"):
        output.write_whole(tmp_path / "none" / "report.html", b"")
