"""A site's records behind doors: who is for training, who for testing, and which door a run's claim demands."""

from dataclasses import dataclass, field, replace
from functools import lru_cache

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from privfed.privacy import noise
from privfed.privacy.events import PrivacyUnit
from privfed.privacy.oracle.door import ALL, Door, DoorSettings, Loss, NoisedDoor, Records
from privfed.privacy.oracle.opacus import OpacusDoor
from privfed.privacy.oracle.patients import PatientDoor
from privfed.privacy.oracle.plain import PlainDoor
from privfed.privacy.oracle.shares import ShareDoor
from privfed.privacy.oracle.source import SourcedDoor
from privfed.privacy.oracle.together import AskingDoor, AskingPlainDoor, Oracle
from privfed.privacy.shared import RecordSum
from privfed.privacy.units import Patients

from .architecture import Schema, build_model, divided
from .config import Config
from .data.records import SiteData, keyed_fraction
from .errors import ConfigError, DataError
from .terms import split_id, whole_group
from .transfer import Everything
from .transfer.base import digest_of

_SOURCE_BATCH = 256  # public records of a draw, on average
_AT_ONCE = 1024  # records that pass a frozen base together

Network = tuple[nn.Module, Loss]
"""A model and its loss, in the place of the run's own: for audits, whose canaries choose their gradients."""


@dataclass(frozen=True)
class Split:
    """A site's records by purpose."""

    train: SiteData = field(repr=False)
    test: SiteData = field(repr=False)
    parts: dict[str, Tensor] = field(repr=False)

    def standardised(self, mean: Tensor, deviation: Tensor) -> "Split":
        """The same records with inputs (x − mean) / deviation, float32[F] each."""
        return replace(self, train=self.train.scaled(mean, deviation), test=self.test.scaled(mean, deviation))


def split(config: Config, data: SiteData, key: bytes) -> Split:
    """Training and test records, by a keyed hash of each patient, or of each record where nobody is named.

    Records that their table marks as test records are these.

    Args:
        key: bytes[32], the site's split key.

    Raises:
        ConfigError: some patient has marked and unmarked records.
    """
    data = seen(config, data)
    testing = keyed_fraction(data.units, key=key, label="test") < config.evaluation.test_fraction
    if data.test is not None:
        testing = data.test
        if len(np.intersect1d(data.units[testing], data.units[~testing])):
            raise ConfigError("data.test marks some records of a patient and not others: mark all of them or none")
    train = data.rows(~testing)
    return Split(train, data.rows(testing), _parts(config, train, key))


@torch.no_grad()
def seen(config: Config, data: SiteData) -> SiteData:
    """The records as the trained network sees them: what a frozen base makes of each, if there is one."""
    if type(config.transfer) is Everything:
        return data
    schema = Schema(features=data.inputs.shape[1], classes=len(config.data.classes))
    frozen, _ = divided(config, schema)
    if frozen is None or len(data) == 0:
        return data
    return replace(data, inputs=torch.cat([frozen(rows) for rows in torch.split(data.inputs, _AT_ONCE)]))


def _parts(config: Config, train: SiteData, key: bytes) -> dict[str, Tensor]:
    """The rows of each part of the training records."""
    parts = {ALL: np.ones(len(train), dtype=bool)}
    # A hash a record: only for methods that have parts
    where = keyed_fraction(train.units, key=key, label="parts") if config.method.parts else np.zeros(0)
    low = 0.0
    for name, fraction in config.method.parts.items():
        parts[name] = (where >= low) & (where < low + fraction)
        low += fraction
    return {name: torch.from_numpy(np.flatnonzero(mask)) for name, mask in parts.items()}


def few(config: Config, records: Split, number: int, key: bytes) -> Split:
    """The same test records, and only ``number`` of the training records, the first by a keyed hash.

    Args:
        key: bytes[32], the site's split key.
    """
    order = np.argsort(keyed_fraction(records.train.ids, key=key, label="few"))
    chosen = np.zeros(len(records.train), dtype=bool)
    chosen[order[:number]] = True
    train = records.train.rows(chosen)
    return Split(train, records.test, _parts(config, train, key))


def check_units(config: Config, data: SiteData) -> None:
    """Return if the records can be told apart as the claim needs it.

    Raises:
        ConfigError: the claim is about patients, and the records name none.
    """
    if config.privacy.unit is PrivacyUnit.PATIENT and data.patients is None:
        raise ConfigError(
            "privacy.unit = 'patient' needs to know whose each record is: set data.patient to the column with the "
            "patient's id (of a table of your own), or use privacy.unit = 'record'"
        )


