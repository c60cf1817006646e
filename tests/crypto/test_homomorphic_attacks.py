"""The attacks of design/crypto.md §3, each first run against bare BFV, where it works, then against the protocol."""

import gc
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tenseal.sealapi as sealapi

from privfed.crypto import keys
from privfed.crypto.errors import KeyHolderSilent, LocalProtocolError, RemoteProtocolError, SumOutOfRange
from privfed.crypto.homomorphic import messages as m
from privfed.crypto.homomorphic.bfv import FRESH_BUDGET_BITS, NoiseTooHigh, PublicKey, RoundKey, _loaded, seal
from privfed.crypto.homomorphic.coefficients import (
    CHUNK_BYTES,
    COEFFICIENT_MODULUS,
    PUBLIC_KEY_BYTES,
    check_chunks,
    check_public_key,
)
from privfed.crypto.homomorphic.fields import PLAIN_MODULUS, SLOTS, Slots, balanced, layout_of, pack, unpack
from privfed.crypto.packing import IntVector
from privfed.crypto.wire import decode, encode, encode_indices

from .consortium import make_inputs
from .homomorphic_parties import IDENTITIES, KEY_HOLDER, HeWire, he_client, he_session

SESSION = he_session(dim=9, bound=1000)
LAYOUT = layout_of(9, bound=1000, n=4)
INPUTS = make_inputs(SESSION, seed=7)
MALLORY = 3  # the one client that colludes with the aggregator
MOST = 10**7


def decrypt(key: RoundKey, chunks: bytes) -> Slots:
    """What the holder of a key reads in ciphertexts, whatever the protocol would have it do."""
    vector = _loaded(key._context, check_chunks(chunks, LAYOUT.chunks))
    return np.array(vector.decrypt(key._context.secret_key()), dtype=np.int64)


def negated_sum(chunks: list[bytes]) -> bytes:
    total = np.zeros(2 * SLOTS, dtype=np.uint64)
    for one in chunks:
        total = (total + np.frombuffer(one, dtype="<u8")) % np.uint64(COEFFICIENT_MODULUS)
    return ((np.uint64(COEFFICIENT_MODULUS) - total) % np.uint64(COEFFICIENT_MODULUS)).tobytes()


def sent(wire: HeWire) -> dict[int, bytes]:
    """Every client's ciphertexts, as the aggregator got them."""
    return {
        party: decode(reply, m.Ciphertexts, most=MOST).chunks for phase, party, _, reply in wire.log if phase == m.SEND
    }


def resign(party: int, message: m.Commitment, th: bytes) -> bytes:
    statement = m.commitment_statement(th, party, message.commitment, message.sealed, LAYOUT.chunks)
    return encode(msgspec.structs.replace(message, signature=keys.sign(IDENTITIES[party].secagg_private, statement)))


class Crafted(HeWire):
    """A round in which one client commits, in due form, to ciphertexts that it did not encrypt as it should."""

    def __init__(self, craft: bytes, **options: object) -> None:
        super().__init__(SESSION, INPUTS, to_server=self._alter, **options)  # type: ignore[arg-type]
        self.craft = craft

    def _alter(self, phase: str, party: int, message: bytes) -> bytes:
        if (phase, party) != (m.COMMIT, MALLORY):
            return message
        th = self.server._th
        changed = msgspec.structs.replace(
            decode(message, m.Commitment, most=MOST), commitment=m.commitment(th, party, self.craft)
        )
        return resign(party, changed, th)

    def exchange(self, requests: dict[int, bytes]) -> dict[int, bytes]:
        phase, replies = self.server.phase, super().exchange(requests)
        if phase == m.SEND:
            replies[MALLORY] = encode(m.Ciphertexts(sid=self.server._sid, chunks=self.craft))
        return replies


# 1. A curious key holder


