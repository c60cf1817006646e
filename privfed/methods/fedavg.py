"""Federated averaging, with fine-tuning as its personalisation."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta
from torch import Tensor

from privfed.privacy.events import NoiseSite, PrivacyUnit
from privfed.privacy.oracle.door import ALL, Door

from .method import Queries, Rate, State, Steps, descend, fine_tuned, post_processing


class FedAvg(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="name", tag="fedavg"):
    """McMahan et al. 2017, Algorithm 1: θ_k ← w − lr Σ ∇L(θ), τ steps; w ← w + mean(θ_k − w), uniform weights.

    Personalisation is fine-tuning from w at evaluation only.

    Guarantees:
        Record or patient unit, local noise: P(q, σ) × local_steps a participation, by post-processing of the door's
        answers.
    """

    local_steps: Annotated[Steps, Meta(description="τ, gradient steps a round at a site")] = 2
    lr: Annotated[Rate, Meta(description="learning rate of these steps")] = 1.0
    personal_steps: Annotated[Steps, Meta(description="fine-tuning steps at evaluation, never leaving the site")] = 20
    personal_lr: Annotated[Rate, Meta(description="learning rate of the fine-tuning")] = 0.2

    sends: ClassVar[bool] = True
    parts: ClassVar[Mapping[str, float]] = {}

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(ALL, self.local_steps),)

    def guarantee(self, unit: PrivacyUnit, noise: NoiseSite) -> str | None:
        return post_processing(unit, noise)

    def init_server(self, theta: Tensor) -> State:
        return {"theta": theta}

    def init_site(self, theta: Tensor) -> State:
        return {}

    def contribute(self, broadcast: State, door: Door) -> Tensor:
        start = broadcast["theta"].unsqueeze(0)
        return descend(start, door, steps=self.local_steps, lr=self.lr) - start

    def personalize(self, broadcast: State, private: State, local_door: Door) -> State:
        return fine_tuned(broadcast, local_door, steps=self.personal_steps, lr=self.personal_lr)

    def serve(self, state: State, mean_update: Tensor, progress: float) -> State:
        return {"theta": state["theta"] + mean_update}
