"""Doing a run block by block over a server that may be killed: our own checkpoint counts, never FLARE's word."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from privfed.errors import RunIncomplete
from privfed.federation import RoundReport
from privfed.folder import LOCK, RunFolder, held
from privfed.summary import Summary

from . import files, jobs, runs
from .blocks import JOIN_SECONDS, Block
from .consortium import ADMIN, JOB, LAST, Consortium
from .files import DeploymentError

BLOCK = 10
"""Rounds in a job. A site that was away comes back with the next one."""

_SERVER_SECONDS = 120.0  # a killed server is started again by whoever supervises it
_IDLE_SECONDS = 30.0  # a job that says it runs, and works on nothing any more, was lost with its server
_START_SECONDS = 180.0  # how long its processes may take to begin, on a machine that has much to do
_POLL_SECONDS = 0.3
_LOOK_SECONDS = 2.0  # as of blocks


def drive(
    consortium: Consortium,
    home: RunFolder,
    *,
    block: int = BLOCK,
    join_seconds: int = JOIN_SECONDS,
    observer: Callable[[RoundReport], None] | None = None,
) -> Summary:
    """Submit blocks until the run is over.

    Args:
        block: rounds in a job.
        join_seconds: how long each block waits for sites to come.
        observer: called with every round's report, those done before included.

    Raises:
        RunIncomplete: it was stopped, or two blocks in a row did nothing; `resume` goes on.
        DeploymentError: the server does not answer, or another command drives this run.
    """
    with files.locked(home.path / runs.DRIVER, f"{home.path}, as privfed coordinator submit or resume", _LOOK_SECONDS):
        return _drive(consortium, home, Block(home.path.name, block, join_seconds), observer)


def _drive(
    consortium: Consortium, home: RunFolder, block: Block, observer: Callable[[RoundReport], None] | None
) -> Summary:
    seen = idle = 0

    def tell() -> int:
        nonlocal seen
        reports = runs.progress(home)
        for report in reports[seen:] if observer else ():
            observer(report)  # type: ignore[misc]  # there is one
        seen = max(seen, len(reports))
        return len(reports)

    (home.path / runs.STOP).unlink(missing_ok=True)
    session = connect(consortium)
    try:
        while (done := runs.finished(home)) is None:
            before = tell()
            session = _one_block(consortium, home, session, block, tell)
            if (home.path / runs.STOP).exists() and runs.finished(home) is None:
                raise RunIncomplete(f"the run was stopped after round {tell()}: privfed coordinator resume goes on")
            idle = idle + 1 if tell() == before and runs.finished(home) is None else 0
            if idle == 2:
                raise RunIncomplete(f"the run does not go on after round {tell()}: {_reason(consortium)}")
        tell()
        return done
    finally:
        with suppress(Exception):
            session.close()


def connect(consortium: Consortium, seconds: float = _SERVER_SECONDS) -> Any:
    """A session with the consortium's server, waiting for it so long. Raises `DeploymentError`."""
    end = time.monotonic() + seconds
    while (session := jobs.login(consortium.home / ADMIN)) is None:
        if time.monotonic() > end:
            raise DeploymentError(
                f"no server answers at {consortium.terms.host}:{consortium.terms.port}: start it with "
                f"privfed coordinator start {consortium.home}"
            )
        time.sleep(1.0)
    return session


def _one_block(consortium: Consortium, home: RunFolder, session: Any, block: Block, tell: Callable[[], int]) -> Any:
    """Have one job done, or the one that is under way; the session, a new one if the server was lost."""
    under_way = home.path / "job.txt"
    job = under_way.read_text().strip() if under_way.exists() else ""
    if not job or not _works(home):
        folder = consortium.home / JOB
        fewest = 2  # FLARE's business is to have a job at all; who is needed for a sum is ours
        jobs.write_job(folder, block.to_text(), sites=fewest)
        job = session.submit_job(str(folder))
        files.write(under_way, job.encode())
    last_sign = time.monotonic()
    began = False
    while True:
        time.sleep(_POLL_SECONDS)
        tell()
        if runs.finished(home) is not None:
            return session
        if _works(home):
            began, last_sign = True, time.monotonic()
            continue
        try:
            status = jobs.status(session, job)
        except Exception:  # FLARE's own, of many kinds: the server is gone
            with suppress(Exception):
                session.close()
            session = connect(consortium)
            last_sign = time.monotonic()
            continue
        if jobs.is_over(status) or (began and _reason(consortium)):
            break
        quiet = _IDLE_SECONDS if began else max(_START_SECONDS, block.join_seconds)
        if status.startswith("RUNNING") and time.monotonic() - last_sign > quiet:
            with suppress(Exception):
                session.abort_job(job)
            break
        if not status.startswith("RUNNING") and time.monotonic() - last_sign > _SERVER_SECONDS:
            raise DeploymentError(f"the server does not begin with the job: its status is {status or 'unknown'}")
    under_way.unlink(missing_ok=True)
    return session


def under_way(home: RunFolder) -> bool:
    """Whether a command drives this run, or a job does rounds of it."""
    return _works(home) or held(home.path / runs.DRIVER)


def _works(home: RunFolder) -> bool:
    """Whether some process does rounds of this run now."""
    return held(home.path / LOCK)


def _reason(consortium: Consortium) -> str:
    path = consortium.home / LAST
    return path.read_text().strip() if path.exists() else ""
