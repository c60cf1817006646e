"""A site's round between two messages, for an engine that ends its process after each."""

import msgspec


class Interrupted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a site knows of the round under way and has on no disk. Secret; its repr is bare.

    Attributes:
        machine: its part in a masked sum, as `MaskedClient.suspend` gave it; empty if none is under way.
        in_shares: as of the site's contribution.
        contributed: this round's update was given to the aggregation.
    """

    machine: bytes
    in_shares: bool
    contributed: bool

    def __repr__(self) -> str:
        return "Interrupted()"
