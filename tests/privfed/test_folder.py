"""The run's folder and the ledger's key: what is refused, and that nothing was changed."""

import os
import stat
from pathlib import Path

import pytest
import torch

import privfed
from privfed.config import Aggregation, Config, Evaluation, Privacy
from privfed.errors import ConfigError, RunFolderError
from privfed.folder import CHECKPOINT, Checkpoint, RunFacts, RunFolder
from privfed.keyring import ledger_key, site_key
from privfed.privacy.ledger import Ledger

TINY = Config(
    rounds=1,
    privacy=Privacy(noise_multiplier=3.0, target_epsilon=50.0),
    aggregation=Aggregation(kind="plain"),
    evaluation=Evaluation(local_steps=1),
)


def picture(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mode)
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("content", ["notes.txt", "run.json", "config.toml"])
def test_a_folder_that_is_not_empty_is_refused_and_left_as_it_was(tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / content).write_text("mine")
    before = picture(tmp_path)
    with pytest.raises(RunFolderError, match="is not empty: nothing was changed"):
        privfed.run(TINY, out=tmp_path / "out")
    assert picture(tmp_path) == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(RunFolderError):
        privfed.run(TINY, out=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_ledger_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no ledger"):
        privfed.run(TINY, out=tmp_path / "out", ledger=tmp_path / "ledger.db")
    assert picture(tmp_path) == {}


def test_a_ledger_without_its_key_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.db").close()
    before = picture(tmp_path)
    with pytest.raises(RunFolderError, match=r"has no key file ledger\.db\.key"):
        privfed.run(TINY, out=tmp_path / "out", ledger=tmp_path / "ledger.db")
    assert picture(tmp_path) == before


def test_a_key_is_made_once_for_its_owner_alone_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.db"
    key = ledger_key(path)
    assert len(key) == 32 and any(key)
    file = path.with_name("ledger.db.key")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert ledger_key(path) == key
    names = {site_key(key, site, purpose) for site in ("a", "b") for purpose in ("noise", "fingerprint")}
    assert len(names | {key}) == 5


@pytest.mark.parametrize("damage", [b"", bytes(31), bytes(33)])
def test_a_damaged_key_is_named(tmp_path: Path, damage: bytes) -> None:
    ledger_key(tmp_path / "ledger.db")
    (tmp_path / "ledger.db.key").write_bytes(damage)
    with pytest.raises(RunFolderError, match=r"ledger\.db\.key is damaged: it must have 32 bytes"):
        ledger_key(tmp_path / "ledger.db")


def test_a_key_that_others_can_read_is_refused_with_the_remedy(tmp_path: Path) -> None:
    ledger_key(tmp_path / "ledger.db")
    os.chmod(tmp_path / "ledger.db.key", 0o640)
    with pytest.raises(RunFolderError, match="chmod 600"):
        ledger_key(tmp_path / "ledger.db")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "out", RunFacts(run="r", ledger="ledger.db", noise_multiplier=2.0), "# empty\n")


POINT = Checkpoint(3, {"theta": torch.arange(3.0)}, {"a/b c": {"theta": torch.ones(2)}, "d": {}}, {"e": 'spent "é"\n'})


def test_a_checkpoint_reads_back_and_replaces_the_last_one(folder: RunFolder) -> None:
    assert folder.load_checkpoint() is None
    folder.save_checkpoint(Checkpoint(1, {"theta": torch.zeros(3)}, {}, {}))
    folder.save_checkpoint(POINT)
    read = folder.load_checkpoint()
    assert read is not None
    assert (read.next_round, read.retired) == (3, POINT.retired)
    assert torch.equal(read.server["theta"], torch.arange(3.0))
    assert torch.equal(read.sites["a/b c"]["theta"], torch.ones(2))
    assert stat.S_IMODE((folder.path / CHECKPOINT).stat().st_mode) == 0o600
    assert not list(folder.path.glob("*.new"))


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_a_damaged_checkpoint_is_named_and_left_alone(folder: RunFolder, keep: int) -> None:
    folder.save_checkpoint(POINT)
    path = folder.path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:keep])
    before = picture(folder.path)
    with pytest.raises(RunFolderError, match=r"checkpoint\.safetensors is damaged"):
        folder.load_checkpoint()
    assert picture(folder.path) == before


def test_a_damaged_run_file_or_a_folder_of_something_else_is_named(folder: RunFolder, tmp_path: Path) -> None:
    (folder.path / "run.json").write_text('{"run": "r"')
    with pytest.raises(RunFolderError, match=r"run\.json is damaged"):
        folder.facts()
    with pytest.raises(RunFolderError, match="is not a run's folder"):
        privfed.resume(tmp_path)
    with pytest.raises(RunFolderError, match="there is no folder"):
        privfed.resume(tmp_path / "absent")


def test_metrics_cut_short_by_a_kill_lose_only_their_last_line(folder: RunFolder) -> None:
    for number in range(3):
        folder.add_metrics({"round": number})
    path = folder.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    assert folder.metrics() == [{"round": 0}, {"round": 1}]
    path.write_text('{"round": 0}\n{"rou\n{"round": 2}\n')
    with pytest.raises(RunFolderError, match="line 2 is damaged"):
        folder.metrics()


def test_one_process_at_a_time(folder: RunFolder) -> None:
    with folder.locked(), pytest.raises(RunFolderError, match="another process"), RunFolder(folder.path).locked():
        pass
    with folder.locked():
        pass
