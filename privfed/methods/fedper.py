"""FedPer: a common body under each site's own head, trained together."""

from typing import Annotated, ClassVar

from msgspec import Meta
from torch import Tensor

from privfed.privacy.oracle.door import ALL, Door

from ..models import Part
from .keeping import Keeping
from .method import Queries, Rate, State, Steps, descend


class FedPer(Keeping, frozen=True, kw_only=True, tag_field="name", tag="fedper"):
    """Arivazhagan et al. 2019, Algorithm 1: (body, h_k) ← τ joint SGD steps from (w, h_k); w ← w + mean(body − w).

    The head h_k never leaves. Personalisation adapts the head alone; a new site fits one to w.

    Guarantees:
        Record or patient unit, local noise: P(q, σ) × local_steps a participation: the head comes from the door's
        noised answers like the body. Client unit: the whole update of the body is clipped and noised, whatever the head
        saw.
    """

    local_steps: Annotated[Steps, Meta(description="τ, gradient steps a round at a site")] = 5
    lr: Annotated[Rate, Meta(description="learning rate of these steps")] = 0.5

    stays: ClassVar[tuple[Part, ...]] = ("head",)

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(ALL, self.local_steps),)

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        start = self.model(broadcast, shared)
        theta = descend(start, door, steps=self.local_steps, lr=self.lr)
        return theta - start, self.keep(shared, theta)
