"""The data door: the only way from records to anything that learns.

A method asks for a draw, then for gradients on it. It never sees a record, a label, a count or a loss. The door clips,
noises and meters; what it executed stands in ``charges``. A method that uses nothing else is differentially private by
composition and post-processing (Dwork and Roth 2014, Theorem 3.16 and Proposition 2.1).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from ..errors import NoGuarantee
from ..events import Charge, PoissonGaussian
from ..noise import poisson_sample, release

Loss = Callable[[Tensor, Tensor], Tensor]
"""``loss(output [B, ...], target [B]) -> [B]``: one number per record, moved by that record alone."""

ALL = "all"


@dataclass(frozen=True)
class Records:
    """A site's training records, for its doors only.

    Args:
        inputs: float32[n, ...].
        targets: int64[n] or float32[n].
        parts: name → int64[m] row numbers. "all" is every record; the other parts come from a keyed hash of each
            record's id, so that membership never depends on other records.
        split: names the keyed hash behind the parts; the ledger books a part as ``<split>/<part>``.
        whole: the ledger's name for "all": itself, or a part of that split that all of these records are.
    """

    inputs: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    parts: Mapping[str, Tensor] = field(repr=False)
    split: str = "none"
    whole: str = ALL

    def __len__(self) -> int:
        return len(self.targets)


class Batch:
    """An opaque draw. It shows neither records nor how many there are."""

    __slots__ = ("_part", "_rows")

    def __init__(self, part: str, rows: Tensor) -> None:
        self._part, self._rows = part, rows

    def __repr__(self) -> str:
        return f"Batch(part={self._part!r})"


class Door(Protocol):
    """Draws batches and answers gradient queries on them, for K models at once (K = 1 at a real site)."""

    def draw(self, part: str = ALL) -> Batch:
        """A Poisson sample, at the public rate, of the records of ``part``."""
        ...

    def gradient(self, theta: Tensor, batch: Batch) -> Tensor:
        """float32[K, P]: the mean loss gradient at ``theta`` float32[K, P], clipped and noised as the run demands."""
        ...

    @property
    def charges(self) -> tuple[Charge, ...]:
        """What the door has executed so far, as the ledger books it."""
        ...


@runtime_checkable
class ExactDoor(Door, Protocol):
    """A door without noise: what it answers may leave only inside a vector that is clipped and noised whole."""

    def curvature(self, theta: Tensor, batch: Batch, vector: Tensor) -> Tensor:
        """float32[K, P]: H · vector, with H the Hessian of the mean loss on ``batch`` at ``theta`` [K, P]."""
        ...


def curvature(door: Door, theta: Tensor, batch: Batch, vector: Tensor) -> Tensor:
    """`ExactDoor.curvature`, where the door is exact.

    Raises:
        NoGuarantee: the door clips and noises gradients, and a record moves H · vector without bound.
    """
    if not isinstance(door, ExactDoor):
        raise NoGuarantee(
            "second-order terms exist only without a claim or at client level: clipping a record's gradient does not "
            "bound what the record does to a Hessian. Use a first-order method, or privacy.unit = 'client' or 'none'"
        )
    return door.curvature(theta, batch, vector)


@dataclass
class Meter:
    """Books what was executed: m queries on one draw are one event P(q, σ/√m), a fresh draw is an event of its own.

    m answers with noise σ on the same records tell as much as one answer with noise σ/√m (their average is sufficient
    for the shared sum), while the sampling amplifies once. Booking them as m fresh draws would understate ε.
    """

    sample_rate: float
    noise_multiplier: float
    split: str
    whole: str = ALL
    _queries: dict[int, tuple[Batch, int]] = field(default_factory=dict)

    def drawn(self, batch: Batch) -> Batch:
        self._queries[id(batch)] = (batch, 0)  # holds the batch, so that its id is not used again
        return batch

    def query(self, batch: Batch) -> None:
        if id(batch) not in self._queries:
            raise ValueError("batch must be a draw of this door: another's sample rate is not what would be booked")
        self._queries[id(batch)] = (batch, self._queries[id(batch)][1] + 1)

    @property
    def charges(self) -> tuple[Charge, ...]:
        runs: dict[tuple[str, int], int] = {}
        for batch, queries in self._queries.values():
            if queries:
                runs[batch._part, queries] = runs.get((batch._part, queries), 0) + 1
        return tuple(
            charge(
                group(self.split, part, self.whole), self.sample_rate, self.noise_multiplier / math.sqrt(queries), count
            )
            for (part, queries), count in sorted(runs.items())
        )


def group(split: str, part: str, whole: str = ALL) -> str:
    """The ledger's name for a part of a split; of "all", ``whole``."""
    return whole if part == ALL else f"{split}/{part}"


