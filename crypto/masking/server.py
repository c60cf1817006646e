"""The server of `secagg/1`: relays keys and sealed shares, adds masked inputs as they come, removes the masks last."""

import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from .. import keys, merkle, shamir
from ..aggregation import AggregationResult, Session, session_id, signed_total
from ..errors import FaultyDealer, LocalProtocolError, RemoteProtocolError, ThresholdNotMet
from ..graph import Graph, build
from ..packing import add_packed, residues_in
from ..prg import Entropy, add_masks
from ..roster import Roster
from ..wire import decode, decode_indices, encode, encode_indices, records
from . import messages as m


@dataclass(kw_only=True, slots=True)
class _Dealing:
    """What the server keeps of one client's `Deal`; lists are in neighbour order, boxes only until they are sent."""

    commitment: bytes
    signature: bytes
    hashes: list[bytes]
    boxes: list[bytes]
    tree: list[list[bytes]]


class MaskedServer:
    """One attempt, server side (Bonawitz et al. 2017, Figure 4). See `AggregationServer` for the methods.

    Args:
        session: what it asks for; every client computes its own and a difference ends the talk.
        roster: public keys of the clients.
        threads: coefficient ranges unmasked at once; above 1 pays only where cores are idle.
        verify: checks signatures; another than the default only where one process plays all clients.
        entropy: system entropy; a test may inject its own.

    Raises:
        ValueError: a session in which masks would protect nobody.

    **Guarantees**: ends with the exact sum over `contributors`, or a typed error and no sum. A bad reply changes
    nothing. A bad share is named by the hash its dealer signed, a bad dealer by its commitment or advertised key.
    Memory for inputs is one vector, however many come. Not promised: detection of a false but in-range input.
    """

    def __init__(
        self,
        *,
        session: Session,
        roster: Roster,
        threads: int = 1,
        verify: keys.Verify = keys.verify,
        entropy: Entropy = secrets.token_bytes,
    ) -> None:
        m.check_session(session, roster)
        self.phase = "ready"
        self._waiting: set[int] = set()
        self._session, self._roster = session, roster
        self._sid = session_id(session, roster.hash)
        self._threads, self._verify_signature = threads, verify
        self._key = keys.ExchangeKey(entropy(keys.KEY_BYTES))  # for authentication only; see `messages.input_key`
        self._most = m.largest_message(session)
        self._steps: dict[
            str, tuple[type[msgspec.Struct], Callable[[int, Any, bytes], None], Callable[[], dict[int, bytes]]]
        ] = {
            m.ADVERTISE: (m.Advertise, self._take_advertisement, self._send_members),
            m.SHARE: (m.Deal, self._take_deal, self._send_deliveries),
            m.MASK: (m.MaskedInput, self._take_masked_input, self._send_survivors),
            m.CONSISTENCY: (m.Consent, self._take_consent, self._send_consents),
            m.UNMASK: (m.Shares, self._take_shares, self._finish),
        }
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
        self.phase, self._waiting = m.ADVERTISE, set(self._session.cohort)
        return {client: encode(m.Start(sid=self._sid)) for client in self._session.cohort}

    def receive(self, client: int, message: bytes) -> None:
        if self.phase not in self._steps:
            raise LocalProtocolError(f"receive() in phase {self.phase}")
        if client not in self._waiting:
            raise RemoteProtocolError(f"client {client} was not asked in phase {self.phase} or has answered")
        kind, take, _ = self._steps[self.phase]
        received = decode(message, kind, most=self._most)
        if received.sid != self._sid:  # type: ignore[attr-defined]  # every message of this protocol starts with sid
            raise RemoteProtocolError(f"client {client} is in another session")
        take(client, received, message)
        self._waiting.remove(client)

    def close_phase(self) -> dict[int, bytes]:
        if self.phase not in self._steps:
            raise LocalProtocolError(f"close_phase() in phase {self.phase}")
        stage, answered = self.phase, self._answered()
        self._dropped[stage] = tuple(sorted(self._waiting))
        self._waiting = set()
        try:
            if self._complaints:
                raise FaultyDealer(stage=stage, accusers={d: tuple(sorted(by)) for d, by in self._complaints.items()})
            if len(answered) < self._needed(stage):
                raise ThresholdNotMet(stage=stage, needed=self._needed(stage), have=len(answered))
            requests = self._steps[stage][2]()
        except BaseException:
            self.phase = m.FAILED
            self._forget()
            raise
        self.phase, self._waiting = m.FOLLOWS[stage], set(requests)
        return requests

    def _forget(self) -> None:
        """Drops everything gathered; also what a machine holds before it starts."""
        self._th = self._dealers_bytes = self._view = b""
        self._advertisements: dict[int, tuple[bytes, m.Advertise]] = {}
        self._advertised: set[bytes] = set()
        self._input_secrets: dict[int, bytes] = {}  # client → what the key of its input's tag comes from
        self._graph = Graph((), None)
        self._deals: dict[int, _Dealing] = {}
        self._dealers: tuple[int, ...] = ()
        self._complaints: dict[int, set[int]] = {}
        self._survivors: tuple[int, ...] = ()
        self._inputs: set[int] = set()
        self._consents: dict[int, bytes] = {}
        self._shares: dict[int, dict[int, bytes]] = {}  # holder → dealer → its one share
        # The sum's own memory holds the residues until it is decoded: pages are slow to come by, and model-sized.
        self._total = np.zeros(self._session.dim, dtype=np.int64)
        self._residues = residues_in(self._total, self._session.bits)

    def _answered(self) -> tuple[int, ...]:
        """Who has answered the current phase validly; a complaint is not an input."""
        gathered: dict[str, Collection[int]] = {
            m.ADVERTISE: self._advertisements,
            m.SHARE: self._deals,
            m.MASK: self._inputs,
            m.CONSISTENCY: self._consents,
            m.UNMASK: self._shares,
        }
        return tuple(sorted(gathered[self.phase]))

    def _needed(self, stage: str) -> int:
        if stage == m.CONSISTENCY:
            return self._view_quorum()
        return self._session.threshold if stage == m.UNMASK else self._session.quorum

    def _view_quorum(self) -> int:
        return m.view_quorum(len(self._graph.ring), self._session.colluders)

    def _verify(self, client: int, signature: bytes, statement: bytes) -> None:
        self._verify_signature(self._roster.members[client].secagg_key, signature, statement)

    # Each _take_* checks everything before it stores anything, so that a bad reply leaves no trace.

    def _take_advertisement(self, client: int, reply: m.Advertise, message: bytes) -> None:
        self._verify(client, reply.signature, m.advertise_statement(self._sid, client, reply.mask_key, reply.box_key))
        offered = (reply.mask_key, reply.box_key)
        if reply.mask_key == reply.box_key or not self._advertised.isdisjoint(offered):
            raise RemoteProtocolError(f"client {client} advertised a key that is taken")
        # Any private key shows a public one of low order: it gives zero with all of them (RFC 7748 §6.1).
        self._key.agree(reply.mask_key)
        self._input_secrets[client] = self._key.agree(reply.box_key)
        self._advertisements[client] = (message, reply)
        self._advertised.update(offered)

    def _send_members(self) -> dict[int, bytes]:
        members = self._answered()
        received = [self._advertisements[member][0] for member in members]
        self._th = m.transcript(self._sid, self._key.public, members, received)
        self._graph = build(members, degree=self._session.degree, th=self._th)
        request = m.Members(
            sid=self._sid,
            server_key=self._key.public,
            members=encode_indices(members),
            advertisements=b"".join(received),
        )
        return dict.fromkeys(members, encode(request))

    def _take_deal(self, client: int, reply: m.Deal, message: bytes) -> None:
        hashes = records(reply.hashes, self._graph.size, m.HASH_PAIR_BYTES)
        boxes = records(reply.boxes, self._graph.size - 1, m.BOX_BYTES)
        if len(reply.commitment) != m.COMMITMENT_BYTES:
            raise RemoteProtocolError(f"client {client} sent a commitment of the wrong size")
        boxes.insert(self._graph.position(client, client), b"")  # none is sent for the dealer itself
        tree = merkle.tree([m.leaf(pair, box) for pair, box in zip(hashes, boxes, strict=True)])
        statement = m.deal_statement(self._sid, self._th, client, reply.commitment, tree[-1][0])
        self._verify(client, reply.signature, statement)
        self._deals[client] = _Dealing(
            commitment=reply.commitment, signature=reply.signature, hashes=hashes, boxes=boxes, tree=tree
        )

    def _send_deliveries(self) -> dict[int, bytes]:
        self._dealers = self._answered()
        self._dealers_bytes = encode_indices(self._dealers)
        requests = {
            holder: encode(
                m.Delivery(
                    sid=self._sid,
                    dealers=self._dealers_bytes,
                    dealings=b"".join(
                        self._dealing(dealer, holder)
                        for dealer in self._graph.neighbours(holder)
                        if dealer in self._deals and dealer != holder
                    ),
                )
            )
            for holder in self._dealers
        }
        for deal in self._deals.values():
            deal.boxes, deal.tree = [], []
        return requests

    def _dealing(self, dealer: int, holder: int) -> bytes:
        """What `holder` gets of the dealer's `Deal`: its own part and the proof that the dealer signed it."""
        deal, position = self._deals[dealer], self._graph.position(dealer, holder)
        return b"".join(
            (
                deal.commitment,
                deal.signature,
                deal.hashes[position],
                merkle.path(deal.tree, position),
                deal.boxes[position],
            )
        )

    def _take_masked_input(self, client: int, reply: m.MaskedInput, message: bytes) -> None:
        if reply.complaints:
            statement = m.complaint_statement(self._sid, self._th, client, self._dealers_bytes, reply.complaints)
            self._verify(client, reply.proof, statement)
            accused = decode_indices(reply.complaints)
            possible = (set(self._graph.neighbours(client)) & set(self._dealers)) - {client}
            if reply.masked or not possible.issuperset(accused):
                raise RemoteProtocolError(f"client {client} sent a complaint that no honest client sends")
            for dealer in accused:
                self._complaints.setdefault(dealer, set()).add(client)
            return
        key = m.input_key(self._input_secrets[client], self._th, client, self._dealers_bytes)
        keys.check_one_time_tag(key, reply.proof, reply.masked)
        add_packed(self._residues, reply.masked, self._session.bits)
        self._inputs.add(client)

    def _send_survivors(self) -> dict[int, bytes]:
        self._survivors = self._answered()
        survivors = encode_indices(self._survivors)
        self._view = m.consent_statement(self._sid, self._th, self._dealers_bytes, survivors)
        return dict.fromkeys(self._survivors, encode(m.Survivors(sid=self._sid, survivors=survivors)))

    def _take_consent(self, client: int, reply: m.Consent, message: bytes) -> None:
        self._verify(client, reply.signature, self._view)
        self._consents[client] = reply.signature

    def _send_consents(self) -> dict[int, bytes]:
        # No more than each client must check: a signature costs it more than the masks of a small model.
        consented = self._answered()
        signers = consented[: self._view_quorum()]
        request = m.Reveal(
            sid=self._sid,
            signers=encode_indices(signers),
            signatures=b"".join(self._consents[signer] for signer in signers),
        )
        return dict.fromkeys(consented, encode(request))

    def _take_shares(self, client: int, reply: m.Shares, message: bytes) -> None:
        dealers = [dealer for dealer in self._graph.neighbours(client) if dealer in self._deals]
        kept = [dealer for dealer in dealers if dealer in self._inputs]
        gone = [dealer for dealer in dealers if dealer not in self._inputs]
        self_masks = records(reply.self_mask, len(kept), shamir.SHARE_BYTES)
        mask_keys = records(reply.mask_key, len(gone), shamir.SHARE_BYTES)
        for dealer, share in zip(kept, self_masks, strict=True):
            self._check_share(dealer, client, m.SELF_MASK, share, slice(None, m.HASH_BYTES))
        for dealer, share in zip(gone, mask_keys, strict=True):
            self._check_share(dealer, client, m.MASK_KEY, share, slice(m.HASH_BYTES, None))
        self._shares[client] = dict(zip(kept + gone, self_masks + mask_keys, strict=True))

    def _check_share(self, dealer: int, holder: int, kind: bytes, share: bytes, which: slice) -> None:
        signed = self._deals[dealer].hashes[self._graph.position(dealer, holder)][which]
        if m.share_hash(self._sid, kind, dealer, holder, share) != signed:
            raise RemoteProtocolError(f"client {holder} sent a share of dealer {dealer} that is not the one dealt")

    def _finish(self) -> dict[int, bytes]:
        """Recovers b of every survivor and the mask key of everyone who went, checks both, removes their masks."""
        plus: list[bytes] = []
        minus: list[bytes] = []
        for dealer, secret in self._recover().items():
            if dealer in self._inputs:
                if m.self_mask_commitment(self._sid, dealer, secret) != self._deals[dealer].commitment:
                    raise FaultyDealer(stage=m.UNMASK, accusers={dealer: ()})
                minus.append(m.self_mask_key(secret, self._th))
                continue
            key = keys.ExchangeKey(secret)
            if key.public != self._advertisements[dealer][1].mask_key:
                raise FaultyDealer(stage=m.UNMASK, accusers={dealer: ()})
            # What its surviving neighbours added for it is still in the sum: its own, opposite masks never came.
            for survivor in self._graph.neighbours(dealer):
                if survivor in self._inputs:
                    shared = key.agree(self._advertisements[survivor][1].mask_key)
                    mask = m.pair_mask_key(shared, self._th, dealer, survivor)
                    (minus if survivor > dealer else plus).append(mask)
        add_masks(self._residues, plus=plus, minus=minus, threads=self._threads)
        total = signed_total(self._residues, self._session, len(self._survivors), into=self._total)
        self._result = AggregationResult(total=total, contributors=self._survivors, dropped=dict(self._dropped))
        self._forget()
        return {}

    def _recover(self) -> dict[int, bytes]:
        """Every dealer's one secret, from t of its holders."""
        threshold = self._session.threshold
        holders = {
            dealer: tuple(holder for holder in self._graph.neighbours(dealer) if holder in self._shares)[:threshold]
            for dealer in self._dealers
        }
        fewest = min(map(len, holders.values()))
        if fewest < threshold:
            raise ThresholdNotMet(stage=m.UNMASK, needed=threshold, have=fewest)
        weights = {group: shamir.weights_at_zero([holder + 1 for holder in group]) for group in set(holders.values())}
        return {dealer: self._combine(dealer, group, weights[group]) for dealer, group in holders.items()}

    def _combine(self, dealer: int, holders: tuple[int, ...], weights: shamir.Limbs) -> bytes:
        try:
            # Every share has its signed hash: if together they give no secret, the dealer dealt them so.
            shares = shamir.decode_shares([self._shares[holder][dealer] for holder in holders])
            return shamir.from_limbs(shamir.combine(shares, weights=weights))
        except ValueError:
            raise FaultyDealer(stage=m.UNMASK, accusers={dealer: ()}) from None
