"""The coordinator's side of a run whose records nobody here has: what is checked before it, and what it leaves."""

import hashlib
import json
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

from privfed import config_io, folder, seals, statements
from privfed.architecture import Schema, build_model, parameter_count, update_size
from privfed.cohort import cohort_of, held_out
from privfed.config import Config, SideNoise
from privfed.crypto.roster import Roster
from privfed.data.columns import input_names
from privfed.data.tables import Table
from privfed.errors import ConfigError
from privfed.federation import RoundReport
from privfed.folder import RunFacts, RunFolder
from privfed.methods import State
from privfed.noise_levels import meets_training, noise_levels, side_plan
from privfed.parameters import load_vector
from privfed.privacy.accountant import Accountant, Epsilon
from privfed.privacy.ledger import Ledger
from privfed.report import render
from privfed.schedule import Spending
from privfed.selection import check_selection
from privfed.standardisation import fold
from privfed.summary import Summary, report_of
from privfed.terms import checked_encoding, needs_key_holder
from privfed.witness import Witness

from . import papers
from .consortium import LEDGER, RUNS, Consortium
from .files import DeploymentError

STOP = "stop"
"""A file in a run's folder: end after this round."""

DRIVER = ".driver"
"""A file in a run's folder: held by the one command that submits its jobs."""


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
    if config.simulation.dropout or config.simulation.outages:
        raise ConfigError("simulation.dropout and simulation.outages are for simulations: leave them away")
    if reason := config.method.guarantee(config.privacy.unit, config.privacy.noise):
        raise ConfigError(reason)
    names = [member.name for member in roster.members]
    if needs_key_holder(config) and config.aggregation.key_holder not in names:
        raise ConfigError(
            "aggregation.kind = 'homomorphic' in a deployment needs aggregation.key_holder: the site that decrypts the "
            f"sums, one of {', '.join(names)}. A key holder that is no site is for simulations"
        )
    training = len(names) - len(held_out(config, names))
    cohort = cohort_of(config, training)
    if strangers := sorted(set(config.evaluation.public_sites) - set(names)):
        raise ConfigError(f"evaluation.public_sites: no site {strangers[0]!r}; sites are {', '.join(names)}")
    schema, accountant = papers.schema_of(terms), Accountant()
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
    ready = plan(config, consortium, roster_of(consortium))
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


def finished(home: RunFolder) -> Summary | None:
    """The summary of a run that is over."""
    path = home.path / folder.SUMMARY
    return msgspec.json.decode(path.read_bytes(), type=Summary) if path.exists() else None


def progress(home: RunFolder) -> list[RoundReport]:
    """The rounds that the checkpoint stands for."""
    checkpoint = home.load_checkpoint()
    return [report_of(line) for line in home.metrics(checkpoint.next_round)] if checkpoint else []


def roster_of(consortium: Consortium) -> Roster:
    roster = consortium.roster()
    if roster is None:
        raise DeploymentError(f"there is no roster yet: privfed consortium roster {consortium.home}")
    return roster


def spending(ready: Plan, sites: int) -> Spending | None:
    if ready.config.privacy.schedule == "constant":
        return None
    cohort = cohort_of(ready.config, sites)
    beside = meets_training(ready.config, side_plan(ready.config, cohort, ready.schema, ready.side_noise))
    size = update_size(ready.config, ready.schema.features, parameter_count(ready.config, ready.schema))
    return Spending(ready.config, size, ready.noise_multiplier, beside, ready.accountant)


def spent(book: Ledger, site: str, delta: float) -> Epsilon:
    """What a site last signed: its own ledger is not here."""
    words = [seals.read(body) for body in book.statements(site)]
    if not words:
        return Epsilon(0.0, delta, "pld", 0.0, {})
    last = words[-1]
    value = float("inf") if last.epsilon is None else last.epsilon
    return Epsilon(value, last.delta, last.accountant, 0.0, {})  # type: ignore[arg-type]  # as the site named it


def leave(
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
