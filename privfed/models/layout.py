"""Which parameters of a flat model are its head, its normalisation, its body: by index, from the module's layers."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Part = Literal["head", "body", "norm"]
"""The last layer; what normalises; all the rest."""

Layout = Mapping[Part, Tensor]
"""bool[P] each: which parameters of a flat model a part has. Each parameter is in one of them."""

NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)
"""What normalises, with scales and shifts of its own."""


def pieces(network: nn.Module) -> tuple[tuple[Part, int], ...]:
    """The part and the size of each parameter, in the order of ``parameters()``.

    The head is the layer that was registered last and is no normalisation.
    """
    owner = {
        parameter: module for module in network.modules() for parameter in module.parameters(recurse=False)
    }  # of a parameter in two layers, the later
    layers = [owner[parameter] for parameter in network.parameters()]
    head = next((layer for layer in reversed(layers) if not isinstance(layer, NORMS)), None)

    def part(layer: nn.Module) -> Part:
        return "norm" if isinstance(layer, NORMS) else "head" if layer is head else "body"

    return tuple(
        (part(layer), parameter.numel()) for layer, parameter in zip(layers, network.parameters(), strict=True)
    )


def layout(sizes: Sequence[tuple[Part, int]]) -> Layout:
    """The parts, from `pieces`."""
    where: dict[Part, Tensor] = {
        part: torch.zeros(sum(size for _, size in sizes), dtype=torch.bool) for part in get_args(Part)
    }
    start = 0
    for part, size in sizes:
        where[part][start : start + size] = True
        start += size
    return where
