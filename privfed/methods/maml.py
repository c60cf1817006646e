"""Second-order MAML, which is the exact Per-FedAvg."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from msgspec import Meta
from torch import Tensor

from privfed.privacy.events import NoiseSite, PrivacyUnit
from privfed.privacy.oracle.door import Door

from .meta import HALVES, QUERY, SUPPORT, adapt, back
from .method import FineTuned, Queries, Rate, State, Steps, second_order


class Maml(FineTuned, frozen=True, kw_only=True, tag_field="name", tag="maml"):
    """Finn et al. 2017, Algorithm 1: θ = w − α∇L_S(w), n steps; w ← w − β mean Π(I − αH_S) ∇L_Q(θ).

    The products with the Hessian are exact, on the draws of the steps that they belong to. Personalisation is
    adaptation on all of the site's training records, and stays there.

    Guarantees:
        None for units inside a site: (I − αH_S) v reads the support records once more, without noise or bound. Client
        unit: the whole update is clipped and noised, whatever it was made of.
    """

    inner_steps: Annotated[Steps, Meta(description="n, adaptation steps on the support records")] = 1
    inner_lr: Annotated[Rate, Meta(description="α, learning rate of the adaptation")] = 0.5
    outer_lr: Annotated[Rate, Meta(description="β, learning rate of the meta step")] = 3.0

    parts: ClassVar[Mapping[str, float]] = HALVES

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(SUPPORT, self.inner_steps), Queries(QUERY, 1))

    def guarantee(self, unit: PrivacyUnit, noise: NoiseSite) -> str | None:
        return second_order(unit, noise)

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        adapted, trail = adapt(broadcast["theta"].unsqueeze(0), door, steps=self.inner_steps, rates=self.inner_lr)
        gradient = door.gradient(adapted, door.draw(QUERY))
        return -self.outer_lr * back(trail, gradient, door, self.inner_lr, first_order=False), {}
