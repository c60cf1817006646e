"""A small consortium on made-up records, with everything in the test's hands: keys, journals, ledger, messages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from privfed import wire
from privfed.architecture import Schema, build_model
from privfed.cohort import Cohort, cohort_of
from privfed.config import Config, Evaluation, Policy, Privacy, SideNoise
from privfed.crypto.journal import Journal, MemoryJournal
from privfed.crypto.roster import FIRST_PREVIOUS, Identity, Roster
from privfed.data.records import SiteData, public_split_key
from privfed.engines.contract import Engine
from privfed.engines.local import LocalEngine
from privfed.federation import Federation
from privfed.methods import FedAvg
from privfed.parameters import encode, to_vector
from privfed.privacy.accountant import Accountant
from privfed.privacy.ledger import Ledger, Recorded
from privfed.privacy.selftest import SelfTest
from privfed.simulation.faults import FaultyEngine
from privfed.site import Site
from privfed.terms import checked_encoding
from tests.crypto.consortium import stream

SCHEMA = Schema(features=3, classes=2)
SIZE = 3 * 2 + 2  # logistic regression of three inputs on two classes
ACCOUNTANT = Accountant()  # shared for its caches
SELF_TEST = SelfTest()  # shared as in a simulation: the code is the same
SIGMA = 2.0
NO_SIDE_NOISE = SideNoise()
MARK = 7.25  # every record holds it: nothing that leaves may


def config(**changes: Any) -> Config:
    """Cheap, with a fixed noise: nothing is calibrated."""
    fields: dict[str, Any] = {
        "name": "toy",
        "rounds": 3,
        "method": FedAvg(local_steps=1, lr=0.5, personal_steps=1),
        "privacy": Privacy(noise_multiplier=SIGMA, target_epsilon=50.0, expected_batch_size=10.0),
        "evaluation": Evaluation(local_steps=1),
    }
    return Config(**{**fields, **changes})


def records(seed: int, n: int = 40) -> SiteData:
    randomness = np.random.default_rng(seed)
    targets = randomness.integers(0, 2, n)
    inputs = randomness.normal(size=(n, 3)) + targets[:, None]
    inputs[:, 2] = MARK
    ids = randomness.integers(0, 2**63, n).astype(np.uint64)
    return SiteData(ids, torch.from_numpy(inputs).float(), torch.from_numpy(targets))


def key(site: str, purpose: str) -> bytes:
    return f"{site} {purpose}".encode().ljust(32, b".")[:32]


def round_plan(config: Config) -> wire.RoundPlan:
    """The first round of four sites, of which one may drop out."""
    return wire.RoundPlan(
        run="r",
        round=0,
        attempt=0,
        cohort=(0, 1, 2, 3),
        threshold=3,
        minimum_cohort=3,
        colluders=1,
        degree=None,
        noise_multiplier=1.0,
        config=config,
        roster_version=1,
    )


@dataclass
class House:
    """Sites a, b, c, … over one ledger."""

    path: Path
    n: int = 5
    policy: Policy = field(default_factory=Policy)
    insecure: bool = False
    journals: Callable[[str], Journal] = lambda name: MemoryJournal()
    data: Callable[[str], SiteData] = lambda name: records(ord(name))
    schema: Schema = SCHEMA

    def __post_init__(self) -> None:
        self.names = [chr(ord("a") + number) for number in range(self.n)]
        # Noise derives from what a round is bound to, identities too: with all of them fixed it is the same every time
        self.identities = {name: Identity.generate(name, stream(name)) for name in self.names}
        members = tuple(identity.member for identity in self.identities.values())
        self.roster = Roster(version=1, previous=FIRST_PREVIOUS, members=members)
        self.kept = {name: self.journals(name) for name in self.names}
        self.ledger = Ledger(self.path / "ledger.db")
        self.sites = {name: self.start(name) for name in self.names}

    def start(self, name: str, **changes: Any) -> Site:
        """The site's process; once more for a restart."""
        fields: dict[str, Any] = {
            "identity": self.identities[name],
            "roster": self.roster,
            "data": self.data(name),
            "schema": self.schema,
            "ledger": self.ledger,
            "journal": self.kept[name],
            "fingerprint_key": key(name, "fingerprint"),
            "noise_key": key(name, "noise"),
            "split_key": public_split_key(0),
            "insecure": self.insecure,
            "policy": self.policy,
            "accountant": ACCOUNTANT,
            "self_test": SELF_TEST,
        }
        return Site(**{**fields, **changes})

    def charged(self, site: str | None = None) -> tuple[Recorded, ...]:
        """What the ledger holds as spent; the terms a run began with stand there too."""
        return tuple(line for line in self.ledger.entries(site) if line.entry.kind == "charge")

    def federation(
        self, config: Config, *, engine: Engine | None = None, run: str = "r", side_noise: SideNoise = NO_SIDE_NOISE
    ) -> Federation:
        return Federation(
            config=config,
            run=run,
            roster=self.roster,
            engine=engine or FaultyEngine(LocalEngine(self.sites), config.simulation, seed=config.seed),
            noise_multiplier=config.privacy.noise_multiplier or 0.0,
            side_noise=side_noise,
            schema=self.schema,
            state=config.method.init_server(to_vector(build_model(config, self.schema))),
            clock=lambda: 0.0,
            server_key=key("server", "noise"),
        )

    def plan(self, config: Config, **changes: Any) -> wire.RoundPlan:
        cohort: Cohort = cohort_of(config, self.n)
        fields: dict[str, Any] = {
            "run": "r",
            "round": 0,
            "attempt": 0,
            "cohort": tuple(range(self.n)),
            "threshold": cohort.threshold,
            "minimum_cohort": cohort.minimum_cohort,
            "colluders": cohort.colluders,
            "degree": cohort.degree,
            "noise_multiplier": config.privacy.noise_multiplier or 0.0,
            "config": config,
            "features": self.schema.features,
            "roster_version": 1,
        }
        return wire.RoundPlan(**{**fields, **changes})


def fit(config: Config, n: int) -> Cohort:
    """The cohort of ``n`` sites, checked as a run checks it before it starts."""
    cohort = cohort_of(config, n)
    checked_encoding(config, cohort, SIZE, config.privacy.noise_multiplier or 0.0)
    return cohort


class Tap:
    """An engine that keeps every message, and may change or lose what comes back."""

    def __init__(self, engine: Engine, alter: Callable[[str, wire.Request, bytes], bytes | None] | None = None) -> None:
        self._engine, self._alter = engine, alter or (lambda site, request, reply: reply)
        self.log: list[tuple[str, bytes, bytes]] = []

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        replies = self._engine.exchange(requests, deadline_seconds)
        self.log += [(site, requests[site], reply) for site, reply in replies.items()]
        altered = {
            site: self._alter(site, wire.decode_request(requests[site]), reply) for site, reply in replies.items()
        }
        return {site: reply for site, reply in altered.items() if reply is not None}


def state_of(value: float = 0.0, **changes: Any) -> bytes:
    return encode({"theta": torch.full((SIZE,), value), **changes})


def changed(config: Config, section: str, **changes: Any) -> Config:
    return msgspec.structs.replace(config, **{section: msgspec.structs.replace(getattr(config, section), **changes)})
