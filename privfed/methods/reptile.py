"""Reptile: a start from which few steps lead to each site's own model."""

from typing import Annotated

from msgspec import Meta
from torch import Tensor

from privfed.privacy.oracle.door import ALL, Door

from .method import FineTuned, Queries, Rate, State, Steps, descend


class Reptile(FineTuned, frozen=True, kw_only=True, tag_field="name", tag="reptile"):
    """Nichol, Achiam and Schulman 2018, Algorithm 2 (batched): θ_k ← τ steps from w; w ← w + ε · mean(θ_k − w).

    The outer rate ε falls linearly from ``outer_lr`` to 0 over the run, as in the paper's experiments.

    Guarantees:
        Record or patient unit, local noise: P(q, σ) × inner_steps a participation: θ_k − w is post-processing of the
        door's answers (Li et al. 2020, "Differentially private meta-learning", Section 3).
    """

    inner_steps: Annotated[Steps, Meta(description="τ, gradient steps a round at a site")] = 2
    inner_lr: Annotated[Rate, Meta(description="learning rate of these steps")] = 2.0
    outer_lr: Annotated[Rate, Meta(description="ε, the server's step towards the sites' mean; falls linearly to 0")] = (
        1.0
    )

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(ALL, self.inner_steps),)

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        start = broadcast["theta"].unsqueeze(0)
        return descend(start, door, steps=self.inner_steps, lr=self.inner_lr) - start, {}

    def serve(self, state: State, mean_update: Tensor, progress: float) -> State:
        return {"theta": state["theta"] + self.outer_lr * (1.0 - progress) * mean_update}
