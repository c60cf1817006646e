"""Networks for tables of numbers."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int, *, seed: int) -> nn.Sequential:
    """Fully connected network with ReLU between layers; no hidden layer makes it logistic regression.

    Args:
        inputs: number of columns.
        hidden: widths of the hidden layers.
        outputs: number of classes.
        seed: public; equal seeds give equal start parameters.
    """
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for width_in, width_out in itertools.pairwise([inputs, *hidden, outputs]):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    layers.pop()
    if not hidden:  # a convex problem: start at zero, where no class is preferred
        for parameter in layers[0].parameters():
            nn.init.zeros_(parameter)
    return nn.Sequential(*layers)


def classification_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """float32[B]: the cross-entropy of each record."""
    return functional.cross_entropy(outputs, targets, reduction="none")
