"""Runs the cells of a study: in parallel, resumable, one cell's failure no other's."""

import contextlib
import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from privfed import config_io, folder
from privfed.errors import ConfigError, PrivfedError

from .plan import Cell

CELLS, FAILURE = "cells", "failed.json"
Context = contextlib.AbstractContextManager[object]
BACKENDS = ("loky", "sequential", "ray", "dask")


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
        home: the study's folder.
        jobs: cells at a time.
        backend: "loky" (processes of this machine), "sequential", "ray" or "dask".
        address: of the cluster, for the last two.
        observer: called with each cell as it ends.

    Raises:
        ConfigError: the backend is not there.
    """
    import joblib

    root = home / CELLS
    root.mkdir(parents=True, exist_ok=True)
    texts = [(cell, config_io.to_toml(cell.config)) for cell in cells]
    finished: list[Done] = []
    with _backend(backend, address):
        tasks = joblib.Parallel(
            n_jobs=1 if backend == "sequential" else jobs,
            backend=None if backend in ("ray", "dask") else backend,
            return_as="generator_unordered" if backend in ("loky",) else "generator",
            batch_size=1,
        )(joblib.delayed(_run_cell)(number, text, str(root / cell.id)) for number, (cell, text) in enumerate(texts))
        for number, error, resumed in tasks:
            done = Done(cells[number], error, resumed)
            finished.append(done)
            observer(done)
    return tuple(sorted(finished, key=lambda done: cells.index(done.cell)))


def _run_cell(number: int, text: str, path: str) -> tuple[int, str | None, bool]:
    """One cell in a worker: what it needs travels as text."""
    import tomllib

    from privfed import api

    home = Path(path)
    try:
        if (home / folder.SUMMARY).exists() and not (home / folder.JOURNAL).exists():
            return number, None, True
        (home / FAILURE).unlink(missing_ok=True)
        if (home / folder.RUN).exists():
            api.resume(home, report=False)
            return number, None, True
        for leftover in home.glob("*") if home.exists() else ():  # of a kill before the run had begun
            leftover.unlink()
        api.run(config_io.decode(tomllib.loads(text)), out=home, report=False)
    except Exception as error:
        known = isinstance(error, PrivfedError | ValueError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        home.mkdir(parents=True, exist_ok=True)
        trace = None if known else traceback.format_exc()
        (home / FAILURE).write_text(json.dumps({"error": reason, "traceback": trace}, indent=2), encoding="utf-8")
        return number, reason, False
    return number, None, False


def _backend(name: str, address: str | None) -> Context:
    """joblib's context for a cluster that the user has; nothing for processes of this machine."""
    import joblib

    if name not in BACKENDS:
        raise ConfigError(f"--backend {name}: it must be one of {', '.join(BACKENDS)}")
    if name in ("loky", "sequential"):
        return contextlib.nullcontext()
    try:
        if name == "ray":
            import ray
            from ray.util.joblib import register_ray

            ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
            register_ray()
            return cast(Context, joblib.parallel_config(backend="ray"))
        from dask.distributed import Client

        return cast(Context, joblib.parallel_config(backend="dask", client=Client(address)))
    except ImportError as error:
        raise ConfigError(f"--backend {name} needs its package: pip install {name} ({error})") from None
