"""SHA-256 over length-prefixed parts: two different tuples can never give the same bytes to the hash."""

import hashlib


def digest(label: str, *parts: bytes) -> bytes:
    """The 32-byte hash of (label, *parts), each with its length before it.

    Args:
        label: what the hash is for (domain separation), e.g. ``"secagg/1/transcript"``.
        parts: byte strings of any length.

    **Guarantees**: injective encoding, so equal digests mean equal labels and parts (collision resistance of SHA-256).
    """
    state = hashlib.sha256()
    for part in (label.encode(), *parts):
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.digest()
