"""The coordinator's side of a run that has no records: rounds in blocks, a checkpoint after each round.

One FLARE job is one block. Whatever is killed, the next block goes on from the checkpoint: a round that was cut short
is the same round again, for the same server key gives the same messages, and sites answer each of them once.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated

import msgspec
import torch
from msgspec import Meta

from privfed import config_io, folder, seals, statements
from privfed.cohort import cohort_of, held_out
from privfed.config import Config, SideNoise
from privfed.crypto.journal import JournalFile, SQLiteJournal
from privfed.crypto.roster import Roster
from privfed.data.columns import input_names, input_ranges
from privfed.data.tables import Table
from privfed.engines.contract import Engine
from privfed.errors import ConfigError
from privfed.federation import Federation, RoundReport
from privfed.folder import Checkpoint, RunFacts, RunFolder
from privfed.keyring import ledger_key, site_key
from privfed.methods import State
from privfed.noise_levels import meets_training, noise_levels, side_plan
from privfed.parameters import load_vector, to_vector
from privfed.privacy import noise
from privfed.privacy.accountant import Accountant, Epsilon
from privfed.privacy.ledger import Ledger
from privfed.report import render
from privfed.schedule import Spending
from privfed.seals import COORDINATOR
from privfed.selection import best, check_selection, stalled
from privfed.standardisation import fold
from privfed.summary import Summary, metrics_line, report_of, summarize
from privfed.terms import Schema, build_model, checked_encoding, needs_key_holder, parameter_count, update_size
from privfed.witness import Witness

from . import papers
from .consortium import LEDGER, RUNS, Consortium
from .files import DeploymentError

STOP = "stop"
"""A file in a run's folder: end after this round."""

JOIN_SECONDS = 30.0


