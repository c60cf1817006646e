"""Normalisation of each site's own, for sites whose inputs are shifted or scaled against each other's."""

from typing import Annotated, ClassVar

from msgspec import Meta
from torch import Tensor

from privfed.privacy.oracle.door import ALL, Door

from ..models import Part
from .keeping import Keeping
from .method import Queries, Rate, State, Steps, descend


class LocalNorm(Keeping, frozen=True, kw_only=True, tag_field="name", tag="local-norm"):
    """Li et al. 2021 (ICLR, FedBN), Algorithm 1, with GroupNorm: τ joint SGD steps; all but scales and shifts averaged.

    Batch normalisation, which the paper keeps local, mixes records and has running statistics that no clip bounds: no
    unit inside a site has a guarantee with it. `model.norm = "group"` normalises each record by itself. Personalisation
    adapts the scales and shifts alone.

    Guarantees:
        Record or patient unit, local noise: P(q, σ) × local_steps a participation: scales and shifts come from the
        door's noised answers like the rest. Client unit: the whole update is clipped and noised.
    """

    local_steps: Annotated[Steps, Meta(description="τ, gradient steps a round at a site")] = 2
    lr: Annotated[Rate, Meta(description="learning rate of these steps")] = 0.5

    stays: ClassVar[tuple[Part, ...]] = ("norm",)

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(ALL, self.local_steps),)

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        start = self.model(broadcast, shared)
        theta = descend(start, door, steps=self.local_steps, lr=self.lr)
        return theta - start, self.keep(shared, theta)
