"""Where a run stands, from its folder alone: for who looks on, and asking no site.

The round loop leaves a line a round and a checkpoint; this reads them as they come. Whatever is drawn of it, on a
terminal or on a page, shows no more: counts of sites, means over two sites or more, the largest ε, what failed.
"""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from . import config_io, folder
from .cohort import held_out
from .config import Config
from .errors import RunFolderError
from .federation import RoundReport
from .folder import RunFolder
from .summary import Summary, report_of
from .wire import printable

NOW = "now.json"
"""A file in a run's folder while somebody works on it: what is being waited for."""

QUIET_LOOKS = 10
"""So many looks in a row at which nobody is at work: the command and its job were ended, or killed."""

_NAMED = 8  # so many sites are told by name in one fault


class Now(msgspec.Struct, frozen=True):
    """now.json: what the coordinator waits for.

    Args:
        round: from 0.
        step: of the round's aggregation, or "evaluate".
        asked: the sites that it was sent to.
    """

    round: int
    step: str
    asked: tuple[str, ...]


class View(msgspec.Struct, frozen=True, kw_only=True):
    """A run at one instant.

    Args:
        state: "not begun": there is no run's folder yet; "at work"; "over"; "idle": nobody works on it, and resuming
            goes on.
        done, planned: rounds.
        phase: what is waited for; empty between two rounds.
        sites_in, sites_out: who is asked now, or took part last; and the others.
        epsilon: the largest of any site, all its runs together.
        metric, score: the global model's, where sites release it.
        faults: refusals, dropouts and sums that were not released, of the last round; why the last block ended.
    """

    run: str
    state: Literal["not begun", "at work", "over", "idle"]
    done: int
    planned: int
    phase: str = ""
    sites_in: tuple[str, ...] = ()
    sites_out: tuple[str, ...] = ()
    epsilon: float | None = None
    metric: str = ""
    score: float | None = None
    faults: tuple[str, ...] = ()


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One round.

    Args:
        round: from 0.
        contributed, invited: sites.
        loss, score, personalized: means over the sites that release them, two or more; or the one noised score of all.
        deviation: of a noised score, by its noise.
        epsilon: the largest of any site, all its runs together; None where no site measured.
        noise_multiplier, clip: of its updates, as of `RoundReport`.
        bytes_up: that a contributing site sent, mean.
        faults: what went wrong.
    """

    round: int
    contributed: int
    invited: int
    loss: float | None
    score: float | None
    personalized: float | None
    deviation: float | None
    epsilon: float | None
    noise_multiplier: float
    clip: float | None
    bytes_up: float
    seconds: float
    faults: tuple[str, ...]


@dataclass
class Attendance:
    """One site over the rounds so far.

    Attributes:
        fault: its last refusal or silence, with the round.
    """

    contributed: int = 0
    missed: int = 0
    fault: str = ""


def row_of(report: RoundReport) -> Row:
    """A round's report, without what belongs to single sites: a mean over one would be its very figure."""

    def mean(name: str) -> float | None:
        values = [getattr(measured, name) for measured in report.measurements.values()]
        spread = report.figures(name)
        return spread.mean if spread and sum(v is not None and math.isfinite(v) for v in values) > 1 else None

    released = report.released
    return Row(
        round=report.round,
        contributed=len(report.contributed),
        invited=len(report.invited),
        loss=mean("loss"),
        score=released.score if released else mean("global_score"),
        personalized=mean("personalized"),
        deviation=released.deviation if released else None,
        epsilon=report.epsilon,
        noise_multiplier=report.noise_multiplier,
        clip=report.clip,
        bytes_up=report.bytes_up,
        seconds=report.seconds,
        faults=faults(report),
    )


def faults(report: RoundReport) -> tuple[str, ...]:
    """What went wrong in a round: to be shown on a terminal, whoever made the folder."""
    found = [f"{site} refuses: {reason}" for site, reason in report.refused.items()]
    found += [f"{named(sites)} did not answer {step}" for step, sites in report.dropped.items()]
    found += [f"no sum: {report.aborted}"] if report.aborted else []
    return tuple(map(printable, found))


