"""Runs the cells of a study: in parallel, resumable, one cell's failure no other's."""

import contextlib
import json
import secrets
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import msgspec
from torch import Tensor

from privfed import config_io, folder
from privfed.config import Config
from privfed.data.records import Sites
from privfed.errors import PrivfedError, RunFolderError

from .backends import ended
from .plan import Cell

CELLS, FAILURE = "cells", "failed.json"


@dataclass(frozen=True)
class Done:
    """One cell that has ended, well or not.

    Attributes:
        error: why it failed; None if it did not.
        resumed: it had ended before, or went on from a kill.
    """

    cell: Cell
    error: str | None
    resumed: bool


def run_study(
    cells: Sequence[Cell],
    home: Path,
    *,
    jobs: int = 1,
    backend: str = "loky",
    address: str | None = None,
    observer: Callable[[Done], None] = lambda done: None,
) -> tuple[Done, ...]:
    """Run what has not ended yet.

    A cell's folder is a run's folder, with its own ledger. A killed study is started again with the same call: ended
    cells are left as they are, interrupted ones go on where they stopped, failed ones are tried again.

    Args:
        cells: what `plan.cells` gave.
        home: the study's folder. A cluster's workers must see it, and the records, under the same paths.
        jobs: cells at a time.
        backend: "loky" (processes of this machine), "sequential", "ray" or "dask".
        address: of the cluster, for the last two; default one of this machine's own, for as long as the study runs.
        observer: called with each cell as it ends.

    Raises:
        ConfigError, PrivfedError: from `ended`.
        RunFolderError: the study runs in this folder already, or nothing can be written there.
    """
    root = home.absolute() / CELLS  # a cluster's workers stand elsewhere
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"can not write into {home}: {error.strerror}") from None
    start = secrets.token_hex(8)  # workers outlive a study: what they hold is this start's alone
    order = sorted(range(len(cells)), key=lambda number: _read_as(cells[number].config))
    tasks = [(start, config_io.to_toml(cells[number].config), str(root / cells[number].id)) for number in order]
    finished: dict[int, Done] = {}
    with folder.locked(home):  # of two at once one would take the other's new cells for leftovers
        for place, outcome in ended(backend, address, jobs, _run_cell, tasks):
            number = order[place]
            failed, resumed = (f"its worker was lost ({outcome})", False) if isinstance(outcome, Exception) else outcome
            if failed is None and not (root / cells[number].id / folder.SUMMARY).exists():
                failed = f"it ended where {root} is another folder: a cluster's workers must see this one"
            finished[number] = Done(cells[number], failed, resumed)
            observer(finished[number])
    return tuple(finished[number] for number in range(len(cells)))


def _run_cell(task: tuple[str, str, str]) -> tuple[str | None, bool]:
    """One cell in a worker: what it needs travels as text. Why it failed, and whether it had ended or begun before."""
    import tomllib

    from privfed import api

    start, text, path = task
    home = Path(path)
    try:
        if (home / folder.SUMMARY).exists() and not (home / folder.JOURNAL).exists():
            return None, True
        (home / FAILURE).unlink(missing_ok=True)
        if (home / folder.RUN).exists():
            api.resume(home, report=False)
            return None, True
        for leftover in home.glob("*") if home.exists() else ():  # of a kill before the run had begun
            leftover.unlink()
        config = config_io.decode(tomllib.loads(text))
        data, baselines = _in_common(start, _read_as(config))
        api.run(config, out=home, prepared=replace(api.prepare(config, data=data), baselines=baselines), report=False)
    except Exception as error:
        known = isinstance(error, PrivfedError | ValueError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        trace = None if known else traceback.format_exc()
        with contextlib.suppress(OSError):  # a full disk, which may be the reason
            home.mkdir(parents=True, exist_ok=True)
            (home / FAILURE).write_text(json.dumps({"error": reason, "traceback": trace}, indent=2), encoding="utf-8")
        return reason, False
    return None, False


def _read_as(config: Config) -> bytes:
    """The same for runs on the same records."""
    return msgspec.msgpack.encode(Config(data=config.data, seed=config.seed, task=config.task))


@lru_cache(maxsize=1)  # cells on the same records come one after the other
def _in_common(start: str, read_as: bytes) -> tuple[Sites, dict[bytes, Tensor]]:
    """What a worker's runs on the same records share: these records, and the models of their sites alone."""
    config = msgspec.msgpack.decode(read_as, type=Config)
    return config.data.load(seed=config.seed, task=config.task), {}
