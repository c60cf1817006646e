"""Low-rank updates beside frozen layers."""

from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor, nn

from privfed.models.layout import pieces

from .everything import Everything
from .freezing import freeze


class LowRank(Everything, frozen=True, kw_only=True, tag="low-rank"):
    """W + B A in the place of each frozen W but the last layer's, which is trained whole (Hu et al. 2022, Section 4.1).

    A comes from the public seed, B from zero, so that training begins at the base. In a finished model W + B A is one
    matrix again.

    Guarantees:
        A and B are two ordinary layers: each record's gradient by both is clipped as one. Fewer parameters take less
        noise in all: its norm grows as the root of their number.
    """

    rank: Annotated[int, Meta(ge=1, le=1024, description="r, width of the update; at most a layer's own rank")] = 4

    def trained(self, whole: nn.Module) -> nn.Module:
        layers = {parameter: module for module in whole.modules() for parameter in module.parameters(recurse=False)}
        head = next(
            layers[parameter]
            for (part, _), parameter in reversed([*zip(pieces(whole), whole.parameters(), strict=True)])
            if part == "head"
        )
        for name, module in list(whole.named_modules()):
            if module is head:
                continue
            if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d) and name:
                parent, _, attribute = name.rpartition(".")
                setattr(whole.get_submodule(parent), attribute, Adapted(module, self.rank))
            else:
                for own, parameter in list(module.named_parameters(recurse=False)):
                    delattr(module, own)
                    module.register_buffer(own, parameter.detach())
        return whole

    def merge(self, trained: nn.Module, whole: nn.Module) -> None:
        state = trained.state_dict()
        for name, module in trained.named_modules():
            if isinstance(module, Adapted):
                for adapter in ("down", "up"):
                    state.pop(f"{name}.{adapter}.weight")
                state[f"{name}.weight"] = state.pop(f"{name}.frozen.weight") + module.update()
                if f"{name}.frozen.bias" in state:
                    state[f"{name}.bias"] = state.pop(f"{name}.frozen.bias")
        whole.load_state_dict(state)


class Adapted(nn.Module):
    """A frozen layer and its update: ``frozen(x) + up(down(x))``. Wider than the layer's own rank adds nothing."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, Tensor)
        rank = min(rank, *weight.flatten(1).shape)
        if isinstance(layer, nn.Linear):
            self.down: nn.Module = nn.Linear(layer.in_features, rank, bias=False)
            self.up: nn.Module = nn.Linear(rank, layer.out_features, bias=False)
        else:
            assert isinstance(layer, nn.Conv1d | nn.Conv2d)  # `LowRank.trained`
            kind: type[nn.Conv1d] | type[nn.Conv2d] = type(layer)
            where = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            self.down = kind(layer.in_channels, rank, layer.kernel_size, bias=False, **where)  # type: ignore[arg-type]
            self.up = kind(rank, layer.out_channels, 1, bias=False)
        self.frozen = freeze(layer)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.frozen(inputs) + self.up(self.down(inputs))
        return outputs

    def update(self) -> Tensor:
        """B A, of the shape of the frozen weight."""
        up, down = self.up.weight, self.down.weight
        assert isinstance(up, Tensor) and isinstance(down, Tensor)
        return torch.einsum("or,r...->o...", up.flatten(1), down).detach()
