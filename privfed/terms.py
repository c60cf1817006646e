"""What a configuration comes to, in public constants: the integers that are added up, and what a round costs.

A site and the coordinator derive the same from the same plan. Nothing here has seen a record.
"""

import hashlib
import math
from functools import lru_cache
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from privfed.crypto.aggregation import MAX_BITS, Session
from privfed.crypto.homomorphic.fields import layout_of
from privfed.crypto.roster import Roster
from privfed.privacy.adversaries import Deployment
from privfed.privacy.clipping import AdaptiveClip, adaptive_sum
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import Charge, NoiseSite, PrivacyUnit
from privfed.privacy.oracle.door import ALL, group
from privfed.privacy.releases import Counts, Standardisation
from privfed.privacy.shared import MOST_SHARE_VARIANCE, ClientSum, CountSum, RecordSum, client_sum, record_sum
from privfed.privacy.units import executed_event

from . import wire
from .architecture import update_size
from .cohort import Cohort
from .config import Config
from .errors import ConfigError
from .grid import Grid, check_grid, grid_of, uses_grid
from .methods import Queries

# What is added up


class Encoding(Protocol):
    """Vectors as integers: what the aggregation is told."""

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


Update = Grid | ClientSum | RecordSum
Summand = Update | CountSum


def encoding_of(
    config: Config,
    cohort: Cohort,
    parameters: int,
    noise_multiplier: float,
    seed: bytes = b"",
    clip: float | None = None,
) -> Update:
    """How updates of ``parameters`` coordinates become integers under the run's unit and noise.

    Args:
        seed: of the rotation, public, another one each round. It changes neither sizes nor costs.
        clip: C where it adapts; default where it starts. It changes neither.

    Raises:
        NoGuarantee: the combination has none, or its noise does not fit the aggregation.
    """
    privacy = config.privacy
    unit, noise = privacy.unit, privacy.noise
    if privacy.clip == "adaptive" and unit is not PrivacyUnit.CLIENT:
        raise NoGuarantee(
            f"privacy.clip = 'adaptive' with privacy.unit = {unit.value!r} is not offered: it counts the sites whose "
            "update is short, and a count of short gradients would need noise of its own. Set max_grad_norm"
        )
    if uses_grid(config):
        return Grid(parameters, grid_of(config.aggregation, cohort.size))
    at_server = noise is NoiseSite.CENTRAL
    adaptive = clip_rule(config, cohort, noise_multiplier)
    if not at_server and config.aggregation.kind == "plain":
        raise NoGuarantee(
            "privacy.noise = 'distributed' needs a secure sum: with aggregation.kind = 'plain' the server sees every "
            "site's vector under that site's share of the noise alone; use 'masked' or 'homomorphic'"
        )
    if adaptive is not None:
        return adaptive_sum(
            parameters,
            clip=clip or privacy.max_update_norm,
            rule=adaptive,
            minimum_cohort=cohort.minimum_cohort,
            colluders=0 if at_server else claimed_colluders(config, cohort),
            sites=cohort.size,
            most_bits=MAX_BITS,
            seed=seed,
            at_server=at_server,
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


def clip_rule(config: Config, cohort: Cohort, noise_multiplier: float) -> AdaptiveClip | None:
    """How the clip of whole sites' updates follows them; None where it is fixed."""
    privacy = config.privacy
    if privacy.clip == "fixed" or noise_multiplier <= 0:
        return None
    return AdaptiveClip.for_units(
        cohort.size, noise_multiplier, quantile=privacy.clip_quantile, learning_rate=privacy.clip_rate
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


def deployment_of(config: Config, cohort: Cohort, noise: NoiseSite | None = None) -> Deployment:
    """What decides who sees what of a run's sums whose noise is added at ``noise``; default where the updates' is.

    With a key holder among the sites, one colluding site opens every vector; with one of its own, no number of sites.
    On a sparse graph of masks nothing is promised beyond the colluders that it was made for.
    """
    masked, encrypted = (config.aggregation.kind == kind for kind in ("masked", "homomorphic"))
    at_a_site = encrypted and config.aggregation.key_holder is not None
    opens = cohort.threshold if cohort.degree is None else cohort.colluders + 1
    return Deployment(
        unit=config.privacy.unit,
        noise=noise or config.privacy.noise,
        secure_sum=masked or encrypted,
        threshold=opens if masked else 1 if at_a_site else None,
    )


def worthwhile_colluders(config: Config, cohort: Cohort) -> tuple[int, ...]:
    """The numbers of sites that stand by the server and are worth a line of their own.

    Where no number of sites opens a vector, all the others together are, who know all shares but one.
    """
    if not shares_noise(config):
        return ()
    numbers = {claimed_colluders(config, cohort), deployment_of(config, cohort).threshold or cohort.size - 1}
    return tuple(sorted(numbers - {0}))


def shares_noise(config: Config) -> bool:
    """Whether something of the run hides behind noise in shares: its updates, or what it releases beside them."""
    privacy = config.privacy
    if privacy.unit is PrivacyUnit.NONE or not config.method.sends:
        return False
    beside = config.evaluation.release == "private" or privacy.standardise_epsilon is not None
    return beside or privacy.noise is NoiseSite.DISTRIBUTED


def session_of(plan: wire.RoundPlan, context: bytes, encoding: Encoding, purpose: wire.Purpose = "update") -> Session:
    """The aggregation session that a party derives from the plan and model it holds."""
    return _session(plan, context, encoding.dim, encoding.bound, purpose)


@lru_cache(maxsize=4)  # the sites of a simulation derive the same one, and checking it takes time
def _session(plan: wire.RoundPlan, context: bytes, dim: int, bound: int, purpose: wire.Purpose) -> Session:
    return Session(
        run=run_of(plan.run, purpose),
        round=plan.round,
        attempt=plan.attempt,
        cohort=plan.cohort,
        dim=dim,
        bound=bound,
        threshold=plan.threshold,
        minimum_cohort=plan.minimum_cohort,
        colluders=plan.colluders,
        degree=plan.degree,
        context=context,
    )


def cohort_in(plan: wire.RoundPlan) -> Cohort:
    """The cohort that a plan invites."""
    return Cohort(len(plan.cohort), plan.threshold, plan.minimum_cohort, plan.colluders, plan.degree)


def run_of(run: str, purpose: wire.Purpose) -> str:
    """The name that a run's sums of one purpose go by in sessions and ledgers: each its own series of rounds."""
    return run if purpose == "update" else f"{run}/{purpose}"


def side_encoding(plan: wire.RoundPlan, purpose: wire.Purpose) -> CountSum:
    """What is summed in a round beside the updates.

    Raises:
        NoGuarantee: the plan releases no such thing, or it has no guarantee.
    """
    return count_sum(plan.config, cohort_in(plan), purpose, plan.features, getattr(plan.side_noise, purpose))


@lru_cache(maxsize=4)
def plan_encoding(plan: wire.RoundPlan, parameters: int) -> Update:
    """`encoding_of` what a plan says of a network of ``parameters``."""
    seed = hashlib.sha256(f"{plan.run}\0{plan.round}\0{plan.attempt}".encode()).digest()
    size = update_size(plan.config, plan.features, parameters)
    return encoding_of(plan.config, cohort_in(plan), size, plan.noise_multiplier, seed, plan.clip)


def checked_encoding(config: Config, cohort: Cohort, parameters: int, noise_multiplier: float) -> Update:
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
    check_grid(config, cohort.size)
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
        raise ConfigError(f"aggregation: {error}") from None
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


# What is released beside the updates

BINS = 32  # of a histogram of scores, from which AUROC is read
CLIENT_STEPS = 1000  # unit = client: a site's accuracy in so many steps


def counts_of(config: Config) -> Counts | None:
    """What the sites count after a round, None where figures are not released through noise.

    One record, or the one that counts of each patient, stands in (records, correct), or in one cell of a histogram of
    scores by label. A whole site stands as (steps, steps · accuracy). The personal models' figures are not among
    them: a personal model has seen its site's records without noise, so one record may move all of its counts.

    Raises:
        NoGuarantee: a combination without one.
    """
    if config.evaluation.release != "private":
        return None
    unit, metric = config.privacy.unit, config.metric
    if unit is PrivacyUnit.NONE:
        raise NoGuarantee(
            "evaluation.release = 'private' promises what privacy.unit = 'none' does not: use release = 'internal'"
        )
    if config.aggregation.kind == "plain" or not config.method.sends:
        raise NoGuarantee(
            "evaluation.release = 'private' shares its noise in a secure sum: use aggregation.kind = 'masked' or "
            "'homomorphic', and a method that sends"
        )
    if metric not in ("accuracy", "auroc"):
        raise NoGuarantee(
            f"evaluation.release = 'private' counts records, and {metric} is no such count: of a class set "
            "evaluation.metric = 'accuracy' or 'auroc', of another task release = 'internal' or 'public-cohort'"
        )
    if unit is not PrivacyUnit.CLIENT:
        return Counts(cells=2, cells_per_unit=2) if metric == "accuracy" else Counts(cells=2 * BINS, cells_per_unit=1)
    if metric != "accuracy":
        raise NoGuarantee(
            "evaluation.release = 'private' with privacy.unit = 'client' has no AUROC: a site's histogram has no "
            "bound. Use evaluation.metric = 'accuracy'"
        )
    return Counts(cells=2, cells_per_unit=2, most_per_cell=CLIENT_STEPS)


def count_sum(
    config: Config, cohort: Cohort, purpose: wire.Purpose, features: int, noise_multiplier: float
) -> CountSum:
    """The sum of counts or of moments that a run releases.

    Raises:
        NoGuarantee: the run releases no such thing, or it has no guarantee.
    """
    release: Counts | Standardisation | None = counts_of(config)
    if purpose == "inputs":
        release = Standardisation(lower=-np.ones(features), upper=np.ones(features))
        if config.privacy.standardise_epsilon is None:
            release = None
        elif config.privacy.unit not in (PrivacyUnit.RECORD, PrivacyUnit.PATIENT) or config.aggregation.kind == "plain":
            raise NoGuarantee(
                "privacy.standardise_epsilon needs privacy.unit = 'record' or 'patient' and a secure sum "
                "(aggregation.kind = 'masked' or 'homomorphic'), in which the noise is shared"
            )
    if release is None or noise_multiplier <= 0:
        raise NoGuarantee(f"the plan asks for {purpose} that its configuration does not release")
    counts = CountSum(
        release=release,
        noise_multiplier=noise_multiplier,
        minimum_cohort=cohort.minimum_cohort,
        colluders=claimed_colluders(config, cohort),
        sites=cohort.size,
        most_bits=MAX_BITS,
    )
    if counts.share_variance > MOST_SHARE_VARIANCE or (2 * cohort.size * counts.bound).bit_length() > MAX_BITS:
        raise NoGuarantee(f"noise in shares does not fit: {purpose} with a noise of {noise_multiplier:g}. Lower it")
    return counts


# What it costs


def split_id(config: Config) -> str:
    """Names the keyed-hash split of a run's records, for the ledger.

    Parts compose in parallel under one name only. So the name changes with whatever could move a record to another
    part: the seed, how records get their ids, where the parts' borders are.
    """
    read = (config.data, config.task.columns)
    terms = (config.seed, read, config.evaluation.test_fraction, sorted(config.method.parts.items()))
    return f"hash-{hashlib.sha256(msgspec.msgpack.encode(terms)).hexdigest()[:12]}"


TRAIN, TEST = "train", "test"


def whole_group(config: Config) -> str:
    """The ledger's name for all training records.

    Where something is released about the test records, the training records are a part like them, so that both
    together cost the larger of the two. A method with parts of its own has no release about all of them.
    """
    if config.evaluation.release != "private" or config.method.parts or config.privacy.unit is PrivacyUnit.CLIENT:
        return ALL
    return group(split_id(config), TRAIN)


def side_charge(config: Config, encoding: CountSum, purpose: wire.Purpose, shares: int | None = None) -> Charge:
    """What one sum beside the updates costs; at its worst, unless the shares in it are known."""
    figures_of_records = purpose == "figures" and config.privacy.unit is not PrivacyUnit.CLIENT
    where = group(split_id(config), TEST) if figures_of_records else whole_group(config)
    return Charge(encoding.event(shares), 1, where)


def planned_charges(
    config: Config, encoding: Encoding, noise_multiplier: float, participations: int = 1
) -> tuple[Charge, ...]:
    """What ``participations`` rounds of the run will cost one site, known before any record is touched."""
    privacy = config.privacy
    if privacy.unit is PrivacyUnit.NONE or not config.method.sends:
        return ()
    if isinstance(encoding, ClientSum | RecordSum):
        return (Charge(encoding.event(), participations, whole_group(config)),)

    def charge(queries: Queries) -> Charge:
        event = executed_event(
            privacy.sampling if privacy.unit is PrivacyUnit.PATIENT else "patient",
            sample_rate=privacy.rate,
            noise_multiplier=noise_multiplier / math.sqrt(queries.each),  # as `Meter` books several answers on a draw
            max_records=privacy.max_records,
        )
        where = group(split_id(config), queries.part, whole_group(config))
        return Charge(event, queries.count * participations, where)

    return tuple(charge(queries) for queries in config.method.queries())
