"""Logistic regression and fully connected networks, for tables of numbers."""

import itertools
from typing import Annotated

import msgspec
from msgspec import Meta
from torch import nn

from .network import Inputs, check_numbers, seeded

Widths = tuple[Annotated[int, Meta(ge=1, le=65536)], ...]
Norm = Annotated[str, Meta(pattern="^(none|group)$")]


class MLP(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="name", tag="mlp"):
    """Linear layers with ReLU between them."""

    hidden: Annotated[Widths, Meta(description="widths of the hidden layers; [] is logistic regression")] = ()
    norm: Annotated[Norm, Meta(description='"group" normalises the hidden values of each record by themselves')] = (
        "none"
    )

    def build(self, inputs: Inputs, outputs: int, *, seed: int) -> nn.Sequential:
        check_numbers(inputs, "mlp")
        return mlp(inputs.features, self.hidden, outputs, seed=seed, norm=self.norm == "group")


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int, *, seed: int, norm: bool = False) -> nn.Sequential:
    """Fully connected network with ReLU between layers; no hidden layer makes it logistic regression.

    Args:
        inputs: number of columns.
        hidden: widths of the hidden layers.
        outputs: number of classes.
        seed: public; equal seeds give equal start parameters.
        norm: normalise each record's hidden values, before each ReLU (Wu and He 2018, GroupNorm of one group). It
            mixes no records, as batch normalisation would.
    """
    with seeded(seed):
        layers = dense(inputs, hidden, outputs, norm=norm)
    if not hidden:  # a convex problem: start at zero, where no class is preferred
        for parameter in layers[0].parameters():
            nn.init.zeros_(parameter)
    return nn.Sequential(*layers)


def dense(inputs: int, hidden: tuple[int, ...], outputs: int, *, norm: bool) -> list[nn.Module]:
    """The layers of it, at torch's start parameters."""
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise([inputs, *hidden]):
        layers += [nn.Linear(width_in, width_out)]
        layers += [nn.GroupNorm(1, width_out), nn.ReLU()] if norm else [nn.ReLU()]
    return [*layers, nn.Linear([inputs, *hidden][-1], outputs)]
