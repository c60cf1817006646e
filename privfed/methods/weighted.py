"""Transfer by a weighted objective: the target's gradient, and beside it that of a public source, less and less."""

from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor

from privfed.privacy.oracle.door import ALL, Door
from privfed.privacy.oracle.source import source_gradient

from .method import FineTuned, Queries, Rate, State, Steps


class Weighted(FineTuned, frozen=True, kw_only=True, tag_field="name", tag="weighted"):
    """θ ← θ − lr (α ∇f_target(θ) + β_r ∇g_source(θ)), τ steps; w ← w + mean(θ_k − w); β falls linearly to 0.

    The source is `transfer.public_source`; g's gradient is over a public draw of it. Personalisation is fine-tuning on
    the target alone, from w, at evaluation only.

    Guarantees:
        Record or patient unit, local noise: P(q, σ) × local_steps a participation. The source knows no record of the
        site: its gradient joins the door's answer after clip and noise. Client unit: the whole update is clipped and
        noised.
    """

    local_steps: Annotated[Steps, Meta(description="τ, gradient steps a round at a site")] = 2
    lr: Annotated[Rate, Meta(description="learning rate of these steps")] = 0.5
    target_weight: Annotated[float, Meta(ge=0, le=1e3, description="α")] = 1.0
    source_weight: Annotated[float, Meta(ge=0, le=1e3, description="β in the first round")] = 0.3
    source_rounds: Annotated[int, Meta(ge=1, le=100_000, description="rounds until β is 0")] = 20

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(ALL, self.local_steps),)

    def init_server(self, theta: Tensor) -> State:
        return {"theta": theta, "round": torch.zeros((), dtype=torch.float32)}

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        start = theta = broadcast["theta"].unsqueeze(0)
        beta = self.source_weight * max(0.0, 1.0 - float(broadcast["round"]) / self.source_rounds)
        for _ in range(self.local_steps):
            step = self.target_weight * door.gradient(theta, door.draw())
            if beta > 0:
                step = step + beta * source_gradient(door, theta)
            theta = theta - self.lr * step
        return theta - start, {}

    def serve(self, state: State, mean_update: Tensor, progress: float) -> State:
        return {"theta": state["theta"] + mean_update, "round": state["round"] + 1}
