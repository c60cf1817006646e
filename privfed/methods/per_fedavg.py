"""Per-FedAvg (HF): the Hessian's effect by a difference of two gradients, so that every look at a record is a query."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from msgspec import Meta
from torch import Tensor

from privfed.privacy.oracle.door import Door

from .meta import HALVES, QUERY, SUPPORT
from .method import FineTuned, Queries, Rate, State, Steps


class PerFedAvg(FineTuned, frozen=True, kw_only=True, tag_field="name", tag="per-fedavg"):
    """Fallah, Mokhtari and Ozdaglar 2020, Algorithm 1 with the approximation (HF) of Section 5; τ steps of

        θ = w − α g_S(w);  u = g_Q(θ);  w ← w − β (u − α (g_H(w + δu) − g_H(w − δu)) / 2δ)

    and w ← w + mean(w_k − w) at the server. The paper's three batches are draws of two fixed parts: g_S and g_H are on
    fresh draws of the support records, g_Q on the query records. Both ± gradients are on one draw, since their
    difference is to be of δ and not of the records. Personalisation is adaptation, and stays at the site.

    Guarantees:
        Record or patient unit, local noise: all four answers are noised. A participation costs the larger of support,
        P(q, σ) × τ and P(q, σ/√2) × τ (two answers on one draw), and query, P(q, σ) × τ. 1/2δ amplifies the noise of
        the difference: with noise, take δ near 1. Client unit: the whole update is clipped and noised.
    """

    local_steps: Annotated[Steps, Meta(description="τ, meta steps a round at a site")] = 1
    inner_lr: Annotated[Rate, Meta(description="α, learning rate of the adaptation")] = 0.5
    outer_lr: Annotated[Rate, Meta(description="β, learning rate of the meta step")] = 3.0
    difference: Annotated[float, Meta(gt=0, le=1e3, description="δ, length of the difference along u")] = 1e-3

    parts: ClassVar[Mapping[str, float]] = HALVES

    def queries(self) -> tuple[Queries, ...]:
        steps = self.local_steps
        return (Queries(SUPPORT, steps), Queries(SUPPORT, steps, each=2), Queries(QUERY, steps))

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        start = theta = broadcast["theta"].unsqueeze(0)
        for _ in range(self.local_steps):
            adapted = theta - self.inner_lr * door.gradient(theta, door.draw(SUPPORT))
            along = door.gradient(adapted, door.draw(QUERY))
            batch, shift = door.draw(SUPPORT), self.difference * along
            bend = (door.gradient(theta + shift, batch) - door.gradient(theta - shift, batch)) / (2 * self.difference)
            theta = theta - self.outer_lr * (along - self.inner_lr * bend)
        return theta - start, {}
