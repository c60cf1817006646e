"""One gradient a round, and a server that takes the step: the method for noise in shares."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from privfed.privacy.events import NoiseSite, PrivacyUnit
from privfed.privacy.oracle.door import ALL, Door

from .method import Queries, Rate, State, Steps, fine_tuned, one_answer


class FedSGD(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="name", tag="fedsgd"):
    """McMahan et al. 2017, Section 2 (FedSGD): m ← μ m + mean ∇L_k(w); w ← w − lr m.

    Momentum is at the server (Reddi et al. 2021, FedAvgM), so it is post-processing. Personalisation is fine-tuning
    from w at evaluation only.

    Guarantees:
        Record or patient unit, local noise: P(q, σ) a participation. Distributed noise: the site's update *is* the
        door's one answer, added to the others' before anything else is done with it, so the sum carries every share.
    """

    lr: Annotated[Rate, Meta(description="learning rate of the server")] = 0.5
    momentum: Annotated[float, Meta(ge=0, lt=1, description="μ, the server's momentum")] = 0.9
    personal_steps: Annotated[Steps, Meta(description="fine-tuning steps at evaluation, never leaving the site")] = 20
    personal_lr: Annotated[Rate, Meta(description="learning rate of the fine-tuning")] = 0.2

    sends: ClassVar[bool] = True
    parts: ClassVar[Mapping[str, float]] = {}

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(ALL, 1),)

    def guarantee(self, unit: PrivacyUnit, noise: NoiseSite) -> str | None:
        return one_answer(unit, noise)

    def init_server(self, theta: Tensor) -> State:
        return {"theta": theta, "momentum": torch.zeros_like(theta)}

    def init_site(self, theta: Tensor) -> State:
        return {}

    def point(self, broadcast: State) -> Tensor:
        return broadcast["theta"].unsqueeze(0)

    def contribute(self, broadcast: State, door: Door) -> Tensor:
        return door.gradient(self.point(broadcast), door.draw())

    def personalize(self, broadcast: State, private: State, local_door: Door) -> State:
        return fine_tuned(broadcast, local_door, steps=self.personal_steps, lr=self.personal_lr)

    def serve(self, state: State, mean_update: Tensor, progress: float) -> State:
        momentum = self.momentum * state["momentum"] + mean_update
        return {"theta": state["theta"] - self.lr * momentum, "momentum": momentum}
