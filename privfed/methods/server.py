"""Server optimisers: what the server makes of the sites' mean update, whatever the method."""

from typing import Annotated

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from .method import Rate, State

Decay = Annotated[float, Meta(ge=0, lt=1)]


class _Optimizer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Reddi et al. 2021, Algorithm 2: m ← β₁ m + (1 − β₁) Δ; the step is lr · m / (√v + τ), with v by the method.

    Δ is the sites' mean update of the model. The step takes its place in the method's own server step.

    Guarantees:
        It sees nothing but sums that were released, so it costs no ε under any unit and noise. Its state stays at the
        server.
    """

    def step(self, state: State, update: Tensor) -> tuple[Tensor, State]:
        """The step float32[P] from Δ float32[P], and the next state, which begins empty."""
        raise NotImplementedError


class Plain(_Optimizer, frozen=True, tag_field="name", tag="plain"):
    """The mean update itself."""

    def step(self, state: State, update: Tensor) -> tuple[Tensor, State]:
        return update, {}


class Momentum(_Optimizer, frozen=True, kw_only=True, tag_field="name", tag="momentum"):
    """Hsu, Qi and Brown 2019 (FedAvgM): m ← β m + Δ; the step is lr · m."""

    lr: Annotated[Rate, Meta(description="learning rate of the server")] = 1.0
    momentum: Annotated[Decay, Meta(description="β")] = 0.9

    def step(self, state: State, update: Tensor) -> tuple[Tensor, State]:
        mean = self.momentum * state.get("mean", torch.zeros_like(update)) + update
        return self.lr * mean, {"mean": mean}


class _Adaptive(_Optimizer, frozen=True, kw_only=True):
    """Coordinates of their own rate; v begins at τ², as in the paper."""

    lr: Annotated[Rate, Meta(description="learning rate of the server")] = 0.1
    beta_1: Annotated[Decay, Meta(description="β₁, how much of the earlier mean stays")] = 0.9
    tau: Annotated[float, Meta(gt=0, le=1e3, description="τ, adaptivity: below it an update counts as small")] = 1e-2

    def square(self, before: Tensor, now: Tensor) -> Tensor:
        """v, from what it was and Δ²."""
        raise NotImplementedError

    def step(self, state: State, update: Tensor) -> tuple[Tensor, State]:
        mean = self.beta_1 * state.get("mean", torch.zeros_like(update)) + (1 - self.beta_1) * update
        square = self.square(state.get("square", torch.full_like(update, self.tau**2)), update.square())
        return self.lr * mean / (square.sqrt() + self.tau), {"mean": mean, "square": square}


class Adagrad(_Adaptive, frozen=True, kw_only=True, tag_field="name", tag="adagrad"):
    """FedAdagrad of Reddi et al. 2021, Algorithm 2: v ← v + Δ²."""

    beta_1: Annotated[Decay, Meta(description="β₁, how much of the earlier mean stays")] = 0.0

    def square(self, before: Tensor, now: Tensor) -> Tensor:
        return before + now


class Adam(_Adaptive, frozen=True, kw_only=True, tag_field="name", tag="adam"):
    """FedAdam of Reddi et al. 2021, Algorithm 2: v ← β₂ v + (1 − β₂) Δ². Without bias correction, as there."""

    beta_2: Annotated[Decay, Meta(description="β₂, how much of the earlier mean square stays")] = 0.99

    def square(self, before: Tensor, now: Tensor) -> Tensor:
        return self.beta_2 * before + (1 - self.beta_2) * now


class Yogi(_Adaptive, frozen=True, kw_only=True, tag_field="name", tag="yogi"):
    """FedYogi of Reddi et al. 2021, Algorithm 2: v ← v − (1 − β₂) Δ² sign(v − Δ²)."""

    beta_2: Annotated[Decay, Meta(description="β₂, how much of the earlier mean square stays")] = 0.99

    def square(self, before: Tensor, now: Tensor) -> Tensor:
        return before - (1 - self.beta_2) * now * torch.sign(before - now)


Server = Plain | Momentum | Adagrad | Adam | Yogi

KEEPS = "server/"
"""Begins the names in the server's state that no site is sent."""


def optimized(optimizer: Server, state: State, mean_update: Tensor) -> tuple[Tensor, State]:
    """The mean update with the model's block, the first, replaced by the optimiser's step; and what it keeps.

    Args:
        state: the server's; the model's size is that of its "theta".
        mean_update: float32[blocks · P]. The other blocks are no steps of a model: control variates have to be means.
    """
    size = len(state["theta"])
    kept = {name.removeprefix(KEEPS): tensor for name, tensor in state.items() if name.startswith(KEEPS)}
    step, kept_next = optimizer.step(kept, mean_update[:size])
    return torch.cat([step, mean_update[size:]]), {KEEPS + name: tensor for name, tensor in kept_next.items()}
