"""The client of `secagg/1`: five messages in, five out, and an input that leaves at most once."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from .. import keys, merkle, shamir
from ..aggregation import Session, VectorSource, session_id
from ..errors import LocalProtocolError, RemoteProtocolError
from ..graph import Graph, build
from ..journal import Answers, Journal
from ..packing import encode as to_residues
from ..packing import pack
from ..prg import Entropy, add_masks, expand
from ..roster import Identity, Roster
from ..wire import decode, decode_indices, encode, encode_indices, records
from . import messages as m
from .suspended import Suspended


class MaskedClient:
    """One client in one attempt (Bonawitz et al. 2017, Figure 4). See `AggregationClient` for the methods.

    Args:
        session: as this client received it, checked by the caller against the site's policy.
        identity: this site's long-term keys; its index is found in the roster.
        roster: the pinned roster.
        vector: the input, asked for once, after every check of the step that sends it. Exceptions from it propagate
            unchanged and leave the machine failed.
        journal: durable memory. All of the session's entropy is expanded from its seed.
        threads: coefficient ranges masked at once; above 1 pays only where cores are idle.
        verify: checks signatures; another than the default only where one process plays all clients.

    Raises:
        ValueError: a session that would protect nobody, or one this identity is not part of.

    **Guarantees**, for an honest client whose pinned roster is right and whose journal is not rolled back: against a
    malicious server with at most `colluders` clients (and fewer than `threshold`), at most one sum that includes
    this input can be learnt, over at least `minimum_cohort` clients that signed the same view. Not promised: that
    the others' inputs are honest, nor anything about what the sum itself reveals.

    A message of another session or step, or one that does not parse, is refused and changes nothing. A message of this
    step that fails a check shows a cheating server: the machine fails and its secrets are dropped (Python cannot
    promise that their memory is overwritten).
    """

    def __init__(
        self,
        *,
        session: Session,
        identity: Identity,
        roster: Roster,
        vector: VectorSource,
        journal: Journal,
        threads: int = 1,
        verify: keys.Verify = keys.verify,
    ) -> None:
        m.check_session(session, roster)
        self._index = roster.index_of(identity.member.secagg_key)
        if not session.invites(self._index):
            raise ValueError(f"client {self._index} is not in the cohort {session.cohort}")
        self.phase = m.ADVERTISE
        self._session, self._roster = session, roster
        self._signing_key = keys.SigningKey(identity.secagg_private)
        self._sid = session_id(session, roster.hash)
        self._vector, self._journal = vector, journal
        self._threads, self._verify = threads, verify
        self._answers = Answers(journal, self._sid)
        self._most = m.largest_message(session)
        self._steps: dict[str, tuple[type[msgspec.Struct], Callable[[Any], msgspec.Struct]]] = {
            m.ADVERTISE: (m.Start, self._advertise),
            m.SHARE: (m.Members, self._deal),
            m.MASK: (m.Delivery, self._mask),
            m.CONSISTENCY: (m.Survivors, self._consent),
            m.UNMASK: (m.Reveal, self._reveal),
        }
        self._complained = False
        self.summed: tuple[int, ...] = ()
        """Whose inputs the sum holds, once enough of them have signed so; empty before."""
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
        kind, step = self._steps[self.phase]
        received = decode(message, kind, most=self._most)
        if received.sid != self._sid:  # type: ignore[attr-defined]  # every message of this protocol starts with sid
            raise RemoteProtocolError("the server is in another session: its plan, model, roster or round differs")
        try:
            answer = step(received)
            reply = self._answers.record(self.phase, message, encode(answer), self._fingerprint(answer))
            # A complaint voids the attempt: nothing of it may be answered any more.
            following = m.DONE if self._complained else m.FOLLOWS[self.phase]
            if following == m.DONE:
                self._answers.finish()
        except BaseException:
            self.phase = m.FAILED
            self._forget()
            with suppress(Exception):  # the first error is the one to see; the high-water mark already stands
                self._answers.finish()
            raise
        self.phase = following
        if self.done:
            self._forget()
        return reply

    def _forget(self) -> None:
        """Drops everything secret; also what a machine holds before it starts."""
        self._seed = self._self_mask = self._th = self._input_secret = b""
        self._advertisement = self._dealers_bytes = self._survivors_bytes = self._consent_signature = b""
        self._keys: dict[str, keys.ExchangeKey] = {}
        self._graph = Graph((), None)
        self._members: tuple[int, ...] = ()
        self._dealers: tuple[int, ...] = ()
        self._survivors: tuple[int, ...] = ()
        self._mask_keys: dict[int, bytes] = {}  # neighbour → its public keys
        self._box_public: dict[int, bytes] = {}
        self._box_keys: dict[int, dict[int, bytes]] = {}  # neighbour → dealer of the two → key of its box
        self._held: dict[int, tuple[bytes, bytes]] = {}  # dealer → its b-share and its mask-key share

    def suspend(self) -> bytes:
        """What a new machine of this session needs to go on from here, in another process.

        It holds shares of other clients' secrets: seal it, and keep it no longer than the session. What follows from
        the journal's seed is not in it. The last answer is not either: a machine that goes on repeats none.

        Raises:
            LocalProtocolError: it has failed: there is nothing to go on with.
        """
        if self.phase == m.FAILED:
            raise LocalProtocolError("this machine has failed; make a new one for a new attempt")
        return Suspended(
            sid=self._sid,
            phase=self.phase,
            summed=self.summed,
            advertisement=self._advertisement,
            th=self._th,
            input_secret=self._input_secret,
            members=self._members,
            mask_keys=self._mask_keys,
            box_public=self._box_public,
            dealers=self._dealers_bytes,
            survivors=self._survivors_bytes,
            consent_signature=self._consent_signature,
            held={dealer: b"".join(halves) for dealer, halves in self._held.items()},
        ).to_bytes()

    def resume(self, suspended: bytes) -> None:
        """Have a machine that has done nothing yet go on where `suspend` left another one.

        Raises:
            LocalProtocolError: this one is no longer new, or the state is of another session or none.
            ReplayRefused: the journal has moved on: the session is over, or a later one has begun.
        """
        if self.phase != m.ADVERTISE or self._seed:
            raise LocalProtocolError("only a new machine can go on with what another one left")
        state = Suspended.from_bytes(suspended)
        if state.sid != self._sid:
            raise LocalProtocolError("the suspended machine is of another session")
        if state.phase in (m.SHARE, m.MASK, m.CONSISTENCY, m.UNMASK):
            session = self._session
            self._seed = self._journal.begin(self._sid, session.run, session.round, session.attempt)
            self._keys = {purpose: keys.ExchangeKey(self._private(purpose)) for purpose in ("mask key", "box key")}
            self._self_mask = b"" if state.phase == m.SHARE else self._entropy("self mask")(shamir.SECRET_BYTES)
            self._advertisement, self._input_secret, self._th = state.advertisement, state.input_secret, state.th
            if state.members:
                self._members = state.members
                self._graph = build(state.members, degree=session.degree, th=state.th)
            self._mask_keys, self._box_public = dict(state.mask_keys), dict(state.box_public)
            self._dealers_bytes, self._survivors_bytes = state.dealers, state.survivors
            self._dealers, self._survivors = decode_indices(state.dealers), decode_indices(state.survivors)
            self._consent_signature = state.consent_signature
            self._held = {dealer: _halves(pair) for dealer, pair in state.held.items()}
        self.phase, self.summed = state.phase, state.summed

    def _advertise(self, request: m.Start) -> m.Advertise:
        session, sid = self._session, self._sid
        self._seed = self._journal.begin(sid, session.run, session.round, session.attempt)
        self._keys = {purpose: keys.ExchangeKey(self._private(purpose)) for purpose in ("mask key", "box key")}
        mask_key, box_key = (key.public for key in self._keys.values())
        statement = m.advertise_statement(sid, self._index, mask_key, box_key)
        reply = m.Advertise(sid=sid, mask_key=mask_key, box_key=box_key, signature=self._sign(statement))
        self._advertisement = encode(reply)
        return reply

    def _deal(self, request: m.Members) -> m.Deal:
        # 1. Whose keys: a subset of the cohort, large enough, with this client's own keys unaltered in it.
        members = self._subset(request.members, of=self._session.cohort, what="members")
        advertisements = records(request.advertisements, len(members), m.ADVERTISEMENT_BYTES)
        if advertisements[members.index(self._index)] != self._advertisement:
            raise RemoteProtocolError("the server replaced this client's own keys")
        advertised = {
            member: self._check_advertisement(member, advertisement)
            for member, advertisement in zip(members, advertisements, strict=True)
        }
        if len({request.server_key, *(key for pair in advertised.values() for key in pair)}) != 2 * len(members) + 1:
            raise RemoteProtocolError("two of the advertised keys are the same")
        self._input_secret = self._keys["box key"].agree(request.server_key)
        self._th = m.transcript(self._sid, request.server_key, members, advertisements)
        self._members, self._graph = members, build(members, degree=self._session.degree, th=self._th)
        holders = self._graph.neighbours(self._index)
        self._mask_keys = {holder: advertised[holder][0] for holder in holders}
        self._box_public = {holder: advertised[holder][1] for holder in holders}

        # 2. Two secrets, split among the neighbours; one box for each but this client itself.
        self._self_mask = self._entropy("self mask")(shamir.SECRET_BYTES)
        pairs = self._split((self._self_mask, self._private("mask key")), holders)
        hashes = [self._hash_pair(self._index, holder, pair) for holder, pair in zip(holders, pairs, strict=True)]
        commitment = m.self_mask_commitment(self._sid, self._index, self._self_mask)
        boxes = [
            b"" if holder == self._index else self._seal(holder, pair, stated, commitment)
            for holder, pair, stated in zip(holders, pairs, hashes, strict=True)
        ]
        self._held[self._index] = _halves(pairs[holders.index(self._index)])

        # 3. One signature over all of it.
        root = merkle.tree([m.leaf(pair, box) for pair, box in zip(hashes, boxes, strict=True)])[-1][0]
        return m.Deal(
            sid=self._sid,
            commitment=commitment,
            hashes=b"".join(hashes),
            boxes=b"".join(boxes),
            signature=self._sign(m.deal_statement(self._sid, self._th, self._index, commitment, root)),
        )

    def _mask(self, request: m.Delivery) -> m.MaskedInput:
        dealers = self._subset(request.dealers, of=self._graph.ring, what="dealers")
        self._dealers, self._dealers_bytes = dealers, request.dealers
        present = set(dealers) - {self._index}
        others = [neighbour for neighbour in self._graph.neighbours(self._index) if neighbour in present]
        size = m.dealing_bytes(self._graph.size)
        complaints = []
        # 1. A box that opens to shares with the hashes it is bound to is the dealer's own word, and enough.
        for dealer, dealing in zip(others, records(request.dealings, len(others), size), strict=True):
            try:
                self._held[dealer] = self._open(dealer, dealing)
            except RemoteProtocolError:
                # 2. Otherwise somebody cheats: the dealer if it signed this, and is accused of it; else the server.
                self._check_signed(dealer, dealing)
                complaints.append(dealer)
        if complaints:
            self._complained = True
            return self._complain(encode_indices(tuple(sorted(complaints))))
        if len(self._held) < self._session.threshold:
            raise RemoteProtocolError("fewer shares than the threshold were delivered")

        # 3. y = x + PRG(b) + Σ ± PRG(s_ij) modulo 2^w, + where i > j. From here on only the input itself can fail.
        session, mine = self._session, self._keys["mask key"]
        pair_keys = {
            other: m.pair_mask_key(mine.agree(self._mask_keys[other]), self._th, self._index, other) for other in others
        }
        words = to_residues(self._vector(), dim=session.dim, bound=session.bound, bits=session.bits)
        add_masks(
            words,
            plus=[
                m.self_mask_key(self._self_mask, self._th),
                *(key for other, key in pair_keys.items() if self._index > other),
            ],
            minus=[key for other, key in pair_keys.items() if self._index < other],
            threads=self._threads,
        )
        masked = pack(words, session.bits)
        key = m.input_key(self._input_secret, self._th, self._index, request.dealers)
        return m.MaskedInput(sid=self._sid, masked=masked, complaints=b"", proof=keys.one_time_tag(key, masked))

    def _consent(self, request: m.Survivors) -> m.Consent:
        survivors = self._subset(request.survivors, of=self._dealers, what="survivors")
        self._survivors, self._survivors_bytes = survivors, request.survivors
        self._consent_signature = self._sign(self._view())
        return m.Consent(sid=self._sid, signature=self._consent_signature)

    def _reveal(self, request: m.Reveal) -> m.Shares:
        signers, survivors = decode_indices(request.signers), set(self._survivors)
        quorum = m.view_quorum(len(self._graph.ring), self._session.colluders)
        if not set(signers) <= survivors or len(signers) < quorum:
            raise RemoteProtocolError(f"{quorum} survivors must have signed this view, got {len(signers)}")
        signatures, view = records(request.signatures, len(signers), keys.SIGNATURE_BYTES), self._view()
        for signer, signature in zip(signers, signatures, strict=True):
            if signer == self._index and signature == self._consent_signature:
                continue
            self._verify(self._roster.members[signer].secagg_key, signature, view)
        self.summed = self._survivors
        # One kind of share for each dealer, never both: both would open its input alone.
        dealers = [neighbour for neighbour in self._graph.neighbours(self._index) if neighbour in self._held]
        return m.Shares(
            sid=self._sid,
            self_mask=b"".join(self._held[dealer][0] for dealer in dealers if dealer in survivors),
            mask_key=b"".join(self._held[dealer][1] for dealer in dealers if dealer not in survivors),
        )

    def _entropy(self, label: str) -> Entropy:
        return expand(self._seed, session_id=self._sid, label=label)

    def _private(self, purpose: str) -> bytes:
        """An X25519 private key of this session: derived again when needed, so that its bytes are not kept."""
        return self._entropy(purpose)(keys.KEY_BYTES)

    def _sign(self, statement: bytes) -> bytes:
        return self._signing_key.sign(statement)

    def _subset(self, data: bytes, *, of: tuple[int, ...], what: str) -> tuple[int, ...]:
        """Checked indices: from `of`, this client among them, no fewer than the quorum."""
        indices = decode_indices(data)
        if not set(indices).issubset(of) or self._index not in indices:
            raise RemoteProtocolError(f"{what} must be of the step before and include this client")
        if len(indices) < self._session.quorum:
            raise RemoteProtocolError(f"{len(indices)} {what} are fewer than the {self._session.quorum} agreed on")
        return indices

    def _check_advertisement(self, member: int, advertisement: bytes) -> tuple[bytes, bytes]:
        """A member's mask and box keys, under its signature."""
        advertised = decode(advertisement, m.Advertise, most=m.ADVERTISEMENT_BYTES)
        if advertised.sid != self._sid:
            raise RemoteProtocolError("an advertisement is of another session")
        if member != self._index:  # its own has been compared byte for byte
            statement = m.advertise_statement(self._sid, member, advertised.mask_key, advertised.box_key)
            self._verify(self._roster.members[member].secagg_key, advertised.signature, statement)
        return advertised.mask_key, advertised.box_key

    def _split(self, secrets: tuple[bytes, bytes], holders: tuple[int, ...]) -> list[bytes]:
        """For each holder its share of the one secret and of the other."""
        shares = shamir.split(
            shamir.to_limbs(secrets),
            points=[holder + 1 for holder in holders],
            threshold=self._session.threshold,
            entropy=self._entropy("shares"),
        )
        return shamir.encode_shares(shares)

    def _hash_pair(self, dealer: int, holder: int, pair: bytes) -> bytes:
        self_mask, mask_key = _halves(pair)
        return m.share_hash(self._sid, m.SELF_MASK, dealer, holder, self_mask) + m.share_hash(
            self._sid, m.MASK_KEY, dealer, holder, mask_key
        )

    def _seal(self, holder: int, pair: bytes, hashes: bytes, commitment: bytes) -> bytes:
        key = self._box_key(self._index, holder)
        context = m.box_context(self._sid, self._th, self._index, holder, hashes, commitment)
        return keys.seal(key, pair, bound_to=context)

    def _box_key(self, dealer: int, other: int) -> bytes:
        """The key of the dealer's box, agreed once with the other for the box to it and the box from it."""
        if other not in self._box_keys:
            secret = self._keys["box key"].agree(self._box_public[other])
            self._box_keys[other] = m.box_keys(secret, self._th, self._index, other)
        return self._box_keys[other][dealer]

    def _open(self, dealer: int, dealing: bytes) -> tuple[bytes, bytes]:
        """The shares in a dealing. Raises RemoteProtocolError if they are not those their dealer states."""
        commitment, _, hashes, _, box = m.split_dealing(dealing)
        key = self._box_key(dealer, dealer)
        context = m.box_context(self._sid, self._th, dealer, self._index, hashes, commitment)
        pair = keys.open_sealed(key, box, bound_to=context)
        if self._hash_pair(dealer, self._index, pair) != hashes:
            raise RemoteProtocolError("a share is not the one its dealer signed")
        return _halves(pair)

    def _check_signed(self, dealer: int, dealing: bytes) -> None:
        """Returns only if the dealing is the dealer's, byte for byte. Asked only in doubt: signatures are slow."""
        commitment, signature, hashes, siblings, box = m.split_dealing(dealing)
        root = merkle.root_from_path(m.leaf(hashes, box), self._graph.position(dealer, self._index), siblings)
        statement = m.deal_statement(self._sid, self._th, dealer, commitment, root)
        self._verify(self._roster.members[dealer].secagg_key, signature, statement)

    def _complain(self, complaints: bytes) -> m.MaskedInput:
        proof = self._sign(m.complaint_statement(self._sid, self._th, self._index, self._dealers_bytes, complaints))
        return m.MaskedInput(sid=self._sid, masked=memoryview(b""), complaints=complaints, proof=proof)

    def _fingerprint(self, answer: msgspec.Struct) -> bytes | None:
        """What the journal keeps for a reply: its signature over all of it, or a tag where SHA-256 would take long.

        The tag of a masked input for the journal is under a key from the session's seed, which the server, that
        shares the key of the proof, does not know: nobody can aim at two vectors with one tag.
        """
        if isinstance(answer, m.MaskedInput) and answer.masked:
            return keys.one_time_tag(self._entropy("journal")(keys.KEY_BYTES), answer.masked) + answer.proof
        return answer.proof if isinstance(answer, m.MaskedInput) else getattr(answer, "signature", None)

    def _view(self) -> bytes:
        return m.consent_statement(self._sid, self._th, self._dealers_bytes, self._survivors_bytes)


def _halves(pair: bytes) -> tuple[bytes, bytes]:
    return pair[: shamir.SHARE_BYTES], pair[shamir.SHARE_BYTES :]
