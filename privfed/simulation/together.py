"""The embedded engine at speed: every site runs as if alone, and one pass computes all their gradients."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from privfed.privacy.errors import NoGuarantee
from privfed.privacy.oracle.stacked import StackedNetwork
from privfed.privacy.oracle.together import Query, StackedOracle

from ..architecture import Schema, build_model
from ..config import Config
from ..data.records import Sites
from ..doors import seen
from ..engines.contract import Handler
from ..errors import ConfigError
from .rendezvous import Rendezvous

R = TypeVar("R")
FEW = 8
"""Fewer sites than that have their own doors, unless the configuration says otherwise."""


class Meeting:
    """Where the doors of simulated sites ask, and all who have asked are answered together.

    Args:
        oracle: computes the gradients.
    """

    def __init__(self, oracle: StackedOracle) -> None:
        self._oracle, self._rendezvous = oracle, Rendezvous[Query, Tensor](oracle.answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._rendezvous.close()

    @property
    def parameters(self) -> int:
        return self._oracle.parameters

    def ask(self, query: Query) -> Tensor:
        return self._rendezvous.ask(query)

    def run(self, tasks: Sequence[Callable[[], R]]) -> list[R]:
        """What the tasks return, in order; their questions meet."""
        return self._rendezvous.run(tasks)


class CohortEngine:
    """Hands each site its request, and lets their doors meet.

    Args:
        sites: made with ``meeting`` as their oracle.

    Guarantees:
        A site's replies are those that it would give alone: the same draws, noise and ledger entries; updates equal
        up to rounding. A site that refuses, fails, or asks more or less than others changes no other's reply.
    """

    def __init__(self, sites: Mapping[str, Handler], meeting: Meeting) -> None:
        self._sites, self._meeting = dict(sites), meeting

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        def reply(name: str) -> bytes:
            return self._sites[name].handle(requests[name])

        return dict(zip(requests, self._meeting.run([partial(reply, name) for name in requests]), strict=True))


def meeting(config: Config, data: Sites, schema: Schema) -> Meeting | None:
    """What ``simulation.engine`` comes to for these sites; None where each computes for itself.

    Raises:
        ConfigError: "cohort" was asked for, and the network has layers, or the task a loss, that mix records.
    """
    wanted = config.simulation.engine
    if wanted == "opacus" or (wanted == "auto" and len(data.sites) < FEW):
        return None
    if config.task.coupled:
        if wanted == "auto":
            return None
        raise ConfigError("simulation.engine = 'cohort': the task's loss would mix the sites' records; use 'opacus'")
    example = next(iter(data.sites.values()))
    example = seen(config, example.rows(np.arange(len(example)) == 0))
    stacked = partial(
        StackedNetwork, build_model(config, schema), config.task.loss, example.inputs[:1], example.targets[:1]
    )
    try:
        private = stacked(dtype=torch.float64)
        if wanted == "auto" and not private.closed_form:
            return None
        return Meeting(StackedOracle(private, stacked(dtype=torch.float32)))
    except NoGuarantee as refusal:
        if wanted == "auto":
            return None
        raise ConfigError(f"simulation.engine = 'cohort': {refusal}") from None
