"""A fake wire: sites with fixed keys, and machines that talk through dictionaries."""

from collections.abc import Callable, Collection, Mapping
from hashlib import sha256

import numpy as np

from privfed.crypto.aggregation import (
    AggregationClient,
    AggregationResult,
    Session,
    default_colluders,
    default_minimum_cohort,
    default_threshold,
    run_round,
)
from privfed.crypto.errors import RemoteProtocolError
from privfed.crypto.journal import Journal, MemoryJournal
from privfed.crypto.masking.client import MaskedClient
from privfed.crypto.masking.server import MaskedServer
from privfed.crypto.packing import IntVector
from privfed.crypto.plain import PlainClient, PlainServer
from privfed.crypto.prg import Entropy
from privfed.crypto.roster import FIRST_PREVIOUS, Identity, Roster


def stream(seed: str) -> Entropy:
    """Deterministic bytes for tests: SHA-256 in counter mode."""
    counter = 0

    def take(size: int) -> bytes:
        nonlocal counter
        out = b""
        while len(out) < size:
            out += sha256(f"{seed}/{counter}".encode()).digest()
            counter += 1
        return out[:size]

    return take


IDENTITIES = [Identity.generate(f"site-{i}", stream(f"identity {i}")) for i in range(12)]
ROSTER = Roster(version=1, previous=FIRST_PREVIOUS, members=tuple(i.member for i in IDENTITIES))


def make_session(cohort: Collection[int] = range(5), **changes: object) -> Session:
    n = len(cohort)
    threshold = default_threshold(n)
    fields: dict[str, object] = {
        "run": "test",
        "round": 1,
        "attempt": 0,
        "cohort": tuple(cohort),
        "dim": 7,
        "bound": 100,
        "threshold": threshold,
        "minimum_cohort": default_minimum_cohort(threshold),
        "colluders": default_colluders(n, threshold),
        "context": bytes(32),
    }
    return Session(**{**fields, **changes})  # type: ignore[arg-type]


def make_inputs(session: Session, seed: int = 0) -> dict[int, IntVector]:
    rng = np.random.default_rng(seed)
    return {i: rng.integers(-session.bound, session.bound, session.dim, endpoint=True) for i in session.cohort}


def masked_client(
    session: Session, index: int, vector: IntVector | Callable[[], IntVector], journal: Journal | None = None
) -> MaskedClient:
    return MaskedClient(
        session=session,
        identity=IDENTITIES[index],
        roster=ROSTER,
        vector=vector if callable(vector) else lambda: vector,
        journal=journal or MemoryJournal(stream(f"seed {index}")),
    )


def masked_round(session: Session, inputs: Mapping[int, IntVector]) -> tuple[MaskedServer, dict[int, MaskedClient]]:
    return MaskedServer(session=session, roster=ROSTER, entropy=stream("server")), {
        i: masked_client(session, i, vector) for i, vector in inputs.items()
    }


def plain_round(session: Session, inputs: Mapping[int, IntVector]) -> tuple[PlainServer, dict[int, PlainClient]]:
    return PlainServer(session=session), {
        i: PlainClient(session=session, index=i, vector=lambda v=v: v, journal=MemoryJournal())  # type: ignore[misc]
        for i, v in inputs.items()
    }


class Wire:
    """An `exchange` that loses chosen clients' replies from a chosen phase on and can alter bytes in flight."""

    def __init__(
        self,
        server: MaskedServer | PlainServer,
        clients: Mapping[int, AggregationClient],
        *,
        lost: Mapping[str, Collection[int]] | None = None,
        to_client: Callable[[str, int, bytes], bytes] = lambda phase, client, message: message,
        to_server: Callable[[str, int, bytes], bytes] = lambda phase, client, message: message,
    ) -> None:
        self.server, self.clients, self.lost = server, clients, lost or {}
        self.to_client, self.to_server = to_client, to_server
        self.log: list[tuple[str, int, bytes, bytes]] = []
        self.bad: list[tuple[int, RemoteProtocolError]] = []
        self.refusals: list[tuple[int, RemoteProtocolError]] = []

    def exchange(self, requests: dict[int, bytes]) -> dict[int, bytes]:
        phase, replies = self.server.phase, {}
        for client, request in requests.items():
            sent = self.to_client(phase, client, request)
            try:
                reply = self.clients[client].receive(sent)
            except RemoteProtocolError as error:
                self.refusals.append((client, error))
                continue
            self.log.append((phase, client, sent, reply))
            if client not in self.lost.get(phase, ()):
                replies[client] = self.to_server(phase, client, reply)
        return replies

    def run(self) -> AggregationResult:
        return run_round(self.server, self.exchange, lambda client, error: self.bad.append((client, error)))
