"""The rounds of one job, at the coordinator: a checkpoint after each, and a word on where it stands for who watches.

One FLARE job is one block. Whatever is killed, the next block goes on from the checkpoint: a round that was cut short
is the same round again, for the same server key gives the same messages, and sites answer each of them once.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated

import msgspec
import torch
from msgspec import Meta

from privfed import config_io, folder
from privfed.architecture import build_model
from privfed.cohort import cohort_of, held_out
from privfed.config import Config
from privfed.crypto.journal import JournalFile, SQLiteJournal
from privfed.crypto.roster import Roster
from privfed.engines.contract import Engine
from privfed.federation import Federation, RoundReport
from privfed.folder import Checkpoint, RunFacts, RunFolder
from privfed.keyring import ledger_key, site_key
from privfed.methods import State
from privfed.parameters import to_vector
from privfed.privacy import noise
from privfed.privacy.ledger import Ledger
from privfed.seals import COORDINATOR
from privfed.selection import best, stalled
from privfed.summary import metrics_line, report_of, summarize
from privfed.terms import needs_key_holder
from privfed.watching import telling
from privfed.witness import Witness

from . import runs
from .consortium import LEDGER, Consortium
from .files import DeploymentError
from .runs import Plan

JOIN_SECONDS = 30
_LOOK_SECONDS = 2.0  # who looks whether somebody is at work holds the folder for an instant
_CLOSED = "policy.hours = "
"""How the reason of a site begins that takes part at other hours."""


class Block(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a job is for; its text.

    Args:
        run: a run's folder at the coordinator.
        rounds: at most so many.
        join_seconds: how long the coordinator waits for sites to come.
    """

    run: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    rounds: Annotated[int, Meta(ge=1, le=100_000)]
    join_seconds: Annotated[int, Meta(ge=1, le=86_400)] = JOIN_SECONDS

    def to_text(self) -> str:
        return f'run = "{self.run}"\nrounds = {self.rounds}\njoin_seconds = {self.join_seconds}\n'


def do_block(consortium: Consortium, block: Block, engine: Engine, present: Callable[[set[str]], set[str]]) -> bool:
    """The rounds of one block.

    Args:
        present: waits for sites; those that came.

    Returns:
        Whether the run is over.

    Raises:
        PrivfedError: why it can not go on.
    """
    torch.set_num_threads(1)
    home, roster = runs.find(consortium, block.run), runs.roster_of(consortium)
    config = config_io.load_config(home.path / folder.CONFIG)
    ready = runs.plan(config, consortium, roster, facts=home.facts())
    with home.locked(_LOOK_SECONDS), ExitStack() as stack:
        if (home.path / folder.SUMMARY).exists():
            return True
        home.require_whole()
        book = stack.enter_context(Ledger(consortium.home / LEDGER))
        told = stack.enter_context(telling(home.path))
        work = _Work(consortium, home, roster, ready, book)
        work.require(present)
        over = work.rounds(work.federation(engine, told), block.rounds)
        if over:
            work.finish()
    return over


