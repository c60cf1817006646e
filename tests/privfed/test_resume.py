"""A run that is killed, resumed, damaged, or run twice: its ε is counted once, and what is wrong is named."""

import errno
import fcntl
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import privfed
from privfed import api, folder, wire
from privfed.api import Preparation, Run
from privfed.cli.app import main
from privfed.cli.exits import exit_code
from privfed.config import Config
from privfed.engines.local import LocalEngine
from privfed.errors import DataError, PrivfedError, RunFolderError
from privfed.folder import RunFolder
from privfed.privacy.errors import LedgerCorrupt
from privfed.privacy.ledger import Ledger
from privfed.simulation.faults import HOMOMORPHIC_STEPS

ROUNDS = 3
SITES = ("a", "b", "c", "d")
DROPOUTS = ["simulation.dropout=0.2", 'simulation.outages=[{round=1, site="b", step="mask"}]', "seed=3"]


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: SIGKILL does not care, and the runs below sync some thousand times."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        yield Path(scratch)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "t.csv"
    randomness = np.random.default_rng(0)
    rows = [f"{SITES[i % 4]},{randomness.normal() + i // 4 % 2:.4f},{i // 4 % 2}" for i in range(120)]
    path.write_text("\n".join(["site,x,y", *rows]) + "\n")
    return path


def configure(table: Path, *more: str) -> Config:
    return privfed.load_config(
        overrides=[
            *('data.source="csv"', f'data.file="{table}"', 'data.site="site"', 'data.label="y"'),
            *('data.classes={no=["0"], yes=["1"]}', 'data.numeric=[{name="x", range=[-3, 4]}]', f"rounds={ROUNDS}"),
            *("privacy.noise_multiplier=2.0", "privacy.target_epsilon=100", "privacy.insecure_seed=7"),
            *("method.personal_steps=1", "evaluation.local_steps=1", 'name="toy"', *more),
        ]
    )


def child(
    task: Callable[[], object], kill_after: float | None = None, prepare: Callable[[], None] | None = None
) -> int:
    """Run ``task`` in a forked child, killed after some seconds; its wait status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork beside threads; none of them holds a lock here
        pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
            if prepare is not None:
                prepare()
            task()
        except BaseException as error:
            os._exit(40 + (exit_code(error) or 9) if isinstance(error, Exception) else 49)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def die_at(count: int) -> None:
    """In a child: SIGKILL just before the count-th call that makes something durable."""
    left = count

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "link", "write"):
        setattr(os, name, deadly(getattr(os, name)))


def die_in(step: str) -> None:
    """In a child: SIGKILL in that step of round 1, when half of those asked have answered, and one party at least."""

    def exchange(self: LocalEngine, requests: dict[str, bytes], deadline_seconds: float) -> dict[str, bytes]:
        replies: dict[str, bytes] = {}
        for name, request in requests.items():
            replies[name] = self._sites[name].handle(request)
            message = wire.decode_request(request)
            if (message.round, message.step) == (1, step) and 2 * len(replies) >= len(requests):
                os.kill(os.getpid(), signal.SIGKILL)
        return replies

    LocalEngine.exchange = exchange  # type: ignore[method-assign,assignment]


def hashes(path: Path) -> dict[str, str]:
    """Every file's hash: what "nothing was changed" means."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != folder.LOCK
    }


def expect_same(run: Run, whole: Run, home: Path, ledger: Path | None = None) -> None:
    """``run`` ended as ``whole`` did, with one charge a site and round."""
    assert run.summary.complete
    assert run.summary.privacy.epsilon == whole.summary.privacy.epsilon
    assert [r.round for r in run.reports] == [r.round for r in whole.reports]
    assert [r.contributed for r in run.reports] == [r.contributed for r in whole.reports]
    assert [dict(r.measurements) for r in run.reports] == [dict(r.measurements) for r in whole.reports]
    assert bool((run.theta == whole.theta).all())
    assert (home / folder.MODEL).exists() and (home / folder.PERSONAL).exists()

    def keys(path: Path, name: str) -> list[tuple[str, int, int]]:
        with Ledger(path) as book:
            book.verify()
            charges = [line.entry for line in book.entries() if line.entry.kind == "charge"]
        return sorted((entry.site, entry.round, entry.attempt) for entry in charges if entry.run == name)

    charged = keys(ledger or home / folder.LEDGER, run.summary.run)
    assert len(set(charged)) == len(charged)
    assert charged == keys(whole.folder / folder.LEDGER, whole.summary.run)


