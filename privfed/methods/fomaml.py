"""First-order MAML over a fixed support/query split, which is Per-FedAvg (FO)."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta
from torch import Tensor

from privfed.privacy.events import NoiseSite, PrivacyUnit
from privfed.privacy.oracle.door import Door

from .method import Queries, Rate, State, Steps, descend, fine_tuned, post_processing

SUPPORT, QUERY = "support", "query"


class Fomaml(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="name", tag="fomaml"):
    """Finn et al. 2017, Section 5.2; Fallah et al. 2020, Per-FedAvg (FO): θ ← w − α∇L_S(w); w ← w − β mean ∇L_Q(θ).

    Guarantees:
        Record unit, local noise, both loops noised: each record is in support or in query for good, by a keyed hash of
        its own id, so ε is the larger of P(q, σ) × inner_steps (support) and P(q, σ) × 1 (query) a participation:
        adaptive parallel composition. Second-order MAML has no such guarantee: (I − αH_S) reads the support records
        again, without noise.
    """

    inner_steps: Annotated[Steps, Meta(description="adaptation steps on the support records")] = 1
    inner_lr: Annotated[Rate, Meta(description="α, learning rate of the adaptation")] = 0.5
    outer_lr: Annotated[Rate, Meta(description="β, learning rate of the meta step")] = 6.0
    personal_steps: Annotated[Steps, Meta(description="adaptation steps at evaluation, never leaving the site")] = 20
    personal_lr: Annotated[Rate, Meta(description="learning rate of that adaptation")] = 0.2

    sends: ClassVar[bool] = True
    parts: ClassVar[Mapping[str, float]] = {SUPPORT: 0.5, QUERY: 0.5}

    def queries(self) -> tuple[Queries, ...]:
        return (Queries(SUPPORT, self.inner_steps), Queries(QUERY, 1))

    def guarantee(self, unit: PrivacyUnit, noise: NoiseSite) -> str | None:
        return post_processing(unit, noise)

    def init_server(self, theta: Tensor) -> State:
        return {"theta": theta}

    def init_site(self, theta: Tensor) -> State:
        return {}

    def contribute(self, broadcast: State, door: Door) -> Tensor:
        start = broadcast["theta"].unsqueeze(0)
        adapted = descend(start, door, steps=self.inner_steps, lr=self.inner_lr, part=SUPPORT)
        return -self.outer_lr * door.gradient(adapted, door.draw(QUERY))

    def personalize(self, broadcast: State, private: State, local_door: Door) -> State:
        return fine_tuned(broadcast, local_door, steps=self.personal_steps, lr=self.personal_lr)

    def serve(self, state: State, mean_update: Tensor, progress: float) -> State:
        return {"theta": state["theta"] + mean_update}