def test_a_key_holder_reads_bare_ciphertexts_but_only_noise_in_those_of_the_protocol() -> None:
    wire, read = HeWire(SESSION, INPUTS), {}
    key = None

    def before_release(phase: str, party: int, message: bytes) -> bytes:
        nonlocal key
        key = wire.key_holder._key
        if phase == m.DELIVER:
            read.update({client: decrypt(key, chunks) for client, chunks in sent(wire).items()})
            # Bare, as other systems send them: read without further ado.
            bare = PublicKey(key.public).encrypt(pack(INPUTS[0], LAYOUT, SESSION))
            assert np.array_equal(unpack(decrypt(key, bare), LAYOUT, limit=1000), INPUTS[0])
        return message

    wire.to_party = before_release
    total = wire.run().total
    for slots in read.values():
        with pytest.raises(SumOutOfRange):
            unpack(slots, LAYOUT, limit=1000)
        # x + r, and in the slots without a coordinate r alone: uniform. Their mean has deviation t/√(12 · 4096).
        assert abs(slots.mean()) < 6 * PLAIN_MODULUS / np.sqrt(12 * SLOTS)
        assert len(np.unique(slots)) > SLOTS - 3
    # All that it holds together, blinds' sum included, is the sum that it was to learn.
    release = next(decode(s, m.ReleaseRequest, most=MOST) for phase, _, s, _ in wire.log if phase == m.RELEASE)
    everything = sum(read.values()) % PLAIN_MODULUS
    opened = balanced((everything - np.frombuffer(release.blinds, dtype="<u8").astype(np.int64)) % PLAIN_MODULUS)
    assert np.array_equal(unpack(opened, LAYOUT, limit=4000), total)


def test_the_blinds_of_too_few_are_never_added_up_for_the_key_holder() -> None:
    """A key holder that refuses all but the victim would get the victim's own blind as R."""
    others = encode_indices((1, 2, 3))

    def refuse(phase: str, party: int, message: bytes) -> bytes:
        if phase != m.DELIVER:
            return message
        return encode(msgspec.structs.replace(decode(message, m.Checked, most=MOST), refused=others))

    wire = HeWire(SESSION, INPUTS, to_server=refuse)
    with pytest.raises(Exception, match="deliver: 1 clients answered, 3 are needed"):
        wire.run()
    assert m.RELEASE not in [phase for phase, *_ in wire.log]


# 2. −Σ of the others' ciphertexts


def test_minus_the_sum_of_the_others_opens_a_victim_of_bare_bfv() -> None:
    key = RoundKey(LAYOUT.chunks)
    public = PublicKey(key.public)
    ciphertexts = {i: public.encrypt(pack(INPUTS[i], LAYOUT, SESSION)) for i in (0, 1, 2)}
    for chunks in (*ciphertexts.values(), negated_sum([ciphertexts[1], ciphertexts[2]])):
        key.add(chunks)
    assert np.array_equal(unpack(key.decrypt(), LAYOUT, limit=1000), INPUTS[0])


def test_a_client_cannot_send_other_ciphertexts_than_it_committed_to() -> None:
    wire = HeWire(SESSION, INPUTS)

    def late(phase: str, party: int, message: bytes) -> bytes:
        if (phase, party) != (m.SEND, MALLORY):
            return message
        return encode(m.Ciphertexts(sid=wire.server._sid, chunks=negated_sum([sent(wire)[1], sent(wire)[2]])))

    wire.to_server = late
    result = wire.run()
    assert [(party, str(error)) for party, error in wire.bad] == [
        (MALLORY, "client 3 sent other ciphertexts than it committed to")
    ]
    assert np.array_equal(result.total, sum(INPUTS[i] for i in (0, 1, 2)))


def test_nor_does_the_key_holder_take_them_from_an_aggregator_that_colludes() -> None:
    wire = HeWire(SESSION, INPUTS)

    def swap(phase: str, party: int, message: bytes) -> bytes:
        if phase != m.DELIVER:
            return message
        delivery, size = decode(message, m.Delivery, most=MOST), LAYOUT.chunks * CHUNK_BYTES
        forged = negated_sum([sent(wire)[1], sent(wire)[2]])
        return encode(msgspec.structs.replace(delivery, chunks=delivery.chunks[: 3 * size] + forged))

    wire.to_party = swap
    result = wire.run()
    assert result.dropped[m.DELIVER] == (MALLORY,)
    assert np.array_equal(result.total, sum(INPUTS[i] for i in (0, 1, 2)))


