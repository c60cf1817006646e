"""A frozen base under a trained rest: records pass the base once, and training sees what it made of them."""

from typing import Annotated

from msgspec import Meta
from torch import nn

from privfed.errors import ConfigError
from privfed.models.layout import NORMS

from .everything import Everything
from .freezing import freeze


class LastLayers(Everything, frozen=True, kw_only=True, tag="last"):
    """The last ``layers`` are trained; what lies before them is constant, and each site computes it once.

    One layer is a new head on fixed features (Yosinski et al. 2014); more are partial unfreezing.

    Guarantees:
        The base is a function of one record and of constants that were there before the run. So a record's features
        stand for the record: clip, sampling and noise of the trained part protect it, whatever the base is.
    """

    layers: Annotated[
        int,
        Meta(ge=1, le=1000, description="layers that are trained, from the last; a normalisation goes with its own"),
    ] = 1

    def divided(self, whole: nn.Module) -> tuple[nn.Module | None, nn.Module]:
        if not isinstance(whole, nn.Sequential):
            raise ConfigError(
                "transfer.train = 'last' cuts an nn.Sequential, and model.factory gave another module: have it give "
                "nn.Sequential(body, head), or use train = 'low-rank'"
            )
        chain = list(whole)
        held = [
            at
            for at, layer in enumerate(chain)
            if any(True for _ in layer.parameters()) and not isinstance(layer, NORMS)
        ]
        if self.layers >= len(held):
            raise ConfigError(
                f"transfer.layers = {self.layers}, and the network has {len(held)} layers: train fewer, or all"
            )
        at = held[-self.layers]
        return freeze(nn.Sequential(*chain[:at])), nn.Sequential(*chain[at:])

    def trained(self, whole: nn.Module) -> nn.Module:
        return self.divided(whole)[1]

    def merge(self, trained: nn.Module, whole: nn.Module) -> None:
        assert isinstance(whole, nn.Sequential) and isinstance(trained, nn.Sequential)  # `divided`
        nn.Sequential(*list(whole)[len(whole) - len(trained) :]).load_state_dict(trained.state_dict())
