"""The shape of a kind of network: from what is public about the inputs to a module."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import nn

from privfed.errors import ConfigError


@dataclass(frozen=True)
class Inputs:
    """What a record is made of.

    Args:
        features: F, numbers of a record.
        items: (position among them, count) of each that is the number of an item, 1 to count, 0 for an unknown one.
    """

    features: int
    items: tuple[tuple[int, int], ...] = ()


class Kind(Protocol):
    """Settings of a network. They are all that travels: every party builds the module for itself."""

    def build(self, inputs: Inputs, outputs: int, *, seed: int) -> nn.Module:
        """A network from float32[B, F] to float32[B, outputs]; equal seeds give equal start parameters.

        Raises:
            ConfigError: it can not take these inputs.
        """
        ...


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start parameters by a public seed; the process's own generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the one of this processor; torch.manual_seed also wakes the others
        yield


def check_numbers(inputs: Inputs, kind: str) -> None:
    """Raise `ConfigError` if some input is the number of an item: its size means nothing."""
    if inputs.items:
        raise ConfigError(f"model.name = {kind!r} takes measurements, and data.items are names: use name = 'embedding'")


def check_shape(inputs: Inputs, shape: tuple[int, ...], kind: str) -> None:
    """Raise `ConfigError` if a record's numbers do not fill ``shape``."""
    check_numbers(inputs, kind)
    if prod(shape) != inputs.features:
        raise ConfigError(
            f"model.shape = {list(shape)} holds {prod(shape)} numbers, and a record has {inputs.features} inputs"
        )
