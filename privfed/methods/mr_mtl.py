"""Mean-regularised multi-task learning: a model for each site, pulled towards their mean."""

from typing import Annotated

from msgspec import Meta
from torch import Tensor

from privfed.privacy.oracle.door import ALL, Door

from .method import FineTuned, Queries, Rate, State, Steps, descend_near


class MRMTL(FineTuned, frozen=True, kw_only=True, tag_field="name", tag="mr-mtl"):
    """Liu et al. 2022 (arXiv 2206.07902), Algorithm 1: v_k ← v_k − lr (g(v_k) + λ (v_k − v̄)), τ steps; v̄ ← mean v_k.

    Sent is v_k − v̄. λ = 0 is every site alone, a large λ one model for all. v_k is kept as shared state: it is made of
    noised answers, and what is sent depends on it. A site that has none yet begins at v̄. The personal model goes on
    from v_k on the same objective with exact gradients; it stays at the site and never flows back.

    Guarantees:
        Record or patient unit, local noise: P(q, σ) × local_steps a participation. v_k over all rounds post-processes
        the door's answers. Client unit: the whole update is clipped and noised.
    """

    local_steps: Annotated[Steps, Meta(description="τ, gradient steps a round at a site")] = 2
    lr: Annotated[Rate, Meta(description="learning rate of these steps")] = 0.5
    regularization: Annotated[float, Meta(ge=0, le=1e4, description="λ, pull towards the sites' mean")] = 0.5

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(ALL, self.local_steps),)

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        mean = broadcast["theta"].unsqueeze(0)
        own = shared.get("theta", mean)
        own = descend_near(own, mean, door, steps=self.local_steps, lr=self.lr, pull=self.regularization)
        return own - mean, {"theta": own}

    def personalize(self, broadcast: State, shared: State, private: State, local_door: Door) -> State:
        mean = broadcast["theta"].unsqueeze(0)
        own = shared.get("theta", mean)
        steps, lr = self.personal_steps, self.personal_lr
        return {"theta": descend_near(own, mean, local_door, steps=steps, lr=lr, pull=self.regularization)[0]}
