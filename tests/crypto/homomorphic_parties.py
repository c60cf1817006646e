"""Clients and a key holder of `heagg/1` on a fake wire that can lose and alter messages."""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor

from privfed.crypto.aggregation import AggregationResult, Session, run_round
from privfed.crypto.errors import AggregationError, RemoteProtocolError
from privfed.crypto.homomorphic import messages as m
from privfed.crypto.homomorphic.client import HomomorphicClient
from privfed.crypto.homomorphic.key_holder import HomomorphicKeyHolder
from privfed.crypto.homomorphic.server import HomomorphicServer
from privfed.crypto.journal import Journal, MemoryJournal
from privfed.crypto.packing import IntVector
from privfed.crypto.roster import FIRST_PREVIOUS, Identity, Roster

from .consortium import make_inputs, make_session, stream

IDENTITIES = [Identity.generate(f"site-{i}", stream(f"he identity {i}")) for i in range(65)]
ROSTER = Roster(version=1, previous=FIRST_PREVIOUS, members=tuple(i.member for i in IDENTITIES))
KEY_HOLDER = 64


def he_session(cohort: Collection[int] = range(4), **changes: object) -> Session:
    return make_session(cohort, **{"threshold": 1, "minimum_cohort": 3, "colluders": 0, **changes})


def he_client(
    session: Session,
    index: int,
    vector: IntVector | Callable[[], IntVector],
    journal: Journal | None = None,
    *,
    key_holder: int = KEY_HOLDER,
    pool: Executor | None = None,
) -> HomomorphicClient:
    return HomomorphicClient(
        session=session,
        key_holder=key_holder,
        identity=IDENTITIES[index],
        roster=ROSTER,
        vector=vector if callable(vector) else lambda: vector,
        journal=journal or MemoryJournal(),
        pool=pool,
    )


def he_key_holder(session: Session, index: int = KEY_HOLDER, journal: Journal | None = None) -> HomomorphicKeyHolder:
    return HomomorphicKeyHolder(
        session=session, identity=IDENTITIES[index], roster=ROSTER, journal=journal or MemoryJournal()
    )


class Kept(MemoryJournal):
    """A journal that keeps a session until the next one begins, as a site's does: its round may begin anew."""

    def finish(self, sid: bytes) -> None:
        pass


AGGREGATOR = -1
"""In `HeWire`'s journals."""


class HeWire:
    """One round. Hooks see (phase, party, message); a lost party does its work and its answer vanishes."""

    def __init__(
        self,
        session: Session,
        inputs: Mapping[int, IntVector] | None = None,
        *,
        key_holder: int = KEY_HOLDER,
        lost: Mapping[str, Collection[int]] | None = None,
        to_party: Callable[[str, int, bytes], bytes] = lambda phase, party, message: message,
        to_server: Callable[[str, int, bytes], bytes] = lambda phase, party, message: message,
        pool: Executor | None = None,
        journals: Mapping[int, Journal] | None = None,
    ) -> None:
        self.session, self.inputs = session, dict(inputs or make_inputs(session))
        kept = journals or {}
        self.server = HomomorphicServer(
            session=session, key_holder=key_holder, roster=ROSTER, journal=kept.get(AGGREGATOR)
        )
        self.clients = {
            i: he_client(session, i, vector, kept.get(i), key_holder=key_holder, pool=pool)
            for i, vector in self.inputs.items()
        }
        self.key_holder, self.index = he_key_holder(session, key_holder, kept.get(key_holder)), key_holder
        self.lost, self.to_party, self.to_server = lost or {}, to_party, to_server
        self.log: list[tuple[str, int, bytes, bytes]] = []
        self.bad: list[tuple[int, RemoteProtocolError]] = []
        self.refusals: list[tuple[int, AggregationError]] = []

    def exchange(self, requests: dict[int, bytes]) -> dict[int, bytes]:
        phase, replies = self.server.phase, {}
        for party, request in requests.items():
            sent = self.to_party(phase, party, request)
            machine = self.key_holder if phase in m.KEY_HOLDER_STEPS else self.clients[party]
            try:
                reply = machine.receive(sent)
            except AggregationError as error:
                self.refusals.append((party, error))
                continue
            if party not in self.lost.get(phase, ()):
                replies[party] = self.to_server(phase, party, reply)
                self.log.append((phase, party, sent, replies[party]))
        return replies

    def run(self) -> AggregationResult:
        return run_round(self.server, self.exchange, lambda party, error: self.bad.append((party, error)))