class Block(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a job is for; its text.

    Args:
        run: a run's folder at the coordinator.
        rounds: at most so many.
    """

    run: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    rounds: Annotated[int, Meta(ge=1, le=100_000)]

    def to_text(self) -> str:
        return f'run = "{self.run}"\nrounds = {self.rounds}\n'


@dataclass(frozen=True)
class Plan:
    """A checked configuration and its noise, for sites whose records nobody else has."""

    config: Config
    schema: Schema
    noise_multiplier: float
    side_noise: SideNoise
    accountant: Accountant = field(repr=False)


def plan(config: Config, consortium: Consortium, roster: Roster, *, facts: RunFacts | None = None) -> Plan:
    """`api.prepare` without records.

    Raises:
        ConfigError: a combination that has no guarantee, or that does not fit the consortium.
    """
    config_io.check(config)
    config_io.check_used(config)
    check_selection(config)
    terms = consortium.terms
    if not isinstance(config.data, Table) or papers.agreed(config.data) != terms.data or config.task != terms.task:
        raise ConfigError(
            f"the experiment's data and task are not those of {consortium.home / papers.TERMS}: sites would refuse it"
        )
    if needs_key_holder(config):
        raise ConfigError("aggregation.kind = 'homomorphic' is not deployed yet: use 'masked'")
    if config.simulation.dropout or config.simulation.outages:
        raise ConfigError("simulation.dropout and simulation.outages are for simulations: leave them away")
    if reason := config.method.guarantee(config.privacy.unit, config.privacy.noise):
        raise ConfigError(reason)
    names = [member.name for member in roster.members]
    training = len(names) - len(held_out(config, names))
    cohort = cohort_of(config, training)
    if strangers := sorted(set(config.evaluation.public_sites) - set(names)):
        raise ConfigError(f"evaluation.public_sites: no site {strangers[0]!r}; sites are {', '.join(names)}")
    columns, accountant = terms.data.columns, Accountant()
    schema = Schema(len(input_names(columns)), len(terms.data.classes), input_ranges(columns))
    levels = noise_levels(config, cohort, schema, accountant) if facts is None else None
    noise_multiplier, side_noise = levels or (facts.noise_multiplier, facts.side_noise)  # type: ignore[union-attr]
    size = update_size(config, schema.features, parameter_count(config, schema))
    checked_encoding(config, cohort, size, noise_multiplier)
    return Plan(config, schema, noise_multiplier, side_noise, accountant)


def begin(consortium: Consortium, config: Config) -> RunFolder:
    """The folder of a new run.

    Raises:
        ConfigError, DeploymentError: nothing was written.
    """
    ready = plan(config, consortium, _roster(consortium))
    name = f"{config.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    facts = RunFacts(name, str(consortium.home / LEDGER), ready.noise_multiplier, ready.side_noise)
    return RunFolder.create(consortium.home / RUNS / name, facts, config_io.to_toml(config))


def find(consortium: Consortium, run: str | None) -> RunFolder:
    """A run by its name; the latest one without."""
    runs = consortium.home / RUNS
    if run is None:
        found = sorted(runs.glob("*/run.json"), key=lambda path: path.stat().st_mtime_ns)
        if not found:
            raise DeploymentError(
                f"{consortium.home} has no run yet: privfed coordinator submit {consortium.home} FILE"
            )
        return RunFolder.open(found[-1].parent)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", run):
        raise DeploymentError(f"{run!r} is not the name of a run")
    return RunFolder.open(runs / run)


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
    home, roster = find(consortium, block.run), _roster(consortium)
    config = config_io.load_config(home.path / folder.CONFIG)
    facts = home.facts()
    ready = plan(config, consortium, roster, facts=facts)
    started = datetime.now(UTC)
    with home.locked(), ExitStack() as stack:
        if (home.path / folder.SUMMARY).exists():
            return True
        home.require_whole()
        checkpoint = home.load_checkpoint()
        if checkpoint is None:
            start = to_vector(build_model(config, ready.schema))
            checkpoint = Checkpoint(0, config.method.init_server(start), {}, {})
        kept, lines = checkpoint.kept, home.metrics(checkpoint.next_round)
        reports = [report_of(line) for line in lines]
        key = ledger_key(consortium.home / LEDGER)
        book = stack.enter_context(Ledger(consortium.home / LEDGER))
        journal = SQLiteJournal(JournalFile(home.path / folder.JOURNAL), "")
        home.datasets({})  # the records are the sites' own affair
        home.keep_metrics(lines)
        members = {member.name: member.ledger_key for member in roster.members}
        witness = Witness(book, site_key(key, COORDINATOR, "ledger"), members)
        federation = Federation(
            config=config,
            run=facts.run,
            roster=roster,
            engine=engine,
            noise_multiplier=ready.noise_multiplier,
            side_noise=ready.side_noise,
            schema=ready.schema,
            state=checkpoint.server,
            spending=_spending(ready, len(members)),
            done=reports,
            server_key=noise.derive_key(key, b"coordinator"),
            journal=journal,
            retired=checkpoint.retired,
        )
        active = set(members) - set(checkpoint.retired)
        unseen = held_out(config, list(members))
        here = present(active)
        needed = cohort_of(config, len(active - unseen)).minimum_cohort
        if len(here - unseen) < needed:
            missing = ", ".join(sorted(active - here))
            raise DeploymentError(f"{len(here)} sites are there, a sum needs {needed}: {missing} did not come")
        rounds, over = federation.rounds(), False
        for _ in range(block.rounds):
            over = stalled(reports, config.metric, config.evaluation.patience)
            report = None if over else next(rounds, None)
            if report is None:
                over = True
                break
            reports.append(report)
            if config.evaluation.keep == "best" and best(reports, config.metric) == report.round:
                kept = {name: tensor.clone() for name, tensor in federation.state.items()}
            witness.round(facts.run, report.round, report.words)
            home.add_metrics(metrics_line(facts.run, report))
            home.save_checkpoint(Checkpoint(federation.next_round, federation.state, {}, federation.retired, kept))
            if (home.path / STOP).exists():
                break
        over = over or federation.next_round >= config.rounds
        if over:
            seconds = sum(report.seconds for report in reports) or (datetime.now(UTC) - started).total_seconds()
            spent = {name: _spent(book, name, config.privacy.delta) for name in members}
            summary = summarize(
                config,
                run=facts.run,
                spent={name: epsilon for name, epsilon in spent.items() if name not in unseen},
                insecure=config.privacy.insecure_seed is not None,
                simulated=False,
                noise_multiplier=ready.noise_multiplier,
                reports=reports,
                retired=federation.retired,
                stopped_early=stalled(reports, config.metric, config.evaluation.patience)
                and len(reports) < config.rounds,
                seconds=seconds,
            )
            _leave(ready, home, kept or federation.state, witness, summary, terms=consortium.terms)
    return over


def finished(home: RunFolder) -> Summary | None:
    """The summary of a run that is over."""
    path = home.path / folder.SUMMARY
    return msgspec.json.decode(path.read_bytes(), type=Summary) if path.exists() else None


def progress(home: RunFolder) -> list[RoundReport]:
    """The rounds that the checkpoint stands for."""
    checkpoint = home.load_checkpoint()
    return [report_of(line) for line in home.metrics(checkpoint.next_round)] if checkpoint else []


def _roster(consortium: Consortium) -> Roster:
    roster = consortium.roster()
    if roster is None:
        raise DeploymentError(f"there is no roster yet: privfed consortium roster {consortium.home}")
    return roster


def _spending(ready: Plan, sites: int) -> Spending | None:
    if ready.config.privacy.schedule == "constant":
        return None
    cohort = cohort_of(ready.config, sites)
    beside = meets_training(ready.config, side_plan(ready.config, cohort, ready.schema, ready.side_noise))
    size = update_size(ready.config, ready.schema.features, parameter_count(ready.config, ready.schema))
    return Spending(ready.config, size, ready.noise_multiplier, beside, ready.accountant)


def _spent(book: Ledger, site: str, delta: float) -> Epsilon:
    """What a site last signed: its own ledger is not here."""
    words = [seals.read(body) for body in book.statements(site)]
    if not words:
        return Epsilon(0.0, delta, "pld", 0.0, {})
    last = words[-1]
    value = float("inf") if last.epsilon is None else last.epsilon
    return Epsilon(value, last.delta, last.accountant, 0.0, {})  # type: ignore[arg-type]  # as the site named it


def _leave(
    ready: Plan,
    home: RunFolder,
    state: State,
    witness: Witness,
    summary: Summary,
    *,
    terms: papers.Terms,
) -> None:
    """Write what a finished run leaves at the coordinator. Personal models stay at their sites."""
    model = build_model(ready.config, ready.schema)
    load_vector(model, state["theta"])
    fold(model, state)
    about = {
        "run": summary.run,
        "inputs": json.dumps(input_names(terms.data.columns)),
        "classes": json.dumps(tuple(terms.data.classes)),
    }
    home.save_tensors(folder.MODEL, dict(model.named_parameters()), about)
    home.write(folder.KEYS, json.dumps(witness.public_keys, indent=2) + "\n")
    text = summary.to_json() + "\n"
    digests = statements.digests(home.path) | {folder.SUMMARY: hashlib.sha256(text.encode()).hexdigest()}
    witness.ended(summary.run, digests)
    home.write(folder.SUMMARY, text)
    (home.path / folder.JOURNAL).unlink(missing_ok=True)
    home.write(folder.REPORT, render(home.path))
