"""One gradient a round, and a server that takes the step: the method for noise in shares."""

from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor

from privfed.privacy.events import NoiseSite, PrivacyUnit
from privfed.privacy.oracle.door import ALL, Door

from .method import FineTuned, Queries, Rate, State, one_answer


class FedSGD(FineTuned, frozen=True, kw_only=True, tag_field="name", tag="fedsgd"):
    """McMahan et al. 2017, Section 2 (FedSGD): m ← μ m + mean ∇L_k(w); w ← w − lr m.

    Momentum is at the server (Reddi et al. 2021, FedAvgM), so it is post-processing. Personalisation is fine-tuning
    from w at evaluation only.

    Guarantees:
        Record or patient unit, local noise: P(q, σ) a participation. Distributed noise: the site's update *is* the
        door's one answer, added to the others' before anything else is done with it, so the sum carries every share.
    """

    lr: Annotated[Rate, Meta(description="learning rate of the server")] = 0.5
    momentum: Annotated[float, Meta(ge=0, lt=1, description="μ, the server's momentum")] = 0.9

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(ALL, 1),)

    def guarantee(self, unit: PrivacyUnit, noise: NoiseSite) -> str | None:
        return one_answer(unit, noise)

    def init_server(self, theta: Tensor) -> State:
        return {"theta": theta, "momentum": torch.zeros_like(theta)}

    def point(self, broadcast: State) -> Tensor:
        return broadcast["theta"].unsqueeze(0)

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        return door.gradient(self.point(broadcast), door.draw()), {}

    def serve(self, state: State, mean_update: Tensor, progress: float) -> State:
        momentum = self.momentum * state["momentum"] + mean_update
        return {"theta": state["theta"] - self.lr * momentum, "momentum": momentum}