@dataclass
class _Work:
    """A run as its checkpoint has it, and what its rounds add."""

    consortium: Consortium
    home: RunFolder
    roster: Roster
    ready: Plan
    book: Ledger
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        config, home = self.config, self.home
        checkpoint = home.load_checkpoint()
        if checkpoint is None:
            start = to_vector(build_model(config, self.ready.schema))
            checkpoint = Checkpoint(0, config.method.init_server(start), {}, {})
        self.checkpoint = checkpoint
        lines = home.metrics(checkpoint.next_round)
        self.reports: list[RoundReport] = [report_of(line) for line in lines]
        self.retired, self.kept, self.state = dict(checkpoint.retired), checkpoint.kept, checkpoint.server
        self.key = ledger_key(self.consortium.home / LEDGER)
        self.journal = SQLiteJournal(JournalFile(home.path / folder.JOURNAL), "")
        home.datasets({})  # the records are the sites' own affair
        home.keep_metrics(lines)
        members = {member.name: member.ledger_key for member in self.roster.members}
        self.members = tuple(members)
        self.unseen = held_out(config, self.members)
        self.witness = Witness(self.book, site_key(self.key, COORDINATOR, "ledger"), members)

    @property
    def config(self) -> Config:
        return self.ready.config

    @property
    def facts(self) -> RunFacts:
        return self.home.facts()

    def require(self, present: Callable[[set[str]], set[str]]) -> None:
        """Return if enough sites are there for a sum, and who decrypts it. Raises `DeploymentError`."""
        active = set(self.members) - set(self.retired)
        here = present(active)
        needed = cohort_of(self.config, len(active - self.unseen)).minimum_cohort
        missing = ", ".join(sorted(active - here))
        if len(here - self.unseen) < needed:
            raise DeploymentError(f"{len(here)} sites are there, a sum needs {needed}: {missing} did not come")
        if needs_key_holder(self.config) and self.config.aggregation.key_holder not in here:
            raise DeploymentError(f"the key holder {self.config.aggregation.key_holder} did not come")

    def federation(self, engine: Engine, told: Callable[[int, str, Sequence[str]], None]) -> Federation:
        ready = self.ready
        return Federation(
            config=self.config,
            run=self.facts.run,
            roster=self.roster,
            engine=engine,
            noise_multiplier=ready.noise_multiplier,
            side_noise=ready.side_noise,
            schema=ready.schema,
            state=self.state,
            spending=runs.spending(ready, len(self.members)),
            done=self.reports,
            server_key=noise.derive_key(self.key, b"coordinator"),
            journal=self.journal,
            retired=self.retired,
            on_step=told,
        )

    def rounds(self, federation: Federation, most: int) -> bool:
        """At most so many; whether the run is over."""
        coming, over = federation.rounds(), False
        for _ in range(most):
            report = None if self._stalled else next(coming, None)
            if report is None:
                over = True
                break
            _require_open(report)
            self._keep(report, federation)
            if (self.home.path / runs.STOP).exists():
                break
        self.retired, self.state = dict(federation.retired), federation.state
        return over or federation.next_round >= self.config.rounds

    @property
    def _stalled(self) -> bool:
        return stalled(self.reports, self.config.metric, self.config.evaluation.patience)

    def _keep(self, report: RoundReport, federation: Federation) -> None:
        """Have a round on disk; the checkpoint last, for with it the round is done."""
        self.reports.append(report)
        if self.config.evaluation.keep == "best" and best(self.reports, self.config.metric) == report.round:
            self.kept = {name: tensor.clone() for name, tensor in federation.state.items()}
        self.witness.round(self.facts.run, report.round, report.words)
        self.home.add_metrics(metrics_line(self.facts.run, report))
        self.home.save_checkpoint(
            Checkpoint(federation.next_round, federation.state, {}, federation.retired, self.kept)
        )

    def finish(self) -> None:
        """Write what a run that is over leaves."""
        config, reports = self.config, self.reports
        seconds = sum(report.seconds for report in reports) or (datetime.now(UTC) - self.started).total_seconds()
        spent = {name: runs.spent(self.book, name, config.privacy.delta) for name in self.members}
        summary = summarize(
            config,
            run=self.facts.run,
            spent={name: epsilon for name, epsilon in spent.items() if name not in self.unseen},
            insecure=config.privacy.insecure_seed is not None,
            simulated=False,
            noise_multiplier=self.ready.noise_multiplier,
            reports=reports,
            retired=self.retired,
            stopped_early=self._stalled and len(reports) < config.rounds,
            seconds=seconds,
        )
        state: State = self.kept or self.state
        runs.leave(self.ready, self.home, state, self.witness, summary, terms=self.consortium.terms)


def _require_open(report: RoundReport) -> None:
    """Return unless the round has no sum because sites take part at other hours: it is done again then.

    Raises:
        DeploymentError: the round counts as cut short; nothing of it is kept.
    """
    closed = [f"{site}: {reason}" for site, reason in report.refused.items() if reason.startswith(_CLOSED)]
    if report.aborted is not None and closed:
        raise DeploymentError(f"round {report.round + 1} waits for sites that are closed now ({'; '.join(closed)})")
