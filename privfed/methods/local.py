"""Every site alone: the baseline that federation has to beat."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta
from torch import Tensor

from privfed.privacy.events import NoiseSite, PrivacyUnit
from privfed.privacy.oracle.door import Door

from ..models import Layout, Part
from .method import Queries, Rate, State, Steps, descend


class Local(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="name", tag="local"):
    """v_k ← v_k − lr ∇L_k(v_k), ``steps`` a round, on the site's own records alone.

    Guarantees:
        Nothing leaves the site, so the others learn nothing: ε = 0 under every unit and noise.
    """

    steps: Annotated[Steps, Meta(description="gradient steps a round")] = 20
    lr: Annotated[Rate, Meta(description="learning rate")] = 0.1

    sends: ClassVar[bool] = False
    parts: ClassVar[Mapping[str, float]] = {}
    blocks: ClassVar[int] = 1
    stays: ClassVar[tuple[Part, ...]] = ()

    def queries(self) -> tuple[Queries, ...]:
        return ()

    def guarantee(self, unit: PrivacyUnit, noise: NoiseSite) -> str | None:
        return None

    def init_server(self, theta: Tensor) -> State:
        return {"theta": theta}

    def init_site(self, theta: Tensor, layout: Layout) -> tuple[State, State]:
        return {}, {"theta": theta}

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        raise RuntimeError("the local method sends nothing")

    def personalize(self, broadcast: State, shared: State, private: State, local_door: Door) -> State:
        return {"theta": descend(private["theta"].unsqueeze(0), local_door, steps=self.steps, lr=self.lr)[0]}

    def serve(self, state: State, mean_update: Tensor, progress: float) -> State:
        return state
