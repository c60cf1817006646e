"""A whole consortium in one process: sites, identities and the engine between them."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec
from torch import Tensor

from privfed.crypto.journal import Journal, JournalFile, SQLiteJournal
from privfed.crypto.keys import MemoisedVerify
from privfed.crypto.roster import FIRST_PREVIOUS, Identity, Roster
from privfed.privacy import noise
from privfed.privacy.accountant import Accountant
from privfed.privacy.ledger import Ledger
from privfed.privacy.selftest import SelfTest

from .. import keyring
from ..architecture import Schema, opened
from ..config import Config
from ..data.records import Sites, public_split_key
from ..doors import Network
from ..engines.contract import Engine, Handler, Progress, Watch
from ..engines.local import LocalEngine
from ..errors import ConfigError, RunFolderError
from ..key_holder import KeyHolder, SiteWithKey
from ..seals import COORDINATOR
from ..site import Site
from ..terms import KEY_HOLDER, needs_key_holder
from ..witness import Witness
from ..workers import workers
from .durable import AT_ONCE, DurableEngine
from .faults import FaultyEngine
from .together import CohortEngine, meeting

T = TypeVar("T")


@dataclass(frozen=True)
class Consortium:
    """Simulated sites and what a coordinator needs to reach them."""

    sites: Mapping[str, Site]
    roster: Roster
    engine: Engine
    witness: Witness
    server_key: bytes = field(repr=False)
    journal: Journal = field(repr=False)
    journal_file: JournalFile = field(repr=False)

    def close(self) -> None:
        """The run is over: what could replay its last round is erased, at once for all sites."""
        with self.journal_file.together():
            for site in self.sites.values():
                site.close()


@contextmanager
def open_consortium(
    config: Config,
    data: Sites,
    schema: Schema,
    *,
    ledger: Path,
    journal: Path,
    accountant: Accountant,
    network: Callable[[], Network] | None = None,
    baselines: MutableMapping[bytes, Tensor] | None = None,
    watch: Watch | None = None,
) -> Iterator[Consortium]:
    """Sites over the ledger at ``ledger``, whose key file gives each of them its own secrets.

    The same ledger gives the same identities and noise keys again, so that an interrupted run goes on as itself.

    Args:
        network, baselines: as of `Site`.
        watch: told how far the opening, and later each exchange, is.

    Raises:
        ConfigError: from `members`.
        RunFolderError, PrivacyError: the ledger or its key can not be used.
    """
    key = keyring.ledger_key(ledger)
    identities = {name: _identity(key, name) for name in members(config, data)}
    public = tuple(identity.member for identity in identities.values())
    roster = Roster(version=1, previous=FIRST_PREVIOUS, members=public)
    seed = config.privacy.insecure_seed
    processes = config.simulation.threads if needs_key_holder(config) else 1
    self_test, verify = SelfTest(), MemoisedVerify()
    # Whoever typed the configuration runs these sites too, and trusts what is named in it
    policy = msgspec.structs.replace(config.policy, trusted=(*config.policy.trusted, *opened(config)))
    with ExitStack() as stack:
        book, pool = stack.enter_context(Ledger(ledger)), stack.enter_context(workers(processes))
        answered = _journal_file(journal)
        together = meeting(config, data, schema) if network is None else None  # it knows the run's own alone
        if together is not None:
            stack.enter_context(together)
        sites = {
            name: Site(
                identity=identities[name],
                roster=roster,
                data=records,
                schema=schema,
                ledger=book,
                journal=SQLiteJournal(answered, name),
                fingerprint_key=keyring.site_key(key, name, "fingerprint"),
                noise_key=keyring.site_key(key, name, "noise")
                if seed is None
                else noise.insecure_key(seed, name.encode()),
                split_key=public_split_key(config.seed),
                insecure=seed is not None,
                policy=policy,
                accountant=accountant,
                pool=pool,
                self_test=self_test,
                network=network,
                oracle=together,
                verify=verify,
                baselines=baselines,
            )
            for name, records in _told(data.sites.items(), "opening the sites", len(data.sites), watch)
        }
        handlers: dict[str, Handler] = dict(sites)
        if needs_key_holder(config):
            name = config.aggregation.key_holder or KEY_HOLDER
            role = SQLiteJournal(answered, f"{name}, as key holder")
            key_holder = KeyHolder(identity=identities[name], roster=roster, journal=role, policy=policy)
            handlers[name] = SiteWithKey(sites[name], key_holder) if name in sites else key_holder
        carrier = LocalEngine(handlers) if together is None else CohortEngine(handlers, together)
        # The ledger is first on disk: what was answered is never ahead of what was spent
        durable = DurableEngine(carrier, answered.together, book.together, watch=watch)
        engine = FaultyEngine(durable, config.simulation, seed=config.seed)
        # No site has an empty name: the coordinator's memory is its own.
        members_of_ledger = {name: identities[name].member.ledger_key for name in sites}
        witness = Witness(book, keyring.site_key(key, COORDINATOR, "ledger"), members_of_ledger)
        server_key = noise.derive_key(key, b"coordinator")
        yield Consortium(sites, roster, engine, witness, server_key, SQLiteJournal(answered, ""), answered)


def _identity(key: bytes, name: str) -> Identity:
    """A party's keys, the same ones for the same ledger."""
    secagg, ledger = (keyring.site_key(key, name, purpose) for purpose in ("secagg", "ledger"))
    return Identity(name=name, secagg_private=secagg, ledger_private=ledger)


def _told(items: Iterable[T], what: str, number: int, watch: Watch | None) -> Iterator[T]:
    """The items, with word of how many have been taken."""
    for done, item in enumerate(items):
        if watch is not None and done % AT_ONCE == 0:
            watch(Progress(what, done, number))
        yield item


def members(config: Config, data: Sites) -> list[str]:
    """The roster's names: the sites, and after them a key holder of its own where one is needed.

    Raises:
        ConfigError: the key holder's name is taken by a site, or is that of none.
    """
    names, named = list(data.sites), config.aggregation.key_holder
    if COORDINATOR in names:
        raise ConfigError(f"a site is named {COORDINATOR!r}, which is the coordinator's name in the ledger: rename it")
    if not needs_key_holder(config):
        return names
    if named is None and KEY_HOLDER in names:
        raise ConfigError(f"a site is named {KEY_HOLDER!r}: rename it, or set aggregation.key_holder to a site's name")
    if named is not None and named not in names:
        raise ConfigError(
            f"aggregation.key_holder: no site {named!r}; sites are {', '.join(names)}. Without it, the key holder is a "
            "party of its own"
        )
    return names if named is not None else [*names, KEY_HOLDER]


def _journal_file(path: Path) -> JournalFile:
    try:
        return JournalFile(path)
    except sqlite3.DatabaseError as error:
        raise RunFolderError(f"{path} is damaged ({error}): restore it from your copy") from None
