"""The private door of K simulated sites at once: one pass for all of them, and what each would answer alone.

For simulations, in which nobody sends a model made to break rounding: see `StackedNetwork`. The arithmetic is float64
by default, as `OpacusDoor`'s is, so that a study's figures do not depend on which of the two gave them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..events import Charge
from ..noise import release_each
from .door import ALL, Batch, DoorSettings, Meter, Records, rows_of
from .stacked import StackedNetwork

MEMORY_BYTES = 32 * 2**20
"""About the last cache of a processor. Of more at once memory becomes the limit, of less the calls."""
_FEW = 25  # sites that are not worth a pass of their own


class Draws(Batch):
    """An opaque draw of each site."""

    __slots__ = ("_counts",)

    def __init__(self, part: str, rows: Tensor, counts: Tensor) -> None:
        super().__init__(part, rows)
        self._counts = counts


@dataclass(frozen=True, repr=False)
class _Part:
    """A part's row numbers, int64[Σ n], site after site, and where each site's end; a number for each, and by site."""

    rows: np.ndarray
    ends: np.ndarray
    uniform: np.ndarray
    uniform_of: Sequence[np.ndarray]

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> "_Part":
        ends = np.cumsum([len(own) for own in rows])
        uniform = np.empty(ends[-1])
        return cls(np.concatenate(rows), ends, uniform, np.split(uniform, ends[:-1]))

    def sample(self, rate: float, randomness: Sequence[np.random.Generator]) -> tuple[Tensor, Tensor]:
        """`noise.poisson_sample` of each site: rows drawn, site after site, and how many are each site's."""
        for numbers, source in zip(self.uniform_of, randomness, strict=True):
            source.random(out=numbers)
        drawn = self.uniform < rate
        before = np.concatenate([[0], np.cumsum(drawn)])[self.ends]
        return torch.from_numpy(self.rows[drawn]), torch.from_numpy(np.diff(before, prepend=0))


