"""Convolutions for images."""

from typing import Annotated

import msgspec
from msgspec import Meta
from torch import nn

from privfed.errors import ConfigError

from .mlp import Widths, dense
from .network import Inputs, check_shape, seeded

Side = Annotated[int, Meta(ge=1, le=4096)]


class CNN(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="name", tag="cnn"):
    """Blocks of convolution, GroupNorm, ReLU and 2 × 2 maximum, then dense layers.

    GroupNorm (Wu and He 2018) normalises each record by itself; batch normalisation would mix records.
    """

    shape: Annotated[tuple[Side, Side, Side], Meta(description="channels, height and width of a record's inputs")]
    channels: Annotated[
        Widths, Meta(min_length=1, description="channels of each block; a block halves height and width")
    ] = (16, 32)
    kernel: Annotated[int, Meta(ge=1, le=31, description="height and width of the kernels; odd")] = 3
    groups: Annotated[int, Meta(ge=1, description="groups of GroupNorm; it divides all channels")] = 4
    hidden: Annotated[Widths, Meta(description="widths of the dense hidden layers before the last")] = ()

    def build(self, inputs: Inputs, outputs: int, *, seed: int) -> nn.Sequential:
        check_shape(inputs, self.shape, "cnn")
        before, *sides = self.shape
        check_blocks(self.channels, self.kernel, self.groups, sides)
        layers: list[nn.Module] = [nn.Unflatten(1, self.shape)]
        with seeded(seed):
            for width in self.channels:
                layers += [
                    nn.Conv2d(before, width, self.kernel, padding=self.kernel // 2),
                    nn.GroupNorm(self.groups, width),
                    nn.ReLU(),
                    nn.MaxPool2d(2),
                ]
                before, sides = width, [side // 2 for side in sides]
            layers += [nn.Flatten(), *dense(before * sides[0] * sides[1], self.hidden, outputs, norm=False)]
        return nn.Sequential(*layers)


def check_blocks(channels: Widths, kernel: int, groups: int, sides: list[int]) -> None:
    """Raise `ConfigError` for blocks that can not stand on each other."""
    if kernel % 2 == 0:
        raise ConfigError(f"model.kernel must be odd, got {kernel}")
    if any(width % groups for width in channels):
        raise ConfigError(f"model.groups = {groups} must divide each of model.channels = {list(channels)}")
    if min(sides) < 2 ** len(channels):
        raise ConfigError(
            f"model.channels has {len(channels)} blocks, each halves {' × '.join(map(str, sides))}: nothing is left"
        )
