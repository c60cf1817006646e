"""What choosing costs: the best of many private runs has seen the records many times.

Papernot and Steinke 2022, "Hyperparameter Tuning with Renyi Differential Privacy", Theorem 2: if the number of runs K
is drawn from a truncated negative binomial distribution D(η, γ), each run takes its settings at random, and only the
best one is released (by a figure that the runs themselves release), then with λ-RDP ε(λ) of a single run the choice
has, for any order λ̂,

    ε'(λ) ≤ ε(λ) + (1 + η)(1 − 1/λ̂) ε(λ̂) + (1 + η) log(1/γ) / λ̂ + log(E[K]) / (λ − 1).
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from . import rdp
from .errors import NoGuarantee
from .events import Charge


def divergence_of(charges: Iterable[Charge]) -> np.ndarray:
    """float64[orders]: RDP of the composition of all charges, whatever part of the records each is about."""
    total = np.zeros_like(rdp.ORDERS)
    for charge in charges:
        total += charge.count * rdp.divergences(charge.event)
    return total


def epsilon_of_best(runs: Sequence[Iterable[Charge]], delta: float) -> float:
    """ε at ``delta`` of releasing the best of a random number of runs, as many as these on average.

    The settings of each run are drawn from these with equal chances, and their number from the geometric distribution
    (η = 1): a fixed number of runs, or one after another until it is good enough, has no such bound.

    Args:
        runs: what each candidate would cost; the dearest counts, at every order.

    Raises:
        NoGuarantee: no candidate, or one without noise.
    """
    if not runs:
        raise NoGuarantee("there is nothing to choose from")
    worst = np.max([divergence_of(charges) for charges in runs], axis=0)
    if not np.isfinite(worst).any():
        raise NoGuarantee("a candidate without noise: nothing bounds what choosing it tells")
    mean = len(runs)
    if mean == 1:
        return rdp.epsilon(worst, delta)
    eta, gamma = 1.0, 1.0 / mean  # the geometric distribution has E[K] = 1/γ
    once = np.min((1 + eta) * (1 - 1 / rdp.ORDERS) * worst + (1 + eta) * math.log(1 / gamma) / rdp.ORDERS)
    return rdp.epsilon(worst + once + math.log(mean) / (rdp.ORDERS - 1), delta)
