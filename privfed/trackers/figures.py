"""What trackers are given of a run."""

import math
import re
from pathlib import Path

from privfed.errors import RunFolderError
from privfed.folder import RUN, RunFolder
from privfed.report.standing import meaning, void
from privfed.summary import STATUS
from privfed.watching import Row, Watcher

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def identity(watcher: Watcher) -> tuple[str, float]:
    """The run's id, and when it began, in seconds of the clock.

    Raises:
        RunFolderError: there is no run, or its id is none that a tool can take.
    """
    path: Path = watcher.path
    if watcher.config is None:
        raise RunFolderError(f"there is no run in {path} yet")
    run = RunFolder(path).facts().run
    if not _NAME.fullmatch(run):
        raise RunFolderError(f"{path / RUN} names its run {run!r}: letters, digits, dots, dashes and underscores alone")
    return run, (path / RUN).stat().st_mtime


def figures(watcher: Watcher, row: Row) -> dict[str, float]:
    """One round's figures by name; those that it has."""
    config = watcher.config
    struck = config is not None and void(config, watcher.summary)
    found: dict[str, float | None] = {
        "loss": row.loss,
        "global": row.score,
        "global_deviation": row.deviation,
        "personalized": row.personalized,
        "epsilon_max_VOID" if struck else "epsilon_max": row.epsilon,
        "noise_multiplier": row.noise_multiplier,
        "clip": row.clip,
        "sites_invited": row.invited,
        "sites_contributed": row.contributed,
        "faults": len(row.faults),
        "bytes_up_per_site": row.bytes_up,
        "seconds": row.seconds,
    }
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def epsilon_is(watcher: Watcher) -> str:
    """What the run's ε is of. It stays the same while the run goes on, so that what was written holds."""
    assert watcher.config is not None
    return meaning(watcher.config, watcher.rows[:1], None)


def facts(watcher: Watcher) -> dict[str, str]:
    """What the figures are of; the same for all rounds."""
    config = watcher.config
    assert config is not None
    target = "" if config.privacy.noise_multiplier is not None else f"{config.privacy.target_epsilon:g}"
    return {
        "method": str(type(config.method).__struct_config__.tag),
        "rounds": str(config.rounds),
        "seed": str(config.seed),
        "metric": config.metric,
        "figures": STATUS[config.evaluation.release],
        "aggregation": config.aggregation.kind if config.method.sends else "none",
        "unit": config.privacy.unit.value,
        "noise": config.privacy.noise.value,
        "delta": f"{config.privacy.delta:g}",
        "target_epsilon": target,
    }
