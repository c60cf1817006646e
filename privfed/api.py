"""``privfed.run``: one call from a configuration to a finished run, and what it gives back."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch
from torch import nn

from privfed.privacy.accountant import Accountant
from privfed.privacy.events import PrivacyUnit
from privfed.privacy.ledger import Ledger

from . import config_io, folder, keyring, statements, watching
from .architecture import Schema, build_model, finisher, parameter_count, start_vector, update_size
from .cohort import cohort_of, held_out, training_sites
from .config import Config, SideNoise
from .data.records import Sites
from .doors import check_units
from .engines.contract import Progress, Watch
from .errors import ConfigError, DataError, RunFolderError
from .federation import Federation, RoundReport
from .folder import Checkpoint, RunFacts, RunFolder
from .grid import check_grid
from .methods import State
from .noise_levels import meets_training, noise_levels, side_plan
from .parameters import to_vector
from .report import render
from .schedule import Spending
from .selection import best, check_selection, stalled
from .simulation.consortium import Consortium, members, open_consortium
from .standardisation import fold
from .summary import Summary, claim_of, metrics_line, report_of, summarize
from .terms import checked_encoding, deployment_of, worthwhile_colluders
from .transfer.base import require_digest

Observer = Callable[[RoundReport], None]

_LOOK_SECONDS = 0.5  # who looks whether somebody is at work holds the folder for an instant


@dataclass(frozen=True)
class Run:
    """A finished (or cleanly ended) run.

    Attributes:
        folder: what it left on disk.
        summary: the figures that ``privfed run --json`` prints.
        reports: one per round.
        theta: float32[P], the global model's parameters, for inputs as the run standardised them.
    """

    folder: Path
    summary: Summary
    reports: tuple[RoundReport, ...] = field(repr=False)
    theta: torch.Tensor = field(repr=False)


@dataclass(frozen=True)
class Preparation:
    """A checked configuration with its data and its noise: nothing is written or spent yet."""

    config: Config
    data: Sites
    schema: Schema
    noise_multiplier: float
    side_noise: SideNoise
    accountant: Accountant = field(repr=False)
    baselines: dict[bytes, torch.Tensor] = field(default_factory=dict, repr=False)  # as of `Site`

    @property
    def training(self) -> tuple[str, ...]:
        """The sites that take part in training, by name."""
        unseen = held_out(self.config, list(self.data.sites))
        return tuple(name for name in self.data.sites if name not in unseen)


def prepare(config: Config, *, facts: RunFacts | None = None, data: Sites | None = None) -> Preparation:
    """Check that the configuration can run and promise what it claims; load the data; calibrate the noise.

    Args:
        config: what to run.
        facts: of an interrupted run, whose noise is calibrated already.
        data: what ``config.data.load`` gave for this seed and task; default read now.

    Raises:
        ConfigError: a combination that has no guarantee or does not fit the sites.
        DataError: the records can not be read.
    """
    config_io.check(config)
    config_io.check_used(config)
    check_selection(config)
    reason = config.method.guarantee(config.privacy.unit, config.privacy.noise)
    if reason is not None:
        raise ConfigError(reason)
    if data is None:
        if config.data.planned_sites is not None:  # what their number rules out is told before the long reading
            check_grid(config, training_sites(config, config.data.planned_sites))
        data = config.data.load(seed=config.seed, task=config.task)
    for records in data.sites.values() if config.method.sends else ():
        check_units(config, records)
    unseen = held_out(config, list(data.sites))
    if config.evaluation.unseen_fraction and not unseen:
        raise ConfigError(
            f"evaluation.unseen_fraction = {config.evaluation.unseen_fraction:g} of {len(data.sites)} sites is none: "
            "raise it, or name them in evaluation.unseen_sites"
        )
    if len(unseen) == len(data.sites):
        raise ConfigError("evaluation.unseen_sites and unseen_fraction hold every site out: none is left to train")
    cohort = cohort_of(config, len(data.sites) - len(unseen))
    check_grid(config, cohort.size)
    parties = members(config, data)
    if strangers := sorted(set(config.evaluation.public_sites) - set(data.sites)):
        raise ConfigError(f"evaluation.public_sites: no site {strangers[0]!r}; sites are {', '.join(data.sites)}")
    for outage in config.simulation.outages:
        if outage.site not in parties:
            raise ConfigError(f"simulation.outages: no site {outage.site!r}; sites are {', '.join(parties)}")
    accountant = Accountant()
    schema = Schema(features=len(data.inputs), classes=len(data.classes), ranges=data.ranges)
    if config.privacy.standardise_epsilon is not None and not data.ranges:
        raise ConfigError("privacy.standardise_epsilon needs a data source that declares its inputs' public ranges")
    _require_files(config)
    if facts is None:
        noise_multiplier, side_noise = noise_levels(config, cohort, schema, accountant)
    else:
        noise_multiplier, side_noise = facts.noise_multiplier, facts.side_noise
    size = update_size(config, schema.features, parameter_count(config, schema))
    if config.transfer.base is not None:
        start_vector(config, schema)  # a base of another shape is told before there is a folder
    checked_encoding(config, cohort, size, noise_multiplier)
    return Preparation(
        config=config,
        data=data,
        schema=schema,
        noise_multiplier=noise_multiplier,
        side_noise=side_noise,
        accountant=accountant,
    )


def _require_files(config: Config) -> None:
    """Return if what the configuration names beside its data is here, and is what it names.

    Raises:
        ConfigError, DataError: it is not, or fits no network of this run.
    """
    transfer = config.transfer
    if transfer.base is not None:
        require_digest(transfer.base, transfer.sha256, "transfer.sha256")
    if transfer.public_source is not None:
        if transfer.public_source.file is None:
            raise ConfigError("transfer.public_source needs one file")
        require_digest(transfer.public_source.file, transfer.source_sha256, "transfer.source_sha256")


def run(
    config: Config,
    *,
    out: Path | str | None = None,
    ledger: Path | str | None = None,
    observer: Observer | None = None,
    watch: Watch | None = None,
    prepared: Preparation | None = None,
    report: bool = True,
) -> Run:
    """Run a whole federation in this process.

    Args:
        config: what to run; ``load_config()`` gives the main job.
        out: a new or empty folder for the results; default ``runs/<name>-<time>``.
        ledger: an existing ledger to go on with, so that ε composes over runs; default a new one in the folder.
        observer: called with every round's report as it ends.
        watch: called on the way: how many sites a step of a round has reached.
        prepared: what `prepare` gave for this configuration, if it was called before.
        report: leave ``report.html`` too; it can be made of the folder later.

    Returns:
        The run. ``run.summary.complete`` tells whether all rounds were done.

    Raises:
        ConfigError, DataError, RunFolderError: before anything was spent.
    """
    name = f"{config.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    path = Path(out) if out is not None else Path("runs") / name
    folder.require_empty(path)
    if ledger is not None and not Path(ledger).is_file():
        raise ConfigError(f"there is no ledger at {ledger}; leave --ledger away to start a new one")
    if ledger is not None:
        keyring.ledger_key(Path(ledger))  # refused, without its key, before anything is written
    ready = prepared or prepare(config)
    book = folder.LEDGER if ledger is None else os.fspath(Path(ledger).absolute())
    facts = RunFacts(run=name, ledger=book, noise_multiplier=ready.noise_multiplier, side_noise=ready.side_noise)
    home = RunFolder.create(path, facts, config_io.to_toml(config))
    return _drive(ready, home, observer, watch, page=report)


def prepare_resumed(path: Path | str) -> Preparation:
    """`prepare` for the interrupted run in ``path``, with the noise it began with."""
    home = RunFolder.open(Path(path))
    config = config_io.load_config(home.path / folder.CONFIG)
    return prepare(config, facts=home.facts())


def resume(
    path: Path | str,
    *,
    observer: Observer | None = None,
    watch: Watch | None = None,
    prepared: Preparation | None = None,
    report: bool = True,
) -> Run:
    """Go on with an interrupted run where it stopped. A round that was cut short is the same round again.

    A run that has ended stays as it is.

    Args:
        path: the run's folder.
        observer: called with every further round's report.
        watch: as of `run`.
        prepared: what `prepare_resumed` gave, if it was called before.
        report: as of `run`.

    Raises:
        RunFolderError: the folder is damaged or in use; it says what. Nothing was changed.
        DataError: the records are no longer those that the run began with.
        LedgerCorrupt: the ledger does not verify.
    """
    return _drive(prepared or prepare_resumed(path), RunFolder.open(Path(path)), observer, watch, page=report)


def _drive(ready: Preparation, home: RunFolder, observer: Observer | None, watch: Watch | None, *, page: bool) -> Run:
    """Do the rounds that are left, from the folder's checkpoint or from the start."""
    config = ready.config
    torch.set_num_threads(config.simulation.threads)
    started = datetime.now(UTC)
    facts = home.facts()
    with home.locked(_LOOK_SECONDS):
        if (home.path / folder.SUMMARY).exists():
            return _ended(home, page=page)
        # All that could be wrong with the folder is found here, before anything is written
        home.require_whole()
        checkpoint = home.load_checkpoint()
        if checkpoint is None:
            start = to_vector(build_model(config, ready.schema))
            checkpoint = Checkpoint(0, config.method.init_server(start), {}, {})
        kept = checkpoint.kept
        lines = home.metrics(checkpoint.next_round)
        reports = [report_of(line) for line in lines]
        earlier = sum(report.seconds for report in reports)
        if reports:
            _same_spending(home, config, reports)
        opened = open_consortium(
            config,
            ready.data,
            ready.schema,
            ledger=home.ledger(),
            journal=home.path / folder.JOURNAL,
            accountant=ready.accountant,
            baselines=ready.baselines,
            watch=watch,
        )
        with opened as consortium, watching.telling(home.path) as told:
            _same_records(home, consortium)
            home.keep_metrics(lines)  # a line beyond the checkpoint is of the round that is now done again
            for name, private in checkpoint.sites.items():
                consortium.sites[name].restore(private, checkpoint.shared.get(name, {}))
            federation = Federation(
                config=config,
                run=facts.run,
                roster=consortium.roster,
                engine=consortium.engine,
                noise_multiplier=ready.noise_multiplier,
                side_noise=ready.side_noise,
                schema=ready.schema,
                state=checkpoint.server,
                spending=_spending(ready),
                done=reports,
                server_key=consortium.server_key,
                journal=consortium.journal,
                retired=checkpoint.retired,
                on_step=told,
            )
            rounds = federation.rounds()
            while not stalled(reports, config.metric, config.evaluation.patience):
                report = next(rounds, None)
                if report is None:
                    break
                reports.append(report)
                if config.evaluation.keep == "best" and best(reports, config.metric) == report.round:
                    kept = {name: tensor.clone() for name, tensor in federation.state.items()}
                consortium.witness.round(facts.run, report.round, report.words)
                home.add_metrics(metrics_line(facts.run, report))
                home.save_checkpoint(
                    Checkpoint(
                        federation.next_round,
                        federation.state,
                        {name: site.private_state for name, site in consortium.sites.items()},
                        federation.retired,
                        kept,
                        {name: site.shared_state for name, site in consortium.sites.items()},
                    )
                )
                if observer is not None:
                    observer(report)
            seconds = earlier + (datetime.now(UTC) - started).total_seconds()
            if watch is not None:
                watch(Progress("writing what the run leaves", 0, len(ready.data.sites)))
            summary = _summarised(ready, federation, consortium, reports, seconds)
            _leave(ready, home, kept or federation.state, consortium, summary, page=page)
    return Run(home.path, summary, tuple(reports), (kept or federation.state)["theta"])


