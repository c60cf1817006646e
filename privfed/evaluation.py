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
        weighted_mean: mean with the sites' weights; the unweighted one where none are given.
    """

    mean: float
    worst_decile: float
    sd: float
    weighted_mean: float


def spread(
    values: Sequence[float | None], weights: Sequence[float] | None = None, *, lower_is_better: bool = False
) -> Spread | None:
    """The spread of the sites that have a value; None when none has.

    Args:
        weights: of each site, for the weighted mean alone; numbers of test records.
        lower_is_better: the worst sites are those with the largest values.
    """
    given = [1.0] * len(values) if weights is None else weights
    pairs = sorted(
        (
            (value, weight)
            for value, weight in zip(values, given, strict=True)
            if value is not None and math.isfinite(value)
        ),
        reverse=lower_is_better,
    )
    if not pairs:
        return None
    defined, heavy = (np.array(column) for column in zip(*pairs, strict=True))
    worst = defined[: max(1, round(len(defined) / 10))]
    mean = float(np.mean(defined))
    weighted = float(np.average(defined, weights=heavy)) if heavy.sum() > 0 else mean
    return Spread(mean, float(np.mean(worst)), float(np.std(defined)), weighted)


def fraction_hurt(
    ours: Mapping[str, float | None], theirs: Mapping[str, float | None], *, lower_is_better: bool = False
) -> float | None:
    """Share of sites whose figure is worse than what they would have had; None when no site has both."""
    pairs = [(mine, theirs[site]) for site, mine in ours.items() if mine is not None and theirs.get(site) is not None]
    if not pairs:
        return None
    hurt = [(mine > other if lower_is_better else mine < other) for mine, other in pairs if other is not None]
    return sum(hurt) / len(pairs)


@dataclass(frozen=True)
class Paired:
    """How much better one is than the other, over runs that share everything else.

    Attributes:
        mean: of the differences.
        half_width: half the width of their 95 % interval, by Student's t; NaN for fewer than two pairs.
        pairs: how many.
    """

    mean: float
    half_width: float
    pairs: int


def paired(ours: Sequence[float], theirs: Sequence[float], *, level: float = 0.95) -> Paired:
    """The interval of ours − theirs, pair by pair: one pair a seed."""
    from scipy import stats

    differences = np.subtract(ours, theirs)
    number = len(differences)
    if number < 2:
        return Paired(float(differences.mean()) if number else math.nan, math.nan, number)
    width = stats.t.ppf((1 + level) / 2, number - 1) * differences.std(ddof=1) / math.sqrt(number)
    return Paired(float(differences.mean()), float(width), number)