def test_no_ciphertext_leaves_before_the_list_is_closed_by_the_key_holder() -> None:
    wire = HeWire(SESSION, INPUTS)
    requests = wire.server.start()
    wire.server.receive(KEY_HOLDER, wire.exchange(requests)[KEY_HOLDER])
    replies = wire.exchange(wire.server.close_phase())
    committed = {i: decode(reply, m.Commitment, most=MOST) for i, reply in replies.items()}
    members, listed = encode_indices((0, 1, 2, 3)), b"".join(one.commitment for one in committed.values())
    th = wire.key_holder._th
    own = keys.sign(IDENTITIES[MALLORY].secagg_private, m.closed_statement(th, members, listed))
    request = m.SendRequest(sid=wire.server._sid, members=members, commitments=listed, signature=own)
    with pytest.raises(RemoteProtocolError, match="a signature does not verify"):
        wire.clients[0].receive(encode(request))
    # Signed, but without this client, with another commitment in its place, or with too few clients.
    for client, chosen, commitments in (
        (1, (0, 2, 3), listed[:96]),
        (2, (0, 1, 2), listed[:32] * 3),
        (3, (0, 3), listed[:32] + listed[96:]),
    ):
        signature = keys.sign(
            IDENTITIES[KEY_HOLDER].secagg_private, m.closed_statement(th, encode_indices(chosen), commitments)
        )
        request = m.SendRequest(
            sid=wire.server._sid, members=encode_indices(chosen), commitments=commitments, signature=signature
        )
        with pytest.raises(RemoteProtocolError):
            wire.clients[client].receive(encode(request))
        with pytest.raises(LocalProtocolError):  # failed for good, with its ciphertexts dropped
            wire.clients[client].receive(encode(request))
        assert not wire.clients[client]._chunks


def test_the_list_is_closed_once() -> None:
    wire = HeWire(SESSION, INPUTS)
    wire.run()
    closing = next(sent for phase, _, sent, _ in wire.log if phase == m.CLOSE)
    fresh = HeWire(SESSION, INPUTS)
    replies = fresh.exchange(fresh.server.start())
    fresh.server.receive(KEY_HOLDER, replies[KEY_HOLDER])
    requests = fresh.server.close_phase()
    with pytest.raises(RemoteProtocolError):  # commitments under the other round's key
        fresh.key_holder.receive(closing)
    with pytest.raises(LocalProtocolError):
        fresh.key_holder.receive(closing)
    assert fresh.key_holder._key is None
    assert requests

    again = HeWire(SESSION, INPUTS)
    closes: list[bytes] = []

    def twice(phase: str, party: int, message: bytes) -> bytes:
        if phase == m.CLOSE:
            closes.append(message)
        if phase == m.DELIVER:
            request = decode(closes[0], m.CloseRequest, most=MOST)
            fewer = msgspec.structs.replace(
                request, members=encode_indices((0, 1, 2)), records=request.records[: 3 * m.RECORD_BYTES]
            )
            return encode(fewer)
        return message

    again.to_party = twice
    with pytest.raises(KeyHolderSilent):
        again.run()


# 3. Key recovery by a crafted addend


def lifted(value: int) -> int:
    """round(q/t · value): how BFV writes a plaintext coefficient modulo q."""
    return (COEFFICIENT_MODULUS * value + PLAIN_MODULUS // 2) // PLAIN_MODULUS


def scaled(coefficient: int) -> bytes:
    """(0, Δ · coefficient): decrypts to coefficient · s, with hardly any noise."""
    chunks = np.zeros((2, SLOTS), dtype="<u8")
    chunks[1, 0] = lifted(coefficient)
    return chunks.tobytes()


def interpolated(slots: Slots) -> IntVector:
    """The polynomial with these values, by SEAL's own encoder."""
    parameters = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.BFV)
    parameters.set_poly_modulus_degree(SLOTS)
    parameters.set_coeff_modulus(sealapi.CoeffModulus.Create(SLOTS, [60, 20]))
    parameters.set_plain_modulus(PLAIN_MODULUS)
    encoder = sealapi.BatchEncoder(sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC128))
    plain = sealapi.Plaintext()
    encoder.encode([int(slot) % PLAIN_MODULUS for slot in slots], plain)
    return balanced(np.array([plain[i] for i in range(SLOTS)], dtype=np.int64))


