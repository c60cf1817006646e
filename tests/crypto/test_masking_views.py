"""Who is in which set: forged survivors, quorums of neighbours, and what is revealed of whom."""

import numpy as np
import pytest

from privfed.crypto import keys, shamir
from privfed.crypto.errors import LocalProtocolError, RemoteProtocolError
from privfed.crypto.masking import messages as m
from privfed.crypto.masking.client import MaskedClient
from privfed.crypto.masking.server import MaskedServer
from privfed.crypto.prg import add_masks, keystream
from privfed.crypto.wire import decode, encode, encode_indices

from .consortium import IDENTITIES, Wire, make_inputs, make_session, masked_round

MOST = 10**6


def until(phase: str, server: MaskedServer, wire: Wire) -> dict[int, bytes]:
    """The requests of `phase`, after an honest run up to it."""
    requests = server.start()
    while server.phase != phase:
        for client, reply in wire.exchange(requests).items():
            server.receive(client, reply)
        requests = server.close_phase()
    return requests


def test_a_client_that_dropped_before_cannot_survive() -> None:
    session = make_session(range(6))
    server, clients = masked_round(session, make_inputs(session))
    request = until(m.CONSISTENCY, server, Wire(server, clients, lost={m.SHARE: [5], m.MASK: [5]}))[0]
    sid = decode(request, m.Survivors, most=MOST).sid
    with pytest.raises(RemoteProtocolError, match="step before"):
        clients[0].receive(encode(m.Survivors(sid=sid, survivors=encode_indices(tuple(range(6))))))


@pytest.mark.parametrize("degree", [None, 4])
def test_every_dealer_has_one_kind_of_share_revealed_never_both(degree: int | None) -> None:
    sparse = {"degree": degree, "threshold": 3, "minimum_cohort": 10, "colluders": 1} if degree else {}
    session = make_session(range(12), **sparse)
    server, clients = masked_round(session, make_inputs(session))
    wire = Wire(server, clients, lost={m.MASK: [2, 7]})
    wire.run()
    for phase, client, _, reply in wire.log:
        if phase == m.UNMASK:
            shares = decode(reply, m.Shares, most=MOST)
            revealed = len(shares.self_mask) + len(shares.mask_key)
            held = 12 if degree is None else degree + 1
            assert revealed == held * shamir.SHARE_BYTES, client
    # And it cannot be asked again, with the sets exchanged.
    for client in (0, 1):
        with pytest.raises((RemoteProtocolError, LocalProtocolError)):
            clients[client].receive(wire.log[0][2])


def reveal(client: MaskedClient, request: bytes, signers: tuple[int, ...], statement: bytes) -> bytes:
    """An unmasking request with valid signatures of just these signers."""
    signatures = b"".join(keys.sign(IDENTITIES[signer].secagg_private, statement) for signer in signers)
    sid = decode(request, m.Reveal, most=MOST).sid
    return client.receive(encode(m.Reveal(sid=sid, signers=encode_indices(signers), signatures=signatures)))


def test_signatures_of_all_neighbours_are_no_quorum() -> None:
    # q = ⌊(12 + 1)/2⌋ + 1 = 7 of all survivors. With t = 3 of the 5 neighbours as the rule, a few colluders around one
    # client could sign a view made for it alone.
    session = make_session(range(12), degree=4, threshold=3, minimum_cohort=10, colluders=1)
    server, clients = masked_round(session, make_inputs(session))
    request = until(m.UNMASK, server, Wire(server, clients))[0]
    around = tuple(sorted(server._graph.neighbours(0)))
    statement = server._view
    assert len(around) == 5 > session.threshold
    with pytest.raises(RemoteProtocolError, match="7 survivors must have signed"):
        reveal(clients[0], request, around, statement)
    assert reveal(clients[1], request, tuple(range(7)), statement)


def test_a_quorum_on_another_view_reveals_nothing() -> None:
    session = make_session(range(6))
    server, clients = masked_round(session, make_inputs(session))
    request = until(m.UNMASK, server, Wire(server, clients))[0]
    other = m.consent_statement(server._sid, server._th, server._dealers_bytes, encode_indices((0, 1, 2, 3, 4)))
    with pytest.raises(RemoteProtocolError, match="signature"):
        reveal(clients[0], request, (0, 1, 2, 3, 4, 5), other)


@pytest.mark.parametrize(("n", "bits"), [(3, 32), (5, 16), (12, 32)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sum_does_not_wrap(n: int, bits: int, sign: int) -> None:
    bound = (2**bits - 1) // (2 * n)
    session = make_session(range(n), bound=bound)
    assert session.bits == bits
    inputs = {i: np.full(session.dim, sign * bound, dtype=np.int64) for i in session.cohort}
    assert Wire(*masked_round(session, inputs)).run().total.tolist() == [sign * n * bound] * session.dim


def test_every_bit_of_a_seed_changes_the_whole_mask() -> None:
    # Flower 1.42 folds a 256-bit seed to 32 bits, of which 28 vary: flipping bit i and bit i + 32 cancel there.
    seed = bytes(range(32))
    masks = {keystream(seed, 64)}
    for bit in range(256):
        masks.add(keystream((int.from_bytes(seed, "big") ^ (1 << bit)).to_bytes(32, "big"), 64))
    both = int.from_bytes(seed, "little") ^ 1 ^ (1 << 32)
    masks.add(keystream(both.to_bytes(32, "little"), 64))
    assert len(masks) == 258


def test_what_a_server_sees_of_one_client_is_uniform() -> None:
    # The masked words of a constant input: 200,000 bytes, χ² over 256 values has mean 255 and σ = √510 ≈ 22.6.
    words = np.zeros(50_000, dtype="<u4")
    add_masks(words, plus=[b"\1" * 32, b"\2" * 32], minus=[b"\3" * 32])
    counts = np.bincount(np.frombuffer(words.tobytes(), dtype=np.uint8), minlength=256)
    expected = 200_000 / 256
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 255) < 6 * 22.6


def test_the_upload_is_packed_to_w_bits() -> None:
    session = make_session(range(4), dim=10_000, bound=1000)
    wire = Wire(*masked_round(session, make_inputs(session)))
    wire.run()
    largest = max(len(reply) for phase, _, _, reply in wire.log if phase == m.MASK)
    assert session.bits == 13 and largest <= 10_000 * 13 / 8 + 300
