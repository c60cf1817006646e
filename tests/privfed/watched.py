"""Folders of runs to look at, made without a run."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from privfed import folder
from privfed.folder import Checkpoint, RunFolder
from tests.privfed.test_report import make_folder


def watched(path: Path, sites: Sequence[str], *, over: bool = True, **more: Any) -> Path:
    """A run's folder with invented figures; one that is not over stands at its checkpoint."""
    make_folder(path, sites, **more)
    config = (path / folder.CONFIG).read_bytes()
    facts = {"run": "made", "ledger": "ledger.db", "noise_multiplier": 3.5}
    (path / folder.RUN).write_text(json.dumps(facts | {"config_sha256": hashlib.sha256(config).hexdigest()}))
    lines = [
        json.loads(text) | {"noise_multiplier": 3.5, "seconds": 0.25}
        for text in (path / folder.METRICS).read_text().splitlines()
    ]
    (path / folder.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not over:
        (path / folder.SUMMARY).unlink()
        stand_at(path, len(lines))
    return path


def stand_at(path: Path, next_round: int) -> None:
    """Write the checkpoint of a round."""
    RunFolder(path).save_checkpoint(Checkpoint(next_round, {"theta": torch.zeros(3)}, {}, {}))
