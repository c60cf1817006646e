"""Everything a cheating server, a cheating client or a broken wire may try."""

import gc
import subprocess
import sys
from hashlib import sha256
from typing import Any

import msgspec
import numpy as np
import pytest

from privfed.crypto import keys, merkle
from privfed.crypto.errors import FaultyDealer, LocalProtocolError, RemoteProtocolError, ThresholdNotMet
from privfed.crypto.journal import MemoryJournal
from privfed.crypto.masking import messages as m
from privfed.crypto.masking.client import MaskedClient
from privfed.crypto.masking.server import MaskedServer
from privfed.crypto.roster import Identity
from privfed.crypto.wire import decode, encode, encode_indices

from .consortium import IDENTITIES, ROSTER, Wire, make_inputs, make_session, masked_client, masked_round, stream

SESSION = make_session(range(4), dim=3)
INPUTS = make_inputs(SESSION)
MOST = 10**6


def honest_log() -> dict[tuple[str, int], tuple[bytes, bytes]]:
    wire = Wire(*masked_round(SESSION, INPUTS))
    wire.run()
    return {(phase, client): (sent, reply) for phase, client, sent, reply in wire.log}


LOG = honest_log()
PHASES = list(m.FOLLOWS)


def client_before(phase: str, index: int = 0) -> MaskedClient:
    client = masked_client(SESSION, index, INPUTS[index])
    for earlier in PHASES[: PHASES.index(phase)]:
        client.receive(LOG[earlier, index][0])
    return client


def server_before(phase: str) -> MaskedServer:
    server, _ = masked_round(SESSION, {})
    server.start()
    for earlier in PHASES[: PHASES.index(phase)]:
        for index in SESSION.cohort:
            server.receive(index, LOG[earlier, index][1])
        server.close_phase()
    return server


def test_the_transcript_of_a_whole_round_is_frozen() -> None:
    state = sha256()
    for key in sorted(LOG, key=lambda key: (PHASES.index(key[0]), key[1])):
        for message in LOG[key]:
            state.update(len(message).to_bytes(4, "big") + message)
    assert state.hexdigest() == FROZEN, "the wire form changed: raise the protocol's version"


FROZEN = "d6e1c35c24b1b071d9dd3c285e67be20b515e322daf397dc68d6dfb877ce0c82"


@pytest.mark.parametrize("phase", PHASES)
def test_a_reply_altered_at_any_byte_is_refused_and_leaves_no_trace(phase: str) -> None:
    server = server_before(phase)
    reply = LOG[phase, 1][1]
    for position in range(len(reply)):
        altered = bytearray(reply)
        altered[position] ^= 1 << position % 8
        with pytest.raises(RemoteProtocolError):
            server.receive(1, bytes(altered))
    for altered_reply in (b"", reply[:-1], reply + b"\0", reply * 2, b"\xdd\xff\xff\xff\xff", b"\x91" * 5000):
        with pytest.raises(RemoteProtocolError):
            server.receive(1, altered_reply)
    for other in PHASES:
        if other != phase:
            with pytest.raises(RemoteProtocolError):
                server.receive(1, LOG[other, 1][1])
    for client in (0, 2, 3, 1):
        server.receive(client, LOG[phase, client][1])
    server.close_phase()
    while not server.done:
        for client in SESSION.cohort:
            server.receive(client, LOG[server.phase, client][1])
        server.close_phase()
    assert np.array_equal(server.result.total, sum(INPUTS.values()))


@pytest.mark.parametrize("phase", PHASES)
def test_a_request_altered_at_any_byte_is_refused(phase: str) -> None:
    request = LOG[phase, 0][0]
    client = client_before(phase)
    for position in range(len(request)):
        altered = bytearray(request)
        altered[position] ^= 1 << position % 8
        if client.phase == m.FAILED:
            client = client_before(phase)
        if phase == m.SHARE and is_server_key(request, position):
            # A client cannot tell; its signature can: see the test of a key put in between.
            with pytest.raises(RemoteProtocolError, match="signature"):
                server_before(m.SHARE).receive(0, client.receive(bytes(altered)))
            client = client_before(phase)
            continue
        if phase == m.MASK and is_evidence(request, position):
            # Needed only against a dealer whose box does not open: without it nothing changes, see the test below.
            assert client.receive(bytes(altered)) == LOG[phase, 0][1]
            client = client_before(phase)
            continue
        with pytest.raises(RemoteProtocolError):
            client.receive(bytes(altered))


