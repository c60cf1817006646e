"""``privfed.run``: one call from a configuration to a finished run, and what it gives back."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from privfed.crypto.journal import SQLiteJournal
from privfed.crypto.roster import FIRST_PREVIOUS, Identity, Roster
from privfed.privacy import noise
from privfed.privacy.accountant import Accountant
from privfed.privacy.calibration import noise_multiplier_for
from privfed.privacy.events import PrivacyUnit
from privfed.privacy.ledger import Ledger

from . import config_io, keyring
from .config import Config
from .data.records import Sites
from .engines.local import LocalEngine
from .errors import ConfigError
from .federation import Federation, RoundReport, cohort_of
from .folder import JOURNAL, LEDGER, MODEL, SUMMARY, RunFolder
from .parameters import load_vector, save_model, to_vector
from .simulation.faults import FaultyEngine
from .site import Schema, Site, build_model, planned_charges
from .summary import Summary, metrics_line, summarize

Observer = Callable[[RoundReport], None]


@dataclass(frozen=True)
class Run:
    """A finished (or cleanly ended) run.

    Attributes:
        folder: what it left on disk.
        summary: the figures that ``privfed run --json`` prints.
        reports: one per round.
        theta: float32[P], the global model's parameters.
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
    accountant: Accountant = field(repr=False)


def prepare(config: Config) -> Preparation:
    """Check that the configuration can run and promise what it claims; load the data; calibrate the noise.

    Raises:
        ConfigError: a combination that has no guarantee or does not fit the sites.
        DataError: the records can not be read.
    """
    config_io.check(config)
    reason = config.method.guarantee(config.privacy.unit, config.privacy.noise)
    if reason is not None:
        raise ConfigError(reason)
    data = config.data.load(seed=config.seed)
    if config.method.sends:
        cohort_of(config, len(data.sites))
    for outage in config.simulation.outages:
        if outage.site not in data.sites:
            raise ConfigError(f"simulation.outages: no site {outage.site!r}; sites are {', '.join(data.sites)}")
    accountant = Accountant()
    return Preparation(
        config=config,
        data=data,
        schema=Schema(features=len(data.inputs), classes=len(data.classes)),
        noise_multiplier=_noise_multiplier(config, accountant),
        accountant=accountant,
    )


def run(
    config: Config,
    *,
    out: Path | str | None = None,
    ledger: Path | str | None = None,
    observer: Observer | None = None,
    prepared: Preparation | None = None,
) -> Run:
    """Run a whole federation in this process.

    Args:
        config: what to run; ``load_config()`` gives the main job.
        out: a new or empty folder for the results; default ``runs/<name>-<time>``.
        ledger: an existing ledger to go on with, so that ε composes over runs; default a new one in the folder.
        observer: called with every round's report as it ends.
        prepared: what `prepare` gave for this configuration, if it was called before.

    Returns:
        The run. ``run.summary.complete`` tells whether all rounds ended with a sum.

    Raises:
        ConfigError, DataError, RunFolderError: before anything was spent.
    """
    ready = prepared or prepare(config)
    torch.set_num_threads(config.simulation.threads)
    name = f"{config.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    ledger_path = Path(ledger) if ledger is not None else None
    if ledger_path is not None and not ledger_path.exists():
        raise ConfigError(f"there is no ledger at {ledger_path}; leave --ledger away to start a new one")
    if ledger_path is not None:
        keyring.ledger_key(ledger_path)  # a ledger without its key is refused before anything is written
    folder = RunFolder.create(Path(out) if out is not None else Path("runs") / name, config_io.to_toml(config))
    ledger_path = ledger_path or folder.path / LEDGER
    key = keyring.ledger_key(ledger_path)
    with Ledger(ledger_path) as book:
        roster, sites = _sites(ready, folder, book, key)
        federation = _federation(ready, name, roster, sites)
        started = datetime.now(UTC)
        reports: list[RoundReport] = []
        for report in federation.rounds():
            reports.append(report)
            folder.add_metrics(metrics_line(name, report))
            folder.save_checkpoint(federation.state, run=name, next_round=federation.next_round)
            if observer is not None:
                observer(report)
        summary = summarize(
            ready.config,
            run=name,
            # From the ledger, not from the last measurement that came through: it is late, or never came.
            spent={name: site.spent(config.privacy.delta) for name, site in sites.items()},
            simulated=ready.data.simulated,
            noise_multiplier=ready.noise_multiplier,
            reports=reports,
            retired=federation.retired,
            seconds=(datetime.now(UTC) - started).total_seconds(),
        )
    model = build_model(config, ready.schema)
    load_vector(model, federation.state["theta"])
    save_model(folder.path / MODEL, model, _model_facts(ready, name))
    folder.write(SUMMARY, summary.to_json())
    return Run(folder.path, summary, tuple(reports), federation.state["theta"])


def _noise_multiplier(config: Config, accountant: Accountant) -> float:
    privacy = config.privacy
    if privacy.unit is PrivacyUnit.NONE or not config.method.sends:
        return 0.0
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    if privacy.target_epsilon is None:
        raise ConfigError("privacy needs target_epsilon (calibrates the noise) or noise_multiplier (fixes it)")
    try:
        return noise_multiplier_for(
            privacy.target_epsilon,
            privacy.delta,
            lambda sigma: planned_charges(config, sigma, config.rounds),
            accountant=accountant,
        )
    except ValueError as error:
        raise ConfigError(f"privacy.target_epsilon = {privacy.target_epsilon:g}: {error}") from None


def _sites(ready: Preparation, folder: RunFolder, book: Ledger, key: bytes) -> tuple[Roster, dict[str, Site]]:
    config = ready.config
    identities = {site: Identity.generate(site) for site in ready.data.sites}
    roster = Roster(
        version=1, previous=FIRST_PREVIOUS, members=tuple(identity.member for identity in identities.values())
    )
    sites: dict[str, Site] = {}
    insecure_seed = config.privacy.insecure_seed
    for site, records in ready.data.sites.items():
        secure_key = keyring.site_key(key, site, "noise")
        sites[site] = Site(
            identity=identities[site],
            roster=roster,
            data=records,
            schema=ready.schema,
            ledger=book,
            journal=SQLiteJournal(folder.path / JOURNAL, site),
            fingerprint_key=keyring.site_key(key, site, "fingerprint"),
            noise_key=secure_key if insecure_seed is None else noise.insecure_key(insecure_seed, site.encode()),
            insecure=insecure_seed is not None,
            policy=config.policy,
            accountant=ready.accountant,
        )
    return roster, sites


def _federation(ready: Preparation, name: str, roster: Roster, sites: Mapping[str, Site]) -> Federation:
    config = ready.config
    engine = FaultyEngine(LocalEngine(sites), config.simulation, seed=config.seed)
    start = to_vector(build_model(config, ready.schema))
    return Federation(
        config=config,
        run=name,
        roster=roster,
        engine=engine,
        noise_multiplier=ready.noise_multiplier,
        state=config.method.init_server(start),
    )


def _model_facts(ready: Preparation, name: str) -> Mapping[str, str]:
    facts: dict[str, Any] = {
        "run": name,
        "inputs": "\n".join(ready.data.inputs),
        "classes": "\n".join(ready.data.classes),
        "hidden": ",".join(map(str, ready.config.model.hidden)),
    }
    return facts
