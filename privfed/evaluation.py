"""Figures of merit: at a site, on its own test records; over the sites, mean, worst decile and who was hurt."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .parameters import load_vector


@torch.no_grad()
def outputs_of(model: nn.Module, theta: Tensor, inputs: Tensor) -> Tensor:
    """float32[n, classes]: the model's outputs at parameters float32[P]."""
    load_vector(model, theta)
    outputs: Tensor = model(inputs)
    return outputs


@dataclass(frozen=True)
class Spread:
    """One figure over the sites, every site counting once.

    Attributes:
        mean: unweighted mean over sites.
        worst_decile: mean of the worst tenth of the sites (at least one).
        sd: standard deviation over sites.
    """

    mean: float
    worst_decile: float
    sd: float


def spread(values: Sequence[float | None], *, lower_is_better: bool = False) -> Spread | None:
    """The spread of the sites that have a value; None when none has."""
    found = (value for value in values if value is not None and math.isfinite(value))
    defined = sorted(found, reverse=lower_is_better)
    if not defined:
        return None
    worst = defined[: max(1, round(len(defined) / 10))]
    return Spread(mean=float(np.mean(defined)), worst_decile=float(np.mean(worst)), sd=float(np.std(defined)))


def fraction_hurt(
    ours: Mapping[str, float | None], theirs: Mapping[str, float | None], *, lower_is_better: bool = False
) -> float | None:
    """Share of sites whose figure is worse than what they would have had; None when no site has both."""
    pairs = [(mine, theirs[site]) for site, mine in ours.items() if mine is not None and theirs.get(site) is not None]
    if not pairs:
        return None
    hurt = [(mine > other if lower_is_better else mine < other) for mine, other in pairs if other is not None]
    return sum(hurt) / len(pairs)