def private_door(
    config: Config,
    schema: Schema,
    records: Split,
    *,
    noise_multiplier: float,
    key: bytes,
    network: Network | None = None,
    oracle: Oracle | None = None,
) -> NoisedDoor:
    """The door of noise that each site adds for itself.

    Args:
        key: bytes[32], secret: draws and noise come from it.
        network: instead of the run's own; fresh, the door makes it its own.
        oracle: computes for simulated sites together; None at a real site. Patients' sums and another network's are not
            its: their doors compute for themselves.

    Raises:
        ConfigError: the claim is about patients, and the records name none.
    """
    check_units(config, records.train)
    privacy = config.privacy
    drawn = noise.generator(key)
    settings = DoorSettings(
        sample_rate=privacy.rate,
        expected_batch_size=privacy.expected_batch_size,
        max_grad_norm=privacy.max_grad_norm,
        noise_multiplier=noise_multiplier,
        part_fractions=config.method.parts,
    )
    if oracle is not None and network is None and privacy.unit is not PrivacyUnit.PATIENT:
        return AskingDoor(oracle, records=_records(config, records), settings=settings, randomness=drawn)
    model, loss = network or (build_model(config, schema), config.task.loss)
    if privacy.unit is not PrivacyUnit.PATIENT:
        return OpacusDoor(
            model=model,
            loss=loss,
            records=_records(config, records),
            settings=settings,
            randomness=drawn,
        )
    assert records.train.patients is not None  # checked above
    return PatientDoor(
        model=model,
        loss=loss,
        records=_records(config, records),
        settings=settings,
        randomness=drawn,
        patients=Patients.of(records.train.patients.tolist()),
        sampling=privacy.sampling,
        max_records=privacy.max_records,
    )


def share_door(
    config: Config,
    schema: Schema,
    records: Split,
    shared: RecordSum,
    *,
    noise_multiplier: float,
    key: bytes,
    network: Network | None = None,
    oracle: Oracle | None = None,
) -> ShareDoor:
    """The door of noise that all sites add together; arguments as of `private_door`."""
    drawn = noise.derive_key(key, b"draw")
    door = private_door(
        config, schema, records, noise_multiplier=noise_multiplier, key=drawn, network=network, oracle=oracle
    )
    return ShareDoor(door, shared, noise.derive_key(key, b"release"))


def exact_door(config: Config, schema: Schema, records: Split, key: bytes, *, oracle: Oracle | None = None) -> Door:
    """The door without noise, for runs that claim nothing, or whose claim is about the whole update."""
    return _plain_door(config, schema, records, config.privacy.rate, noise.generator(key), oracle)


def local_door(config: Config, schema: Schema, records: Split, *, oracle: Oracle | None = None) -> Door:
    """Exact and full-batch, for models that never leave this site."""
    return _plain_door(config, schema, records, 1.0, np.random.default_rng(0), oracle)


def with_source(config: Config, schema: Schema, door: Door, key: bytes, *, oracle: Oracle | None = None) -> Door:
    """The door, and the run's public source beside it where it has one.

    Args:
        key: bytes[32]: the draws of public records come from it; a draw tells nothing of the site's own.

    Raises:
        DataError: the source's file is not the one that the configuration names.
    """
    if config.transfer.public_source is None:
        return door
    source = public_source(config)
    everyone = Records(source.inputs, source.targets, {ALL: torch.arange(len(source))})
    rate = min(1.0, _SOURCE_BATCH / len(source))
    drawn = noise.generator(noise.derive_key(key, b"source"))
    if oracle is not None:
        return SourcedDoor(door, AskingPlainDoor(oracle, records=everyone, sample_rate=rate, randomness=drawn))
    model = build_model(config, schema)
    plain = PlainDoor(model=model, loss=config.task.loss, records=everyone, sample_rate=rate, randomness=drawn)
    return SourcedDoor(door, plain)


def _plain_door(
    config: Config,
    schema: Schema,
    records: Split,
    sample_rate: float,
    randomness: np.random.Generator,
    oracle: Oracle | None,
) -> Door:
    held = _records(config, records)
    if oracle is not None:
        return AskingPlainDoor(oracle, records=held, sample_rate=sample_rate, randomness=randomness)
    return PlainDoor(
        model=build_model(config, schema),
        loss=config.task.loss,
        records=held,
        sample_rate=sample_rate,
        randomness=randomness,
    )


def _records(config: Config, records: Split) -> Records:
    return Records(records.train.inputs, records.train.targets, records.parts, split_id(config), whole_group(config))


def public_source(config: Config) -> SiteData:
    """The public records of ``transfer.public_source``, as the trained network sees them.

    Raises:
        DataError: their file is not here, or not the one that the configuration names; or it can not be read.
    """
    return _public_source(msgspec.msgpack.encode(config))


@lru_cache(maxsize=2)
def _public_source(encoded: bytes) -> SiteData:
    """Once for all sites of a process."""
    config = msgspec.msgpack.decode(encoded, type=Config)
    source = config.transfer.public_source
    assert source is not None  # `with_source`
    file = source.file
    try:
        right = file is not None and digest_of(file) == config.transfer.source_sha256
    except DataError:
        right = False
    if not right:
        raise DataError("transfer.public_source is not here, or is not the file that transfer.source_sha256 names")
    sites = [seen(config, records) for records in source.load(seed=config.seed, task=config.task).sites.values()]
    inputs, targets = torch.cat([site.inputs for site in sites]), torch.cat([site.targets for site in sites])
    return SiteData(np.concatenate([site.ids for site in sites]), inputs, targets)
