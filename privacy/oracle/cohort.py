"""The private door of K simulated sites at once: one pass for all of them, and what each would answer alone.

For simulations, in which nobody sends a model made to break rounding: see `StackedNetwork`. The arithmetic is float64
by default, as `OpacusDoor`'s is, so that a study's figures do not depend on which of the two gave them.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..events import Charge
from ..noise import release_each
from .door import ALL, Batch, DoorSettings, Meter, Records, rows_of
from .stacked import StackedNetwork

MEMORY_BYTES = 128 * 2**20
_FEW = 25  # sites that are not worth a pass of their own


class Draws(Batch):
    """An opaque draw of each site."""

    __slots__ = ("_counts",)

    def __init__(self, part: str, rows: Tensor, counts: Tensor) -> None:
        super().__init__(part, rows)
        self._counts = counts


class CohortDoor:
    """Clipped, noised and metered gradients of K simulated sites.

    Args:
        network: the sites' network. Its dtype is the arithmetic's.
        sites: each site's training records; parts and the ledger's names for them are the same everywhere.
        settings: the public constants, of every site alike.
        randomness: each site's own generator; its draws and its noise come from it alone.
        memory_bytes: what gradients may take at once: sites and records are worked on in blocks that keep to it.

    Guarantees:
        Site k's answers are those of an `OpacusDoor` with the same records and generator: the same records drawn and
        the same noise bit for bit, the same clipped sums up to rounding, the same `charges`. No site's answer depends
        on another's records. All of it up to rounding, whose limits are those of `StackedNetwork`.
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
            part: [rows_of(records, part).numpy() + start for records, start in zip(sites, before, strict=False)]
            for part in sites[0].parts
        }

    def draw(self, part: str = ALL) -> Draws:
        """A Poisson draw of ``part`` at every site."""
        if part not in self._parts:
            raise ValueError(f"part must be one of {sorted(self._parts)}, got {part!r}")
        held, rate = self._parts[part], self._settings.sample_rate
        drawn = [
            rows[randomness.random(len(rows)) < rate] for rows, randomness in zip(held, self._randomness, strict=True)
        ]
        counts = torch.tensor([len(rows) for rows in drawn])
        draws = Draws(part, torch.from_numpy(np.concatenate(drawn)), counts)
        self._meter.drawn(draws)
        return draws

    def gradient(self, theta: Tensor, batch: Batch) -> Tensor:
        """float32[K, P]: each site's noised mean of clipped gradients at its row of ``theta`` [K, P], or at [1, P]."""
        sites, parameters = len(self._randomness), self._network.parameters
        if theta.shape not in ((sites, parameters), (1, parameters)):
            raise ValueError(f"theta must have shape [{sites}, {parameters}], got {list(theta.shape)}")
        self._meter.query(batch)
        assert isinstance(batch, Draws)  # the meter knows its own draws
        answers = theta.new_empty(sites, parameters)
        blocks = clipped_sums(
            self._network,
            theta.expand(sites, -1),
            self._inputs,
            self._targets,
            batch._rows,
            batch._counts,
            max_grad_norm=self._settings.max_grad_norm,
            memory_bytes=self._memory_bytes,
        )
        for members, sums in blocks:
            answers[members] = release_each(
                sums.cpu(),
                noise_multiplier=self._settings.noise_multiplier,
                max_grad_norm=self._settings.max_grad_norm,
                expected_batch_size=self._settings.denominator(batch._part),
                randomness=self._randomness[members]
                if isinstance(members, slice)
                else [self._randomness[site] for site in members.tolist()],
            ).to(theta.dtype)
        return answers

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
    """The sites' sums, block by block: which sites, int64[k] or a slice; [k, P], Σ g · min(1, C/‖g‖) of each.

    Args:
        theta: [K, P].
        inputs, targets: records of all sites.
        rows: int64[Σ counts], row numbers in them, site after site.
        counts: int64[K], how many of them are each site's.
        max_grad_norm: C; None for the plain mean instead of a clipped sum.
    """
    first = torch.cumsum(counts, 0) - counts
    for members, width, at_once in _blocks(counts, network, memory_bytes):
        point = theta[members].to(network.device, network.dtype)
        total: Tensor | None = None
        for low in range(0, width, at_once):
            high = min(width, low + at_once)
            mask = torch.arange(low, high) < counts[members].unsqueeze(1)
            which = rows[(first[members].unsqueeze(1) + torch.arange(low, high))[mask]].to(network.device)
            filled = mask.flatten().to(network.device)
            x = _padded(inputs, which, filled, network.dtype)
            y = _padded(targets, which, filled, None)
            x, y, mask = x.view(*mask.shape, *x.shape[1:]), y.view(*mask.shape, *y.shape[1:]), mask.to(network.device)
            if max_grad_norm is not None:
                sums = network.clipped_sums(point, x, y, mask, max_grad_norm=max_grad_norm)
            else:
                share = mask.sum(1) / counts[members].clamp_min(1).to(network.device)
                sums = network.mean_gradients(point, x, y, mask) * share.to(network.dtype).unsqueeze(1)
            total = sums if total is None else total + sums
        assert total is not None  # width is at least 1
        yield members, total


def _padded(values: Tensor, rows: Tensor, filled: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``values`` at ``rows`` where ``filled``, zeros elsewhere; floats as ``dtype``."""
    chosen = values.index_select(0, rows)
    if dtype is not None and chosen.is_floating_point():
        chosen = chosen.to(dtype)
    if len(rows) == len(filled):
        return chosen
    padded = chosen.new_zeros(len(filled), *chosen.shape[1:])
    padded[filled] = chosen
    return padded


def _blocks(counts: Tensor, network: StackedNetwork, memory_bytes: int) -> Iterator[tuple[Tensor | slice, int, int]]:
    """Which sites are worked on together: members, the most records of one, and how many of these at once.

    Padding costs what records cost, so sites of very different size do not share a block.
    """
    sizes = counts.tolist()
    largest, per_site = max(sizes), 4 * network.parameters * network.dtype.itemsize
    ragged = largest * len(sizes) > 2 * sum(sizes)
    order = sorted(range(len(sizes)), key=lambda site: -sizes[site]) if ragged else list(range(len(sizes)))
    begin = 0
    while begin < len(order):
        width = max(1, sizes[order[begin]] if ragged else largest)
        at_once = max(1, min(width, memory_bytes // network.bytes_per_record))
        end = begin + max(1, memory_bytes // (at_once * network.bytes_per_record + per_site))
        if ragged:
            small = (at for at in range(begin + _FEW, len(order)) if sizes[order[at]] < 0.6 * width)
            end = min(end, next(small, end))
        yield torch.tensor(order[begin:end]) if ragged else slice(begin, end), width, at_once
        begin = end
