"""SHA-256 over length-prefixed parts: two different tuples can never give the same bytes to the hash."""

import hashlib

_JOINED_BYTES = 64 * 1024  # one call for a short input; a long one is not copied


def digest(label: str, *parts: bytes) -> bytes:
    """The 32-byte hash of (label, *parts), each with its length before it.

    Args:
        label: what the hash is for (domain separation), e.g. ``"secagg/1/transcript"``.
        parts: byte strings of any length.

    **Guarantees**: injective encoding, so equal digests mean equal labels and parts (collision resistance of SHA-256).
    """
    pieces = [piece for part in (label.encode(), *parts) for piece in (len(part).to_bytes(8, "big"), part)]
    if sum(map(len, pieces)) <= _JOINED_BYTES:
        return hashlib.sha256(b"".join(pieces)).digest()
    state = hashlib.sha256()
    for piece in pieces:
        state.update(piece)
    return state.digest()