def charge(group: str, sample_rate: float, noise_multiplier: float, count: int) -> Charge:
    """The ledger's line for ``count`` fresh draws with one query each."""
    return Charge(
        event=PoissonGaussian(sample_rate=sample_rate, noise_multiplier=noise_multiplier), count=count, group=group
    )


def rows_of(records: Records, part: str) -> Tensor:
    """The row numbers of ``part``, or an error that names the parts there are."""
    try:
        return records.parts[part]
    except KeyError:
        raise ValueError(f"part must be one of {sorted(records.parts)}, got {part!r}") from None


def check_theta(theta: Tensor, parameters: int) -> None:
    """Refuse a theta that is not [1, P]: this door serves one site."""
    if theta.shape != (1, parameters):
        raise ValueError(f"theta must have shape [1, {parameters}], got {list(theta.shape)}")


@dataclass(frozen=True, kw_only=True)
class DoorSettings:
    """The public constants of a private door; none may be computed from the records.

    Args:
        sample_rate: q in (0, 1], the probability that a record is in a draw.
        expected_batch_size: the denominator of a mean gradient over "all"; parts scale it by ``part_fractions``.
        max_grad_norm: C, the largest L2 norm of one record's gradient.
        noise_multiplier: σ / C.
        part_fractions: part → the public fraction of records that its keyed hash selects.
    """

    sample_rate: float
    expected_batch_size: float
    max_grad_norm: float
    noise_multiplier: float
    part_fractions: Mapping[str, float]

    def denominator(self, part: str) -> float:
        return self.expected_batch_size * self.part_fractions.get(part, 1.0)


def sample(records: Records, part: str, sample_rate: float, randomness: np.random.Generator) -> Batch:
    """A Poisson draw of ``part``."""
    rows = rows_of(records, part)
    return Batch(part, rows[poisson_sample(len(rows), sample_rate, randomness)])


def sample_exactly(records: Records, part: str, sample_rate: float, randomness: np.random.Generator) -> Batch:
    """`sample` for a door without noise: at a rate of 1 there is nothing to draw, and no noise that would shift."""
    return Batch(part, rows_of(records, part)) if sample_rate == 1.0 else sample(records, part, sample_rate, randomness)


class NoisedDoor:
    """Draws, noises and meters; who computes the clipped sum in between is a subclass's choice.

    Args:
        parameters: P.
        records, settings, randomness: as of `OpacusDoor`.
    """

    def __init__(
        self, *, parameters: int, records: Records, settings: DoorSettings, randomness: np.random.Generator
    ) -> None:
        self._size, self._records, self._settings, self._randomness = parameters, records, settings, randomness
        self._meter = Meter(settings.sample_rate, settings.noise_multiplier, records.split, records.whole)

    def draw(self, part: str = ALL) -> Batch:
        return self._meter.drawn(sample(self._records, part, self._settings.sample_rate, self._randomness))

    def gradient(self, theta: Tensor, batch: Batch) -> Tensor:
        return (
            release(
                self._unnoised_sum(theta, batch),
                noise_multiplier=self._settings.noise_multiplier,
                max_grad_norm=self._settings.max_grad_norm,
                expected_batch_size=self._settings.denominator(batch._part),
                randomness=self._randomness,
            )
            .to(theta.dtype)
            .unsqueeze(0)
        )

    @property
    def whole(self) -> str:
        """The ledger's name for all records behind this door."""
        return self._records.whole

    @property
    def charges(self) -> tuple[Charge, ...]:
        return self._meter.charges

    def _unnoised_sum(self, theta: Tensor, batch: Batch) -> Tensor:
        """float64[P]: what a release adds its noise to. For doors alone: this has left no door yet."""
        check_theta(theta, self._size)
        self._meter.query(batch)
        return self._sum_at(theta, batch._rows)

    def _sum_at(self, theta: Tensor, rows: Tensor) -> Tensor:
        """float64[P]: Σ over ``rows`` of g · min(1, C/‖g‖) at ``theta`` [1, P]."""
        raise NotImplementedError
