"""Convolutions over time, for signals: accelerometers, heart curves, voices."""

from typing import Annotated

import msgspec
from msgspec import Meta
from torch import nn

from .cnn import Side, check_blocks
from .mlp import Widths, dense
from .network import Inputs, check_shape, seeded


class Signal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="name", tag="signal"):
    """Blocks of convolution over time, GroupNorm, ReLU and maximum of two, then dense layers."""

    shape: Annotated[tuple[Side, Side], Meta(description="channels and points in time of a record's inputs")]
    channels: Annotated[Widths, Meta(min_length=1, description="channels of the blocks, which halve time")] = (16, 32)
    kernel: Annotated[int, Meta(ge=1, le=101, description="points that a kernel spans; odd")] = 5
    groups: Annotated[int, Meta(ge=1, description="groups of GroupNorm; it divides all channels")] = 4
    hidden: Annotated[Widths, Meta(description="widths of the dense hidden layers before the last")] = ()

    def build(self, inputs: Inputs, outputs: int, *, seed: int) -> nn.Sequential:
        check_shape(inputs, self.shape, "signal")
        before, length = self.shape
        check_blocks(self.channels, self.kernel, self.groups, [length])
        layers: list[nn.Module] = [nn.Unflatten(1, self.shape)]
        with seeded(seed):
            for width in self.channels:
                layers += [
                    nn.Conv1d(before, width, self.kernel, padding=self.kernel // 2),
                    nn.GroupNorm(self.groups, width),
                    nn.ReLU(),
                    nn.MaxPool1d(2),
                ]
                before, length = width, length // 2
            layers += [nn.Flatten(), *dense(before * length, self.hidden, outputs, norm=False)]
        return nn.Sequential(*layers)
