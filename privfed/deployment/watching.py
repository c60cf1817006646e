"""Where a run stands, from its folder at the coordinator: for a person who looks on, and asking no site."""

from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

from privfed import config_io, folder
from privfed.federation import RoundReport
from privfed.folder import RunFolder

from . import runs, submission
from .blocks import Now
from .consortium import LAST, Consortium

QUIET_LOOKS = 10
"""So many looks in a row at which nobody is at work: the command and its job were ended, or killed."""


class View(msgspec.Struct, frozen=True, kw_only=True):
    """A run at one instant.

    Args:
        state: "at work"; "over"; "idle": nobody works on it, and resume goes on.
        done, planned: rounds.
        phase: what is waited for; empty between two rounds.
        sites_in, sites_out: who is asked now, or took part last; and the others.
        epsilon: the largest of any site, all its runs together.
        metric, score: the global model's, where sites release it.
        faults: refusals, dropouts and sums that were not released, of the last round; why the last block ended.
    """

    run: str
    state: Literal["at work", "over", "idle"]
    done: int
    planned: int
    phase: str = ""
    sites_in: tuple[str, ...] = ()
    sites_out: tuple[str, ...] = ()
    epsilon: float | None = None
    metric: str = ""
    score: float | None = None
    faults: tuple[str, ...] = ()


class Watcher:
    """Looks at one run again and again.

    Args:
        home: its folder.
    """

    def __init__(self, consortium: Consortium, home: RunFolder) -> None:
        self._consortium, self._home = consortium, home
        self._config = config_io.load_config(home.path / folder.CONFIG)
        roster = consortium.roster()
        self._names = tuple(member.name for member in roster.members) if roster else ()
        self.reports: list[RoundReport] = []

    def look(self) -> View:
        """Where it stands now."""
        self.reports = runs.progress(self._home)
        over = runs.finished(self._home) is not None
        working = not over and submission.under_way(self._home)
        now = self._now() if working else None
        last = self.reports[-1] if self.reports else None
        inside = now.asked if now else last.contributed if last else ()
        measured = [report for report in self.reports if report.measurements or report.released]
        figure = measured[-1].figures("global_score") if measured else None
        released = measured[-1].released if measured else None
        return View(
            run=self._home.path.name,
            state="over" if over else "at work" if working else "idle",
            done=len(self.reports),
            planned=self._config.rounds,
            phase=f"round {now.round + 1}: {now.step}" if now else "",
            sites_in=tuple(inside),
            sites_out=tuple(name for name in self._names if name not in inside),
            epsilon=measured[-1].epsilon if measured else None,
            metric=self._config.metric,
            score=released.score if released else figure.mean if figure else None,
            faults=(*(faults(last) if last else ()), *self._ended(over)),
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
            quiet = quiet + 1 if view.state == "idle" else 0
            if view != seen and not 0 < quiet < QUIET_LOOKS:  # between two blocks nobody may be at work
                yield view
                seen = view
            if view.state == "over" or quiet >= QUIET_LOOKS:
                return
            pause()

    def _now(self) -> Now | None:
        try:
            return msgspec.json.decode((self._home.path / runs.NOW).read_bytes(), type=Now)
        except (OSError, msgspec.MsgspecError):
            return None  # between two blocks

    def _ended(self, over: bool) -> tuple[str, ...]:
        path = self._consortium.home / LAST
        text = path.read_text().strip() if path.exists() and not over else ""
        return (f"the last block ended: {text}",) if text else ()


def faults(report: RoundReport) -> tuple[str, ...]:
    """What went wrong in a round."""
    found = [f"{site} refuses: {reason}" for site, reason in report.refused.items()]
    found += [f"{', '.join(sites)} did not answer {step}" for step, sites in report.dropped.items()]
    return (*found, *([f"no sum: {report.aborted}"] if report.aborted else []))
