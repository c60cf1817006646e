"""The one shape every way of adding up has: two sans-IO machines and one small driver.

No sockets, clock, log or global randomness in here: bytes go in, bytes come out, and the caller decides when a phase
has waited long enough. Whoever is missing when the caller closes a phase has dropped out.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .degree import degree_and_threshold
from .digest import digest
from .errors import RemoteProtocolError, SumOutOfRange
from .packing import IntVector, decode
from .prg import Words

MAX_BITS = 32
MAX_INDEX = 2**24  # indices are Shamir points too, and must stay inside the field

VectorSource = Callable[[], IntVector]
"""Gives a client's input, at most once, and only when every check of the step that sends it has passed: a round that
dies early spends no privacy budget. After a crash the restarted machine asks again and must get the same vector."""


def default_threshold(n: int) -> int:
    """⌊2n/3⌋ + 1 shares, at most n − 1 from four clients on, so that one dropout is always tolerated there."""
    threshold = 2 * n // 3 + 1
    return min(threshold, n - 1) if n >= 4 else threshold


def default_minimum_cohort(threshold: int) -> int:
    """max(3, t) survivors: the sum of two tells each the other's input."""
    return max(3, threshold)


def default_colluders(n: int, threshold: int) -> int:
    """2t − n − 1, the most colluders against whom t share holders never see two views of a round (complete graph)."""
    return max(0, 2 * threshold - n - 1)


COMPLETE_UP_TO = 128
"""Clients up to which everyone masks with everyone: the graph for deployments, and cheap enough."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The numbers of a masked session that follow from the size of its cohort; see `Session` for each."""

    degree: int | None
    threshold: int
    minimum_cohort: int
    colluders: int