def is_server_key(request: bytes, position: int) -> bool:
    """Whether this byte of a member list is of the server's key."""
    at = request.index(decode(request, m.Members, most=MOST).server_key)
    return at <= position < at + keys.KEY_BYTES


def test_a_server_key_put_in_between_is_refused_by_the_server() -> None:
    # Whoever stands between knows its own key, would know the tag's key with client 0, and gets no further.
    mine = keys.ExchangeKey(b"\5" * 32)
    request = decode(LOG[m.SHARE, 0][0], m.Members, most=MOST)
    deal = client_before(m.SHARE).receive(encode(msgspec.structs.replace(request, server_key=mine.public)))
    with pytest.raises(RemoteProtocolError, match="signature"):
        server_before(m.SHARE).receive(0, deal)
    for taken in (bytes(32), request.advertisements[-64 - 2 - 32 : -64 - 2], b"short"):  # low order, a peer's box key
        with pytest.raises(RemoteProtocolError):
            client_before(m.SHARE).receive(encode(msgspec.structs.replace(request, server_key=taken)))


def test_no_other_input_is_accepted_for_a_client() -> None:
    honest = decode(LOG[m.MASK, 1][1], m.MaskedInput, most=MOST)
    other = decode(LOG[m.MASK, 2][1], m.MaskedInput, most=MOST)
    secret, server = bytes(32), server_before(m.MASK)
    forged = keys.one_time_tag(m.input_key(secret, server._th, 1, server._dealers_bytes), other.masked)
    # Another client's whole input, its vector under this client's tag, and tags under keys that others can derive.
    for proof in (other.proof, honest.proof, forged, b"", honest.proof[:-1], honest.proof + b"\0"):
        with pytest.raises(RemoteProtocolError, match="tag"):
            server.receive(1, encode(msgspec.structs.replace(other, proof=proof)))
    # The right key over another view of U2 is another key.
    key = m.input_key(server._input_secrets[1], server._th, 1, server._dealers_bytes[:-4])
    with pytest.raises(RemoteProtocolError, match="tag"):
        server.receive(1, encode(msgspec.structs.replace(honest, proof=keys.one_time_tag(key, honest.masked))))
    server.receive(1, LOG[m.MASK, 1][1])


def is_evidence(request: bytes, position: int) -> bool:
    """Whether this byte of a delivery is of a dealer's signature or tree path."""
    size = m.dealing_bytes(4)
    start = len(request) - 3 * size
    if position < start:
        return False
    at = (position - start) % size
    return 32 <= at < 96 or 160 <= at < size - m.BOX_BYTES


@pytest.mark.parametrize("evidence", ["signature", "path"])
def test_without_the_dealers_signature_a_bad_box_is_the_servers_fault(evidence: str) -> None:
    request = bytearray(LOG[m.MASK, 0][0])
    request[-1] ^= 1  # the box of the last dealer
    size = m.dealing_bytes(4)
    request[len(request) - size + (40 if evidence == "signature" else 170)] ^= 1
    with pytest.raises(RemoteProtocolError, match="signature"):
        client_before(m.MASK).receive(bytes(request))


@pytest.mark.parametrize("phase", PHASES)
def test_messages_of_another_attempt_or_step_change_nothing(phase: str) -> None:
    client = client_before(phase)
    other = make_session(range(4), dim=3, attempt=1)
    foreign = MaskedServer(session=other, roster=ROSTER).start()[0]
    for message in (foreign, LOG[phase, 0][1], *(LOG[p, 0][0] for p in PHASES[PHASES.index(phase) + 1 :])):
        with pytest.raises(RemoteProtocolError):
            client.receive(message)
    assert client.receive(LOG[phase, 0][0]) == LOG[phase, 0][1]


def test_an_identical_retransmission_gets_identical_bytes_and_another_message_does_not() -> None:
    client = client_before(m.MASK)
    first = client.receive(LOG[m.MASK, 0][0])
    assert client.receive(LOG[m.MASK, 0][0]) == first
    with pytest.raises(RemoteProtocolError):
        client.receive(LOG[m.SHARE, 0][0])


