"""Who takes part: a versioned, hash-chained list of public keys, signed by a key that is kept offline.

A coordinator cannot add clients of its own making: a site uses a roster only after it accepted that version, and a
version counts only with the offline signature and as the direct successor of the one accepted before.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import msgspec

from . import keys
from .digest import digest
from .errors import RemoteProtocolError

FIRST_PREVIOUS = bytes(32)


class Member(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A site's public side: its name and two Ed25519 keys, apart so that a ledger signature is never a protocol one."""

    name: str
    secagg_key: bytes
    ledger_key: bytes


class Roster(
    msgspec.Struct, frozen=True, array_like=True, tag="privfed/roster/1", forbid_unknown_fields=True, dict=True
):
    """One version of the list; a member's position is its index in every protocol.

    Attributes:
        version: 1, 2, …
        previous: hash of the version before, 32 zero bytes for the first.
        members: in index order.

    Raises:
        ValueError: names or keys that repeat or have the wrong size.
    """

    version: int
    previous: bytes
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        if self.version < 1 or len(self.previous) != 32 or (self.version == 1) != (self.previous == FIRST_PREVIOUS):
            raise ValueError("roster must have version 1 and no previous hash, or a later version and one")
        every_key = [key for member in self.members for key in (member.secagg_key, member.ledger_key)]
        if any(len(key) != keys.KEY_BYTES for key in every_key) or len(set(every_key)) != len(every_key):
            raise ValueError(f"roster keys must be {keys.KEY_BYTES} bytes each and all different")
        if not all(member.name for member in self.members) or len({m.name for m in self.members}) != len(self.members):
            raise ValueError("roster names must be given and all different")

    @cached_property  # the clients of a simulation ask the same roster
    def hash(self) -> bytes:
        """bytes[32] of the canonical encoding; part of every session id."""
        return digest("privfed/roster/1", msgspec.msgpack.encode(self))

    def index_of(self, secagg_key: bytes) -> int:
        """The index of the member with this key. Raises ValueError if there is none."""
        try:
            return self._indices[secagg_key]
        except KeyError:
            raise ValueError("this identity is not in the roster; have it added to the next version") from None

    @cached_property
    def _indices(self) -> dict[bytes, int]:
        return {member.secagg_key: index for index, member in enumerate(self.members)}


class _SignedRoster(msgspec.Struct, frozen=True, array_like=True, tag="privfed/signed-roster/1"):
    body: bytes
    signature: bytes


def sign_roster(roster: Roster, authority_private: bytes) -> bytes:
    """The file to hand out: the roster with the offline key's Ed25519 signature."""
    body = msgspec.msgpack.encode(roster)
    return msgspec.msgpack.encode(
        _SignedRoster(body=body, signature=keys.sign(authority_private, digest("privfed/roster/1", body)))
    )


def load_roster(data: bytes, authority: bytes) -> Roster:
    """The roster in a signed file.

    Args:
        data: what `sign_roster` gave.
        authority: Ed25519 public key of the offline signer, learnt out of band.

    Raises:
        RemoteProtocolError: not a signed roster of this authority, or a malformed one.
    """
    try:
        signed = msgspec.msgpack.decode(data, type=_SignedRoster)
        # Verified before the body is parsed: nothing unsigned reaches the decoder of rosters.
        keys.verify(authority, signed.signature, digest("privfed/roster/1", signed.body))
        roster = msgspec.msgpack.decode(signed.body, type=Roster)
    except (msgspec.MsgspecError, ValueError):
        raise RemoteProtocolError("not a valid signed roster") from None
    return roster


def accept(data: bytes, *, authority: bytes, pinned: Roster | None) -> Roster:
    """The roster to pin from now on, if a site may move to it from the one it pinned before.

    Args:
        data: the signed roster offered.
        authority: the offline signer's public key.
        pinned: the roster accepted last, None at a site that has none yet.

    Raises:
        RemoteProtocolError: bad signature, or neither the pinned version again nor its direct successor.
    """
    roster = load_roster(data, authority)
    if pinned is None or roster.hash == pinned.hash:
        return roster
    if roster.version != pinned.version + 1 or roster.previous != pinned.hash:
        raise RemoteProtocolError(f"roster version {roster.version} does not follow pinned version {pinned.version}")
    return roster


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A site's long-term secrets: two Ed25519 private keys (32 bytes each). Its repr shows the name alone."""

    name: str
    secagg_private: bytes = field(repr=False)
    ledger_private: bytes = field(repr=False)

    @classmethod
    def generate(cls, name: str, entropy: Callable[[int], bytes] = secrets.token_bytes) -> "Identity":
        """Fresh keys from the system source."""
        return cls(name=name, secagg_private=entropy(keys.KEY_BYTES), ledger_private=entropy(keys.KEY_BYTES))

    @cached_property  # deriving public keys takes longer than most of what asks for them
    def member(self) -> Member:
        """The public side, for the roster."""
        return Member(
            name=self.name,
            secagg_key=keys.verification_key(self.secagg_private),
            ledger_key=keys.verification_key(self.ledger_private),
        )
