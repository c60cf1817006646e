"""What happened to the records: events without behaviour, and how often they happened.

What an event costs is the accountant's business (accountant.py). An event is written by the code that executed the
mechanism, in public constants only: a sample rate derived from the private number of records would itself be a leak.
"""

import math
import operator
import re
from enum import StrEnum
from typing import TypeVar

import dp_accounting
import msgspec

from .errors import UnsupportedEvent


class PrivacyUnit(StrEnum):
    """Whose presence is hidden: neighbouring data sets differ by one of these, added or removed."""

    NONE = "none"
    RECORD = "record"
    PATIENT = "patient"
    CLIENT = "client"


class NoiseSite(StrEnum):
    """Where the noise is added: in each site, in shares summed by the aggregation, or by a trusted server."""

    LOCAL = "local"
    DISTRIBUTED = "distributed"
    CENTRAL = "central"


class Adjacency(StrEnum):
    """What "neighbouring data sets" means."""

    ADD_OR_REMOVE_ONE = "add-or-remove-one"
    REPLACE_ONE = "replace-one"


class Gaussian(msgspec.Struct, frozen=True, tag="gaussian", forbid_unknown_fields=True):
    """A sum over all records, each clipped to L2 norm C, released with noise N(0, (noise_multiplier · C)²).

    Args:
        noise_multiplier: σ/C, unitless, at least 0. Zero is a release without noise: its ε is infinite.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        _set_noise_multiplier(self)


class PoissonGaussian(msgspec.Struct, frozen=True, tag="poisson-gaussian", forbid_unknown_fields=True):
    """The Gaussian release of a sum over a Poisson sample: every unit is in it independently.

    Args:
        sample_rate: probability of each unit to be drawn, in (0, 1], a public constant.
        noise_multiplier: σ/C, unitless, at least 0. Zero is a release without noise: its ε is infinite.
    """

    sample_rate: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        rate = _real("sample_rate", self.sample_rate)
        if not 0.0 < rate <= 1.0:
            raise ValueError(f"sample_rate must be in (0, 1], got {rate}")
        msgspec.structs.force_setattr(self, "sample_rate", rate)
        _set_noise_multiplier(self)


Event = Gaussian | PoissonGaussian

ALL_RECORDS = "all"
_PART = re.compile(r"[^/\s]+/[^/\s]+")


class Charge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A run of identical events on one fixed part of a site's records.

    Args:
        event: what happened.
        count: how many times in a row, at least 1.
        group: which records it touched: "all", or "<split id>/<part>" for one part of a split that puts every record
            into exactly one part by a keyed hash of the record alone. A split redrawn between events is not such a
            split: its events are charged to "all".
    """

    event: Event
    count: int = 1
    group: str = ALL_RECORDS

    def __post_init__(self) -> None:
        if not isinstance(self.event, Event):
            raise TypeError(f"event must be one of {Event}, got {type(self.event).__name__}")
        if isinstance(self.count, bool):
            raise TypeError("count must be an integer, got a bool")
        count = operator.index(self.count)
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        msgspec.structs.force_setattr(self, "count", count)
        if self.group != ALL_RECORDS and not _PART.fullmatch(self.group):
            raise ValueError(f'group must be "all" or "<split id>/<part>", got {self.group!r}')


def to_dp_event(event: Event) -> dp_accounting.DpEvent:
    """The same event in the vocabulary of dp-accounting, for a second opinion.

    Raises:
        UnsupportedEvent: dp-accounting has no such event.
    """
    match event:
        case Gaussian(noise_multiplier=noise_multiplier):
            return dp_accounting.GaussianDpEvent(noise_multiplier)
        case PoissonGaussian(sample_rate=rate, noise_multiplier=noise_multiplier):
            return dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    raise UnsupportedEvent(f"no accountant bounds a {type(event).__name__}")


T = TypeVar("T")


def to_canonical_json(value: object) -> bytes:
    """The one JSON form of a struct: sorted keys, no spaces, floats as the shortest text that reads back exactly."""
    return msgspec.json.encode(value, order="sorted")


def from_canonical_json(data: bytes, kind: type[T]) -> T:
    """Reads a struct back, and insists on its canonical form: what is hashed has one spelling.

    Raises:
        ValueError: not JSON, not of this kind, out of range, or spelled another way.
    """
    value = msgspec.json.decode(data, type=kind)
    if to_canonical_json(value) != data:
        raise ValueError("not in canonical form")
    return value


def _set_noise_multiplier(event: Event) -> None:
    noise_multiplier = _real("noise_multiplier", event.noise_multiplier)
    if noise_multiplier < 0:
        raise ValueError(f"noise_multiplier must be at least 0, got {noise_multiplier}")
    # + 0.0 turns -0.0 into 0.0: equal events have equal bytes
    msgspec.structs.force_setattr(event, "noise_multiplier", noise_multiplier + 0.0)


def _real(name: str, value: float) -> float:
    """A finite Python float: an int or a numpy scalar would be written, and hashed, another way than it is read."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
