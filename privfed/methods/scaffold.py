"""Federated averaging with control variates, which take each site's own drift out of its steps."""

from typing import Annotated, ClassVar

import torch
from msgspec import Meta
from torch import Tensor

from privfed.privacy.oracle.door import ALL, Door

from .method import FineTuned, Queries, Rate, State, Steps


class Scaffold(FineTuned, frozen=True, kw_only=True, tag_field="name", tag="scaffold"):
    """Karimireddy et al. 2020, Algorithm 1, option II, with every site in every round:

        y ← w;  y ← y − lr (g(y) − c_k + c), τ steps;  c_k⁺ = c_k − c + (w − y) / (τ lr)
        w ← w + outer_lr · mean(y − w);  c ← c + mean(c_k⁺ − c_k)

    The second block of an update is c_k⁺ − c_k. c_k stays at the site, as shared state: by the rule above it is the
    mean of the site's own τ noised answers. A site whose update was lost keeps its new c_k, and c is from then on not
    exactly the mean of them. Personalisation is fine-tuning from w at evaluation only.

    Guarantees:
        Record or patient unit, local noise: P(q, σ) × local_steps a participation: both blocks, and c_k with all it
        does to later rounds, post-process the door's answers. Client unit: the vector (y − w, c_k⁺ − c_k) is clipped
        and noised as one, so the control variates share its budget and its noise; with small τ · lr they are the larger
        half of it.
    """

    local_steps: Annotated[Steps, Meta(description="τ, gradient steps a round at a site")] = 2
    lr: Annotated[Rate, Meta(description="learning rate of these steps")] = 0.5
    outer_lr: Annotated[Rate, Meta(description="the server's step towards the sites' mean")] = 1.0

    blocks: ClassVar[int] = 2

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(ALL, self.local_steps),)

    def init_server(self, theta: Tensor) -> State:
        return {"theta": theta, "control": torch.zeros_like(theta)}

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        start, common = broadcast["theta"].unsqueeze(0), broadcast["control"].unsqueeze(0)
        own = shared.get("control", torch.zeros_like(start))
        theta = start
        for _ in range(self.local_steps):
            theta = theta - self.lr * (door.gradient(theta, door.draw()) - own + common)
        after = own - common + (start - theta) / (self.local_steps * self.lr)
        return torch.cat([theta - start, after - own], dim=1), {"control": after}

    def serve(self, state: State, mean_update: Tensor, progress: float) -> State:
        moved, control = mean_update.view(2, -1)
        return {"theta": state["theta"] + self.outer_lr * moved, "control": state["control"] + control}
