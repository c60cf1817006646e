"""Adaptation on the support records, and the gradient of the query loss back through it."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from privfed.privacy.oracle.door import Batch, Door, curvature

SUPPORT, QUERY = "support", "query"
HALVES: Mapping[str, float] = {SUPPORT: 0.5, QUERY: 0.5}


@dataclass(frozen=True)
class Step:
    """One step of the adaptation: where, on which draw, and the gradient that it took; float32[K, P]."""

    theta: Tensor
    batch: Batch
    gradient: Tensor


def adapt(theta: Tensor, door: Door, *, steps: int, rates: float | Tensor) -> tuple[Tensor, list[Step]]:
    """θ ← θ − rates ∘ ∇L_S(θ) from theta [K, P], each step on a fresh draw of the support records."""
    trail: list[Step] = []
    for _ in range(steps):
        batch = door.draw(SUPPORT)
        trail.append(Step(theta, batch, door.gradient(theta, batch)))
        theta = theta - rates * trail[-1].gradient
    return theta, trail


def back(trail: list[Step], gradient: Tensor, door: Door, rates: float | Tensor, *, first_order: bool) -> Tensor:
    """∇_w L_Q(θ(w)) from ∇L_Q at the end of the trail: v ← (I − H_S rates) v, the last step first.

    First order takes each I − H_S rates for I (Finn et al. 2017, Section 5.2).
    """
    for step in [] if first_order else reversed(trail):
        gradient = gradient - curvature(door, step.theta, step.batch, rates * gradient)
    return gradient
