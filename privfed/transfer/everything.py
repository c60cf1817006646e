"""What all ways of transfer have in common; and the plainest: go on with all parameters."""

from typing import Annotated

import msgspec
from msgspec import Meta
from torch import nn

from privfed.data.arrays import Arrays
from privfed.data.tables import Table

Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Everything(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="train", tag="all"):
    """All parameters are trained, from those of ``base`` on.

    A base is public as far as this run goes: its own records are not this run's to protect. What its training spent
    stands in the ledger of the run that made it.
    """

    base: Annotated[
        str | None,
        Meta(description="safetensors file of the network to start from, e.g. a run's model.safetensors; default none"),
    ] = None
    sha256: Annotated[Digest | None, Meta(description="its SHA-256: no party starts from another one")] = None
    fresh_head: Annotated[
        bool, Meta(description="start the last layer anew, for a target with other outputs than the source's")
    ] = False
    public_source: Annotated[
        Table | Arrays | None,
        Meta(description='for method.name = "weighted": public records that every party holds, of the same inputs'),
    ] = None
    source_sha256: Annotated[Digest | None, Meta(description="SHA-256 of their file")] = None

    def divided(self, whole: nn.Module) -> tuple[nn.Module | None, nn.Module]:
        """What records pass first and nobody trains, None where there is none; and what is trained on what it gives.

        Args:
            whole: the run's network. Its layers become those of the result.

        Raises:
            ConfigError: it can not be divided so.
        """
        return None, self.trained(whole)

    def trained(self, whole: nn.Module) -> nn.Module:
        """The network whose parameters the run trains; what else it holds is constant."""
        return whole

    def merge(self, trained: nn.Module, whole: nn.Module) -> None:
        """Have ``whole`` compute what it computes with ``trained`` in its place."""
        whole.load_state_dict(trained.state_dict())
