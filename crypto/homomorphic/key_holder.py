"""The key holder of `heagg/1`: makes a key for one round, closes the list, decrypts one sum, destroys the key."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np

from .. import keys
from ..aggregation import Session
from ..digest import digest
from ..errors import LocalProtocolError, RemoteProtocolError, ReplayRefused, SumOutOfRange
from ..journal import Answers, Journal
from ..packing import encode as to_residues
from ..packing import pack
from ..roster import Identity, Roster
from ..wire import decode, decode_indices, encode, encode_indices, records
from . import messages as m
from .bfv import NoiseTooHigh, RoundKey
from .coefficients import CHUNK_BYTES
from .fields import PLAIN_MODULUS, SLOTS, balanced, unpack


class HomomorphicKeyHolder:
    """The party that can decrypt, in one attempt: `receive` answers one message with one message, like a client.

    Args:
        session: as this party received it, checked by the caller against its own policy.
        identity: its long-term keys; they stand in the roster, in the cohort or beside it.
        roster: the pinned roster.
        journal: durable memory: one released sum for each (round, attempt) of a run, ever. A site that is a client too
            gives another journal (or another owner in its file) than its client has.

    Raises:
        ValueError: a session that would protect nobody or does not fit the encryption.

    **Guarantees**, whatever the aggregator and the clients send: what it adds are ciphertexts that a client of the
    cohort committed to, under its signature, before any ciphertext was sent, each checked by its noise budget; one set
    of at least `minimum_cohort` clients is decrypted, once; a sum with any field beyond contributors × bound, or with
    less than four bits of noise budget, is withheld; then, and whenever it fails, the key is destroyed. It sees blinded
    ciphertexts and the sum of the blinds: with an aggregator that follows the protocol it learns the sum alone.

    A ciphertext crafted to show m slots of this round's key passes the range check by luck alone, with a probability of
    at most 4^−m (2 fields), 8^−m (3 fields); any other result aborts the round and destroys the key, and is the only
    answer that the attempt ever gets. The key has 4096 ternary coefficients, so that fewer than 155 slots of 42 bits
    cannot fix it.

    **After a crash** the key is gone; it was in memory alone. A restarted key holder makes another one for the same
    attempt, the latest that its journal knows, and everyone begins that anew. What it has once answered to the request
    for the sum stands in the journal before it leaves: afterwards the attempt's answer is the same sum over the same
    set, or nothing (`ReplayRefused`). An attempt that failed is over, also after a restart.
    """

    def __init__(self, *, session: Session, identity: Identity, roster: Roster, journal: Journal) -> None:
        self._index = roster.index_of(identity.member.secagg_key)
        self._layout = m.check_session(session, roster, self._index)
        self.phase = m.KEY
        self._session, self._identity, self._roster, self._journal = session, identity, roster, journal
        self._sid = m.session_id_of(session, roster, self._index, self._layout)
        self._answers = Answers(journal, self._sid)
        self._most = m.largest_message(session, self._layout)
        self._key: RoundKey | None = None
        # phase → the messages it may get there, each with what answers it
        self._steps: dict[str, dict[type[msgspec.Struct], Callable[[Any], msgspec.Struct]]] = {
            m.KEY: {m.KeyRequest: self._make_key},
            m.CLOSE: {m.CloseRequest: self._close},
            m.DELIVER: {m.Delivery: self._check, m.ReleaseRequest: self._release},
        }
        self._forget()

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
        received = self._read(message)
        if received.sid != self._sid:
            raise RemoteProtocolError("the server is in another session: its plan, model, roster or round differs")
        try:
            reply = self._answers.keep(message, encode(self._steps[self.phase][type(received)](received)))
        except BaseException as error:
            self.close()
            if isinstance(error, Exception):  # an interrupt is as good as a crash: the attempt may begin anew
                with suppress(Exception):  # the first error is the one to see; the high-water mark already stands
                    self._answers.finish()
            raise
        self.phase = _FOLLOWS[type(received)]
        if self.done:
            self._forget()
        return reply

    def close(self) -> None:
        """Destroys the key now: whatever it was for has ended or begins anew."""
        if not self.done:
            self.phase = m.FAILED
        self._forget()

    def _read(self, message: bytes) -> Any:
        *others, last = self._steps[self.phase]
        for kind in others:
            with suppress(RemoteProtocolError):
                return decode(message, kind, most=self._most)
        return decode(message, last, most=self._most)

    def _forget(self) -> None:
        """Destroys the key and drops the rest; also what a machine holds before it starts."""
        if self._key is not None:
            self._key.destroy()
            self._key = None
        self._th = b""
        self._expected: dict[int, bytes] = {}  # client → commitment, until its ciphertexts are here
        self._added: set[int] = set()

    def _make_key(self, request: m.KeyRequest) -> m.Key:
        if len(request.sealing_key) != keys.KEY_BYTES:
            raise RemoteProtocolError("a sealing key of the wrong size")
        session = self._session
        # The seed is not used, SEAL draws its own randomness; the mark is: no key for an attempt that is over.
        self._journal.begin(self._sid, session.run, session.round, session.attempt)
        self._key = RoundKey(self._layout.chunks)
        self._th = m.transcript(self._sid, request.sealing_key, self._key.public)
        return m.Key(sid=self._sid, public_key=self._key.public, signature=self._sign(self._th))

    def _close(self, request: m.CloseRequest) -> m.Closed:
        members = decode_indices(request.members)
        self._check_members(members)
        for client, record in zip(members, records(request.records, len(members), m.RECORD_BYTES), strict=True):
            committed = record[: m.COMMITMENT_BYTES]
            sealed, signature = record[m.COMMITMENT_BYTES : -keys.SIGNATURE_BYTES], record[-keys.SIGNATURE_BYTES :]
            statement = m.commitment_statement(self._th, client, committed, sealed, self._layout.chunks)
            keys.verify(self._roster.members[client].secagg_key, signature, statement)
            self._expected[client] = committed
        statement = m.closed_statement(self._th, request.members, b"".join(self._expected.values()))
        return m.Closed(sid=self._sid, signature=self._sign(statement))

    def _check(self, request: m.Delivery) -> m.Checked:
        members, size = decode_indices(request.members), self._layout.chunks * CHUNK_BYTES
        if not members or not set(members) <= set(self._expected) or len(request.chunks) != len(members) * size:
            raise RemoteProtocolError("a delivery must hold the ciphertexts of clients that have committed, once")
        refused = []
        for position, client in enumerate(members):
            chunks = request.chunks[position * size : (position + 1) * size]
            try:
                if m.commitment(self._th, client, chunks) != self._expected.pop(client):
                    raise RemoteProtocolError("other ciphertexts than it committed to")
                self._round_key.add(chunks)
                self._added.add(client)
            except RemoteProtocolError:  # this client's fault alone: the round goes on without it
                refused.append(client)
        return m.Checked(sid=self._sid, refused=encode_indices(tuple(refused)))

    def _release(self, request: m.ReleaseRequest) -> m.Release:
        members = decode_indices(request.members)
        if set(members) != self._added:
            raise RemoteProtocolError("the sum is asked for other clients than are in it")
        self._check_members(members)
        count = self._layout.chunks * SLOTS
        if len(request.blinds) != 8 * count:
            raise RemoteProtocolError("the sum of the blinds has the wrong size")
        blinds = np.frombuffer(request.blinds, dtype="<u8")
        if int(blinds.max()) >= PLAIN_MODULUS:
            raise RemoteProtocolError("the sum of the blinds is not reduced")

        # One decryption; whatever comes of it, the key is gone.
        session, total, withheld = self._session, b"", b""
        try:
            slots = self._round_key.decrypt()
            slots -= blinds.astype(np.int64)
            values = unpack(balanced(slots), self._layout, limit=len(members) * session.bound)
            words = to_residues(values, dim=session.dim, bound=len(members) * session.bound, bits=session.bits)
            total = bytes(pack(words, session.bits))
        except SumOutOfRange:
            withheld = m.OUT_OF_RANGE
        except NoiseTooHigh:
            withheld = m.NOISE
        answer = digest("heagg/1/released", total, withheld)
        try:
            self._journal.answer(self._sid, "release", digest("heagg/1/set", request.members), answer)
        except ReplayRefused:
            raise ReplayRefused("before a crash this attempt's answer was another set or sum; there is one") from None
        signature = self._sign(m.release_statement(self._th, request.members, total, withheld))
        return m.Release(sid=self._sid, total=total, withheld=withheld, signature=signature)

    @property
    def _round_key(self) -> RoundKey:
        if self._key is None:
            raise LocalProtocolError("there is no key in this phase")
        return self._key

    def _check_members(self, members: tuple[int, ...]) -> None:
        if not set(members).issubset(self._session.cohort) or len(members) < self._session.quorum:
            raise RemoteProtocolError(f"{self._session.quorum} clients of the cohort are due, got {len(members)}")

    def _sign(self, statement: bytes) -> bytes:
        return keys.sign(self._identity.secagg_private, statement)


_FOLLOWS: dict[type[msgspec.Struct], str] = {
    m.KeyRequest: m.CLOSE,
    m.CloseRequest: m.DELIVER,
    m.Delivery: m.DELIVER,
    m.ReleaseRequest: m.DONE,
}
"""The whole order of a session: what was answered → what is due then."""
