"""FedRep: each site fits its own head to the common body, then moves the body."""

from typing import Annotated, ClassVar

from msgspec import Meta
from torch import Tensor

from privfed.privacy.oracle.door import ALL, Door

from ..models import Part
from .keeping import Keeping
from .method import Queries, Rate, State, Steps, descend


class FedRep(Keeping, frozen=True, kw_only=True, tag_field="name", tag="fedrep"):
    """Collins et al. 2021, Algorithm 1: h_k ← head_steps of SGD at body w; body ← body_steps of SGD at h_k;
    w ← w + mean(body − w).

    The head h_k never leaves. Personalisation goes on with the head alone; a new site fits one to w.

    Guarantees:
        Record or patient unit, local noise: P(q, σ) × (head_steps + body_steps) a participation: the head is trained
        through the noised door as well, because the body's gradient depends on it without bound. Client unit: the whole
        update of the body is clipped and noised, whatever the head saw.
    """

    head_steps: Annotated[Steps, Meta(description="gradient steps of the head a round")] = 5
    head_lr: Annotated[Rate, Meta(description="learning rate of the head")] = 0.5
    body_steps: Annotated[Steps, Meta(description="gradient steps of the body a round")] = 1
    body_lr: Annotated[Rate, Meta(description="learning rate of the body")] = 0.5

    stays: ClassVar[tuple[Part, ...]] = ("head",)

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(ALL, self.head_steps + self.body_steps),)

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        head = shared["own"]
        fitted = descend(self.model(broadcast, shared), door, steps=self.head_steps, lr=self.head_lr * head)
        moved = descend(fitted, door, steps=self.body_steps, lr=self.body_lr * ~head)
        return moved - fitted, self.keep(shared, fitted)