def named(sites: Sequence[str]) -> str:
    """Sites by name, as many as can be read."""
    more = len(sites) - _NAMED
    return printable(", ".join(sites[:_NAMED])) + (f" and {more} more" if more > 0 else "")


@contextmanager
def telling(home: Path) -> Iterator[Callable[[int, str, Sequence[str]], None]]:
    """Keeps now.json in a run's folder, for `Federation`'s on_step; it is gone when nobody is at work.

    A folder in which nothing was begun is left as it stood.
    """
    path = home / NOW
    draft = path.with_suffix(".new")
    told = False

    def tell(round: int, step: str, asked: Sequence[str]) -> None:
        nonlocal told
        told = True
        with suppress(OSError):  # who looks on never ends a run
            draft.write_bytes(msgspec.json.encode(Now(round, step, tuple(asked))))
            draft.replace(path)

    try:
        yield tell
    finally:
        if told:
            path.unlink(missing_ok=True)


class Watcher:
    """Looks at one run again and again, and reads only what is new.

    Args:
        home: its folder, which need not be there yet.
        names: all sites; default those that its folder tells of.
        working: whether some process works on it.
        remark: what else went wrong, beside the rounds; asked while the run is not over.

    Attributes:
        path: the folder.
        config: once it has begun.
        rows: the rounds so far.
        sites: who was ever invited.
        summary: once it is over.

    Guarantees:
        Nothing is written, nobody is kept from working, and neither ledger nor tensors are opened. A round shows once
        its checkpoint stands: one that is done again does not show twice.
    """

    def __init__(
        self,
        home: Path,
        *,
        names: Sequence[str] | None = None,
        working: Callable[[RunFolder], bool] = lambda home: folder.held(home.path / folder.LOCK),
        remark: Callable[[], str] = lambda: "",
    ) -> None:
        self.path = home
        self._home, self._given, self._working, self._remark = RunFolder(home), names, working, remark
        self._forget()
        self._identity: tuple[int, int] | None = None

    def look(self) -> View:
        """Where it stands now.

        Raises:
            RunFolderError, ConfigError: the folder is damaged; it says what.
        """
        config = self._begun()
        if config is None:
            return View(run=self._home.path.name, state="not begun", done=0, planned=0)
        working = self._working(self._home)
        self._read_summary()  # before the rounds: once it is there, all of them are
        self._read_rounds()
        over = self.summary is not None
        now = self._now() if working and not over else None
        inside = now.asked if now else self._last.contributed if self._last else ()
        measured = [row for row in self.rows if row.epsilon is not None or row.score is not None]
        remark = "" if over else printable(self._remark())
        return View(
            run=self._home.path.name,
            state="over" if over else "at work" if working else "idle",
            done=len(self.rows),
            planned=config.rounds,
            phase=printable(f"round {now.round + 1}: {now.step}") if now else "",
            sites_in=tuple(inside),
            sites_out=self._others(config, inside),
            epsilon=measured[-1].epsilon if measured else None,
            metric=config.metric,
            score=measured[-1].score if measured else None,
            faults=(*(self.rows[-1].faults if self.rows else ()), *([remark] if remark else [])),
        )

    def follow(self, pause: Callable[[], None]) -> Iterator[View]:
        """What changes, until the run is over or nobody works on it any more.

        Args:
            pause: between two looks.
        """
        seen: View | None = None
        quiet = 0
        while True:
            view = self.look()
            resting = view.state in ("idle", "not begun")
            quiet = quiet + 1 if resting else 0
            if view != seen and not 0 < quiet < QUIET_LOOKS:  # between two blocks nobody may be at work
                yield view
                seen = view
            if view.state == "over" or quiet >= QUIET_LOOKS:
                return
            pause()

    def _forget(self) -> None:
        """Begin anew: nothing of the run is known."""
        self.config: Config | None = None
        self.summary: Summary | None = None
        self._names: tuple[str, ...] = ()
        self._forget_rounds()

    def _forget_rounds(self) -> None:
        self.rows: list[Row] = []
        self.sites: dict[str, Attendance] = {}
        self._last: RoundReport | None = None
        self._lines = _Lines(self._home.path / folder.METRICS)

    def _begun(self) -> Config | None:
        """The configuration; None before the run has begun. Another run in the same place is found out."""
        try:
            facts = (self._home.path / folder.RUN).stat()
        except OSError:
            self._forget()
            self._identity = None
            return None
        if (identity := (facts.st_ino, facts.st_mtime_ns)) != self._identity:
            self._forget()
            self.config = config_io.load_config(RunFolder.open(self._home.path).path / folder.CONFIG)
            self._identity = identity
        return self.config

    def _read_summary(self) -> None:
        if self.summary is None:
            with suppress(FileNotFoundError):
                text = (self._home.path / folder.SUMMARY).read_bytes()
                try:
                    self.summary = msgspec.json.decode(text, type=Summary)
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    raise RunFolderError(f"{folder.SUMMARY} is damaged ({type(error).__name__})") from None

    def _read_rounds(self) -> None:
        """The rounds that the checkpoint stands for. It follows the lines, so it is read first."""
        stands = self._home.next_round() if self.summary is None else self.summary.rounds
        if self._lines.replaced() or len(self.rows) > stands:
            self._forget_rounds()
        self._lines.read()
        while len(self.rows) < stands and self._lines.waiting:
            number, text = len(self.rows), self._lines.waiting[0]
            try:
                report = report_of(json.loads(text))
                if report.round != number:
                    raise ValueError
            except (ValueError, TypeError, RunFolderError) as error:
                raise RunFolderError(
                    f"{folder.METRICS}: line {number + 1} is damaged ({type(error).__name__})"
                ) from None
            self._lines.waiting.popleft()
            self._count(report)
            self.rows.append(row_of(report))
            self._last = report

    def _count(self, report: RoundReport) -> None:
        given = set(report.contributed)
        for name in report.invited:
            site = self.sites.setdefault(name, Attendance())
            site.contributed += name in given
            site.missed += name not in given
        told = {name: f"refuses: {reason}" for name, reason in report.refused.items()}
        told |= {name: f"did not answer {step}" for step, names in report.dropped.items() for name in names}
        for name, words in told.items():
            self.sites.setdefault(name, Attendance()).fault = printable(f"round {report.round + 1}: {words}")

    def _others(self, config: Config, inside: Sequence[str]) -> tuple[str, ...]:
        """The sites of the run that are not ``inside``; those that are held out of training take part in none."""
        if not self._names:
            self._names = tuple(self._given) if self._given is not None else self._told()
            if self._names:
                unseen = held_out(config, self._names)
                self._names = tuple(name for name in self._names if name not in unseen)
        here = set(inside)
        return tuple(name for name in self._names or self.sites if name not in here)

    def _told(self) -> tuple[str, ...]:
        """The sites whose records the run began with."""
        try:
            return tuple(msgspec.json.decode((self._home.path / folder.DATASETS).read_bytes(), type=dict[str, str]))
        except (OSError, msgspec.MsgspecError):
            return ()

    def _now(self) -> Now | None:
        try:
            return msgspec.json.decode((self._home.path / NOW).read_bytes(), type=Now)
        except (OSError, msgspec.MsgspecError):
            return None  # between two blocks


@dataclass
class _Lines:
    """A file of lines that grows; a resumed run replaces it."""

    path: Path
    waiting: deque[bytes] = field(default_factory=deque)
    _file: int | None = None
    _at: int = 0
    _rest: bytes = b""

    def replaced(self) -> bool:
        """Whether it is no longer the file that was read."""
        try:
            facts = self.path.stat()
        except FileNotFoundError:
            return self._file is not None
        return self._file is not None and (facts.st_ino != self._file or facts.st_size < self._at)

    def read(self) -> None:
        """Take in the whole lines that are new; one that is half written stays for the next time."""
        try:
            with self.path.open("rb") as file:
                number = os.fstat(file.fileno()).st_ino
                if self._file not in (None, number):
                    return  # replaced this very moment: the next look begins anew
                self._file = number
                file.seek(self._at)
                text = file.read()
        except FileNotFoundError:
            return
        self._at += len(text)
        *whole, self._rest = (self._rest + text).split(b"\n")
        self.waiting += whole
