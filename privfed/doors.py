"""A site's records behind doors: who is for training, who for testing, and which door a run's claim demands."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from privfed.privacy import noise
from privfed.privacy.events import PrivacyUnit
from privfed.privacy.oracle.door import ALL, Door, DoorSettings, Loss, Records
from privfed.privacy.oracle.opacus import OpacusDoor
from privfed.privacy.oracle.patients import PatientDoor
from privfed.privacy.oracle.plain import PlainDoor
from privfed.privacy.oracle.shares import ShareDoor
from privfed.privacy.shared import RecordSum
from privfed.privacy.units import Patients

from .config import Config
from .data.records import SiteData, keyed_fraction
from .errors import ConfigError
from .models import classification_loss
from .terms import Schema, build_model, split_id, whole_group

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

    Args:
        key: bytes[32], the site's split key.
    """
    testing = keyed_fraction(data.units, key=key, label="test") < config.evaluation.test_fraction
    train = data.rows(~testing)
    where = keyed_fraction(train.units, key=key, label="parts")
    parts = {ALL: np.ones(len(train), dtype=bool)}
    low = 0.0
    for name, fraction in config.method.parts.items():
        parts[name] = (where >= low) & (where < low + fraction)
        low += fraction
    rows = {name: torch.from_numpy(np.flatnonzero(mask)) for name, mask in parts.items()}
    return Split(train, data.rows(testing), rows)


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
) -> OpacusDoor:
    """The door of noise that each site adds for itself.

    Args:
        key: bytes[32], secret: draws and noise come from it.
        network: instead of the run's own; fresh, the door makes it its own.

    Raises:
        ConfigError: the claim is about patients, and the records name none.
    """
    check_units(config, records.train)
    privacy = config.privacy
    model, loss = network or (build_model(config, schema), classification_loss)
    drawn = noise.generator(key)
    settings = DoorSettings(
        sample_rate=privacy.rate,
        expected_batch_size=privacy.expected_batch_size,
        max_grad_norm=privacy.max_grad_norm,
        noise_multiplier=noise_multiplier,
        part_fractions=config.method.parts,
    )
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
) -> ShareDoor:
    """The door of noise that all sites add together; arguments as of `private_door`."""
    drawn = noise.derive_key(key, b"draw")
    door = private_door(config, schema, records, noise_multiplier=noise_multiplier, key=drawn, network=network)
    return ShareDoor(door, shared, noise.derive_key(key, b"release"))


def exact_door(config: Config, schema: Schema, records: Split, key: bytes) -> PlainDoor:
    """The door without noise, for runs that claim nothing, or whose claim is about the whole update."""
    return PlainDoor(
        model=build_model(config, schema),
        loss=classification_loss,
        records=_records(config, records),
        sample_rate=config.privacy.rate,
        randomness=noise.generator(key),
    )


def local_door(config: Config, schema: Schema, records: Split) -> Door:
    """Exact and full-batch, for models that never leave this site."""
    return PlainDoor(
        model=build_model(config, schema),
        loss=classification_loss,
        records=_records(config, records),
        sample_rate=1.0,
        randomness=np.random.default_rng(0),
    )


def _records(config: Config, records: Split) -> Records:
    return Records(records.train.inputs, records.train.targets, records.parts, split_id(config), whole_group(config))
