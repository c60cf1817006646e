"""The messages of `heagg/1`, who sends them in which order, and what each signature states.

| Step | to → from | What is sent back |
|---|---|---|
| key (H0) | key holder | a fresh public key; one signature over it and over the aggregator's sealing key |
| commit (H1) | clients | a hash of all ciphertexts, the blind's key sealed to the aggregator; signed |
| close (H1) | key holder | one signature over the closed list of commitments |
| send (H2) | clients | the ciphertexts |
| deliver (H2) | key holder, in batches | whose ciphertexts it refuses |
| release (H2) | key holder | the sum, once |

Every message has one type and byte strings of known sizes and forms, which the aggregator checks one by one: none has
room for a TenSEAL context, with a secret key or without, and none is ever parsed as one.
"""

import msgspec

from .. import keys
from ..aggregation import Session, session_id
from ..digest import digest
from ..packing import packed_bytes
from ..roster import Roster
from ..wire import INDEX_BYTES
from .coefficients import CHUNK_BYTES, COEFFICIENT_MODULUS, PUBLIC_KEY_BYTES, SPECIAL_MODULUS
from .fields import PLAIN_MODULUS, SLOTS, Layout, layout_of

KEY, COMMIT, CLOSE, SEND, DELIVER, RELEASE = "key", "commit", "close", "send", "deliver", "release"
DONE, FAILED = "done", "failed"

KEY_HOLDER_STEPS = frozenset({KEY, CLOSE, DELIVER, RELEASE})
"""Steps in which the server talks to the key holder, and to nobody else: so one site may be a client too."""

COMMITMENT_BYTES = 32
SEALED_BYTES = keys.KEY_BYTES + keys.KEY_BYTES + keys.TAG_BYTES
RECORD_BYTES = COMMITMENT_BYTES + SEALED_BYTES + keys.SIGNATURE_BYTES

BATCH_BYTES = 64 * 2**20
"""Ciphertexts in one message to the key holder: some 64 MiB, one client's at least."""

_OVERHEAD_BYTES = 512


class KeyRequest(msgspec.Struct, frozen=True, array_like=True, tag="heagg/1 key?", forbid_unknown_fields=True):
    """H0, server → key holder: make a key; blinds will be sealed to this X25519 key."""

    sid: bytes
    sealing_key: bytes


class Key(msgspec.Struct, frozen=True, array_like=True, tag="heagg/1 key", forbid_unknown_fields=True):
    """H0, key holder → server."""

    sid: bytes
    public_key: bytes
    signature: bytes


class CommitRequest(msgspec.Struct, frozen=True, array_like=True, tag="heagg/1 commit?", forbid_unknown_fields=True):
    """H1, server → client: the round's keys, under the key holder's signature."""

    sid: bytes
    sealing_key: bytes
    public_key: bytes
    signature: bytes


class Commitment(msgspec.Struct, frozen=True, array_like=True, tag="heagg/1 commit", forbid_unknown_fields=True):
    """H1, client → server: SHA-256 of all ciphertexts, and the blind's key (X25519 key ‖ box)."""

    sid: bytes
    commitment: bytes
    sealed: bytes
    signature: bytes


class CloseRequest(msgspec.Struct, frozen=True, array_like=True, tag="heagg/1 close?", forbid_unknown_fields=True):
    """H1, server → key holder: who committed, and to what (commitment ‖ sealed ‖ signature each)."""

    sid: bytes
    members: bytes
    records: bytes


class Closed(msgspec.Struct, frozen=True, array_like=True, tag="heagg/1 close", forbid_unknown_fields=True):
    """H1, key holder → server: nothing is taken but the openings of this list."""

    sid: bytes
    signature: bytes


class SendRequest(msgspec.Struct, frozen=True, array_like=True, tag="heagg/1 send?", forbid_unknown_fields=True):
    """H2, server → client: the closed list, under the key holder's signature."""

    sid: bytes
    members: bytes
    commitments: bytes
    signature: bytes


class Ciphertexts(msgspec.Struct, frozen=True, array_like=True, tag="heagg/1 send", forbid_unknown_fields=True):
    """H2, client → server: what it committed to."""

    sid: bytes
    chunks: bytes


class Delivery(msgspec.Struct, frozen=True, array_like=True, tag="heagg/1 deliver?", forbid_unknown_fields=True):
    """H2, server → key holder: the ciphertexts of some members, in index order."""

    sid: bytes
    members: bytes
    chunks: bytes