@pytest.fixture(scope="module")
def interrupted(table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Preparation]:
    """A run killed after its second round's checkpoint. Copy it, never touch it."""
    home = tmp_path_factory.mktemp("run") / "home"
    ready = api.prepare(configure(table))

    def stop(report: object) -> None:
        if getattr(report, "round", 0) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    status = child(partial(privfed.run, ready.config, out=home, observer=stop, prepared=ready))
    assert os.WIFSIGNALED(status) and (home / folder.CHECKPOINT).exists()
    return home, ready


@pytest.fixture
def home(interrupted: tuple[Path, Preparation], tmp_path: Path) -> Path:
    return Path(shutil.copytree(interrupted[0], tmp_path / "home"))


@pytest.fixture(scope="module")
def whole(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return privfed.run(configure(table), out=tmp_path_factory.mktemp("whole") / "home")


# Kills


@pytest.mark.parametrize(
    "more",
    [
        [],
        DROPOUTS,
        ["method.name='fomaml'", "method.personal_steps=1"],
        ["aggregation.kind='plain'", *DROPOUTS],
        ["aggregation.kind='homomorphic'", *DROPOUTS],
        ["method={name='local'}"],
    ],
    ids=["reptile", "dropouts", "fomaml", "plain", "encrypted", "local"],
)
def test_runs_killed_at_random_instants_end_as_the_uninterrupted_one(
    table: Path, tmp_path: Path, more: list[str]
) -> None:
    ready = api.prepare(configure(table, *more))
    privfed.run(ready.config, out=tmp_path / "warm", prepared=ready)
    started = time.perf_counter()
    uninterrupted = privfed.run(ready.config, out=tmp_path / "whole", prepared=ready)
    seconds = time.perf_counter() - started
    randomness = random.Random(f"{more}")
    trials = 4 if more in ([], DROPOUTS) else 2
    for trial in range(trials):
        home = tmp_path / f"trial-{trial}"
        child(
            partial(privfed.run, ready.config, out=home, prepared=ready),
            seconds * (trial + randomness.random()) / trials,
        )
        if not (home / folder.RUN).exists():  # killed before the folder was a run's
            assert not (home / folder.LEDGER).exists()
            continue
        if trial % 2:
            child(partial(privfed.resume, home, prepared=ready), seconds * randomness.random() / 2)
        expect_same(privfed.resume(home, prepared=ready), uninterrupted, home)


@pytest.mark.parametrize(
    ("key_holder", "steps"), [(None, HOMOMORPHIC_STEPS), ("b", ("close", "release"))], ids=["alone", "at a site"]
)
def test_an_encrypted_round_killed_in_any_step_is_the_same_round_again(
    table: Path, tmp_path: Path, whole: Run, key_holder: str | None, steps: tuple[str, ...]
) -> None:
    """Twice each, so that what was begun anew begins anew; the model is the masked one's to the last bit."""
    more = ["aggregation.kind='homomorphic'", *([f"aggregation.key_holder='{key_holder}'"] if key_holder else [])]
    ready = api.prepare(configure(table, *more))
    for step in steps:
        home = tmp_path / step
        status = child(partial(privfed.run, ready.config, out=home, prepared=ready), prepare=partial(die_in, step))
        assert os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(child(partial(privfed.resume, home, prepared=ready), prepare=partial(die_in, step)))
        run = privfed.resume(home, prepared=ready)
        expect_same(run, whole, home)
        assert run.summary.aggregation.aborted_rounds == 0


def test_a_kill_before_every_durable_write_loses_and_doubles_nothing(table: Path, tmp_path: Path, whole: Run) -> None:
    ready = api.prepare(configure(table))
    for at in (2, 4, 5, 6, 8, 9, 11, 12, 14, 17, 22, 27, 36):
        home = tmp_path / f"at-{at}"
        child(partial(privfed.run, ready.config, out=home, prepared=ready), prepare=partial(die_at, at))
        if not (home / folder.RUN).exists():
            with pytest.raises(RunFolderError, match=r"not a run's folder|there is no folder"):
                privfed.resume(home)
            continue
        if at % 2 == 0:  # a second kill, in the resumed run
            child(partial(privfed.resume, home, prepared=ready), prepare=partial(die_at, at // 2))
        expect_same(privfed.resume(home, prepared=ready), whole, home)


def test_an_interrupted_run_goes_on_with_its_own_data_ledger_and_noise(home: Path, whole: Run) -> None:
    before = (home / folder.METRICS).read_text().splitlines()
    rounds: list[int] = []
    run = privfed.resume(home, observer=lambda report: rounds.append(report.round))
    assert rounds == [2] and run.summary.run in before[0]
    assert (home / folder.METRICS).read_text().splitlines()[:2] == before[:2]
    expect_same(run, whole, home)


def test_a_last_line_cut_short_is_done_again(home: Path, whole: Run) -> None:
    with open(home / folder.METRICS, "a") as file:
        file.write('{"run":"toy","round":2,"lo')
    expect_same(privfed.resume(home), whole, home)


def test_secure_noise_resumes_to_the_same_epsilon(table: Path, tmp_path: Path, whole: Run) -> None:
    ready = api.prepare(configure(table, "privacy.target_epsilon=50"))
    home = tmp_path / "home"
    child(partial(privfed.run, ready.config, out=home, prepared=ready), prepare=partial(die_at, 18))
    run = privfed.resume(home, prepared=ready)
    assert run.summary.privacy.epsilon == whole.summary.privacy.epsilon


def test_an_external_ledger_counts_both_runs_once(table: Path, tmp_path: Path) -> None:
    ready = api.prepare(configure(table))
    first = privfed.run(ready.config, out=tmp_path / "first", prepared=ready)
    book = first.folder / folder.LEDGER
    second = tmp_path / "second"
    task = partial(privfed.run, ready.config, out=second, ledger=book, prepared=ready)
    assert os.WIFSIGNALED(child(task, prepare=partial(die_at, 14)))
    assert not (second / folder.LEDGER).exists()
    away = book.rename(tmp_path / "away.db")
    before = hashes(second)
    with pytest.raises(RunFolderError, match=r"ledger\.db is missing"):
        privfed.resume(second, prepared=ready)
    assert hashes(second) == before and not book.exists()
    away.rename(book)
    run = privfed.resume(second, prepared=ready)
    with Ledger(book) as ledger:
        ledger.verify()
        spends = [line for line in ledger.entries() if line.entry.kind == "charge"]
        assert len(spends) == 2 * ROUNDS * len(SITES)
    assert run.summary.privacy.epsilon.max is not None and first.summary.privacy.epsilon.max is not None
    assert run.summary.privacy.epsilon.max > first.summary.privacy.epsilon.max
    again = privfed.resume(first.folder, prepared=ready)  # the first run ended before the second one spent
    assert again.summary.privacy.epsilon == first.summary.privacy.epsilon


# What does not fit is named, and nothing is changed


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, at: int = -2) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "checkpoint cut": (lambda home: cut(home / folder.CHECKPOINT), r"checkpoint\.safetensors is damaged"),
    "checkpoint flipped": (lambda home: flip(home / folder.CHECKPOINT), r"checkpoint\.safetensors is damaged"),
    "checkpoint empty": (lambda home: (home / folder.CHECKPOINT).write_bytes(b""), r"checkpoint\.safetensors is dam"),
    "checkpoint gone": (lambda home: (home / folder.CHECKPOINT).unlink(), r"checkpoint\.safetensors is missing or old"),
    "metrics first line": (lambda home: replace(home / folder.METRICS, "{", "["), r"metrics\.jsonl: line 1 is damaged"),
    "metrics second line": (
        lambda home: replace(home / folder.METRICS, '"round":1', '"round":8'),
        r"metrics\.jsonl: line 2 is damaged",
    ),
    "metrics content": (
        lambda home: replace(home / folder.METRICS, '"contributed"', '"contribute?"'),
        r"line of metrics\.jsonl is damaged",
    ),
    "metrics gone": (lambda home: (home / folder.METRICS).unlink(), r"metrics\.jsonl has 0 whole lines"),
    "config edited": (lambda home: replace(home / folder.CONFIG, "rounds = 3", "rounds = 9"), r"config\.toml is not"),
    "config cut": (lambda home: cut(home / folder.CONFIG), r"config\.toml is not the configuration"),
    "config gone": (lambda home: (home / folder.CONFIG).unlink(), r"has no config\.toml"),
    "run.json cut": (lambda home: cut(home / folder.RUN), r"run\.json is damaged"),
    "run.json gone": (lambda home: (home / folder.RUN).unlink(), r"has no run\.json"),
    "datasets cut": (lambda home: cut(home / folder.DATASETS), r"datasets\.json is damaged"),
    "datasets gone": (lambda home: (home / folder.DATASETS).unlink(), r"datasets\.json is missing"),
    "key gone": (lambda home: (home / "ledger.db.key").unlink(), r"no key file ledger\.db\.key"),
    "key cut": (lambda home: cut(home / "ledger.db.key"), r"ledger\.db\.key is damaged"),
    "key of another": (lambda home: flip(home / "ledger.db.key"), "another key|records of a, b, c, d are not those"),
    "ledger gone": (lambda home: (home / folder.LEDGER).unlink(), r"ledger\.db is missing"),
    "ledger cut": (lambda home: cut(home / folder.LEDGER), r"ledger\.db"),
    "ledger no database": (lambda home: (home / folder.LEDGER).write_bytes(b"?" * 9000), r"ledger\.db"),
    "ledger of another": (lambda home: _fresh_ledger(home / folder.LEDGER), "does not hold what a spent in round 0"),
    "journal gone": (lambda home: (home / folder.JOURNAL).unlink(), r"journal\.db is missing"),
    "journal no database": (lambda home: (home / folder.JOURNAL).write_bytes(b"?" * 9000), r"journal\.db is damaged"),
}


def _fresh_ledger(path: Path) -> None:
    path.unlink()
    Ledger(path).close()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_named_and_left_alone(
    home: Path, interrupted: tuple[Path, Preparation], damage: str
) -> None:
    spoil, message = DAMAGE[damage]
    spoil(home)
    before = hashes(home)
    with pytest.raises((PrivfedError, LedgerCorrupt), match=message) as refusal:
        privfed.resume(home, prepared=interrupted[1])
    assert hashes(home) == before
    assert exit_code(refusal.value) in (1, 2, 4)


def test_changed_records_are_refused(home: Path, table: Path) -> None:
    original = table.read_text()
    before = hashes(home)
    try:
        table.write_text(original.replace(",0\n", ",1\n", 1))
        with pytest.raises(DataError, match=r"the records of a are not those .* new run with --ledger"):
            privfed.resume(home)
    finally:
        table.write_text(original)
    assert hashes(home) == before


def test_resuming_an_ended_run_changes_nothing(home: Path) -> None:
    ended = privfed.resume(home)
    before = hashes(home)
    again = privfed.resume(home)
    assert hashes(home) == before and again.summary == ended.summary and bool((again.theta == ended.theta).all())
    assert [r.round for r in again.reports] == list(range(ROUNDS))
    cut(home / folder.SUMMARY)
    with pytest.raises(RunFolderError, match=r"summary\.json is damaged"):
        privfed.resume(home)


def test_a_folder_is_one_processes_at_a_time(home: Path, interrupted: tuple[Path, Preparation], whole: Run) -> None:
    before = hashes(home)
    with open(home / folder.LOCK, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunFolderError, match="another process is running in"):
            privfed.resume(home, prepared=interrupted[1])
    assert hashes(home) == before
    expect_same(privfed.resume(home, prepared=interrupted[1]), whole, home)


def test_a_run_is_not_started_over_another(home: Path) -> None:
    before = hashes(home)
    with pytest.raises(RunFolderError, match="continue its run with --resume"):
        privfed.run(privfed.load_config(), out=home)
    assert hashes(home) == before


@pytest.mark.parametrize(
    "extra", [["--out", "x"], ["--set", "rounds=9"], ["--ledger", "x"], ["x.toml"], ["--print-config"]]
)
def test_resume_with_other_options_is_bad_usage(
    home: Path, extra: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(home)
    monkeypatch.setattr(sys, "argv", ["privfed", "run", "--resume", str(home), *extra])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "give it alone" in capsys.readouterr().err
    assert hashes(home) == before


def test_a_resumed_run_ends_with_code_0_and_json(
    home: Path, whole: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["privfed", "run", "--json", "--resume", str(home)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["privacy"]["epsilon"]["max"] == whole.summary.privacy.epsilon.max


# A full disk


def test_a_failed_write_leaves_the_old_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder = RunFolder.open(home)
    checkpoint = run_folder.load_checkpoint()
    assert checkpoint is not None
    before = hashes(home)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: run_folder.save_checkpoint(checkpoint),
        lambda: run_folder.write(folder.SUMMARY, "{}"),
        lambda: run_folder.keep_metrics([]),
    ):
        with pytest.raises(OSError, match=r"No space left on device: .* could not be written"):
            write()
        assert hashes(home) == before


def test_a_run_out_of_space_can_be_resumed_when_there_is_some(
    home: Path, interrupted: tuple[Path, Preparation], whole: Run
) -> None:
    largest = max(path.stat().st_size for path in home.iterdir())

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))  # less than any file: every write fails

    assert largest > 512
    status = child(partial(privfed.resume, home, prepared=interrupted[1]), prepare=limit)
    assert os.WEXITSTATUS(status) == 41  # exit code 1, no traceback
    expect_same(privfed.resume(home, prepared=interrupted[1]), whole, home)