def default_parameters(n: int) -> Parameters:
    """What a cohort of n clients uses unless it is told otherwise.

    Up to 128 clients the complete graph. Above, the k-regular graph that tolerates a tenth of the clients colluding
    with a server that may lie to them, and a tenth dropping out (Bell et al. 2020; `degree.degree_and_threshold`).
    """
    if n <= COMPLETE_UP_TO:
        threshold = default_threshold(n)
        return Parameters(
            degree=None,
            threshold=threshold,
            minimum_cohort=default_minimum_cohort(threshold),
            colluders=default_colluders(n, threshold),
        )
    degree, threshold = degree_and_threshold(n, corrupt=0.1, dropout=0.1)
    return Parameters(degree=degree, threshold=threshold, minimum_cohort=n - n // 10, colluders=n // 10)


def among(indices: tuple[int, ...], index: int) -> bool:
    """Whether increasing ``indices`` hold ``index``: every client asks, and none goes through them all."""
    place = bisect_left(indices, index)
    return place < len(indices) and indices[place] == index


@dataclass(frozen=True, kw_only=True)
class Session:
    """What every party of one attempt agrees on before a byte is sent.

    Attributes:
        run: name of the run.
        round: round number, from 0.
        attempt: attempt at this round, from 0; each has fresh keys.
        cohort: roster indices invited, strictly increasing.
        dim: coordinates of every vector.
        bound: B, the largest magnitude of a coordinate, noise included.
        threshold: t, shares needed to recover a secret.
        minimum_cohort: clients without whose inputs no sum is released.
        colluders: c, clients that may collude with the server without being able to split its view.
        degree: k, other clients each masks with, even; None for all of them (the complete graph). Plain aggregation
            has no use for it.
        context: a hash, by each party itself, of the exact plan bytes and of the model *it received*.

    Raises:
        ValueError: a value out of range; the message names it and what is allowed.

    **Guarantees**: the sum of the whole cohort fits the modulus 2^bits, so a sum of in-range inputs never wraps.
    """

    run: str
    round: int
    attempt: int
    cohort: tuple[int, ...]
    dim: int
    bound: int
    threshold: int
    minimum_cohort: int
    colluders: int
    context: bytes
    degree: int | None = None

    def __post_init__(self) -> None:
        n = len(self.cohort)
        if not self.run:
            raise ValueError("run must be a name, got an empty string")
        if list(self.cohort) != sorted(set(self.cohort)) or not all(0 <= i < MAX_INDEX for i in self.cohort):
            raise ValueError(f"cohort must be strictly increasing indices in [0, {MAX_INDEX}), got {self.cohort}")
        if not self.cohort:
            raise ValueError("cohort must name at least one client, got none")
        if len(self.context) != 32:
            raise ValueError(f"context must be a 32-byte hash, got {len(self.context)} bytes")
        for name, low, high in (
            ("round", 0, 2**63 - 1),
            ("attempt", 0, 2**63 - 1),
            ("dim", 1, 2**31),
            ("bound", 1, 2**31 - 1),
            ("threshold", 1, n),
            ("minimum_cohort", 1, n),
            ("colluders", 0, n - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                limit = f" for a cohort of {n}; lower it or invite more clients" if high in (n, n - 1) else ""
                raise ValueError(f"{name} must be in [{low}, {high}], got {value}{limit}")
        if self.degree is not None and (self.degree % 2 or not 2 <= self.degree < n - 1):
            raise ValueError(f"degree must be even and in [2, {n - 2}] for a cohort of {n}, or None, got {self.degree}")
        if self.bits > MAX_BITS:
            raise ValueError(
                f"bound must keep 2·n·bound + 1 below 2^{MAX_BITS}, got {self.bound} for n = {n}; coarsen the scale"
            )

    def __hash__(self) -> int:
        """Of what tells sessions apart: all of a large cohort would be gone through at every look into a cache."""
        return hash((self.run, self.round, self.attempt, self.context))

    def invites(self, client: int) -> bool:
        """Whether the cohort has this client."""
        return among(self.cohort, client)

    @property
    def bits(self) -> int:
        """w = ⌈log₂(2nB + 1)⌉, the width of a word."""
        return (2 * len(self.cohort) * self.bound).bit_length()

    @property
    def modulus(self) -> int:
        """2^w."""
        return 1 << self.bits

    @property
    def quorum(self) -> int:
        """Fewest clients any phase goes on with: max(t, minimum cohort)."""
        return max(self.threshold, self.minimum_cohort)


@lru_cache(maxsize=4)  # the clients of a simulation ask for the same one
def session_id(session: Session, roster_hash: bytes) -> bytes:
    """The 32 bytes every message carries and every key is bound to; parties that differ in anything cannot talk.

    Args:
        session: the session as this party received it.
        roster_hash: hash of the pinned roster; empty where the aggregation uses no identities.
    """
    numbers = (
        session.round,
        session.attempt,
        session.dim,
        session.bound,
        session.threshold,
        session.minimum_cohort,
        session.colluders,
        session.degree or 0,
    )
    return digest(
        "privfed/session/1",
        session.run.encode(),
        *(number.to_bytes(8, "big") for number in numbers),
        np.asarray(session.cohort, dtype=">u4").tobytes(),
        session.context,
        roster_hash,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class AggregationResult:
    """The exact integer sum and who is in it.

    Attributes:
        total: int64[dim].
        contributors: indices whose inputs are in the sum, increasing.
        dropped: phase → indices that did not answer it.
    """

    total: npt.NDArray[np.int64]
    contributors: tuple[int, ...]
    dropped: Mapping[str, tuple[int, ...]]


def signed_total(
    words: Words, session: Session, contributors: int, *, into: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.int64]:
    """int64[dim] from residues, in the memory of `into` if given (see `packing.decode`).

    Raises:
        SumOutOfRange: a coordinate beyond contributors × bound, which no honest inputs give.
    """
    total = decode(words, session.bits, into=into)
    limit = contributors * session.bound
    if int(total.max()) > limit or int(total.min()) < -limit:
        raise SumOutOfRange(f"a coordinate of the sum is beyond ±{limit}: a client sent an input out of range")
    return total


class AggregationServer(Protocol):
    """The server's machine: says what to send to whom, takes replies one by one, ends with a sum or a typed error."""

    @property
    def phase(self) -> str: ...
    @property
    def waiting(self) -> frozenset[int]:
        """Clients that have not answered the current phase."""
        ...

    @property
    def done(self) -> bool: ...
    @property
    def result(self) -> AggregationResult:
        """Raises LocalProtocolError before `done`."""
        ...

    def start(self) -> dict[int, bytes]:
        """The first phase's requests. Raises LocalProtocolError when called twice."""
        ...

    def receive(self, client: int, message: bytes) -> None:
        """Takes one reply. Raises RemoteProtocolError, with the state unchanged, if the reply is not valid."""
        ...

    def close_phase(self) -> dict[int, bytes]:
        """The next phase's requests, {} when done. Raises ThresholdNotMet or another typed error, which is final."""
        ...


class AggregationClient(Protocol):
    """The client's machine: one message in, one message out."""

    @property
    def done(self) -> bool: ...
    def receive(self, message: bytes) -> bytes:
        """The answer. Raises RemoteProtocolError for a message that must not be answered."""
        ...


def run_round(
    server: AggregationServer,
    exchange: Callable[[dict[int, bytes]], Mapping[int, bytes]],
    on_bad: Callable[[int, RemoteProtocolError], None],
) -> AggregationResult:
    """Drives one attempt of any aggregation over any transport.

    Args:
        server: a machine not yet started.
        exchange: sends requests and gives the replies that came before its deadline. A lazy mapping is consumed one
            reply at a time, so that large replies need not be held together.
        on_bad: told of every invalid reply; that client counts as dropped for the phase.

    Returns:
        The sum.

    Raises:
        AggregationError: the attempt is over; nothing was released.
    """
    requests = server.start()
    while not server.done:
        for client, reply in exchange(requests).items():
            try:
                server.receive(client, reply)
            except RemoteProtocolError as error:
                on_bad(client, error)
        requests = server.close_phase()
    return server.result
