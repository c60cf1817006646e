"""Federated averaging whose sites stay near the server's model."""

from typing import Annotated

from msgspec import Meta
from torch import Tensor

from privfed.privacy.oracle.door import ALL, Door

from .method import FineTuned, Queries, Rate, State, Steps, descend_near


class FedProx(FineTuned, frozen=True, kw_only=True, tag_field="name", tag="fedprox"):
    """Li et al. 2020 (MLSys), Algorithm 2: θ_k ≈ argmin L_k(θ) + μ/2 ‖θ − w‖², by τ steps; w ← w + mean(θ_k − w).

    μ = 0 is `FedAvg`. Personalisation is fine-tuning from w at evaluation only, and stays at the site.

    Guarantees:
        Record or patient unit, local noise: P(q, σ) × local_steps a participation. The proximal term knows no record:
        it joins the door's answer after clip and noise. Client unit: the whole update is clipped and noised.
    """

    local_steps: Annotated[Steps, Meta(description="τ, gradient steps a round at a site")] = 2
    lr: Annotated[Rate, Meta(description="learning rate of these steps")] = 1.0
    regularization: Annotated[float, Meta(ge=0, le=1e4, description="μ, pull towards the server's model")] = 0.1

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(ALL, self.local_steps),)

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        start = broadcast["theta"].unsqueeze(0)
        near = descend_near(start, start, door, steps=self.local_steps, lr=self.lr, pull=self.regularization)
        return near - start, {}
