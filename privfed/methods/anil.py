"""ANIL: almost no inner loop. Only the head adapts, all of the model learns."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from msgspec import Meta
from torch import Tensor

from privfed.privacy.events import NoiseSite, PrivacyUnit
from privfed.privacy.oracle.door import Door

from ..models import Layout
from .meta import HALVES, QUERY, SUPPORT, adapt, back
from .method import FineTuned, Queries, Rate, State, Steps, descend, post_processing, second_order


class Anil(FineTuned, frozen=True, kw_only=True, tag_field="name", tag="anil"):
    """Raghu et al. 2020, Section 4.1: `Maml` with θ = w − α M∇L_S(w), where M is 1 on the head and 0 below.

    Sent is the meta-gradient of all parameters. Personalisation adapts the head alone, and stays at the site.

    Guarantees:
        As `Maml`: none for units inside a site. With first_order, as `Fomaml`: record or patient unit, local noise, the
        larger of P(q, σ) × inner_steps (support) and P(q, σ) × 1 (query) a participation. Client unit: both.
    """

    inner_steps: Annotated[Steps, Meta(description="adaptation steps of the head on the support records")] = 1
    inner_lr: Annotated[Rate, Meta(description="α, learning rate of the adaptation")] = 0.5
    outer_lr: Annotated[Rate, Meta(description="β, learning rate of the meta step")] = 3.0
    first_order: Annotated[
        bool, Meta(description="leave out the second-order terms, which have no record guarantee")
    ] = False

    parts: ClassVar[Mapping[str, float]] = HALVES

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(SUPPORT, self.inner_steps), Queries(QUERY, 1))

    def guarantee(self, unit: PrivacyUnit, noise: NoiseSite) -> str | None:
        return (post_processing if self.first_order else second_order)(unit, noise)

    def init_site(self, theta: Tensor, layout: Layout) -> tuple[State, State]:
        return {"head": layout["head"]}, {}

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        rates = self.inner_lr * shared["head"]
        adapted, trail = adapt(broadcast["theta"].unsqueeze(0), door, steps=self.inner_steps, rates=rates)
        gradient = door.gradient(adapted, door.draw(QUERY))
        return -self.outer_lr * back(trail, gradient, door, rates, first_order=self.first_order), shared

    def personalize(self, broadcast: State, shared: State, private: State, local_door: Door) -> State:
        start, rates = broadcast["theta"].unsqueeze(0), self.personal_lr * shared["head"]
        return {"theta": descend(start, local_door, steps=self.personal_steps, lr=rates)[0]}
