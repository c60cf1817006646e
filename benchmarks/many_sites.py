"""Runs without privacy, all sites in one pass and no federation around them: for choosing among many settings.

The methods are the toolkit's own, at K sites at once; what is left out is what changes no figure without noise: masks,
ledgers, messages, fixed-point sums. `personalisation.py` compares a few of these runs with `privfed.run`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from privfed.architecture import Schema, build_model, first_states, model_layout, sent
from privfed.config import Config
from privfed.doors import Split
from privfed.evaluation import outputs_of
from privfed.parameters import to_vector
from privfed.privacy.oracle.cohort import clipped_sums
from privfed.privacy.oracle.curvature import curvatures
from privfed.privacy.oracle.door import ALL, Batch, Records
from privfed.privacy.oracle.stacked import StackedNetwork

Figures = dict[str, float | None]
"""By site; None where a figure is undefined."""


class AllSites:
    """The exact door of K sites: `PlainDoor`, K times.

    Args:
        sites: each site's training records, with the same parts.
        rates: float64[K], the chance of a record to be in a draw, at each site.
    """

    def __init__(
        self, network: StackedNetwork, sites: Sequence[Records], rates: Sequence[float], randomness: np.random.Generator
    ) -> None:
        self._network, self._sites, self._rates, self._randomness = network, sites, rates, randomness
        self._inputs = torch.cat([records.inputs for records in sites])
        self._targets = torch.cat([records.targets for records in sites])
        self._before = np.cumsum([0, *(len(records) for records in sites)])
        self._drawn: dict[int, tuple[Batch, Tensor]] = {}  # holds the batch, so that its id is not used again

    def draw(self, part: str = ALL) -> Batch:
        rows, counts = [], []
        for records, rate, start in zip(self._sites, self._rates, self._before, strict=False):
            own = records.parts[part]
            if rate < 1.0:
                own = own[torch.from_numpy(self._randomness.random(len(own)) < rate)]
            rows.append(own + int(start))
            counts.append(len(own))
        batch = Batch(part, torch.cat(rows))
        self._drawn[id(batch)] = (batch, torch.tensor(counts))
        return batch

    def gradient(self, theta: Tensor, batch: Batch) -> Tensor:
        counts = self._drawn[id(batch)][1]
        theta, answers = theta.expand(len(self._sites), -1), torch.empty(len(self._sites), theta.shape[1])
        passes = clipped_sums(
            self._network, theta, self._inputs, self._targets, batch._rows, counts, max_grad_norm=None
        )
        for members, means in passes:
            answers[members] = means
        return answers

    def curvature(self, theta: Tensor, batch: Batch, vector: Tensor) -> Tensor:
        counts, theta = self._drawn[id(batch)][1], theta.expand(len(self._sites), -1)
        return curvatures(self._network, theta, vector, self._inputs, self._targets, batch._rows, counts)

    @property
    def charges(self) -> tuple[()]:
        return ()


@dataclass(frozen=True)
class Outcome:
    """Each site's figures on its own test records, of the common model and of its personal one.

    Attributes:
        weights: numbers of test records.
        finite: no model has run away; figures of one that has say nothing.
    """

    global_: Figures
    personalized: Figures
    weights: dict[str, float]
    finite: bool = True


def simulate(
    config: Config,
    sites: Mapping[str, Split],
    *,
    unseen: Mapping[str, Split] | None = None,
    rates: Sequence[float] | None = None,
    start: Tensor | None = None,
) -> Outcome:
    """What `privfed.run` would measure after the last round, without privacy.

    Args:
        unseen: sites that only adapt the result; the figures are then theirs.
        rates: of each training site, instead of the configured one for all.
        start: float32[P], instead of the public start model.
    """
    method, example = config.method, next(iter(sites.values())).train
    schema = Schema(example.inputs.shape[1], int(max(split.train.targets.max() for split in sites.values())) + 1)
    model = build_model(config, schema)
    theta = to_vector(model) if start is None else start
    shared, private = first_states(config, schema)
    if start is not None:
        shared, private = method.init_site(start, model_layout(config, schema.features, len(start)))
    network = network_of(config.model, schema)
    randomness = np.random.default_rng(config.seed)
    first_shared, state, leaves = shared, method.init_server(theta), sent(config, schema.features, len(theta))
    if method.sends:
        rates = [config.privacy.rate] * len(sites) if rates is None else rates
        door = AllSites(network, [_records(split) for split in sites.values()], rates, randomness)
        for number in range(config.rounds):
            update, shared = method.contribute(state, shared, door)
            state = method.serve(state, update.mean(0) * leaves, number / config.rounds)
    measured = sites if unseen is None else unseen
    own = {name: tensor.unsqueeze(0) if tensor.dim() == 2 else tensor for name, tensor in shared.items()}
    everyone = theta.expand(len(measured), -1)
    exact = AllSites(network, [_records(split) for split in measured.values()], [1.0] * len(measured), randomness)
    personal = method.personalize(
        {**state, "theta": state["theta"].expand_as(everyone)},
        own if unseen is None else first_shared,
        {name: everyone for name in private},
        _Lifted(exact),
    )["theta"]
    before, after = Figures(), Figures()
    for (name, split), mine in zip(measured.items(), personal, strict=True):
        for figures, vector in ((before, state["theta"]), (after, mine)):
            outputs = outputs_of(model, vector, split.test.inputs)
            figures[name] = config.task.score(outputs, split.test.targets, config.metric)
    finite = bool(state["theta"].isfinite().all() and personal.isfinite().all())
    return Outcome(before, after, {name: float(len(split.test)) for name, split in measured.items()}, finite)


class _Lifted:
    """A door for `personalize`, which takes models [1, P] and gives back the first: here the "first" is [K, P]."""

    def __init__(self, door: AllSites) -> None:
        self._door, self.draw, self.charges = door, door.draw, door.charges

    def gradient(self, theta: Tensor, batch: Batch) -> Tensor:
        return self._door.gradient(theta[0], batch).unsqueeze(0)


def _records(split: Split) -> Records:
    return Records(split.train.inputs, split.train.targets, split.parts)


@lru_cache(maxsize=8)
def network_of(model: Any, schema: Schema) -> StackedNetwork:
    """Of the configuration's ``model``; the parameters in it are not used."""
    config = Config(model=model)
    inputs, targets = torch.zeros(1, schema.features), torch.zeros(1, dtype=torch.int64)
    return StackedNetwork(build_model(config, schema), config.task.loss, inputs, targets, dtype=torch.float32)
