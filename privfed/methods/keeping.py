"""What methods share that keep a part of the model at the site: FedPer, FedRep, and norms of their own."""

import torch
from torch import Tensor

from privfed.privacy.oracle.door import Door

from ..models import Layout
from .method import FineTuned, State, descend


class Keeping(FineTuned, frozen=True, kw_only=True):
    """The site's model is the server's, with the site's own numbers in the parts that stay.

    They are shared state, trained through the door that `contribute` is given, because what leaves depends on them:
    with a head trained without noise, one record moves even a clipped gradient of the body by many clips. The personal
    model adapts them further with exact gradients; that stays at the site and never flows back.
    """

    def init_site(self, theta: Tensor, layout: Layout) -> tuple[State, State]:
        return {"own": torch.stack([layout[part] for part in self.stays]).any(0)}, {}

    def model(self, broadcast: State, shared: State) -> Tensor:
        """float32[K, P]: the site's model. A site without numbers of its own begins at the server's."""
        theta = broadcast["theta"].unsqueeze(0)
        return torch.where(shared["own"], shared.get("theta", theta), theta)

    def keep(self, shared: State, theta: Tensor) -> State:
        return {"own": shared["own"], "theta": theta * shared["own"]}

    def personalize(self, broadcast: State, shared: State, private: State, local_door: Door) -> State:
        start = self.model(broadcast, shared)
        rates = self.personal_lr * shared["own"]
        return {"theta": descend(start, local_door, steps=self.personal_steps, lr=rates)[0]}
