"""A masked client between two messages, for a process that does not live from one to the next."""

import msgspec

from ..errors import LocalProtocolError
from .messages import DONE, FOLLOWS


class Suspended(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="secagg/1 suspended"):
    """Everything that a `MaskedClient` knows and its journal does not.

    Secret: ``input_secret`` and ``held``. Both are empty once the session is over. Its repr shows neither.

    Attributes:
        sid: the session.
        phase: the step that is due.
        summed: as of the machine.
        advertisement: its own, byte for byte.
        th, input_secret: transcript hash, and the secret that it shares with the server.
        members: U1, increasing.
        mask_keys, box_public: neighbour → its public keys.
        dealers, survivors: U2 and U3, as received.
        consent_signature: its own.
        held: dealer → its two shares.
    """

    sid: bytes
    phase: str
    summed: tuple[int, ...]
    advertisement: bytes
    th: bytes
    input_secret: bytes
    members: tuple[int, ...]
    mask_keys: dict[int, bytes]
    box_public: dict[int, bytes]
    dealers: bytes
    survivors: bytes
    consent_signature: bytes
    held: dict[int, bytes]

    def __repr__(self) -> str:
        return f"Suspended(phase={self.phase!r})"

    def to_bytes(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Suspended":
        """Raises LocalProtocolError: it is none, or of another version."""
        try:
            state = msgspec.msgpack.decode(data, type=cls)
            if state.phase not in (*FOLLOWS, DONE):
                raise ValueError
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise LocalProtocolError("not a suspended machine of this version") from None
        return state
