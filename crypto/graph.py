"""Who masks with whom and who holds whose shares."""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from .digest import digest
from .prg import keystream


@dataclass(frozen=True)
class Graph:
    """The members on a ring; each is joined to the `reach` nearest on either side, or to all (Bell et al. 2020, §3).

    "Neighbours" counts self: a dealer keeps one share of its own. Neighbourhood is mutual. No adjacency list exists:
    a place on the ring answers every question in constant time.

    Args:
        ring: all members, in ring order.
        reach: neighbours on each side; None for the complete graph (Bonawitz et al. 2017).
    """

    ring: tuple[int, ...]
    reach: int | None
    _place: dict[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_place", {member: place for place, member in enumerate(self.ring)})

    @property
    def size(self) -> int:
        """Neighbours of each member, itself included."""
        return len(self.ring) if self.reach is None else 2 * self.reach + 1

    def neighbours(self, member: int) -> tuple[int, ...]:
        """In the order in which boxes and hashes stand; `position` is the place in it."""
        if self.reach is None:
            return self.ring
        n, place = len(self.ring), self._place[member]
        return tuple(self.ring[(place + step) % n] for step in range(-self.reach, self.reach + 1))

    def position(self, member: int, neighbour: int) -> int:
        """Where `neighbour` stands among `member`'s. Raises ValueError if it does not."""
        if self.reach is None:
            return self._place[neighbour]
        position = (self._place[neighbour] - self._place[member] + self.reach) % len(self.ring)
        if position > 2 * self.reach:
            raise ValueError(f"client {neighbour} is no neighbour of client {member}")
        return position


@lru_cache(maxsize=2)  # the clients of a simulation build the same one
def build(members: tuple[int, ...], *, degree: int | None, th: bytes) -> Graph:
    """The graph every party of a session computes alike.

    Args:
        members: the clients that advertised keys, increasing.
        degree: k, other clients each is joined to (even); None for the complete graph, which is also what too few
            members for k give.
        th: bytes[32], the transcript hash; it keys the ring's permutation.

    **Guarantees**: th fixes the graph, and nobody knows th before the last advertisement. Not promised: that the server
    did not try several: by leaving out members it can grind 2^g permutations and gains g bits against the bound of
    `degree`. The complete graph has nothing to grind.
    """
    if degree is None or len(members) <= degree + 1:
        return Graph(members, None)
    draws = np.frombuffer(keystream(digest("secagg/1/graph", th), 8 * len(members)), dtype="<u8")
    order = np.argsort(draws, kind="stable")  # equal draws, of chance n²/2^65, are the same for everyone too
    return Graph(tuple(members[place] for place in order.tolist()), degree // 2)
