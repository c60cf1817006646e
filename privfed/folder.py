"""A run's folder: what it leaves behind, written so that a kill at any instant loses nothing that stood there."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .errors import RunFolderError
from .methods import State

CONFIG, METRICS, MODEL, CHECKPOINT, SUMMARY, JOURNAL = (
    "config.toml",
    "metrics.jsonl",
    "model.safetensors",
    "checkpoint.safetensors",
    "summary.json",
    "journal.db",
)
LEDGER = "ledger.db"


class RunFolder:
    """One run's files.

    Args:
        path: the folder.

    Raises:
        RunFolderError: it holds another run already, or can not be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: str) -> "RunFolder":
        """A new folder with the effective configuration in it."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            remedy = "give another folder with --out"
            if (path / CONFIG).exists():
                remedy = (
                    f"continue it with --resume {path}, or start a new run in another folder that counts what was "
                    f"spent here: --out NEW --ledger {path / LEDGER}"
                )
            raise RunFolderError(f"{path} is not empty: nothing was changed; {remedy}")
        try:
            path.mkdir(parents=True, exist_ok=True)
            _replace(path / CONFIG, config.encode())
        except OSError as error:
            raise RunFolderError(f"can not write to {path}: {error.strerror}") from None
        return cls(path)

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one round to metrics.jsonl, durably."""
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(msgspec.json.encode(line).decode() + "\n")  # a number that is not finite becomes null
            file.flush()
            os.fsync(file.fileno())

    def save_checkpoint(self, state: State, *, run: str, next_round: int) -> None:
        """The server's state and where the run stands, replacing the last one in one step."""
        temporary = self.path / (CHECKPOINT + ".new")
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, temporary, metadata={"run": run, "next_round": str(next_round)})
        _settle(temporary, self.path / CHECKPOINT)

    def load_checkpoint(self) -> tuple[State, str, int]:
        """The state, the run's id and its next round.

        Raises:
            RunFolderError: there is none, or it is damaged.
        """
        path = self.path / CHECKPOINT
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            return load_file(path), metadata["run"], int(metadata["next_round"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise RunFolderError(f"{path} is not a checkpoint ({type(error).__name__}): nothing was changed") from None

    def write(self, name: str, text: str) -> None:
        """A whole text file, replaced in one step."""
        _replace(self.path / name, text.encode())


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(data)
    _settle(temporary, path)


def _settle(temporary: Path, path: Path) -> None:
    """Make ``temporary`` durable and give it its name: a reader sees the old file or the new one, never half of it."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
