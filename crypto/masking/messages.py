"""The messages of `secagg/1`, what each signature states, and the keys both sides derive.

Bonawitz et al. 2017, Figure 4, with the changes of design/crypto.md §2. Lists are byte strings of fixed-size records.
`th`, the transcript hash, is over the advertisements as they were received, never re-encoded.
"""

import msgspec

from .. import degree, keys, merkle, shamir
from ..aggregation import Session
from ..digest import digest
from ..packing import packed_bytes
from ..roster import Roster
from ..wire import INDEX_BYTES, encode, encode_indices

COMMITMENT_BYTES = 32
HASH_BYTES = 32
SHARE_PAIR_BYTES = 2 * shamir.SHARE_BYTES
BOX_BYTES = SHARE_PAIR_BYTES + keys.TAG_BYTES
HASH_PAIR_BYTES = 2 * HASH_BYTES

ADVERTISE, SHARE, MASK, CONSISTENCY, UNMASK = "advertise", "share", "mask", "consistency", "unmask"
DONE, FAILED = "done", "failed"
FOLLOWS = {ADVERTISE: SHARE, SHARE: MASK, MASK: CONSISTENCY, CONSISTENCY: UNMASK, UNMASK: DONE}
"""The whole order of a session, the same on both sides: phase → next phase."""


class Start(msgspec.Struct, frozen=True, array_like=True, tag="secagg/1 start", forbid_unknown_fields=True):
    """R0, server → client: advertise keys for this session."""

    sid: bytes


class Advertise(msgspec.Struct, frozen=True, array_like=True, tag="secagg/1 advertise", forbid_unknown_fields=True):
    """R0, client → server: two fresh X25519 keys and a signature over them."""

    sid: bytes
    mask_key: bytes
    box_key: bytes
    signature: bytes


class Members(msgspec.Struct, frozen=True, array_like=True, tag="secagg/1 members", forbid_unknown_fields=True):
    """R1, server → client: the server's own X25519 key; U1 and its advertisements, in index order, as received."""

    sid: bytes
    server_key: bytes
    members: bytes
    advertisements: bytes


class Deal(msgspec.Struct, frozen=True, array_like=True, tag="secagg/1 deal", forbid_unknown_fields=True):
    """R1, client → server: a commitment to b; per neighbour two share hashes and (but for itself) a sealed box."""

    sid: bytes
    commitment: bytes
    hashes: bytes
    boxes: bytes
    signature: bytes


class Delivery(msgspec.Struct, frozen=True, array_like=True, tag="secagg/1 delivery", forbid_unknown_fields=True):
    """R2, server → client: U2; from each other dealer in it commitment ‖ signature ‖ hashes ‖ tree path ‖ box."""

    sid: bytes
    dealers: bytes
    dealings: bytes


class MaskedInput(msgspec.Struct, frozen=True, array_like=True, tag="secagg/1 masked", forbid_unknown_fields=True):
    """R2, client → server: the masked vector, packed; or no vector and the dealers whose shares are faulty.

    The proof is a one-time tag of the vector, or a signature over the complaints. See `input_key`.
    """

    sid: bytes
    masked: memoryview  # of the message itself: model-sized, and not copied
    complaints: bytes
    proof: bytes


class Survivors(msgspec.Struct, frozen=True, array_like=True, tag="secagg/1 survivors", forbid_unknown_fields=True):
    """R3, server → client: U3, whose masked inputs are in the sum."""

    sid: bytes
    survivors: bytes


class Consent(msgspec.Struct, frozen=True, array_like=True, tag="secagg/1 consent", forbid_unknown_fields=True):
    """R3, client → server: a signature over this view of the session."""

    sid: bytes
    signature: bytes


class Reveal(msgspec.Struct, frozen=True, array_like=True, tag="secagg/1 reveal", forbid_unknown_fields=True):
    """R4, server → client: who consented, with the signatures."""

    sid: bytes
    signers: bytes
    signatures: bytes


