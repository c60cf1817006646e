"""Meta-SGD, as in FedMeta: the start is learned, and a learning rate for each parameter."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from msgspec import Meta
from torch import Tensor

from privfed.privacy.events import NoiseSite, PrivacyUnit
from privfed.privacy.oracle.door import Door

from .meta import HALVES, QUERY, SUPPORT, adapt, back
from .method import Averaging, Queries, Rate, State, Steps, descend, post_processing, second_order


class MetaSGD(Averaging, frozen=True, kw_only=True, tag_field="name", tag="meta-sgd"):
    """Li et al. 2017, Algorithm 1; Chen et al. 2018, Algorithm 1 (FedMeta with Meta-SGD); one step on the support part:

        θ = w − α ∘ g_S,  g_S = ∇L_S(w);  (w, α) ← (w, α) − β mean((I − H_S diag α) ∇L_Q(θ), −g_S ∘ ∇L_Q(θ))

    The second block of an update is α's. Personalisation is adaptation at the learned rates, and stays at the site.

    Guarantees:
        As `Maml`: none for units inside a site. With first_order, which takes I for I − H_S diag α, as `Fomaml`: record
        or patient unit, local noise, the larger of P(q, σ) on support and P(q, σ) on query a participation: the product
        of both answers is post-processing. Client unit: both blocks are clipped and noised as one vector.
    """

    inner_lr: Annotated[Rate, Meta(description="what every rate of α is at the start")] = 0.5
    outer_lr: Annotated[Rate, Meta(description="β, learning rate of the meta step")] = 3.0
    first_order: Annotated[
        bool, Meta(description="leave out the second-order terms, which have no record guarantee")
    ] = False
    personal_steps: Annotated[Steps, Meta(description="adaptation steps at evaluation, never leaving the site")] = 5

    parts: ClassVar[Mapping[str, float]] = HALVES
    blocks: ClassVar[int] = 2

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(SUPPORT, 1), Queries(QUERY, 1))

    def guarantee(self, unit: PrivacyUnit, noise: NoiseSite) -> str | None:
        return (post_processing if self.first_order else second_order)(unit, noise)

    def init_server(self, theta: Tensor) -> State:
        return {"theta": theta, "rates": torch.full_like(theta, self.inner_lr)}

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        rates = broadcast["rates"].unsqueeze(0)
        adapted, trail = adapt(broadcast["theta"].unsqueeze(0), door, steps=1, rates=rates)
        gradient = door.gradient(adapted, door.draw(QUERY))
        start = back(trail, gradient, door, rates, first_order=self.first_order)
        return -self.outer_lr * torch.cat([start, -trail[0].gradient * gradient], dim=1), {}

    def personalize(self, broadcast: State, shared: State, private: State, local_door: Door) -> State:
        start, rates = broadcast["theta"].unsqueeze(0), broadcast["rates"]
        return {"theta": descend(start, local_door, steps=self.personal_steps, lr=rates)[0]}

    def serve(self, state: State, mean_update: Tensor, progress: float) -> State:
        moved, rates = mean_update.view(2, -1)
        return {"theta": state["theta"] + moved, "rates": state["rates"] + rates}
