"""SHA-256 over length-prefixed parts: two different tuples can never give the same bytes to the hash."""

import hashlib

_LENGTHS = tuple(length.to_bytes(8, "big") for length in range(512))  # hundreds of short inputs a session, in one call


def digest(label: str, *parts: bytes) -> bytes:
    """The 32-byte hash of (label, *parts), each with its length before it.

    Args:
        label: what the hash is for (domain separation), e.g. ``"secagg/1/transcript"``.
        parts: byte strings of any length.

    **Guarantees**: injective encoding, so equal digests mean equal labels and parts (collision resistance of SHA-256).
    """
    name = label.encode()
    try:
        text = _LENGTHS[len(name)] + name
        for part in parts:
            text += _LENGTHS[len(part)] + part
    except IndexError:  # long parts: hashed one by one, not copied into one
        state = hashlib.sha256()
        for part in (name, *parts):
            state.update(len(part).to_bytes(8, "big"))
            state.update(part)
        return state.digest()
    return hashlib.sha256(text).digest()
