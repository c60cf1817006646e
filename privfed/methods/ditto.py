"""Ditto: federated averaging, and beside it a personal model that is pulled towards its result."""

from typing import Annotated

from msgspec import Meta
from torch import Tensor

from privfed.privacy.oracle.door import ALL, Door

from .method import FineTuned, Queries, Rate, State, Steps, descend, descend_near


class Ditto(FineTuned, frozen=True, kw_only=True, tag_field="name", tag="ditto"):
    """Li et al. 2021 (ICML), Algorithm 1: w by `FedAvg`; v_k ← v_k − lr_p (∇L_k(v_k) + λ (v_k − w)), s steps.

    v_k goes on from evaluation to evaluation with exact gradients, as private state: it never feeds what is sent. A
    site that has none yet begins at w.

    Guarantees:
        Record or patient unit, local noise: P(q, σ) × local_steps a participation, all of it for w. v_k tells the
        others nothing as long as it stays (Jain et al. 2021). Client unit: the whole update is clipped and noised.
    """

    local_steps: Annotated[Steps, Meta(description="τ, gradient steps a round at a site")] = 2
    lr: Annotated[Rate, Meta(description="learning rate of these steps")] = 1.0
    regularization: Annotated[float, Meta(ge=0, le=1e4, description="λ, pull of the personal model towards w")] = 0.5

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(ALL, self.local_steps),)

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        start = broadcast["theta"].unsqueeze(0)
        return descend(start, door, steps=self.local_steps, lr=self.lr) - start, {}

    def personalize(self, broadcast: State, shared: State, private: State, local_door: Door) -> State:
        centre = broadcast["theta"].unsqueeze(0)
        own = private["theta"].unsqueeze(0) if "theta" in private else centre
        steps, lr = self.personal_steps, self.personal_lr
        return {"theta": descend_near(own, centre, local_door, steps=steps, lr=lr, pull=self.regularization)[0]}
