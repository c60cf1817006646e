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
import numpy as np
from scipy.stats import binom

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


class Gaussian(msgspec.Struct, frozen=True, tag="gaussian", forbid_unknown_fields=True, cache_hash=True):
    """A sum over all records, each clipped to L2 norm C, released with noise N(0, (noise_multiplier · C)²).

    Args:
        noise_multiplier: σ/C, unitless, at least 0. Zero is a release without noise: its ε is infinite.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        _set_noise_multiplier(self)


class PoissonGaussian(msgspec.Struct, frozen=True, tag="poisson-gaussian", forbid_unknown_fields=True, cache_hash=True):
    """The Gaussian release of a sum over a Poisson sample: every unit is in it independently.

    Args:
        sample_rate: probability of each unit to be drawn, in (0, 1], a public constant.
        noise_multiplier: σ/C, unitless, at least 0. Zero is a release without noise: its ε is infinite.
    """

    sample_rate: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        _set_sample_rate(self)
        _set_noise_multiplier(self)


class PatientMixture(msgspec.Struct, frozen=True, tag="patient-mixture", forbid_unknown_fields=True, cache_hash=True):
    """The Gaussian release of a sum over a Poisson sample of *records*, each clipped to C, seen by whole patients.

    A patient has at most `max_records` records, each drawn alone: their number in the sample is Binomial(k, q), and
    the sum moves by up to that many C. Not to be mistaken for patients drawn as units whose *summed* gradient is
    clipped, which is `PoissonGaussian` whatever the number of records.

    Args:
        sample_rate: probability of each record to be drawn, in (0, 1], a public constant.
        max_records: k, the most records of one patient, enforced before the draw.
        noise_multiplier: σ/C with C the clip of one record, unitless, at least 0.

    Source: arXiv 2401.10294; dp-accounting's MixtureOfGaussiansDpEvent(σ, range(k + 1), Binom(k, q)).
    """

    sample_rate: float
    max_records: int
    noise_multiplier: float

    def __post_init__(self) -> None:
        _set_sample_rate(self)
        _set_integer(self, "max_records", at_least=1)
        if self.max_records > MAX_RECORDS:
            raise ValueError(f"max_records must be at most {MAX_RECORDS}, got {self.max_records}: bound the records")
        _set_noise_multiplier(self)


class Skellam(msgspec.Struct, frozen=True, kw_only=True, tag="skellam", forbid_unknown_fields=True, cache_hash=True):
    """A sum of integer vectors, released with the Skellam noise of several parties: one share each, added up.

    Args:
        share_variance: variance of one share in every coordinate, in integer units; at least 1.
        shares: how many shares the released sum carries. A reserve states the fewest that a released sum may carry.
        colluders: how many of them the adversary of the claim knows. The noise that counts is that of the others, so
            that this event prices itself against the server together with so many sites.
        dim: coordinates of the vector, padding included.
        l2_squared: the largest Σ xᵢ² of what one unit moves in the sum, in integer units, rounding counted.
        l1: the largest Σ |xᵢ| of it. Never above min(√dim · √l2_squared, l2_squared).
        sample_rate: probability of each unit to be in the sum, in (0, 1]; below 1, coarse noise has only a loose bound.
    """

    share_variance: int
    shares: int
    colluders: int
    dim: int
    l2_squared: int
    l1: int
    sample_rate: float = 1.0

    def __post_init__(self) -> None:
        _set_sample_rate(self)
        for name, least in (("share_variance", 1), ("shares", 1), ("colluders", 0), ("dim", 1)):
            _set_integer(self, name, at_least=least)
        for name in ("l2_squared", "l1"):
            _set_integer(self, name, at_least=1)
        if self.colluders >= self.shares:
            raise ValueError(
                f"colluders must be fewer than shares, got {self.colluders} of {self.shares}: someone's noise must be "
                "unknown to the adversary"
            )
        # Cauchy–Schwarz, and |x| ≤ x² for integers: more is a mistake, and might hide a wrong sensitivity
        if self.l1 > min(math.isqrt(self.dim * self.l2_squared) + 1, self.l2_squared):
            raise ValueError(f"l1 must be at most min(√(dim · l2_squared), l2_squared), got {self.l1}")

    @property
    def variance(self) -> int:
        """Variance of the noise that the adversary of the claim does not know, per coordinate."""
        return self.share_variance * (self.shares - self.colluders)


MAX_RECORDS = 1000  # of one patient; the loss of more is sampled too coarsely to be worth anything

Event = Gaussian | PoissonGaussian | PatientMixture | Skellam

ALL_RECORDS = "all"
_PART = re.compile(r"[^/\s]+/[^/\s]+")


class Charge(msgspec.Struct, frozen=True, forbid_unknown_fields=True, cache_hash=True):
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
        case PatientMixture(sample_rate=rate, max_records=k, noise_multiplier=noise_multiplier):
            return dp_accounting.dp_event.MixtureOfGaussiansDpEvent(
                noise_multiplier, list(range(k + 1)), record_probabilities(k, rate)
            )
    raise UnsupportedEvent(f"no accountant bounds a {type(event).__name__}")


def is_noiseless(event: Event) -> bool:
    """Whether the event releases its sum without any noise: its ε is infinite."""
    return not isinstance(event, Skellam) and event.noise_multiplier == 0


def record_probabilities(max_records: int, sample_rate: float) -> list[float]:
    """P(j of `max_records` records are drawn), j = 0 … max_records."""
    drawn = np.arange(max_records + 1)
    return [float(p) for p in np.asarray(binom.pmf(drawn, max_records, sample_rate))]


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


def _set_sample_rate(event: PoissonGaussian | PatientMixture | Skellam) -> None:
    rate = _real("sample_rate", event.sample_rate)
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"sample_rate must be in (0, 1], got {rate}")
    msgspec.structs.force_setattr(event, "sample_rate", rate)


def _set_integer(event: msgspec.Struct, name: str, *, at_least: int) -> None:
    value = getattr(event, name)
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got a bool")
    value = operator.index(value)
    if not at_least <= value < 2**62:
        raise ValueError(f"{name} must be at least {at_least} and below 2^62, got {value}")
    msgspec.structs.force_setattr(event, name, value)


def _set_noise_multiplier(event: Gaussian | PoissonGaussian | PatientMixture) -> None:
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