def _spending(ready: Preparation) -> Spending | None:
    """Who chooses the noise of each round, where it is not one for all."""
    if ready.config.privacy.schedule == "constant":
        return None
    config, cohort = ready.config, cohort_of(ready.config, len(ready.training))
    beside = meets_training(config, side_plan(config, cohort, ready.schema, ready.side_noise))
    size = update_size(config, ready.schema.features, parameter_count(config, ready.schema))
    return Spending(config, size, ready.noise_multiplier, beside, ready.accountant)


def _summarised(
    ready: Preparation,
    federation: Federation,
    consortium: Consortium,
    reports: Sequence[RoundReport],
    seconds: float,
) -> Summary:
    """The figures of the rounds done, with ε as it stands in the sites' ledgers now."""
    config, sites = ready.config, {name: consortium.sites[name] for name in ready.training}
    cohort, delta = cohort_of(config, len(sites)), config.privacy.delta
    deployment, colluders = deployment_of(config, cohort), worthwhile_colluders(config, cohort)
    return summarize(
        config,
        run=federation.run,
        spent={name: site.book.spent(delta) for name, site in sites.items()},
        insecure=any(site.book.insecure_spends for site in sites.values()),
        simulated=ready.data.simulated,
        noise_multiplier=ready.noise_multiplier,
        reports=reports,
        retired=federation.retired,
        stopped_early=stalled(reports, config.metric, config.evaluation.patience) and len(reports) < config.rounds,
        exposed=[site.book.exposures(deployment, delta, colluders) for site in sites.values() if config.method.sends],
        seconds=seconds,
    )


