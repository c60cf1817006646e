"""Federated averaging, with fine-tuning as its personalisation."""

from typing import Annotated

from msgspec import Meta
from torch import Tensor

from privfed.privacy.oracle.door import ALL, Door

from .method import FineTuned, Queries, Rate, State, Steps, descend


class FedAvg(FineTuned, frozen=True, kw_only=True, tag_field="name", tag="fedavg"):
    """McMahan et al. 2017, Algorithm 1: θ_k ← w − lr Σ ∇L(θ), τ steps; w ← w + mean(θ_k − w), uniform weights.

    Personalisation is fine-tuning from w at evaluation only.

    Guarantees:
        Record or patient unit, local noise: P(q, σ) × local_steps a participation, by post-processing of the door's
        answers.
    """

    local_steps: Annotated[Steps, Meta(description="τ, gradient steps a round at a site")] = 2
    lr: Annotated[Rate, Meta(description="learning rate of these steps")] = 1.0

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(ALL, self.local_steps),)

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        start = broadcast["theta"].unsqueeze(0)
        return descend(start, door, steps=self.local_steps, lr=self.lr) - start, {}