class Shares(msgspec.Struct, frozen=True, array_like=True, tag="secagg/1 shares", forbid_unknown_fields=True):
    """R4, client → server: shares of b for U3 and of the mask key for U2 \\ U3, in index order."""

    sid: bytes
    self_mask: bytes
    mask_key: bytes


ADVERTISEMENT_BYTES = len(
    encode(Advertise(sid=bytes(32), mask_key=bytes(32), box_key=bytes(32), signature=bytes(keys.SIGNATURE_BYTES)))
)
_OVERHEAD_BYTES = 512
_BEFORE_PATH = COMMITMENT_BYTES + keys.SIGNATURE_BYTES + HASH_PAIR_BYTES


def dealing_bytes(holders: int) -> int:
    """Size of one record of a `Delivery` when every dealer has this many holders, itself included."""
    return _BEFORE_PATH + merkle.depth(holders) * HASH_BYTES + BOX_BYTES


def split_dealing(dealing: bytes) -> tuple[bytes, bytes, bytes, bytes, bytes]:
    """commitment, signature, hash pair, tree path, box."""
    return (
        dealing[:COMMITMENT_BYTES],
        dealing[COMMITMENT_BYTES : COMMITMENT_BYTES + keys.SIGNATURE_BYTES],
        dealing[COMMITMENT_BYTES + keys.SIGNATURE_BYTES : _BEFORE_PATH],
        dealing[_BEFORE_PATH:-BOX_BYTES],
        dealing[-BOX_BYTES:],
    )


def largest_message(session: Session) -> int:
    """Bytes no legal message of this session exceeds."""
    n = len(session.cohort)
    per_client = INDEX_BYTES + ADVERTISEMENT_BYTES + dealing_bytes(n)
    return packed_bytes(session.dim, session.bits) + n * per_client + _OVERHEAD_BYTES


def check_session(session: Session, roster: Roster) -> None:
    """Refuses a session in which masks would protect nobody.

    Raises:
        ValueError: with the value, what is allowed and the remedy.
    """
    n, t, c = len(session.cohort), session.threshold, session.colluders
    if session.cohort[-1] >= len(roster.members):
        raise ValueError(f"cohort names client {session.cohort[-1]}, the roster has {len(roster.members)} members")
    if not 2 <= t <= shamir.MAX_THRESHOLD:
        raise ValueError(f"threshold must be in [2, {shamir.MAX_THRESHOLD}], got {t}; split a larger cohort")
    if session.minimum_cohort < 2:
        raise ValueError("minimum_cohort must be at least 2 (3 hides inputs from each other), got 1")
    if view_quorum(n, c) > n:
        raise ValueError(f"colluders must be at most n − 2 = {n - 2}, got {c}")
    if session.degree is not None:
        degree.check(n, degree=session.degree, threshold=t, colluders=c, minimum_cohort=session.minimum_cohort)
        return
    if not n < 2 * t:
        # With half the cohort or fewer, a server could collect both kinds of share of one client from two groups.
        raise ValueError(f"threshold must be above half the cohort of {n}, got {t}; use default_threshold({n})")
    if not c < t:
        raise ValueError(f"colluders must be below the threshold {t}, got {c}")


def view_quorum(members: int, colluders: int) -> int:
    """q = ⌊(|U1| + c)/2⌋ + 1 signatures: two views with q each would need more than c clients signing both."""
    return (members + colluders) // 2 + 1


def fixed(index: int) -> bytes:
    """An index at fixed width."""
    return index.to_bytes(4, "big")


def transcript(sid: bytes, server_key: bytes, members: tuple[int, ...], advertisements: list[bytes]) -> bytes:
    """th: binds all that follows to exactly this key of the server and these advertisements."""
    return digest("secagg/1/transcript", sid, server_key, encode_indices(members), *advertisements)


def advertise_statement(sid: bytes, client: int, mask_key: bytes, box_key: bytes) -> bytes:
    """What R0 signs."""
    return digest("secagg/1/adv", sid, fixed(client), mask_key, box_key)