def _ended(home: RunFolder, *, page: bool) -> Run:
    """The run that has ended in this folder, as it stands."""
    checkpoint = home.load_checkpoint()
    if checkpoint is None:
        raise RunFolderError(
            f"{home.path} has a {folder.SUMMARY} and no {folder.CHECKPOINT}: restore it from your copy"
        )
    reports = tuple(report_of(line) for line in home.metrics(checkpoint.next_round))
    _close_folder(home, page=page)
    return Run(home.path, _summary(home), reports, (checkpoint.kept or checkpoint.server)["theta"])


def _summary(home: RunFolder) -> Summary:
    try:
        return msgspec.json.decode((home.path / folder.SUMMARY).read_bytes(), type=Summary)
    except (msgspec.MsgspecError, OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{home.path / folder.SUMMARY} is damaged ({type(error).__name__})") from None


def _same_spending(home: RunFolder, config: Config, reports: Sequence[RoundReport]) -> None:
    """Raise if the ledger has lost what the rounds done so far have spent: an older copy would spend it again."""
    with Ledger(home.ledger()) as book:
        book.verify()
        entries = [line.entry for line in book.entries()]
    if config.privacy.unit is PrivacyUnit.NONE or not config.method.sends:
        return
    run = home.facts().run
    booked = {
        (entry.site, entry.round) for entry in entries if entry.kind in ("charge", "reserve") and entry.run == run
    }
    for report in reports:
        for site in report.contributed:
            if (site, report.round) not in booked:
                raise RunFolderError(
                    f"{home.ledger()} does not hold what {site} spent in round {report.round} of this run: it is an "
                    "older copy or another ledger. Restore the latest one; nothing was changed"
                )


def _leave(
    ready: Preparation, home: RunFolder, state: State, consortium: Consortium, summary: Summary, *, page: bool
) -> None:
    """Write what a finished run leaves, and erase what only an unfinished one needs."""

    whole = finisher(ready.config, ready.schema)

    def as_used(theta: torch.Tensor) -> nn.Module:
        model = whole(theta)
        fold(model, state)  # a user's inputs are not standardised
        return model

    about = {
        "run": summary.run,
        "claim": claim_of(summary.privacy),
        "inputs": json.dumps(ready.data.inputs),
        "classes": json.dumps(ready.data.classes),
    }
    home.save_tensors(folder.MODEL, dict(as_used(state["theta"]).named_parameters()), about)
    personal = {
        name: to_vector(as_used(site.private_state["theta"]))
        for name, site in consortium.sites.items()
        if site.private_state
    }
    home.save_tensors(folder.PERSONAL, personal, about)
    home.write(folder.KEYS, json.dumps(consortium.witness.public_keys, indent=2, ensure_ascii=False) + "\n")
    text = summary.to_json() + "\n"
    # Bound before it is there: a kill in between has the run end again, and no summary stands unbound
    digests = statements.digests(home.path) | {folder.SUMMARY: hashlib.sha256(text.encode()).hexdigest()}
    consortium.witness.ended(summary.run, digests)
    home.write(folder.SUMMARY, text)
    consortium.close()
    _close_folder(home, page=page)


def _close_folder(home: RunFolder, *, page: bool) -> None:
    """What comes after the summary; done again if a kill came in between."""
    (home.path / folder.JOURNAL).unlink(missing_ok=True)  # the last round's seeds: nothing will be done again
    if page and not (home.path / folder.REPORT).exists():
        home.write(folder.REPORT, render(home.path))


def _same_records(home: RunFolder, consortium: Consortium) -> None:
    """Raise `DataError` if the records differ from those that the run began with; note them if it begins now."""
    now = {name: site.fingerprint for name, site in consortium.sites.items()}
    before = home.datasets(now)
    changed = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
    if changed:
        raise DataError(
            f"the records of {', '.join(changed)} are not those that the run in {home.path} began with: a round done "
            "again on other records would be a second release. Restore them, or start a new run with --ledger "
            f"{home.ledger()}"
        )
