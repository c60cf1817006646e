"""What a configuration comes to, in public constants: the model's size, its integers, and what a round costs.

A site and the coordinator derive the same from the same plan. Nothing here has seen a record.
"""

import hashlib
import itertools
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import nn

from privfed.crypto.aggregation import MAX_BITS, Session
from privfed.crypto.homomorphic.fields import layout_of
from privfed.crypto.roster import Roster
from privfed.privacy.discretize import FixedPoint
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import Charge, NoiseSite, PrivacyUnit
from privfed.privacy.oracle.door import group
from privfed.privacy.shared import ClientSum, RecordSum, client_sum, record_sum
from privfed.privacy.units import executed_event

from . import wire
from .cohort import Cohort
from .config import Config
from .errors import ConfigError
from .models import mlp


@dataclass(frozen=True)
class Schema:
    """What is public about every site's table."""

    features: int
    classes: int


def build_model(config: Config, schema: Schema) -> nn.Module:
    """The run's network at its public start parameters."""
    return mlp(schema.features, config.model.hidden, schema.classes, seed=config.seed)


def parameter_count(config: Config, schema: Schema) -> int:
    """How many parameters the run's network has, without building it."""
    widths = [schema.features, *config.model.hidden, schema.classes]
    return sum((above + 1) * below for above, below in itertools.pairwise(widths))


# What is added up


class Encoding(Protocol):
    """Vectors as integers: what the aggregation is told, and how its sum is read."""

    @property
    def dim(self) -> int:
        """Coordinates that a site sends."""
        ...

    @property
    def bound(self) -> int:
        """The largest magnitude of one."""
        ...

    def add_noise(self, total: NDArray[np.int64], key: bytes) -> NDArray[np.int64]:
        """int64[dim]: the sum with the server's own noise, where the run trusts it to add some."""
        ...

    def decode(self, total: NDArray[np.int64], *, summands: int) -> NDArray[np.float64]:
        """float64[parameters]: the mean of ``summands`` sites' vectors from the sum."""
        ...


@dataclass(frozen=True)
class Grid:
    """Vectors on a fixed-point grid, for updates that carry their noise already or claim none."""

    parameters: int
    grid: FixedPoint

    @property
    def dim(self) -> int:
        return self.parameters

    @property
    def bound(self) -> int:
        return self.grid.bound

    def add_noise(self, total: NDArray[np.int64], key: bytes) -> NDArray[np.int64]:
        return total

    def decode(self, total: NDArray[np.int64], *, summands: int) -> NDArray[np.float64]:
        return self.grid.decode(total, summands=summands)


def encoding_of(
    config: Config, cohort: Cohort, parameters: int, noise_multiplier: float, seed: bytes = b""
) -> Grid | ClientSum | RecordSum:
    """How updates of ``parameters`` coordinates become integers under the run's unit and noise.

    Args:
        seed: of the rotation, public, another one each round. It changes neither sizes nor costs.

    Raises:
        NoGuarantee: the combination has none, or its noise does not fit the aggregation.
    """
    privacy = config.privacy
    unit, noise = privacy.unit, privacy.noise
    if unit is PrivacyUnit.NONE or noise is NoiseSite.LOCAL or not config.method.sends:
        return Grid(parameters, FixedPoint(config.aggregation.fraction_bits, config.aggregation.limit))
    at_server = noise is NoiseSite.CENTRAL
    if not at_server and config.aggregation.kind == "plain":
        raise NoGuarantee(
            "privacy.noise = 'distributed' needs a secure sum: with aggregation.kind = 'plain' the server sees every "
            "site's vector under that site's share of the noise alone; use 'masked' or 'homomorphic'"
        )
    if unit is PrivacyUnit.CLIENT:
        return client_sum(
            parameters,
            noise_multiplier=noise_multiplier,
            max_update_norm=privacy.max_update_norm,
            minimum_cohort=cohort.minimum_cohort,
            colluders=0 if at_server else claimed_colluders(config, cohort),
            sites=cohort.size,
            most_bits=MAX_BITS,
            seed=seed,
            at_server=at_server,
        )
    if unit is PrivacyUnit.PATIENT and privacy.sampling == "record":
        raise NoGuarantee(
            "privacy.sampling = 'record' with distributed noise is not offered: a patient would move the sum by "
            "max_records clips. Use sampling = 'patient', which clips each patient's own sum"
        )
    return record_sum(
        parameters,
        noise_multiplier=noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=privacy.expected_batch_size,
        sample_rate=privacy.rate,
        minimum_cohort=cohort.minimum_cohort,
        colluders=claimed_colluders(config, cohort),
        sites=cohort.size,
        most_bits=MAX_BITS,
        seed=seed,
    )


