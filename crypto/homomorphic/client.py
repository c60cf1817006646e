"""The client of `heagg/1`: two messages in, two out; its ciphertexts leave only after everyone's are fixed."""

from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor
from contextlib import suppress
from itertools import repeat
from typing import Any

import msgspec

from .. import keys
from ..aggregation import Session, VectorSource
from ..digest import digest
from ..errors import LocalProtocolError, RemoteProtocolError, ReplayRefused
from ..journal import Answers, Journal
from ..prg import expand
from ..roster import Identity, Roster
from ..wire import decode, decode_indices, encode, records
from . import messages as m
from .bfv import PublicKey, encrypt_part
from .fields import SLOTS, Slots, balanced, blind, pack

CHUNKS_PER_TASK = 32
"""Ciphertexts (some 40 ms of work, 2 MiB) that another process makes at a time."""


class HomomorphicClient:
    """One client in one attempt. See `AggregationClient` for the methods.

    Args:
        session: as this client received it, checked by the caller against the site's policy.
        key_holder: roster index of the party that will decrypt the sum.
        identity: this site's long-term keys; its index is found in the roster.
        roster: the pinned roster.
        vector: the input, asked for once, when the round's key has been verified. Exceptions from it propagate
            unchanged and leave the machine failed.
        journal: durable memory of the attempt's input, by its hash. SEAL's own randomness is not derived from its seed.
        pool: other processes that share the work on a long vector, a `ProcessPoolExecutor`; threads gain nothing
            (TenSEAL holds the interpreter's lock). The caller keeps it from round to round, for its start costs more
            than a million parameters.

    Raises:
        ValueError: a session that would protect nobody, that does not fit the encryption, or without this identity.

    **Guarantees**, for an honest client whose pinned roster is right and whose journal is not rolled back, as long as
    the aggregator and the key holder do not collude: the aggregator, with any clients, learns at most one sum that
    includes this input, over at least `minimum_cohort` clients; the key holder learns that sum and nothing more. Not
    promised: anything if those two collude, that the others' inputs are honest, anything about what a sum reveals.

    **After a crash** the same ciphertexts cannot be made again, for SEAL draws its randomness itself. As long as its
    journal keeps the session, a restarted client begins the attempt anew, under whatever key the key holder then signs:
    with a fresh blind, and with the very same input or not at all (`ReplayRefused`), because the same noise on another
    update would be a second release. That not more than one sum comes of it is held by the key holder's journal against
    the aggregator, and by the aggregator's journal against the key holder.
    """

    def __init__(
        self,
        *,
        session: Session,
        key_holder: int,
        identity: Identity,
        roster: Roster,
        vector: VectorSource,
        journal: Journal,
        pool: Executor | None = None,
    ) -> None:
        self._layout = m.check_session(session, roster, key_holder)
        self._index = roster.index_of(identity.member.secagg_key)
        if not session.invites(self._index):
            raise ValueError(f"client {self._index} is not in the cohort {session.cohort}")
        self.phase = m.COMMIT
        self._session, self._identity = session, identity
        self._key_holder_key = roster.members[key_holder].secagg_key
        self._sid = m.session_id_of(session, roster, key_holder, self._layout)
        self._vector, self._journal, self._pool = vector, journal, pool
        self._answers = Answers(journal, self._sid)
        self._most = m.largest_message(session, self._layout)
        self._steps: dict[str, tuple[type[msgspec.Struct], Callable[[Any], msgspec.Struct], str]] = {
            m.COMMIT: (m.CommitRequest, self._commit, m.SEND),
            m.SEND: (m.SendRequest, self._send, m.DONE),
        }
        self._th = self._commitment = self._chunks = b""

    @property
    def done(self) -> bool:
        return self.phase == m.DONE

    def receive(self, message: bytes) -> bytes:
        if self.phase == m.FAILED:
            raise LocalProtocolError("this machine has failed; make a new one for a new attempt")
        if (again := self._answers.repeated(message)) is not None:
            return again
        if self.done:
            raise RemoteProtocolError("every step of this session has been answered")
        kind, step, following = self._steps[self.phase]
        received = decode(message, kind, most=self._most)
        if received.sid != self._sid:  # type: ignore[attr-defined]  # every message of this protocol starts with sid
            raise RemoteProtocolError("the server is in another session: its plan, model, roster or round differs")
        try:
            reply = self._answers.keep(message, encode(step(received)))
            if following == m.DONE:
                self._answers.finish()
        except BaseException:
            self.phase, self._chunks = m.FAILED, b""
            with suppress(Exception):  # the first error is the one to see; the high-water mark already stands
                self._answers.finish()
            raise
        self.phase = following
        if self.done:
            self._chunks = b""
        return reply

    def _commit(self, request: m.CommitRequest) -> m.Commitment:
        # 1. The key holder itself signed this key, for this session and this aggregator: substitution ends here.
        if len(request.sealing_key) != keys.KEY_BYTES:
            raise RemoteProtocolError("a sealing key of the wrong size")
        th = m.transcript(self._sid, request.sealing_key, request.public_key)
        keys.verify(self._key_holder_key, request.signature, th)
        public_key = PublicKey(request.public_key)
        session = self._session
        seed = self._journal.begin(self._sid, session.run, session.round, session.attempt)
        self._th = th

        # 2. The blind's key, for the aggregator alone: the key holder will decrypt the sum of x + r and know no r. Both
        # secrets are of this key, so that an attempt that begins anew under another one blinds anew.
        blind_key = expand(seed, session_id=th, label="blind")(keys.KEY_BYTES)
        sealing = keys.ExchangeKey(expand(seed, session_id=th, label="sealing key")(keys.KEY_BYTES))
        secret = m.sealing_secret(sealing.agree(request.sealing_key), th, self._index)
        sealed = sealing.public + keys.seal(secret, blind_key, bound_to=m.sealing_context(th, self._index))

        # 3. x + r modulo t in every slot, also in those without a coordinate, then encrypted.
        slots = pack(self._vector(), self._layout, session)
        self._hold_to(slots, seed)
        slots += blind(blind_key, th, self._layout)
        self._chunks = self._encrypt(public_key, request.public_key, balanced(slots))
        self._commitment = m.commitment(th, self._index, self._chunks)
        statement = m.commitment_statement(th, self._index, self._commitment, sealed, self._layout.chunks)
        return m.Commitment(
            sid=self._sid,
            commitment=self._commitment,
            sealed=sealed,
            signature=keys.sign(self._identity.secagg_private, statement),
        )

    def _send(self, request: m.SendRequest) -> m.Ciphertexts:
        # The list is closed: whoever sees these ciphertexts has long committed to its own, and cannot add −Σ of them.
        members = decode_indices(request.members)
        commitments = records(request.commitments, len(members), m.COMMITMENT_BYTES)
        if not set(members) <= set(self._session.cohort) or len(members) < self._session.quorum:
            raise RemoteProtocolError(f"{self._session.quorum} clients of the cohort must have committed")
        if dict(zip(members, commitments, strict=True)).get(self._index) != self._commitment:
            raise RemoteProtocolError("the closed list does not hold this client's commitment")
        keys.verify(
            self._key_holder_key,
            request.signature,
            m.closed_statement(self._th, request.members, request.commitments),
        )
        return m.Ciphertexts(sid=self._sid, chunks=self._chunks)

    def _hold_to(self, slots: Slots, seed: bytes) -> None:
        """One attempt, one input: the journal holds its keyed hash before anything of it is encrypted."""
        fingerprint = digest("heagg/1/input", seed, slots.tobytes())
        try:
            self._journal.answer(self._sid, "input", fingerprint, fingerprint)
        except ReplayRefused:
            raise ReplayRefused(
                "before a crash this attempt had another input: its noise on this one would be a second release"
            ) from None

    def _encrypt(self, key: PublicKey, key_bytes: bytes, slots: Slots) -> bytes:
        size = CHUNKS_PER_TASK * SLOTS
        if self._pool is None or len(slots) <= size:
            return key.encrypt(slots)
        parts = [slots[start : start + size].tobytes() for start in range(0, len(slots), size)]
        try:
            return b"".join(self._pool.map(encrypt_part, repeat(key_bytes), parts))
        except BrokenExecutor:  # a worker was killed, for its memory perhaps: slower is better than not at all
            return key.encrypt(slots)
