"""pFedMe: personal models by Moreau envelopes."""

from typing import Annotated

from msgspec import Meta
from torch import Tensor

from privfed.privacy.oracle.door import ALL, Door

from .method import FineTuned, Queries, Rate, State, Steps, descend_near


class PFedMe(FineTuned, frozen=True, kw_only=True, tag_field="name", tag="pfedme"):
    """Dinh, Tran and Nguyen 2020, Algorithm 1; R local rounds, in each of them

        θ ≈ argmin L_k(θ) + λ/2 ‖θ − w_k‖², by K steps from w_k;  w_k ← w_k − lr λ (w_k − θ)

    and w ← (1 − β) w + β mean w_k at the server. Each of the K steps has a draw of its own, where the paper reuses one:
    a fresh draw is amplified by sampling anew, a reused one is not. The personal model is the same θ at w, by exact
    steps; it stays at the site.

    Guarantees:
        Record or patient unit, local noise: P(q, σ) × local_steps · inner_steps a participation; w_k post-processes the
        door's answers. Client unit: the whole update is clipped and noised.
    """

    local_steps: Annotated[Steps, Meta(description="R, local rounds in a round")] = 2
    lr: Annotated[Rate, Meta(description="η, step of w_k towards θ, times λ")] = 0.05
    inner_steps: Annotated[Steps, Meta(description="K, gradient steps of one θ")] = 5
    inner_lr: Annotated[Rate, Meta(description="learning rate of these steps; below 2 / λ")] = 0.05
    regularization: Annotated[float, Meta(gt=0, le=1e4, description="λ, pull of θ towards w_k")] = 15.0
    outer_lr: Annotated[Rate, Meta(description="β, the server's step towards the sites' mean")] = 1.0
    personal_lr: Annotated[Rate, Meta(description="learning rate of the adaptation; below 2 / λ")] = 0.05

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(ALL, self.local_steps * self.inner_steps),)

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        start = own = broadcast["theta"].unsqueeze(0)
        for _ in range(self.local_steps):
            steps, lr = self.inner_steps, self.inner_lr
            theta = descend_near(own, own, door, steps=steps, lr=lr, pull=self.regularization)
            own = own - self.lr * self.regularization * (own - theta)
        return own - start, {}

    def personalize(self, broadcast: State, shared: State, private: State, local_door: Door) -> State:
        centre = broadcast["theta"].unsqueeze(0)
        steps, lr = self.personal_steps, self.personal_lr
        return {"theta": descend_near(centre, centre, local_door, steps=steps, lr=lr, pull=self.regularization)[0]}

    def serve(self, state: State, mean_update: Tensor, progress: float) -> State:
        return {"theta": state["theta"] + self.outer_lr * mean_update}
