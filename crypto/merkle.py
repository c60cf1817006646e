"""A hash tree over a dealer's boxes: one signature covers all, and each holder checks its own in log₂ n hashes.

Merkle 1987, with the leaf and node prefixes of RFC 6962 §2.1 so that a node can never pass for a leaf.
"""

from collections.abc import Sequence
from hashlib import sha256

HASH_BYTES = 32
_EMPTY = bytes(HASH_BYTES)  # pads to a power of two; no known input hashes to it


def depth(count: int) -> int:
    """Hashes in the path of a tree of `count` leaves."""
    return (count - 1).bit_length()


def tree(leaves: Sequence[bytes]) -> list[list[bytes]]:
    """Levels from the leaf hashes up to the root, `[[root]]` last."""
    level = [sha256(b"\0" + leaf).digest() for leaf in leaves]
    level += [_EMPTY] * ((1 << depth(len(leaves))) - len(level))
    levels = [level]
    while len(level) > 1:
        level = [_node(level[i], level[i + 1]) for i in range(0, len(level), 2)]
        levels.append(level)
    return levels


def path(levels: list[list[bytes]], position: int) -> bytes:
    """The sibling hashes from leaf `position` to below the root, joined."""
    return b"".join(level[position >> height ^ 1] for height, level in enumerate(levels[:-1]))


def root_from_path(leaf: bytes, position: int, siblings: bytes) -> bytes:
    """The root that `leaf` at `position` has under these siblings; the caller compares it with a signed one."""
    node = sha256(b"\0" + leaf).digest()
    for start in range(0, len(siblings), HASH_BYTES):
        sibling = siblings[start : start + HASH_BYTES]
        node = _node(sibling, node) if position & 1 else _node(node, sibling)
        position >>= 1
    return node


def _node(left: bytes, right: bytes) -> bytes:
    return sha256(b"\1" + left + right).digest()
