"""The server of `secagg/1`: relays keys and sealed shares, adds masked inputs as they come, removes the masks last."""

from collections.abc import Callable, Collection
from typing import Any

import msgspec
import numpy as np

from .. import keys, merkle, shamir
from ..aggregation import AggregationResult, Session, session_id, signed_total
from ..errors import FaultyDealer, LocalProtocolError, RemoteProtocolError, ThresholdNotMet
from ..graph import neighbours
from ..packing import unpack
from ..prg import Masker, word_dtype
from ..roster import Roster
from ..wire import decode, decode_indices, encode, encode_indices, records
from . import messages as m

# Any scalar shows a low-order key: it gives zero with all of them (RFC 7748 §6.1).
_PROBE = b"\1" * keys.KEY_BYTES


class MaskedServer:
    """One attempt, server side (Bonawitz et al. 2017, Figure 4). See `AggregationServer` for the methods.

    Args:
        session: what it asks for; every client computes its own and a difference ends the talk.
        roster: public keys of the clients.

    Raises:
        ValueError: a session in which masks would protect nobody.

    **Guarantees**: ends with the exact sum over `contributors`, or a typed error and no sum. A bad reply changes
    nothing. A bad share is named by the hash its dealer signed, a bad dealer by its commitment or advertised key.
    Memory for inputs is one vector. Not promised: detection of a false but in-range input.
    """

    def __init__(self, *, session: Session, roster: Roster) -> None:
        m.check_session(session, roster)
        self.phase = "ready"
        self.waiting: frozenset[int] = frozenset()
        self._session, self._roster = session, roster
        self._sid = session_id(session, roster.hash)
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
        self.phase, self.waiting = m.ADVERTISE, frozenset(self._session.cohort)
        return {client: encode(m.Start(sid=self._sid)) for client in self._session.cohort}

    def receive(self, client: int, message: bytes) -> None:
        if self.phase not in self._steps:
            raise LocalProtocolError(f"receive() in phase {self.phase}")
        if client not in self.waiting:
            raise RemoteProtocolError(f"client {client} was not asked in phase {self.phase} or has answered")
        kind, take, _ = self._steps[self.phase]
        received = decode(message, kind, most=self._most)
        if received.sid != self._sid:  # type: ignore[attr-defined]  # every message of this protocol starts with sid
            raise RemoteProtocolError(f"client {client} is in another session")
        take(client, received, message)
        self.waiting -= {client}

    def close_phase(self) -> dict[int, bytes]:
        if self.phase not in self._steps:
            raise LocalProtocolError(f"close_phase() in phase {self.phase}")
        stage, answered = self.phase, self._answered()
        self._dropped[stage] = tuple(sorted(self.waiting))
        self.waiting = frozenset()
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
        self.phase, self.waiting = m.FOLLOWS[stage], frozenset(requests)
        return requests

    def _forget(self) -> None:
        """Drops everything gathered; also what a machine holds before it starts."""
        self._th = self._dealers_bytes = self._view = b""
        self._advertisements: dict[int, tuple[bytes, m.Advertise]] = {}
        self._members: tuple[int, ...] = ()
        self._deals: dict[int, m.Deal] = {}
        self._dealers: tuple[int, ...] = ()
        self._complaints: dict[int, set[int]] = {}
        self._survivors: tuple[int, ...] = ()
        self._inputs: set[int] = set()
        self._consents: dict[int, bytes] = {}
        self._shares: dict[int, dict[int, bytes]] = {}  # holder → dealer → its one share
        self._total = np.zeros(self._session.dim, dtype=word_dtype(self._session.bits))

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
            return m.view_quorum(len(self._members), self._session.colluders)
        return self._session.threshold if stage == m.UNMASK else self._session.quorum

    def _verify(self, client: int, signature: bytes, statement: bytes) -> None:
        keys.verify(self._roster.members[client].secagg_key, signature, statement)

    # Each _take_* checks everything before it stores anything, so that a bad reply leaves no trace.

    def _take_advertisement(self, client: int, reply: m.Advertise, message: bytes) -> None:
        self._verify(client, reply.signature, m.advertise_statement(self._sid, client, reply.mask_key, reply.box_key))
        taken = {key for _, other in self._advertisements.values() for key in (other.mask_key, other.box_key)}
        if reply.mask_key == reply.box_key or {reply.mask_key, reply.box_key} & taken:
            raise RemoteProtocolError(f"client {client} advertised a key that is taken")
        for key in (reply.mask_key, reply.box_key):
            keys.agree(_PROBE, key)
        self._advertisements[client] = (message, reply)

    def _send_members(self) -> dict[int, bytes]:
        self._members = self._answered()
        received = [self._advertisements[member][0] for member in self._members]
        self._th = m.transcript(self._sid, self._members, received)
        request = m.Members(sid=self._sid, members=encode_indices(self._members), advertisements=b"".join(received))
        return dict.fromkeys(self._members, encode(request))

    def _take_deal(self, client: int, reply: m.Deal, message: bytes) -> None:
        holders = neighbours(self._members, client)
        hashes = records(reply.hashes, len(holders), m.HASH_PAIR_BYTES)
        records(reply.boxes, len(holders) - 1, m.BOX_BYTES)
        if len(reply.commitment) != m.COMMITMENT_BYTES:
            raise RemoteProtocolError(f"client {client} sent a commitment of the wrong size")
        leaves = [m.leaf(pair, self._box(reply, client, holder)) for holder, pair in zip(holders, hashes, strict=True)]
        root = merkle.tree(leaves)[-1][0]
        self._verify(client, reply.signature, m.deal_statement(self._sid, self._th, client, reply.commitment, root))
        self._deals[client] = reply

    def _box(self, deal: m.Deal, dealer: int, holder: int) -> bytes:
        """The sealed box from dealer to holder; empty for the dealer itself, for whom none is sent."""
        if dealer == holder:
            return b""
        others = [other for other in neighbours(self._members, dealer) if other != dealer]
        start = others.index(holder) * m.BOX_BYTES
        return deal.boxes[start : start + m.BOX_BYTES]

    def _hash_pair(self, dealer: int, holder: int) -> bytes:
        start = neighbours(self._members, dealer).index(holder) * m.HASH_PAIR_BYTES
        return self._deals[dealer].hashes[start : start + m.HASH_PAIR_BYTES]

    def _send_deliveries(self) -> dict[int, bytes]:
        self._dealers = self._answered()
        self._dealers_bytes = encode_indices(self._dealers)
        dealings: dict[int, list[bytes]] = {holder: [] for holder in self._dealers}
        for dealer in self._dealers:
            deal, holders = self._deals[dealer], neighbours(self._members, dealer)
            boxes = {holder: self._box(deal, dealer, holder) for holder in holders}
            levels = merkle.tree([m.leaf(self._hash_pair(dealer, holder), boxes[holder]) for holder in holders])
            for position, holder in enumerate(holders):
                if holder in dealings and holder != dealer:
                    dealings[holder].append(
                        deal.commitment
                        + deal.signature
                        + self._hash_pair(dealer, holder)
                        + merkle.path(levels, position)
                        + boxes[holder]
                    )
        return {
            holder: encode(m.Delivery(sid=self._sid, dealers=self._dealers_bytes, dealings=b"".join(parts)))
            for holder, parts in dealings.items()
        }

    def _take_masked_input(self, client: int, reply: m.MaskedInput, message: bytes) -> None:
        statement = m.masked_statement(self._sid, self._th, client, self._dealers_bytes, reply.masked, reply.complaints)
        self._verify(client, reply.signature, statement)
        if reply.complaints:
            accused = decode_indices(reply.complaints)
            if reply.masked or client in accused or not set(accused) <= set(self._dealers):
                raise RemoteProtocolError(f"client {client} sent a complaint that no honest client sends")
            for dealer in accused:
                self._complaints.setdefault(dealer, set()).add(client)
            return
        self._total += unpack(reply.masked, dim=self._session.dim, bits=self._session.bits)
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
        signers = self._answered()
        request = m.Reveal(
            sid=self._sid,
            signers=encode_indices(signers),
            signatures=b"".join(self._consents[signer] for signer in signers),
        )
        return dict.fromkeys(signers, encode(request))

    def _take_shares(self, client: int, reply: m.Shares, message: bytes) -> None:
        gone = [dealer for dealer in self._dealers if dealer not in self._inputs]
        shares = dict(
            zip(self._survivors, records(reply.self_mask, len(self._survivors), shamir.SHARE_BYTES), strict=True)
        )
        shares |= zip(gone, records(reply.mask_key, len(gone), shamir.SHARE_BYTES), strict=True)
        for dealer, share in shares.items():
            pair = self._hash_pair(dealer, client)
            if dealer in self._inputs:
                kind, signed = m.SELF_MASK, pair[: m.HASH_BYTES]
            else:
                kind, signed = m.MASK_KEY, pair[m.HASH_BYTES :]
            if m.share_hash(self._sid, kind, dealer, client, share) != signed:
                raise RemoteProtocolError(f"client {client} sent a share of dealer {dealer} that is not the one dealt")
        self._shares[client] = shares

    def _finish(self) -> dict[int, bytes]:
        """Recovers b of every survivor and the mask key of everyone who went, checks both, removes their masks."""
        holders = self._answered()[: self._session.threshold]
        masker = Masker()
        for dealer in self._dealers:
            secret = self._recover(dealer, holders)
            if dealer in self._inputs:
                if m.self_mask_commitment(self._sid, dealer, secret) != self._deals[dealer].commitment:
                    raise FaultyDealer(stage=m.UNMASK, accusers={dealer: ()})
                masker.subtract(self._total, m.self_mask_key(secret, self._th))
            else:
                if keys.exchange_public_key(secret) != self._advertisements[dealer][1].mask_key:
                    raise FaultyDealer(stage=m.UNMASK, accusers={dealer: ()})
                self._remove_pair_masks(masker, dealer, secret)
        total = signed_total(self._total, self._session, len(self._survivors))
        self._result = AggregationResult(total=total, contributors=self._survivors, dropped=dict(self._dropped))
        self._forget()
        return {}

    def _recover(self, dealer: int, holders: tuple[int, ...]) -> bytes:
        try:
            # Every share has its signed hash: if together they give no secret, the dealer dealt them so.
            shares = np.stack([shamir.decode_share(self._shares[holder][dealer]) for holder in holders])
            return shamir.from_limbs(shamir.combine(shares, points=[holder + 1 for holder in holders]))
        except ValueError:
            raise FaultyDealer(stage=m.UNMASK, accusers={dealer: ()}) from None

    def _remove_pair_masks(self, masker: Masker, gone: int, mask_private: bytes) -> None:
        """Removes from the sum what the survivors added for a client whose own, opposite masks never came."""
        for survivor in self._survivors:
            secret = keys.agree(mask_private, self._advertisements[survivor][1].mask_key)
            key = m.pair_mask_key(secret, self._th, gone, survivor)
            if survivor > gone:
                masker.subtract(self._total, key)
            else:
                masker.add(self._total, key)