def multiply(one: list[int], ternary: IntVector) -> list[int]:
    """Modulo x^4096 + 1, by one product of large integers (Kronecker)."""
    width = 80

    def number(coefficients: list[int]) -> int:
        return int.from_bytes(b"".join(c.to_bytes(width // 8, "little") for c in coefficients), "little")

    value = number(one)
    product = [0] * (2 * SLOTS)
    for sign in (1, -1):
        part = value * number([int(c == sign) for c in ternary.tolist()])
        digits = part.to_bytes(2 * SLOTS * width // 8, "little")
        for i in range(2 * SLOTS):
            product[i] += sign * int.from_bytes(digits[i * width // 8 : (i + 1) * width // 8], "little")
    return [product[i] - product[i + SLOTS] for i in range(SLOTS)]


def test_a_crafted_addend_recovers_the_key_of_bare_bfv_and_then_everyone() -> None:
    key = RoundKey(1)
    victim = PublicKey(key.public).encrypt(pack(INPUTS[0], LAYOUT, SESSION))
    key.add(scaled(1))  # the noise budget cannot tell: it is that of a perfect ciphertext
    s = interpolated(key.decrypt())
    assert set(np.unique(s)) == {-1, 0, 1}
    c0, c1 = np.frombuffer(victim, dtype="<u8").reshape(2, SLOTS).tolist()
    noisy = [(a + b) % COEFFICIENT_MODULUS for a, b in zip(c0, multiply(c1, s), strict=True)]
    plain = [round_to_plain(value) for value in noisy]
    slots = decoded(plain)
    assert np.array_equal(unpack(slots, LAYOUT, limit=1000), INPUTS[0])


def round_to_plain(value: int) -> int:
    return (value * PLAIN_MODULUS + COEFFICIENT_MODULUS // 2) // COEFFICIENT_MODULUS % PLAIN_MODULUS


def decoded(plain: list[int]) -> Slots:
    """The slots of a plaintext polynomial: encrypted under a throw-away key as raw coefficients, and decrypted."""
    other = RoundKey(1)
    zero = np.frombuffer(PublicKey(other.public).encrypt(np.zeros(SLOTS, dtype=np.int64)), dtype="<u8").reshape(2, -1)
    chunks = zero.copy()
    chunks[0] = [(int(a) + lifted(c)) % COEFFICIENT_MODULUS for a, c in zip(zero[0], plain, strict=True)]
    return decrypt(other, chunks.tobytes())


@pytest.mark.parametrize("coefficient", [1, 5, PLAIN_MODULUS - 1])
def test_a_crafted_addend_makes_the_key_holder_withhold_the_sum(coefficient: int) -> None:
    wire = Crafted(scaled(coefficient))
    with pytest.raises(SumOutOfRange, match="the key holder withheld the sum"):
        wire.run()
    release = decode(wire.log[-1][3], m.Release, most=MOST)
    assert (release.withheld, release.total) == (m.OUT_OF_RANGE, b"")
    # Once: the key is gone, and nothing more is answered, not even for other blinds.
    assert wire.key_holder._key is None
    request = decode(wire.log[-1][2], m.ReleaseRequest, most=MOST)
    with pytest.raises(RemoteProtocolError, match="every step of this session has been answered"):
        wire.key_holder.receive(encode(msgspec.structs.replace(request, blinds=bytes(len(request.blinds)))))


def test_an_addend_that_probes_the_rounding_is_refused_by_its_noise() -> None:
    """(Δ/2, 1): each coefficient rounds up or down with the key's. A reaction attack needs noise near the limit."""
    chunks = np.frombuffer(scaled(1), dtype="<u8").reshape(2, SLOTS).copy()
    delta = COEFFICIENT_MODULUS // PLAIN_MODULUS
    chunks[0], chunks[1, 0] = delta // 2, 1
    wire = Crafted(chunks.tobytes())
    result = wire.run()
    assert result.dropped[m.DELIVER] == (MALLORY,)
    assert np.array_equal(result.total, sum(INPUTS[i] for i in (0, 1, 2)))


# Keys


def test_a_substituted_public_key_is_refused_by_every_client() -> None:
    wire, mine = HeWire(SESSION, INPUTS), RoundKey(LAYOUT.chunks)

    def substitute(phase: str, party: int, message: bytes) -> bytes:
        if phase != m.COMMIT:
            return message
        request = decode(message, m.CommitRequest, most=MOST)
        th = m.transcript(wire.server._sid, request.sealing_key, mine.public)
        own = keys.sign(IDENTITIES[MALLORY].secagg_private, th)
        return encode(
            msgspec.structs.replace(request, public_key=mine.public, signature=own if party % 2 else request.signature)
        )

    wire.to_party = substitute
    with pytest.raises(Exception, match="commit: 0 clients answered"):
        wire.run()
    assert [str(error) for _, error in wire.refusals] == ["a signature does not verify"] * 4


def test_a_substituted_sealing_key_is_refused_by_client_and_aggregator() -> None:
    other = keys.ExchangeKey(b"\7" * 32).public
    wire = HeWire(SESSION, INPUTS)

    def for_clients(phase: str, party: int, message: bytes) -> bytes:
        if phase != m.COMMIT:
            return message
        return encode(msgspec.structs.replace(decode(message, m.CommitRequest, most=MOST), sealing_key=other))

    wire.to_party = for_clients
    with pytest.raises(Exception, match="commit: 0 clients answered"):
        wire.run()

    wire = HeWire(SESSION, INPUTS)

    def for_key_holder(phase: str, party: int, message: bytes) -> bytes:
        if phase != m.KEY:
            return message
        return encode(msgspec.structs.replace(decode(message, m.KeyRequest, most=MOST), sealing_key=other))

    wire.to_party = for_key_holder
    with pytest.raises(KeyHolderSilent):
        wire.run()
    assert str(wire.bad[0][1]) == "a signature does not verify"


def test_ciphertexts_under_another_key_are_named_and_left_out() -> None:
    other = RoundKey(LAYOUT.chunks)
    foreign = PublicKey(other.public).encrypt(balanced(np.arange(SLOTS, dtype=np.int64)))
    with pytest.raises(NoiseTooHigh):
        RoundKey(LAYOUT.chunks).add(foreign)
    wire = Crafted(foreign)
    result = wire.run()
    assert result.dropped[m.DELIVER] == (MALLORY,)
    assert np.array_equal(result.total, sum(INPUTS[i] for i in (0, 1, 2)))


def test_a_wrong_blind_makes_the_sum_unreadable_and_nothing_is_released() -> None:
    wire = HeWire(SESSION, INPUTS)

    def other_blind(phase: str, party: int, message: bytes) -> bytes:
        if phase != m.RELEASE:
            return message
        request = decode(message, m.ReleaseRequest, most=MOST)
        blinds = np.frombuffer(request.blinds, dtype="<u8").copy()
        blinds[-1] = (blinds[-1] + 1) % PLAIN_MODULUS  # even in a slot that holds nothing
        return encode(msgspec.structs.replace(request, blinds=blinds.tobytes()))

    wire.to_party = other_blind
    with pytest.raises(SumOutOfRange):
        wire.run()


def test_the_sum_is_asked_for_exactly_those_that_are_in_it() -> None:
    for members in ((0, 1, 2), (0, 1), (0, 1, 2, 3, 4)):
        wire = HeWire(SESSION, INPUTS)

        def others(phase: str, party: int, message: bytes, members: tuple[int, ...] = members) -> bytes:
            if phase != m.RELEASE:
                return message
            request = decode(message, m.ReleaseRequest, most=MOST)
            return encode(msgspec.structs.replace(request, members=encode_indices(members)))

        wire.to_party = others
        with pytest.raises(KeyHolderSilent):
            wire.run()
        assert wire.key_holder._key is None


# The secret key and the aggregator


def test_no_byte_of_the_secret_key_reaches_the_aggregator() -> None:
    wire, secret = HeWire(SESSION, INPUTS), []

    def note(phase: str, party: int, message: bytes) -> bytes:
        if phase == m.CLOSE and not secret:
            coefficients = wire.key_holder._key._context.secret_key().data()
            secret.extend(coefficients[i] for i in range(SLOTS))
        return message

    wire.to_party = note
    wire.run()
    assert len(set(secret)) > SLOTS // 2
    for _, _, _, reply in wire.log:
        for start in (0, 100, SLOTS - 4):
            run = np.array(secret[start : start + 4], dtype="<u8").tobytes()
            assert run not in reply
            assert run[:6] + run[8:14] not in reply
    gc.collect()
    assert not any(type(found) is RoundKey and found._context is not None for found in gc.get_objects())


@pytest.mark.parametrize("secret", [False, True])
def test_a_serialized_context_passes_no_check_of_the_aggregator(secret: bool) -> None:
    context = seal.TenSEALContext.new(
        seal.SCHEME_TYPE.BFV, SLOTS, PLAIN_MODULUS, [60, 20], seal.ENCRYPTION_TYPE.ASYMMETRIC, 1
    )
    whole = context.serialize(True, secret, False, False)
    for size in (PUBLIC_KEY_BYTES, CHUNK_BYTES, 2 * CHUNK_BYTES):
        for data in (whole, whole[:size].ljust(size, b"\0"), (whole * 3)[:size]):
            with pytest.raises(RemoteProtocolError):
                check_public_key(data)
            with pytest.raises(RemoteProtocolError):
                check_chunks(data, 1)
    # Even with the key holder's valid signature, in every message that it sends.
    identity = IDENTITIES[KEY_HOLDER]

    def leak(phase: str, party: int, message: bytes) -> bytes:
        sid = wire.server._sid
        if phase == m.KEY:
            th = m.transcript(sid, wire.server._sealing.public, whole)  # type: ignore[union-attr]
            return encode(m.Key(sid=sid, public_key=whole, signature=keys.sign(identity.secagg_private, th)))
        if phase == m.CLOSE:
            return encode(m.Closed(sid=sid, signature=whole))
        if phase == m.DELIVER:
            return encode(m.Checked(sid=sid, refused=whole[: len(whole) // 4 * 4]))
        if phase == m.RELEASE:
            members = wire.server._members
            total, withheld = (b"", whole) if secret else (whole, b"")
            statement = m.release_statement(wire.server._th, members, total, withheld)
            signature = keys.sign(identity.secagg_private, statement)
            return encode(m.Release(sid=sid, total=total, withheld=withheld, signature=signature))
        return message

    for phase in m.KEY_HOLDER_STEPS:
        wire = HeWire(
            SESSION,
            INPUTS,
            to_server=lambda at, party, message, phase=phase: leak(at, party, message) if at == phase else message,  # type: ignore[misc]
        )
        with pytest.raises(KeyHolderSilent):
            wire.run()


# Altered and forged messages


HONEST = [m.KEY, m.COMMIT, m.CLOSE, m.SEND, m.DELIVER, m.RELEASE]


@pytest.mark.parametrize("phase", HONEST)
def test_a_reply_altered_anywhere_is_refused_and_leaves_no_trace(phase: str) -> None:
    tried = 0

    def try_altered(at: str, party: int, message: bytes) -> bytes:
        nonlocal tried
        if at == phase and party in (1, KEY_HOLDER):
            positions = {*range(min(len(message), 120)), *range(max(0, len(message) - 70), len(message))}
            for position in sorted(positions):
                altered = bytearray(message)
                altered[position] ^= 1 << position % 8
                with pytest.raises(RemoteProtocolError):
                    wire.server.receive(party, bytes(altered))
                tried += 1
            for forged in (b"", message[:-1], message + b"\0", message * 2, b"\xdd\xff\xff\xff\xff", b"\x91" * 5000):
                with pytest.raises(RemoteProtocolError):
                    wire.server.receive(party, forged)
        return message

    wire = HeWire(SESSION, INPUTS, to_server=try_altered)
    assert np.array_equal(wire.run().total, sum(INPUTS.values()))
    assert tried > 40


@pytest.mark.parametrize("phase", HONEST)
def test_a_request_altered_anywhere_gets_no_answer(phase: str) -> None:
    honest = HeWire(SESSION, INPUTS)
    honest.run()
    length = len(next(s for at, party, s, _ in honest.log if at == phase and party in (1, KEY_HOLDER)))
    for position in (0, 1, 5, 20, 40, length // 3, length // 2, length - 40, length - 1):

        def flip(at: str, party: int, message: bytes, position: int = position) -> bytes:
            if at != phase or party not in (1, KEY_HOLDER):
                return message
            altered = bytearray(message)
            altered[min(position, len(message) - 1)] ^= 1
            return bytes(altered)

        wire = HeWire(SESSION, INPUTS, to_party=flip)
        try:
            result = wire.run()
        except (KeyHolderSilent, SumOutOfRange):
            continue
        assert 1 not in result.contributors or phase == m.DELIVER  # which holds several clients' ciphertexts
        assert len(result.contributors) == 3
        assert np.array_equal(result.total, sum(INPUTS[i] for i in result.contributors))


def test_ciphertexts_that_are_not_reduced_or_no_encryption_are_refused() -> None:
    chunks = np.frombuffer(PublicKey(RoundKey(1).public).encrypt(np.zeros(SLOTS, dtype=np.int64)), dtype="<u8").copy()
    check_chunks(chunks.tobytes(), 1)
    for value in (COEFFICIENT_MODULUS, 2**64 - 1):
        chunks[77] = value
        with pytest.raises(RemoteProtocolError, match="not reduced"):
            check_chunks(chunks.tobytes(), 1)
    chunks[77], chunks[SLOTS:] = 0, 0
    with pytest.raises(RemoteProtocolError, match="does not depend on the key"):
        check_chunks(chunks.tobytes(), 1)


def test_replies_of_another_session_are_refused() -> None:
    other = HeWire(he_session(dim=9, bound=1000, attempt=1), INPUTS)
    other.run()
    foreign = {(phase, party): (request, reply) for phase, party, request, reply in other.log}

    def replace(phase: str, party: int, message: bytes) -> bytes:
        with pytest.raises(RemoteProtocolError):
            wire.server.receive(party, foreign[phase, party][1])
        return message

    wire = HeWire(SESSION, INPUTS, to_server=replace)
    assert np.array_equal(wire.run().total, sum(INPUTS.values()))
    with pytest.raises(RemoteProtocolError, match="in another session"):
        he_client(SESSION, 0, INPUTS[0]).receive(foreign[m.COMMIT, 0][0])


def test_fresh_ciphertexts_pass_with_the_budget_that_the_limit_of_clients_counts_on() -> None:
    key = RoundKey(1)
    public, rng = PublicKey(key.public), np.random.default_rng(0)
    for _ in range(40):
        slots = rng.integers(-(PLAIN_MODULUS // 2), PLAIN_MODULUS // 2, SLOTS)
        vector = _loaded(key._context, check_chunks(public.encrypt(slots), 1))
        assert key._budget(vector) >= FRESH_BUDGET_BITS


HARNESS = Path(__file__).parents[1] / "fuzz" / "fuzz_homomorphic.py"


def test_forged_messages_raise_nothing_else_and_allocate_little() -> None:
    """Forged sizes, counts, shapes and parameters, in a process that may map 128 MiB more than it has."""
    subprocess.run([sys.executable, str(HARNESS), "--runs", "400"], check=True)