def deal_statement(sid: bytes, th: bytes, dealer: int, commitment: bytes, root: bytes) -> bytes:
    """What R1 signs: the root stands for every box and every share hash, in neighbour order."""
    return digest("secagg/1/deal", sid, th, fixed(dealer), commitment, root)


def complaint_statement(sid: bytes, th: bytes, client: int, dealers: bytes, complaints: bytes) -> bytes:
    """What R2 signs instead of sending an input: an accusation must convince others than the server."""
    return digest("secagg/1/complaint", sid, th, fixed(client), digest("secagg/1/u2", dealers), complaints)


def consent_statement(sid: bytes, th: bytes, dealers: bytes, survivors: bytes) -> bytes:
    """What R3 signs; the same for every signer of one view."""
    return digest("secagg/1/u3", sid, th, digest("secagg/1/u2", dealers), survivors)


def self_mask_commitment(sid: bytes, client: int, seed: bytes) -> bytes:
    """c: hides the 256-bit seed b and fixes it."""
    return digest("secagg/1/b", sid, fixed(client), seed)


def share_hash(sid: bytes, kind: bytes, dealer: int, holder: int, share: bytes) -> bytes:
    """Names one share, so that a bad one is found without trying subsets."""
    return digest("secagg/1/share", sid, kind, fixed(dealer), fixed(holder), share)


def leaf(hash_pair: bytes, box: bytes) -> bytes:
    """A dealer's leaf for one holder; the box is empty for the dealer's own share."""
    return digest("secagg/1/leaf", hash_pair, box)


SELF_MASK, MASK_KEY = b"self mask", b"mask key"


def box_keys(secret: bytes, th: bytes, one: int, other: int) -> dict[int, bytes]:
    """Dealer → the key of its box for the other of the pair: directional, so that a reflected box does not open."""
    low, high = min(one, other), max(one, other)
    both = keys.derive(secret, salt=th, info=b"secagg/1/enc" + fixed(low) + fixed(high), size=2 * keys.KEY_BYTES)
    return {low: both[: keys.KEY_BYTES], high: both[keys.KEY_BYTES :]}


def box_context(sid: bytes, th: bytes, dealer: int, holder: int, hashes: bytes, commitment: bytes) -> bytes:
    """Associated data of a box: what its dealer signs for this holder. All of fixed size."""
    return sid + th + fixed(dealer) + fixed(holder) + hashes + commitment


def pair_mask_key(secret: bytes, th: bytes, one: int, other: int) -> bytes:
    """The PRG key a pair shares; the same from both ends."""
    return keys.derive(secret, salt=th, info=b"secagg/1/mask" + fixed(min(one, other)) + fixed(max(one, other)))


def input_key(secret: bytes, th: bytes, client: int, dealers: bytes) -> bytes:
    """The key of the one tag over a client's masked input; `secret` is X25519 of its box key and the server's key.

    **Guarantees**, as the signature over SHA-256(y) did that it stands for: only the client and this server machine
    can make the machine accept a y for the client, and only under this sid, th and U2. The box key is the client's by
    its signed advertisement. The server's key is the one the client used by th, which its `Deal` signs: with a key
    put in between, the server refuses that signature. U2 and the index are in the derivation, and a client tags one
    vector in a session (its journal), so a key tags one message. A box key may meet the server's key and other
    clients' keys: the derivations have different labels, and no box key is ever recovered from shares. Not promised:
    that the server could prove to anyone else what a client sent. Nothing asks it to; blame rests on signed hashes.
    """
    info = b"secagg/1/input" + fixed(client) + digest("secagg/1/u2", dealers)
    return keys.derive(secret, salt=th, info=info)


def self_mask_key(seed: bytes, th: bytes) -> bytes:
    """The PRG key of a client's own mask."""
    return keys.derive(seed, salt=th, info=b"secagg/1/self")