def members_request(members: list[int], advertisements: list[bytes]) -> bytes:
    sid = decode(LOG[m.SHARE, 0][0], m.Members, most=MOST).sid
    return encode(
        m.Members(
            sid=sid,
            server_key=keys.ExchangeKey(b"\5" * 32).public,
            members=np.array(members, "<u4").tobytes(),
            advertisements=b"".join(advertisements),
        )
    )


@pytest.mark.parametrize(
    ("members", "sources"),
    [
        ([0, 1], [0, 1]),  # below the quorum
        ([1, 2, 3], [1, 2, 3]),  # without this client
        ([0, 1, 1, 2], [0, 1, 1, 2]),  # listed twice
        ([0, 1, 2, 4], [0, 1, 2, 3]),  # outside the cohort
        ([0, 1, 2, 3], [0, 1, 2, 2]),  # one client's keys for two
        ([0, 2, 1, 3], [0, 2, 1, 3]),  # out of order
        ([0, 1, 2, 3], [0, 1, 2]),  # fewer keys than members
        ([0, 1, 2, 3, 2**32 - 1], [0, 1, 2, 3, 3]),
    ],
)
def test_client_refuses_forged_member_lists(members: list[int], sources: list[int]) -> None:
    client = client_before(m.SHARE)
    with pytest.raises(RemoteProtocolError):
        client.receive(members_request(members, [LOG[m.ADVERTISE, s][1] for s in sources]))
    with pytest.raises(LocalProtocolError):
        client.receive(LOG[m.SHARE, 0][0])


def test_client_refuses_substituted_keys_even_its_own() -> None:
    honest = [LOG[m.ADVERTISE, i][1] for i in range(4)]
    sid = decode(honest[0], m.Advertise, most=MOST).sid

    def advertisement(client: int, signer: Identity) -> bytes:
        mask_key, box_key = (keys.ExchangeKey(bytes([k] * 32)).public for k in (9, 10))
        signature = keys.sign(signer.secagg_private, m.advertise_statement(sid, client, mask_key, box_key))
        return encode(m.Advertise(sid=sid, mask_key=mask_key, box_key=box_key, signature=signature))

    for forged in (
        [*honest[:3], advertisement(3, Identity.generate("mallory"))],
        [advertisement(0, IDENTITIES[0]), *honest[1:]],  # own identity, keys from an earlier life
    ):
        with pytest.raises(RemoteProtocolError):
            client_before(m.SHARE).receive(members_request([0, 1, 2, 3], forged))


def survivors_request(survivors: tuple[int, ...]) -> bytes:
    sid = decode(LOG[m.MASK, 0][0], m.Delivery, most=MOST).sid
    return encode(m.Survivors(sid=sid, survivors=encode_indices(survivors)))


@pytest.mark.parametrize("survivors", [(1, 2, 3), (0, 1), (0, 1, 2, 5), (0, 0, 1, 2)])
def test_client_refuses_forged_survivors(survivors: tuple[int, ...]) -> None:
    with pytest.raises(RemoteProtocolError):
        client_before(m.CONSISTENCY).receive(survivors_request(survivors))


def test_a_split_view_of_the_survivors_gets_no_shares() -> None:
    session = make_session(range(5), dim=3)
    server, clients = masked_round(session, make_inputs(session))
    split = {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}

    def equivocate(phase: str, client: int, message: bytes) -> bytes:
        if phase == m.CONSISTENCY and client in split:
            sid = decode(message, m.Survivors, most=MOST).sid
            return encode(m.Survivors(sid=sid, survivors=encode_indices(split[client])))
        return message

    with pytest.raises(ThresholdNotMet):
        Wire(server, clients, to_client=equivocate).run()
    # A server that ignores that and sends what it collected, with and without the odd signatures, fares no better.
    client = client_before(m.CONSISTENCY)
    client.receive(survivors_request((0, 1, 2)))
    with pytest.raises(RemoteProtocolError):
        client.receive(LOG[m.UNMASK, 0][0])


