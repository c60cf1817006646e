"""Plain aggregation: the same shape, bounds and integers as the masked one, with every input visible to the server.

**Guarantees**: exact sums and range checks; once per round and attempt. No confidentiality and no authenticity beyond
what the transport gives.
"""

from contextlib import suppress

import msgspec
import numpy as np

from .aggregation import AggregationResult, Session, VectorSource, session_id, signed_total
from .errors import LocalProtocolError, RemoteProtocolError, ThresholdNotMet
from .journal import Answers, Journal
from .packing import decode as to_signed
from .packing import encode as to_residues
from .packing import pack, packed_bytes, unpack
from .prg import word_dtype
from .wire import decode, encode

SUBMISSION = "submission"
_OVERHEAD_BYTES = 128


class Invitation(msgspec.Struct, frozen=True, array_like=True, tag="plain/1 invitation", forbid_unknown_fields=True):
    """Server → client: submit."""

    sid: bytes


class Submission(msgspec.Struct, frozen=True, array_like=True, tag="plain/1 submission", forbid_unknown_fields=True):
    """Client → server: the packed vector."""

    sid: bytes
    vector: bytes


class PlainServer:
    """Adds submissions as they arrive (memory O(dim)). See `AggregationServer` for the methods."""

    def __init__(self, *, session: Session) -> None:
        self.phase = "ready"
        self._waiting: set[int] = set()
        self._session, self._sid = session, session_id(session, b"")
        self._total = np.zeros(session.dim, dtype=word_dtype(session.bits))
        self._result: AggregationResult | None = None

    @property
    def waiting(self) -> frozenset[int]:
        return frozenset(self._waiting)

    @property
    def done(self) -> bool:
        return self._result is not None

    @property
    def result(self) -> AggregationResult:
        if self._result is None:
            raise LocalProtocolError(f"there is no result in phase {self.phase}")
        return self._result

    def start(self) -> dict[int, bytes]:
        if self.phase != "ready":
            raise LocalProtocolError("start() may be called once; make a new machine for a new attempt")
        self.phase, self._waiting = SUBMISSION, set(self._session.cohort)
        return {client: encode(Invitation(sid=self._sid)) for client in self._session.cohort}

    def receive(self, client: int, message: bytes) -> None:
        if self.phase != SUBMISSION:
            raise LocalProtocolError(f"receive() in phase {self.phase}")
        if client not in self._waiting:
            raise RemoteProtocolError(f"client {client} was not asked or has answered")
        session = self._session
        most = packed_bytes(session.dim, session.bits) + _OVERHEAD_BYTES
        submission = decode(message, Submission, most=most)
        if submission.sid != self._sid:
            raise RemoteProtocolError(f"client {client} is in another session")
        words = unpack(submission.vector, dim=session.dim, bits=session.bits)
        if int(np.abs(to_signed(words, session.bits)).max()) > session.bound:
            raise RemoteProtocolError(f"client {client} sent a value beyond ±{session.bound}")
        self._total += words
        self._waiting.remove(client)

    def close_phase(self) -> dict[int, bytes]:
        if self.phase != SUBMISSION:
            raise LocalProtocolError(f"close_phase() in phase {self.phase}")
        contributors = tuple(client for client in self._session.cohort if client not in self._waiting)
        dropped, self._waiting = tuple(sorted(self._waiting)), set()
        if len(contributors) < self._session.quorum:
            self.phase = "failed"
            raise ThresholdNotMet(stage=SUBMISSION, needed=self._session.quorum, have=len(contributors))
        self.phase = "done"
        self._result = AggregationResult(
            total=signed_total(self._total, self._session, len(contributors)),
            contributors=contributors,
            dropped={SUBMISSION: dropped},
        )
        return {}


class PlainClient:
    """Answers one invitation. See `AggregationClient` for the methods.

    Args:
        session: as this client received it.
        index: its roster index.
        vector: its input, asked for once.
        journal: its memory; a round answered there is never answered again.
    """

    def __init__(self, *, session: Session, index: int, vector: VectorSource, journal: Journal) -> None:
        if not session.invites(index):
            raise ValueError(f"index must be in the cohort {session.cohort}, got {index}")
        self._session, self._sid = session, session_id(session, b"")
        self._vector, self._journal = vector, journal
        self._answers = Answers(journal, self._sid)
        self._phase = "ready"

    @property
    def done(self) -> bool:
        return self._phase == "done"

    def receive(self, message: bytes) -> bytes:
        if self._phase == "failed":
            raise LocalProtocolError("this machine has failed; make a new one for a new attempt")
        if (again := self._answers.repeated(message)) is not None:
            return again
        if self.done:
            raise RemoteProtocolError("this round has been answered already")
        if decode(message, Invitation, most=_OVERHEAD_BYTES).sid != self._sid:
            raise RemoteProtocolError("the server is in another session: its plan, model or round differs from ours")
        session = self._session
        try:
            self._journal.begin(self._sid, session.run, session.round, session.attempt)
            words = to_residues(self._vector(), dim=session.dim, bound=session.bound, bits=session.bits)
            submission = Submission(sid=self._sid, vector=bytes(pack(words, session.bits)))
            reply = self._answers.record(SUBMISSION, message, encode(submission))
            self._answers.finish()
        except BaseException:
            self._phase = "failed"
            with suppress(Exception):  # the first error is the one to see; the high-water mark already stands
                self._answers.finish()
            raise
        self._phase = "done"
        return reply
