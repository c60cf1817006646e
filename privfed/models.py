"""Networks for tables of numbers, and which of their parameters are what."""

import itertools
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Part = Literal["head", "body", "norm"]
"""The last layer; what normalises; all the rest."""

Layout = Mapping[Part, Tensor]
"""bool[P] each: which parameters of a flat model a part has. Each parameter is in one of them."""


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
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the one of this processor; torch.manual_seed also wakes the others
        for width_in, width_out in itertools.pairwise([inputs, *hidden, outputs]):
            layers += [nn.Linear(width_in, width_out)]
            layers += [nn.GroupNorm(1, width_out), nn.ReLU()] if norm else [nn.ReLU()]
    del layers[-2 if norm else -1 :]
    if not hidden:  # a convex problem: start at zero, where no class is preferred
        for parameter in layers[0].parameters():
            nn.init.zeros_(parameter)
    return nn.Sequential(*layers)


def layout(inputs: int, hidden: tuple[int, ...], parameters: int, *, norm: bool = False) -> Layout:
    """The parts of an `mlp` of ``parameters`` numbers, by index, without building it.

    Raises:
        ValueError: no such network has so few parameters.
    """
    layers = list(itertools.pairwise([inputs, *hidden]))
    sizes = [size for above, width in layers for size in ((above + 1) * width, 2 * width if norm else 0)]
    if sum(sizes) >= parameters:
        raise ValueError(f"a network with hidden layers {list(hidden)} has more than {parameters} parameters")
    where: dict[Part, Tensor] = {part: torch.zeros(parameters, dtype=torch.bool) for part in get_args(Part)}
    kinds: tuple[Part, ...] = ("body", "norm")
    start = 0
    for size, part in zip(sizes, itertools.cycle(kinds), strict=False):
        where[part][start : start + size] = True
        start += size
    where["head"][start:] = True
    return where