class CohortDoor:
    """Clipped, noised and metered gradients of K simulated sites.

    Args:
        network: the sites' network. Its dtype is the arithmetic's.
        sites: each site's training records; parts and the ledger's names for them are the same everywhere.
        settings: the public constants, of every site alike.
        randomness: each site's own generator; its draws and its noise come from it alone.
        memory_bytes: what gradients may take at once: sites and records are worked on in blocks that keep to it.

    Guarantees:
        Site k's answers are those of an `OpacusDoor` with the same records and generator: the same records drawn and,
        where the network is float64, the same noise bit for bit, the same clipped sums up to rounding, the same
        `charges`. (A float32 network has noise of the same scale, sampled in float32.) No site's answer depends on
        another's records. All of it up to rounding, whose limits are those of `StackedNetwork`.
    """

    def __init__(
        self,
        *,
        network: StackedNetwork,
        sites: Sequence[Records],
        settings: DoorSettings,
        randomness: Sequence[np.random.Generator],
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        if not sites or len(sites) != len(randomness):
            raise ValueError(f"randomness must have a generator for each of {len(sites)} sites, got {len(randomness)}")
        if len({(records.split, records.whole, *sorted(records.parts)) for records in sites}) > 1:
            raise ValueError("sites must have the same parts under the same names: they are booked alike")
        self._network, self._settings, self._randomness = network, settings, tuple(randomness)
        self._meter = Meter(settings.sample_rate, settings.noise_multiplier, sites[0].split, sites[0].whole)
        self._memory_bytes = memory_bytes
        self._inputs = torch.cat([records.inputs for records in sites]).to(network.device)
        self._targets = torch.cat([records.targets for records in sites]).to(network.device)
        before = np.cumsum([0, *(len(records) for records in sites)])
        self._parts = {
            part: _Part.of(
                [rows_of(records, part).numpy() + start for records, start in zip(sites, before, strict=False)]
            )
            for part in sites[0].parts
        }

    def draw(self, part: str = ALL) -> Draws:
        """A Poisson draw of ``part`` at every site."""
        if part not in self._parts:
            raise ValueError(f"part must be one of {sorted(self._parts)}, got {part!r}")
        draws = Draws(part, *self._parts[part].sample(self._settings.sample_rate, self._randomness))
        self._meter.drawn(draws)
        return draws

    def gradient(self, theta: Tensor, batch: Batch) -> Tensor:
        """float32[K, P]: each site's noised mean of clipped gradients at its row of ``theta`` [K, P], or at [1, P]."""
        sites, parameters = len(self._randomness), self._network.parameters
        if theta.shape not in ((sites, parameters), (1, parameters)):
            raise ValueError(f"theta must have shape [{sites}, {parameters}], got {list(theta.shape)}")
        self._meter.query(batch)
        assert isinstance(batch, Draws)  # the meter knows its own draws
        sums = torch.empty(sites, parameters, dtype=self._network.dtype)
        for members, block in clipped_sums(
            self._network,
            theta.expand(sites, -1),
            self._inputs,
            self._targets,
            batch._rows,
            batch._counts,
            max_grad_norm=self._settings.max_grad_norm,
            memory_bytes=self._memory_bytes,
        ):
            if isinstance(members, slice):  # all of them
                sums = block.cpu()
            else:
                sums[members] = block.cpu()
        return release_each(
            sums,
            noise_multiplier=self._settings.noise_multiplier,
            max_grad_norm=self._settings.max_grad_norm,
            expected_batch_size=self._settings.denominator(batch._part),
            randomness=self._randomness,
            dtype=theta.dtype,
        ).to(theta.device)

    @property
    def charges(self) -> tuple[Charge, ...]:
        """What each single site is booked with: all of them executed the same."""
        return self._meter.charges


def clipped_sums(
    network: StackedNetwork,
    theta: Tensor,
    inputs: Tensor,
    targets: Tensor,
    rows: Tensor,
    counts: Tensor,
    *,
    max_grad_norm: float | None,
    memory_bytes: int = MEMORY_BYTES,
) -> Iterator[tuple[Tensor | slice, Tensor]]:
    """The sites' sums, block by block: which sites, int64[k], or the slice of all; [k, P], Σ g · min(1, C/‖g‖) of each.

    Args:
        theta: [K, P].
        inputs, targets: records of all sites.
        rows: int64[Σ counts], row numbers in them, site after site.
        counts: int64[K], how many of them are each site's.
        max_grad_norm: C; None for the plain mean instead of a clipped sum.
    """
    if len(rows) == 0:
        yield slice(0, len(counts)), theta.new_zeros(theta.shape, dtype=network.dtype, device=network.device)
        return
    first = torch.cumsum(counts, 0) - counts
    for members, width, at_once in _blocks(counts, network, memory_bytes):
        point = theta[members].to(network.device, network.dtype)
        total: Tensor | None = None
        for low in range(0, width, at_once):
            places = torch.arange(low, min(width, low + at_once))
            mask = places < counts[members].unsqueeze(1)
            taken = rows[(first[members].unsqueeze(1) + places).clamp_max(len(rows) - 1).flatten()].to(network.device)
            padding = (~mask).flatten().nonzero().squeeze(1).to(network.device)
            x, y = (padded(values, taken, padding).view(*mask.shape, *values.shape[1:]) for values in (inputs, targets))
            x, mask = x.to(network.dtype) if x.is_floating_point() else x, mask.to(network.device)
            if max_grad_norm is not None:
                sums = network.clipped_sums(point, x, y, mask, max_grad_norm=max_grad_norm)
            else:
                share = mask.sum(1) / counts[members].clamp_min(1).to(network.device)
                sums = network.mean_gradients(point, x, y, mask) * share.to(network.dtype).unsqueeze(1)
            total = sums if total is None else total + sums
        assert total is not None  # width is at least 1
        yield members, total


def padded(values: Tensor, taken: Tensor, padding: Tensor) -> Tensor:
    """``values`` at the rows ``taken``, and zeros at the places ``padding`` of these."""
    return values.index_select(0, taken).index_fill_(0, padding, 0)


def _blocks(counts: Tensor, network: StackedNetwork, memory_bytes: int) -> Iterator[tuple[Tensor | slice, int, int]]:
    """Which sites are worked on together: members, the most records of one, and how many of these at once.

    Padding costs what records cost: where there are several blocks, sites of like size share one.
    """
    sizes = counts.tolist()
    largest, per_record = max(1, *sizes), network.bytes_per_record
    per_site = 4 * network.parameters * network.dtype.itemsize
    alike = largest * len(sizes) <= 2 * sum(sizes)
    if alike and len(sizes) * (largest * per_record + per_site) <= memory_bytes:
        yield slice(0, len(sizes)), largest, largest
        return
    order = sorted(range(len(sizes)), key=lambda site: -sizes[site])
    begin = 0
    while begin < len(order):
        width = max(1, sizes[order[begin]])
        at_once = max(1, min(width, memory_bytes // per_record))
        end = begin + max(1, memory_bytes // (at_once * per_record + per_site))
        small = (at for at in range(begin + _FEW, len(order)) if sizes[order[at]] < 0.6 * width)
        end = min(end, next(small, end))
        yield torch.tensor(order[begin:end]), width, at_once
        begin = end
