"""The aggregator of `heagg/1`: relays signed keys, commitments and ciphertexts; it knows the blinds, no plaintext.

It needs no homomorphic encryption at all: this file imports none.
"""

import secrets
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import numpy as np

from .. import keys
from ..aggregation import AggregationResult, Session, signed_total
from ..digest import digest
from ..errors import (
    KeyHolderSilent,
    LocalProtocolError,
    RemoteProtocolError,
    ReplayRefused,
    SumOutOfRange,
    ThresholdNotMet,
)
from ..journal import Journal, MemoryJournal
from ..packing import unpack
from ..prg import Entropy
from ..roster import Roster
from ..wire import decode, decode_indices, encode, encode_indices
from . import messages as m
from .coefficients import CHUNK_BYTES, check_chunks, check_public_key
from .fields import PLAIN_MODULUS, SLOTS, Layout, blind


class HomomorphicServer:
    """One attempt, the aggregator's side. See `AggregationServer` for the methods.

    In the steps `messages.KEY_HOLDER_STEPS` its one request goes to `key_holder`, in all others to clients: a site may
    be both.

    Args:
        session: what it asks for; every party computes its own and a difference ends the talk.
        key_holder: roster index of the party that decrypts; of the cohort or not.
        roster: public keys of all of them.
        entropy: for the one key that blinds are sealed to.
        journal: durable memory of whose blinds were added up; default none beyond this machine. An aggregator that
            begins an attempt anew after a crash must give the journal that it had before.

    Raises:
        ValueError: a session that would protect nobody or does not fit the encryption.

    **Guarantees**: ends with the exact sum over `contributors`, or a typed error and no sum. A bad reply changes
    nothing. The blinds of one set of clients, of at least the quorum, are added up and sent; with a journal, one set
    for an attempt whatever crashes: a key holder learns nothing that refuses clients until few are left, or that claims
    to have lost its key when it has seen the sum, and waits for one without a victim. Memory is the cohort's
    ciphertexts, until the key holder has them. Not promised: detection of a false but in-range input, or of a
    false but in-range sum that the key holder signs; a client that seals another key than it blinds with makes the sum
    unreadable and is not named.
    """

    def __init__(
        self,
        *,
        session: Session,
        key_holder: int,
        roster: Roster,
        entropy: Entropy = secrets.token_bytes,
        journal: Journal | None = None,
    ) -> None:
        self._layout: Layout = m.check_session(session, roster, key_holder)
        self.phase = "ready"
        self._waiting: set[int] = set()
        self._session, self._key_holder, self._roster = session, key_holder, roster
        self._sid = m.session_id_of(session, roster, key_holder, self._layout)
        self._entropy = entropy
        self._journal = MemoryJournal() if journal is None else journal
        self._most = m.largest_message(session, self._layout)
        self._steps: dict[
            str, tuple[type[msgspec.Struct], Callable[[int, Any], None], Callable[[], dict[int, bytes]]]
        ] = {
            m.KEY: (m.Key, self._take_key, self._ask_for_commitments),
            m.COMMIT: (m.Commitment, self._take_commitment, self._close_list),
            m.CLOSE: (m.Closed, self._take_closed, self._ask_for_ciphertexts),
            m.SEND: (m.Ciphertexts, self._take_ciphertexts, self._deliver),
            m.DELIVER: (m.Checked, self._take_checked, self._deliver),
            m.RELEASE: (m.Release, self._take_release, self._finish),
        }
        self._sealing: keys.ExchangeKey | None = None
        self._dropped: dict[str, tuple[int, ...]] = {}
        self._result: AggregationResult | None = None
        self._forget()

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
        session = self._session
        self._journal.begin(self._sid, session.run, session.round, session.attempt)
        sealing = self._sealing = keys.ExchangeKey(self._entropy(keys.KEY_BYTES))
        request = m.KeyRequest(sid=self._sid, sealing_key=sealing.public)
        return self._ask(m.KEY, {self._key_holder: encode(request)})

    def receive(self, client: int, message: bytes) -> None:
        if self.phase not in self._steps:
            raise LocalProtocolError(f"receive() in phase {self.phase}")
        if client not in self._waiting:
            raise RemoteProtocolError(f"client {client} was not asked in phase {self.phase} or has answered")
        kind, take, _ = self._steps[self.phase]
        received = decode(message, kind, most=self._most)
        if received.sid != self._sid:  # type: ignore[attr-defined]  # every message of this protocol starts with sid
            raise RemoteProtocolError(f"client {client} is in another session")
        take(client, received)
        self._waiting.remove(client)

    def close_phase(self) -> dict[int, bytes]:
        if self.phase not in self._steps:
            raise LocalProtocolError(f"close_phase() in phase {self.phase}")
        missing, self._waiting = tuple(sorted(self._waiting)), set()
        try:
            if self.phase in m.KEY_HOLDER_STEPS and missing:
                raise KeyHolderSilent(stage=self.phase)
            if self.phase in (m.COMMIT, m.SEND):
                self._dropped[self.phase] = missing
            return self._steps[self.phase][2]()
        except BaseException:
            self.phase = m.FAILED
            self._forget()
            raise

    def _ask(self, phase: str, requests: dict[int, bytes]) -> dict[int, bytes]:
        self.phase, self._waiting = phase, set(requests)
        return requests

    def _forget(self) -> None:
        """Drops everything gathered; also what a machine holds before it starts."""
        self._sealing = None
        self._key: m.Key | None = None
        self._th = self._members = b""
        self._commitments: dict[int, m.Commitment] = {}
        self._blind_keys: dict[int, bytes] = {}
        self._closed: m.Closed | None = None
        self._ciphertexts: dict[int, bytes] = {}
        self._delivered: tuple[int, ...] = ()
        self._refused: set[int] = set()
        self._senders: tuple[int, ...] = ()
        self._release: m.Release | None = None

    def _quorum(self, present: int) -> None:
        if present < self._session.quorum:
            raise ThresholdNotMet(stage=self.phase, needed=self._session.quorum, have=present)

    def _verify(self, party: int, signature: bytes, statement: bytes) -> None:
        keys.verify(self._roster.members[party].secagg_key, signature, statement)

    # Each _take_* checks everything before it stores anything, so that a bad reply leaves no trace.

    def _take_key(self, key_holder: int, reply: m.Key) -> None:
        check_public_key(reply.public_key)
        th = m.transcript(self._sid, _present(self._sealing).public, reply.public_key)
        self._verify(key_holder, reply.signature, th)
        self._key, self._th = reply, th

    def _ask_for_commitments(self) -> dict[int, bytes]:
        key = _present(self._key)
        request = encode(
            m.CommitRequest(
                sid=self._sid,
                sealing_key=_present(self._sealing).public,
                public_key=key.public_key,
                signature=key.signature,
            )
        )
        return self._ask(m.COMMIT, dict.fromkeys(self._session.cohort, request))

    def _take_commitment(self, client: int, reply: m.Commitment) -> None:
        if len(reply.commitment) != m.COMMITMENT_BYTES or len(reply.sealed) != m.SEALED_BYTES:
            raise RemoteProtocolError(f"client {client} sent a commitment of the wrong size")
        statement = m.commitment_statement(self._th, client, reply.commitment, reply.sealed, self._layout.chunks)
        self._verify(client, reply.signature, statement)
        public, box = reply.sealed[: keys.KEY_BYTES], reply.sealed[keys.KEY_BYTES :]
        secret = m.sealing_secret(_present(self._sealing).agree(public), self._th, client)
        self._blind_keys[client] = keys.open_sealed(secret, box, bound_to=m.sealing_context(self._th, client))
        self._commitments[client] = reply

    def _close_list(self) -> dict[int, bytes]:
        self._quorum(len(self._commitments))
        self._commitments = dict(sorted(self._commitments.items()))
        self._members = encode_indices(tuple(self._commitments))
        request = m.CloseRequest(
            sid=self._sid,
            members=self._members,
            records=b"".join(c.commitment + c.sealed + c.signature for c in self._commitments.values()),
        )
        return self._ask(m.CLOSE, {self._key_holder: encode(request)})

    def _take_closed(self, key_holder: int, reply: m.Closed) -> None:
        self._verify(key_holder, reply.signature, m.closed_statement(self._th, self._members, self._commitment_list()))
        self._closed = reply

    def _commitment_list(self) -> bytes:
        return b"".join(c.commitment for c in self._commitments.values())

    def _ask_for_ciphertexts(self) -> dict[int, bytes]:
        request = m.SendRequest(
            sid=self._sid,
            members=self._members,
            commitments=self._commitment_list(),
            signature=_present(self._closed).signature,
        )
        return self._ask(m.SEND, dict.fromkeys(self._commitments, encode(request)))

    def _take_ciphertexts(self, client: int, reply: m.Ciphertexts) -> None:
        check_chunks(reply.chunks, self._layout.chunks)
        if m.commitment(self._th, client, reply.chunks) != self._commitments[client].commitment:
            raise RemoteProtocolError(f"client {client} sent other ciphertexts than it committed to")
        self._ciphertexts[client] = reply.chunks

    def _deliver(self) -> dict[int, bytes]:
        """The next batch to the key holder; after the last, R."""
        if self.phase == m.SEND:
            self._senders = tuple(sorted(self._ciphertexts))
        if not self._ciphertexts:
            return self._ask_for_sum()
        self._quorum(len(self._senders) - len(self._refused))
        size = max(1, m.BATCH_BYTES // (self._layout.chunks * CHUNK_BYTES))
        self._delivered = tuple(sorted(self._ciphertexts))[:size]
        request = m.Delivery(
            sid=self._sid,
            members=encode_indices(self._delivered),
            chunks=b"".join(self._ciphertexts.pop(client) for client in self._delivered),
        )
        return self._ask(m.DELIVER, {self._key_holder: encode(request)})

    def _take_checked(self, key_holder: int, reply: m.Checked) -> None:
        refused = set(decode_indices(reply.refused))
        if not refused.issubset(self._delivered):
            raise RemoteProtocolError("the key holder refused a client that was not delivered")
        self._refused |= refused

    def _ask_for_sum(self) -> dict[int, bytes]:
        members = tuple(client for client in self._senders if client not in self._refused)
        self._dropped[m.DELIVER] = tuple(sorted(self._refused))
        self._quorum(len(members))
        self._members = encode_indices(members)
        added = digest("heagg/1/set", self._members)
        try:
            self._journal.answer(self._sid, "release", added, added)
        except ReplayRefused:
            raise ReplayRefused(
                "before a crash this attempt's sum was over other clients; it is not asked for"
            ) from None
        total = np.zeros(self._layout.chunks * SLOTS, dtype=np.int64)
        for client in members:
            total += blind(self._blind_keys[client], self._th, self._layout)  # 64 · 2^42 fits
        request = m.ReleaseRequest(
            sid=self._sid, members=self._members, blinds=(total % PLAIN_MODULUS).astype("<u8").tobytes()
        )
        return self._ask(m.RELEASE, {self._key_holder: encode(request)})

    def _take_release(self, key_holder: int, reply: m.Release) -> None:
        statement = m.release_statement(self._th, self._members, reply.total, reply.withheld)
        self._verify(key_holder, reply.signature, statement)
        if reply.withheld not in (b"", m.OUT_OF_RANGE, m.NOISE) or (reply.withheld and reply.total):
            raise RemoteProtocolError("a sum, or one of the reasons to withhold it, was due")
        if not reply.withheld:
            unpack(reply.total, dim=self._session.dim, bits=self._session.bits)
        self._release = reply

    def _finish(self) -> dict[int, bytes]:
        release, contributors = _present(self._release), decode_indices(self._members)
        if release.withheld:
            raise SumOutOfRange(
                "the key holder withheld the sum: a client encrypted no input in range, or sealed another blind than "
                "it used"
                if release.withheld == m.OUT_OF_RANGE
                else "the key holder withheld the sum: too little noise budget was left"
            )
        words = unpack(release.total, dim=self._session.dim, bits=self._session.bits)
        total = signed_total(words, self._session, len(contributors))
        self._result = AggregationResult(total=total, contributors=contributors, dropped=dict(self._dropped))
        self.phase = m.DONE
        self._forget()
        return {}


T = TypeVar("T")


def _present(value: T | None) -> T:
    """What the step before has stored."""
    assert value is not None
    return value