@pytest.mark.parametrize("signers", [(), (0, 1), (0, 0, 0), (0, 1, 9)])
def test_client_reveals_nothing_without_a_quorum_of_distinct_survivors(signers: tuple[int, ...]) -> None:
    honest = decode(LOG[m.UNMASK, 0][0], m.Reveal, most=MOST)
    by = {i: decode(LOG[m.CONSISTENCY, i][1], m.Consent, most=MOST).signature for i in SESSION.cohort}
    forged = m.Reveal(
        sid=honest.sid, signers=encode_indices(signers), signatures=b"".join(by.get(s, by[0]) for s in signers)
    )
    with pytest.raises(RemoteProtocolError):
        client_before(m.UNMASK).receive(encode(forged))


def test_no_client_answers_a_second_unmasking() -> None:
    client = client_before(m.UNMASK)
    client.receive(LOG[m.UNMASK, 0][0])
    assert client.done
    honest = decode(LOG[m.UNMASK, 0][0], m.Reveal, most=MOST)
    assert len(honest.signers) == 12  # the server sends the q = 3 signatures that are due, of 4
    last = decode(LOG[m.CONSISTENCY, 3][1], m.Consent, most=MOST).signature
    another = m.Reveal(
        sid=honest.sid,
        signers=honest.signers[:8] + encode_indices((3,)),
        signatures=honest.signatures[:128] + last,
    )
    client_before(m.UNMASK).receive(encode(another))
    with pytest.raises(RemoteProtocolError):
        client.receive(encode(another))


class FaultyClient(MaskedClient):
    """Deals as `fault` says, under its own valid signature."""

    fault = ""

    def _split(self, secrets: tuple[bytes, bytes], holders: tuple[int, ...]) -> list[bytes]:
        shares = super()._split(secrets, holders)
        if self.fault in ("self mask shares", "mask key shares"):
            # Not the lowest bits: X25519 ignores three of its key, and the key then rebuilt is just as good.
            at = 8 if self.fault == "self mask shares" else 48
            shares[0] = shares[0][:at] + bytes([shares[0][at] ^ 1]) + shares[0][at + 1 :]
        return shares

    def _seal(self, holder: int, pair: bytes, hashes: bytes, commitment: bytes) -> bytes:
        box = super()._seal(holder, pair, hashes, commitment)
        if self.fault == "box" and holder != 3:
            return box[:-1] + bytes([box[-1] ^ 1])
        if self.fault == "off hash" and holder == 3:
            return super()._seal(holder, bytes(len(pair)), hashes, commitment)
        if self.fault == "other hashes" and holder == 2:
            return super()._seal(holder, pair, bytes(len(hashes)), commitment)
        return box


def run_with_faulty_dealer(fault: str, lost: dict[str, list[int]]) -> Wire:
    server, clients = masked_round(SESSION, INPUTS)
    faulty = FaultyClient(
        session=SESSION, identity=IDENTITIES[1], roster=ROSTER, vector=lambda: INPUTS[1], journal=MemoryJournal()
    )
    faulty.fault = fault
    return Wire(server, {**clients, 1: faulty}, lost=lost)


@pytest.mark.parametrize(("fault", "accusers"), [("box", (0, 2)), ("off hash", (3,)), ("other hashes", (2,))])
def test_a_complaint_voids_the_attempt_and_names_dealer_and_accusers(fault: str, accusers: tuple[int, ...]) -> None:
    wire = run_with_faulty_dealer(fault, {})
    with pytest.raises(FaultyDealer) as void:
        wire.run()
    assert void.value.accusers == {1: accusers} and void.value.stage == m.MASK
    for _, client, _, reply in (entry for entry in wire.log if entry[0] == m.MASK):
        assert bool(decode(reply, m.MaskedInput, most=MOST).masked) == (client not in accusers)


@pytest.mark.parametrize(("fault", "lost"), [("self mask shares", []), ("mask key shares", [1])])
def test_shares_that_do_not_rebuild_the_commitment_prove_the_dealer_faulty(fault: str, lost: list[int]) -> None:
    wire = run_with_faulty_dealer(fault, {m.MASK: lost})
    with pytest.raises(FaultyDealer) as void:
        wire.run()
    assert void.value.accusers == {1: ()} and void.value.stage == m.UNMASK
    with pytest.raises(LocalProtocolError):
        _ = wire.server.result


