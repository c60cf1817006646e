"""FedBABU: all sites train one body under a head that nobody trains."""

from typing import Annotated, ClassVar

from msgspec import Meta
from torch import Tensor

from privfed.privacy.oracle.door import ALL, Door

from ..models import Layout, Part
from .method import FineTuned, Queries, Rate, State, Steps, descend


class FedBABU(FineTuned, frozen=True, kw_only=True, tag_field="name", tag="fedbabu"):
    """Oh, Kim and Yun 2022, Algorithm 1: τ SGD steps of the body under the public random head; w ← w + mean(body − w).

    Head and body are fine-tuned together at evaluation, and stay at the site.

    Guarantees:
        Record or patient unit, local noise: P(q, σ) × local_steps a participation; the head knows no record. Client
        unit: the whole update of the body is clipped and noised.
    """

    local_steps: Annotated[Steps, Meta(description="τ, gradient steps a round at a site")] = 5
    lr: Annotated[Rate, Meta(description="learning rate of these steps")] = 0.5

    stays: ClassVar[tuple[Part, ...]] = ("head",)

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(ALL, self.local_steps),)

    def init_site(self, theta: Tensor, layout: Layout) -> tuple[State, State]:
        return {"trained": ~layout["head"]}, {}

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        start = broadcast["theta"].unsqueeze(0)
        return descend(start, door, steps=self.local_steps, lr=self.lr * shared["trained"]) - start, shared