class Checked(msgspec.Struct, frozen=True, array_like=True, tag="heagg/1 deliver", forbid_unknown_fields=True):
    """H2, key holder → server: those of them that are not in the sum, for good."""

    sid: bytes
    refused: bytes


class ReleaseRequest(msgspec.Struct, frozen=True, array_like=True, tag="heagg/1 release?", forbid_unknown_fields=True):
    """H2, server → key holder: everyone in the sum, and R = Σ of their blinds modulo t, as little-endian uint64."""

    sid: bytes
    members: bytes
    blinds: bytes


class Release(msgspec.Struct, frozen=True, array_like=True, tag="heagg/1 release", forbid_unknown_fields=True):
    """H2, key holder → server: the sum, packed; or nothing, because a field was out of range or the noise too high."""

    sid: bytes
    total: bytes
    withheld: bytes
    signature: bytes


OUT_OF_RANGE, NOISE = b"range", b"noise"
"""Why a sum is withheld."""


def check_session(session: Session, roster: Roster, key_holder: int) -> Layout:
    """The session's layout, unless encryption would protect nobody in it.

    Raises:
        ValueError: with the value, what is allowed and the remedy.
    """
    for what, index in (("cohort names client", session.cohort[-1]), ("key_holder is", key_holder)):
        if not 0 <= index < len(roster.members):
            raise ValueError(f"{what} {index}, the roster has {len(roster.members)} members")
    if session.minimum_cohort < 2:
        raise ValueError("minimum_cohort must be at least 2 (3 hides inputs from each other), got 1")
    return layout_of(session.dim, bound=session.bound, n=len(session.cohort))


def session_id_of(session: Session, roster: Roster, key_holder: int, layout: Layout) -> bytes:
    """The 32 bytes every message carries: the session, who holds the key, and every parameter of the encryption."""
    numbers = (key_holder, SLOTS, PLAIN_MODULUS, COEFFICIENT_MODULUS, SPECIAL_MODULUS, layout.fields)
    return digest(
        "heagg/1/session", session_id(session, roster.hash), *(number.to_bytes(8, "big") for number in numbers)
    )


def largest_message(session: Session, layout: Layout) -> int:
    """Bytes no legal message of this session exceeds."""
    n = len(session.cohort)
    ciphertexts = max(layout.chunks * CHUNK_BYTES, BATCH_BYTES)
    most = max(ciphertexts, PUBLIC_KEY_BYTES, packed_bytes(session.dim, session.bits), 8 * layout.chunks * SLOTS)
    return most + n * (INDEX_BYTES + RECORD_BYTES) + _OVERHEAD_BYTES


def fixed(index: int) -> bytes:
    """An index at fixed width."""
    return index.to_bytes(4, "big")


def transcript(sid: bytes, sealing_key: bytes, public_key: bytes) -> bytes:
    """th: binds all that follows to this round's two keys; also what H0 signs."""
    return digest("heagg/1/keys", sid, sealing_key, digest("heagg/1/public key", public_key))


def commitment(th: bytes, client: int, chunks: bytes) -> bytes:
    """Hides the ciphertexts, which are fresh randomness to everyone else, and fixes them for this client alone."""
    return digest("heagg/1/chunks", th, fixed(client), chunks)


def commitment_statement(th: bytes, client: int, committed: bytes, sealed: bytes, count: int) -> bytes:
    """What H1 signs."""
    return digest("heagg/1/commit", th, fixed(client), committed, sealed, count.to_bytes(8, "big"))


def closed_statement(th: bytes, members: bytes, commitments: bytes) -> bytes:
    """What the key holder signs when it closes the list."""
    return digest("heagg/1/closed", th, members, commitments)


def release_statement(th: bytes, members: bytes, total: bytes, withheld: bytes) -> bytes:
    """What the key holder signs when it releases the sum, or withholds it."""
    return digest("heagg/1/release", th, members, digest("total", total), withheld)


def sealing_secret(secret: bytes, th: bytes, client: int) -> bytes:
    """The key of the one box from a client to the aggregator."""
    return keys.derive(secret, salt=th, info=b"heagg/1/blind" + fixed(client))


def sealing_context(th: bytes, client: int) -> bytes:
    """Associated data of that box."""
    return th + fixed(client)
