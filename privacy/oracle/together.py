"""Doors of simulated sites whose gradients are computed together: each site's door asks, one pass answers them all."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..events import Charge
from .cohort import clipped_sums
from .curvature import curvatures
from .door import ALL, Batch, DoorSettings, NoisedDoor, Records, check_theta, sample_exactly
from .stacked import StackedNetwork


@dataclass(frozen=True)
class Query:
    """One site's question.

    Args:
        theta: [1, P].
        records: the site's.
        rows: int64[m], which of them.
        max_grad_norm: C, for Σ g · min(1, C/‖g‖); None for the mean of g.
        vector: [1, P], for the mean's Hessian times it instead; for exact doors alone.
    """

    theta: Tensor = field(repr=False)
    records: Records = field(repr=False)
    rows: Tensor = field(repr=False)
    max_grad_norm: float | None
    vector: Tensor | None = field(default=None, repr=False)


class Oracle(Protocol):
    """Answers doors that do not compute for themselves. For simulated sites alone: it sees their records."""

    @property
    def parameters(self) -> int:
        """P."""
        ...

    def ask(self, query: Query) -> Tensor:
        """float64[P], a clipped sum, or float32[P], a mean or a product."""
        ...


class AskingDoor(NoisedDoor):
    """`OpacusDoor` whose clipped sums another computes.

    Guarantees:
        Draws, noise and charges are those of an `OpacusDoor` with the same records and generator, bit for bit. The
        clipped sums are as good as the oracle: those of `StackedOracle` equal Opacus's up to rounding.
    """

    def __init__(
        self, oracle: Oracle, *, records: Records, settings: DoorSettings, randomness: np.random.Generator
    ) -> None:
        super().__init__(parameters=oracle.parameters, records=records, settings=settings, randomness=randomness)
        self._oracle = oracle

    def _sum_at(self, theta: Tensor, rows: Tensor) -> Tensor:
        return self._oracle.ask(Query(theta, self._records, rows, self._settings.max_grad_norm))


class AskingPlainDoor:
    """`PlainDoor` whose means another computes; the same draws."""

    def __init__(
        self, oracle: Oracle, *, records: Records, sample_rate: float, randomness: np.random.Generator
    ) -> None:
        self._oracle, self._records = oracle, records
        self._sample_rate, self._randomness = sample_rate, randomness

    def draw(self, part: str = ALL) -> Batch:
        return sample_exactly(self._records, part, self._sample_rate, self._randomness)

    def gradient(self, theta: Tensor, batch: Batch) -> Tensor:
        check_theta(theta, self._oracle.parameters)
        if len(batch._rows) == 0:
            return torch.zeros_like(theta)
        return self._oracle.ask(Query(theta, self._records, batch._rows, None)).unsqueeze(0)

    def curvature(self, theta: Tensor, batch: Batch, vector: Tensor) -> Tensor:
        check_theta(theta, self._oracle.parameters)
        if len(batch._rows) == 0:
            return torch.zeros_like(theta)
        return self._oracle.ask(Query(theta, self._records, batch._rows, None, vector)).unsqueeze(0)

    @property
    def charges(self) -> tuple[Charge, ...]:
        """Nothing is claimed, so nothing is booked."""
        return ()


Answer = Tensor | Exception


class StackedOracle:
    """Answers many sites' queries in one pass.

    Args:
        private: for clipped sums; float64 as Opacus computes here.
        exact: for means; float32 as `PlainDoor` computes.

    Guarantees:
        Each answer is what the site alone would get, up to rounding. What fails for one site fails for that site.
    """

    def __init__(self, private: StackedNetwork, exact: StackedNetwork) -> None:
        self._networks = {False: exact, True: private}
        self._held: tuple[tuple[int, ...], list[Records], Tensor, Tensor] | None = None

    @property
    def parameters(self) -> int:
        return self._networks[True].parameters

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """The answers, in order; an exception where a query can not be answered."""
        alike: dict[Hashable, list[int]] = {}
        for number, query in enumerate(queries):
            alike.setdefault((query.max_grad_norm, query.vector is None), []).append(number)
        answers: dict[int, Answer] = {}
        for numbers in alike.values():
            together = [queries[number] for number in numbers]
            try:
                answers |= zip(numbers, self._pass(together), strict=True)
            except Exception:  # of one of them: let it be that site's alone
                answers |= {number: _caught(lambda q: self._pass([q])[0], queries[number]) for number in numbers}
        return [answers[number] for number in range(len(queries))]

    def _pass(self, queries: Sequence[Query]) -> list[Tensor]:
        limit = queries[0].max_grad_norm
        inputs, targets = self._joined([query.records for query in queries])
        sizes = torch.tensor([len(query.records) for query in queries])
        offsets = torch.cumsum(sizes, 0) - sizes
        rows = torch.cat([query.rows + offset for query, offset in zip(queries, offsets, strict=True)])
        counts = torch.tensor([len(query.rows) for query in queries])
        theta = torch.cat([query.theta for query in queries])
        network = self._networks[limit is not None]
        if queries[0].vector is not None:
            vectors = torch.cat([query.vector for query in queries if query.vector is not None])
            return list(curvatures(network, theta, vectors, inputs, targets, rows, counts))
        answers: list[Tensor] = [torch.empty(0)] * len(queries)
        for members, sums in clipped_sums(network, theta, inputs, targets, rows, counts, max_grad_norm=limit):
            which = range(len(queries))[members] if isinstance(members, slice) else members.tolist()
            for number, vector in zip(which, sums.cpu(), strict=True):
                answers[number] = vector
        return answers

    def _joined(self, sites: list[Records]) -> tuple[Tensor, Tensor]:
        """The sites' records as one table. Sites go step by step together: the last one is likely wanted again."""
        key = tuple(id(records.inputs) for records in sites)
        if self._held is None or self._held[0] != key:
            device = self._networks[True].device
            inputs = torch.cat([records.inputs for records in sites]).to(device)
            targets = torch.cat([records.targets for records in sites]).to(device)
            self._held = (key, sites, inputs, targets)  # holds the sites' own tensors, so that no id is used again
        return self._held[2], self._held[3]


def _caught(function: Callable[[Query], Tensor], query: Query) -> Answer:
    try:
        return function(query)
    except Exception as error:
        return error
