"""First-order MAML over a fixed support/query split, which is Per-FedAvg (FO)."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from msgspec import Meta
from torch import Tensor

from privfed.privacy.oracle.door import Door

from .meta import HALVES, QUERY, SUPPORT
from .method import FineTuned, Queries, Rate, State, Steps, descend


class Fomaml(FineTuned, frozen=True, kw_only=True, tag_field="name", tag="fomaml"):
    """Finn et al. 2017, Section 5.2; Fallah et al. 2020, Per-FedAvg (FO): θ ← w − α∇L_S(w); w ← w − β mean ∇L_Q(θ).

    Guarantees:
        Record unit, local noise, both loops noised: each record is in support or in query for good, by a keyed hash of
        its own id, so ε is the larger of P(q, σ) × inner_steps (support) and P(q, σ) × 1 (query) a participation:
        adaptive parallel composition. Second-order MAML has no such guarantee: (I − αH_S) reads the support records
        again, without noise.
    """

    inner_steps: Annotated[Steps, Meta(description="adaptation steps on the support records")] = 1
    inner_lr: Annotated[Rate, Meta(description="α, learning rate of the adaptation")] = 0.5
    outer_lr: Annotated[Rate, Meta(description="β, learning rate of the meta step")] = 6.0

    parts: ClassVar[Mapping[str, float]] = HALVES

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(SUPPORT, self.inner_steps), Queries(QUERY, 1))

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        start = broadcast["theta"].unsqueeze(0)
        adapted = descend(start, door, steps=self.inner_steps, lr=self.inner_lr, part=SUPPORT)
        return -self.outer_lr * door.gradient(adapted, door.draw(QUERY)), {}