def claimed_colluders(config: Config, cohort: Cohort) -> int:
    """Sites whose shares of noise the server may know while target_epsilon holds.

    Raises:
        NoGuarantee: so many that no noise would be left.
    """
    default = cohort.colluders if config.aggregation.kind == "masked" else 1
    colluders = default if config.privacy.colluders is None else config.privacy.colluders
    if colluders >= cohort.minimum_cohort:
        raise NoGuarantee(
            f"privacy.colluders = {colluders} leaves no honest site in a sum of {cohort.minimum_cohort}: lower it, or "
            "raise aggregation.minimum_cohort"
        )
    return colluders


def session_of(plan: wire.RoundPlan, context: bytes, encoding: Encoding) -> Session:
    """The aggregation session that a party derives from the plan and model it holds."""
    return Session(
        run=plan.run,
        round=plan.round,
        attempt=plan.attempt,
        cohort=plan.cohort,
        dim=encoding.dim,
        bound=encoding.bound,
        threshold=plan.threshold,
        minimum_cohort=plan.minimum_cohort,
        colluders=plan.colluders,
        degree=plan.degree,
        context=context,
    )


def cohort_in(plan: wire.RoundPlan) -> Cohort:
    """The cohort that a plan invites."""
    return Cohort(len(plan.cohort), plan.threshold, plan.minimum_cohort, plan.colluders, plan.degree)


def plan_encoding(plan: wire.RoundPlan, parameters: int) -> Grid | ClientSum | RecordSum:
    """`encoding_of` what a plan says."""
    seed = hashlib.sha256(f"{plan.run}\0{plan.round}\0{plan.attempt}".encode()).digest()
    return encoding_of(plan.config, cohort_in(plan), parameters, plan.noise_multiplier, seed)


def checked_encoding(
    config: Config, cohort: Cohort, parameters: int, noise_multiplier: float
) -> Grid | ClientSum | RecordSum:
    """`encoding_of` a cohort, if the aggregation can add such vectors up.

    Raises:
        ConfigError: the reason, before a round starts.
    """
    try:
        encoding = encoding_of(config, cohort, parameters, noise_multiplier)
    except NoGuarantee as refusal:
        raise ConfigError(str(refusal)) from None
    except ValueError as error:
        raise ConfigError(f"aggregation: {error}") from None
    if not config.method.sends:
        return encoding
    try:
        Session(
            run="-",
            round=0,
            attempt=0,
            cohort=tuple(range(cohort.size)),
            dim=encoding.dim,
            bound=encoding.bound,
            threshold=cohort.threshold,
            minimum_cohort=cohort.minimum_cohort,
            colluders=cohort.colluders,
            degree=cohort.degree,
            context=bytes(32),
        )
        if config.aggregation.kind == "homomorphic":
            layout_of(encoding.dim, bound=encoding.bound, n=cohort.size)
    except ValueError as error:
        cause = " (bound is aggregation.limit × 2^fraction_bits)" if isinstance(encoding, Grid) else ""
        raise ConfigError(f"aggregation: {error}{cause}") from None
    return encoding


# Who decrypts

KEY_HOLDER = "key-holder"
"""The name in the roster of a key holder that is no site."""


def needs_key_holder(config: Config) -> bool:
    """Whether the run encrypts what the sites send."""
    return config.aggregation.kind == "homomorphic" and config.method.sends


def key_holder_of(config: Config, roster: Roster) -> int | None:
    """The roster index of the party that decrypts, None where nothing is encrypted.

    Raises:
        ValueError: the roster has no such member.
    """
    if not needs_key_holder(config):
        return None
    name = config.aggregation.key_holder or KEY_HOLDER
    for index, member in enumerate(roster.members):
        if member.name == name:
            return index
    raise ValueError(f"homomorphic aggregation needs a key holder; the roster has no member named {name!r}")


# What it costs


def split_id(config: Config) -> str:
    """Names the keyed-hash split of a run's records, for the ledger.

    Parts compose in parallel under one name only. So the name changes with whatever could move a record to another
    part: the seed, how records get their ids, where the parts' borders are.
    """
    terms = (config.seed, config.data, config.evaluation.test_fraction, sorted(config.method.parts.items()))
    return f"hash-{hashlib.sha256(msgspec.msgpack.encode(terms)).hexdigest()[:12]}"


def planned_charges(
    config: Config, encoding: Encoding, noise_multiplier: float, participations: int = 1
) -> tuple[Charge, ...]:
    """What ``participations`` rounds of the run will cost one site, known before any record is touched."""
    privacy = config.privacy
    if privacy.unit is PrivacyUnit.NONE or not config.method.sends:
        return ()
    if isinstance(encoding, ClientSum | RecordSum):
        return (Charge(encoding.event(), participations),)
    event = executed_event(
        privacy.sampling if privacy.unit is PrivacyUnit.PATIENT else "patient",
        sample_rate=privacy.rate,
        noise_multiplier=noise_multiplier,
        max_records=privacy.max_records,
    )
    return tuple(
        Charge(event, queries.count * participations, group(split_id(config), queries.part))
        for queries in config.method.queries()
    )
