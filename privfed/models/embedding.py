"""Items as vectors, for recommendation."""

from typing import Annotated

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, nn

from privfed.errors import ConfigError

from .mlp import Widths, dense
from .network import Inputs, seeded


class Embedding(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="name", tag="embedding"
):
    """A learned vector for every item of ``data.items``, beside the other inputs; then dense layers.

    With users as sites, ratings and no hidden layer it is matrix factorisation: the items' vectors are the body, and
    the head is the user's own vector. A method that keeps the head at the site (`FedPer`, `FedRep`) learns the first
    together and the second alone.
    """

    width: Annotated[int, Meta(ge=1, le=4096, description="numbers in an item's vector")] = 8
    hidden: Annotated[Widths, Meta(description="widths of the hidden layers")] = ()

    def build(self, inputs: Inputs, outputs: int, *, seed: int) -> nn.Sequential:
        if not inputs.items:
            raise ConfigError("model.name = 'embedding' looks items up: name their columns under data.items")
        with seeded(seed):
            vectors = Vectors(inputs, self.width)
            return nn.Sequential(vectors, *dense(vectors.outputs, self.hidden, outputs, norm=False))


class Vectors(nn.Module):
    """float32[B, F] to float32[B, items · width + F − items]: each item's vector, then the other inputs."""

    def __init__(self, inputs: Inputs, width: int) -> None:
        super().__init__()
        self.items = inputs.items
        taken = {position for position, _ in inputs.items}
        self.others = [position for position in range(inputs.features) if position not in taken]
        self.outputs = len(self.items) * width + len(self.others)
        self.tables = nn.ModuleList(nn.Embedding(count + 1, width) for _, count in self.items)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)  # type: ignore[arg-type]  # torch's default of 1 drowns ratings

    def forward(self, inputs: Tensor) -> Tensor:
        found = [
            # A number that is none of an item's, as a probe may bring it, is the nearest one
            table(inputs[:, position].round().long().clamp(0, count))
            for table, (position, count) in zip(self.tables, self.items, strict=True)
        ]
        return torch.cat([*found, inputs[:, self.others]] if self.others else found, 1)