def test_a_bad_share_is_named_and_its_holder_counts_as_dropped() -> None:
    def alter(phase: str, client: int, message: bytes) -> bytes:
        return (
            message[:-50] + bytes([message[-50] ^ 1]) + message[-49:] if (phase, client) == (m.UNMASK, 2) else message
        )

    wire = Wire(*masked_round(SESSION, INPUTS), to_server=alter)
    assert np.array_equal(wire.run().total, sum(INPUTS.values()))
    assert [client for client, _ in wire.bad] == [2] and "share of dealer" in str(wire.bad[0][1])
    assert wire.server.result.dropped[m.UNMASK] == (2,)


def test_a_reflected_box_is_refused() -> None:
    # The server hands client 0 its own dealing back as if client 1 had dealt it.
    own = decode(LOG[m.SHARE, 0][1], m.Deal, most=MOST)
    request = decode(LOG[m.MASK, 0][0], m.Delivery, most=MOST)
    levels = merkle.tree([bytes(32)] * 4)
    reflected = own.commitment + own.signature + own.hashes[64:128] + merkle.path(levels, 0) + own.boxes[: m.BOX_BYTES]
    size = m.dealing_bytes(4)
    assert len(reflected) == size
    forged = m.Delivery(sid=request.sid, dealers=request.dealers, dealings=reflected + request.dealings[size:])
    with pytest.raises(RemoteProtocolError):
        client_before(m.MASK).receive(encode(forged))


@pytest.mark.parametrize(
    "changes",
    [{"threshold": 2}, {"minimum_cohort": 1}, {"colluders": 3}, {"cohort": (0, 1, 2, 12)}],
)
def test_sessions_that_protect_nobody_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        MaskedServer(session=make_session(**{"cohort": range(4), **changes}), roster=ROSTER)


def test_terminal_machines_hold_no_secret_and_no_repr_shows_one() -> None:
    client = client_before(m.UNMASK)
    secrets = [client._seed, client._self_mask, *client._box_keys[1].values(), client._input_secret, *client._held[1]]
    assert all(secrets) and client._keys
    shown = repr(client) + repr(IDENTITIES[0]) + repr(client.__dict__["_journal"])
    assert not any(secret.hex() in shown or repr(secret)[2:-1] in shown for secret in secrets)
    client.receive(LOG[m.UNMASK, 0][0])
    held = [value for value in gc.get_referents(client.__dict__) if isinstance(value, bytes)]
    assert not set(secrets) & set(held) and not client._held and not client._keys and not client._box_keys


def test_forged_lengths_allocate_nothing() -> None:
    # Every msgpack header that announces a length, with a huge one, in a process that may map 64 MiB more than it has.
    code = """
import resource
from privfed.crypto.errors import RemoteProtocolError
from privfed.crypto.masking import messages as m
from privfed.crypto.plain import Submission
from privfed.crypto.wire import decode
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 2**26,) * 2)
for kind in (m.Start, m.Advertise, m.Members, m.Deal, m.Delivery, m.MaskedInput, m.Consent, m.Shares, Submission):
    tag = kind.__struct_config__.tag.encode()
    for header in (b"\\xdd", b"\\xdf", b"\\xc6", b"\\xdb", b"\\xc9"):
        for start in (b"", bytes([0x95, 0xA0 + len(tag)]) + tag, b"\\x92"):
            try:
                decode(start + header + b"\\xff\\xff\\xff\\xff" + b"x" * 40, kind, most=1000)
            except RemoteProtocolError:
                continue
            raise SystemExit("accepted")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_merkle_paths_lead_to_the_root_and_only_from_their_place() -> None:
    for count in (1, 2, 3, 5, 8):
        leaves = [bytes([i]) for i in range(count)]
        levels = merkle.tree(leaves)
        for i, leaf in enumerate(leaves):
            siblings = merkle.path(levels, i)
            assert len(siblings) == 32 * merkle.depth(count)
            assert merkle.root_from_path(leaf, i, siblings) == levels[-1][0]
            assert merkle.root_from_path(b"other", i, siblings) != levels[-1][0]
            if count > 1:
                assert merkle.root_from_path(leaf, i ^ 1, siblings) != levels[-1][0]


def test_fresh_entropy_changes_every_byte_that_must_be_fresh() -> None:
    replies = [
        masked_client(SESSION, 0, INPUTS[0], MemoryJournal(stream(seed))).receive(LOG[m.ADVERTISE, 0][0])
        for seed in ("one", "two", "one")
    ]
    assert replies[0] == replies[2] != replies[1]
