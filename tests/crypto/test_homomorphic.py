"""Homomorphic rounds: exact sums, layouts at their limits, dropouts, one key and one answer for each attempt."""

import os
import subprocess
import sys
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.crypto.aggregation import Session
from privfed.crypto.errors import (
    KeyHolderSilent,
    LocalProtocolError,
    RemoteProtocolError,
    ReplayRefused,
    SumOutOfRange,
    ThresholdNotMet,
)
from privfed.crypto.homomorphic import client
from privfed.crypto.homomorphic import messages as m
from privfed.crypto.homomorphic.bfv import RELEASE_BUDGET_BITS, PublicKey, RoundKey, _coefficients_one_by_one, seal
from privfed.crypto.homomorphic.coefficients import CHUNK_BYTES
from privfed.crypto.homomorphic.fields import (
    MAX_CLIENTS,
    PLAIN_MODULUS,
    SLOTS,
    Layout,
    balanced,
    blind,
    largest_sum,
    layout_of,
    pack,
    uniform,
    unpack,
)
from privfed.crypto.homomorphic.server import HomomorphicServer
from privfed.crypto.journal import Journal, MemoryJournal, SQLiteJournal
from privfed.crypto.packing import IntVector
from privfed.crypto.wire import decode, encode, encode_indices

from .consortium import Wire, make_inputs, make_session, masked_round, plain_round, stream
from .homomorphic_parties import AGGREGATOR, KEY_HOLDER, ROSTER, HeWire, Kept, he_client, he_key_holder, he_session

HALF = PLAIN_MODULUS // 2


# Layouts


@pytest.mark.parametrize(("fields", "bound"), [(3, 64), (2, 8192), (1, 2**24)])
def test_sums_of_the_largest_cohort_are_exact_at_the_extremes(fields: int, bound: int) -> None:
    # 64 · 64 = 2^12 and 64 · 8192 = 2^19: a quarter of 14 and 21 bits.
    session = he_session(range(MAX_CLIENTS), dim=3 * fields + 1, bound=bound)
    layout = layout_of(session.dim, bound=bound, n=MAX_CLIENTS)
    assert layout.fields == fields
    for vector in (
        np.full(session.dim, bound),
        np.full(session.dim, -bound),
        np.where(np.arange(session.dim) % 2, bound, -bound),
        np.where(np.arange(session.dim) < layout.used, -bound, bound),
    ):
        slots = balanced(MAX_CLIENTS * pack(vector, layout, session) % PLAIN_MODULUS)
        assert np.array_equal(unpack(slots, layout, limit=MAX_CLIENTS * bound), MAX_CLIENTS * vector)


@pytest.mark.parametrize("n", [2, 3, 5, 64])
def test_the_most_fields_are_chosen_that_leave_a_guard_bit(n: int) -> None:
    for fields, width in ((3, 14), (2, 21)):
        bound = 2 ** (width - 2) // n
        assert layout_of(9, bound=bound, n=n) == Layout(9, fields)
        assert layout_of(9, bound=bound + 1, n=n).fields < fields
    assert largest_sum(1) == 2**40


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(ValueError, match="at most 64 clients within its noise budget, got 65; split the cohort"):
        layout_of(9, bound=1, n=65)
    with pytest.raises(ValueError, match="274877906944 with 1, 131072 with 2, 1024 with 3"):
        layout_of(9, bound=2**39, n=4)  # 2^40 / 4, 2^19 / 4, 2^12 / 4
    with pytest.raises(ValueError, match="minimum_cohort must be at least 2"):
        HomomorphicServer(session=he_session(minimum_cohort=1), key_holder=KEY_HOLDER, roster=ROSTER)
    with pytest.raises(ValueError, match="key_holder is 65, the roster has 65 members"):
        HomomorphicServer(session=he_session(), key_holder=65, roster=ROSTER)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_packing_adds_up_for_any_shape(data: st.DataObject) -> None:
    n, dim = data.draw(st.integers(1, 64)), data.draw(st.integers(1, 3 * SLOTS))
    bound = data.draw(st.integers(1, (2**31 - 1) // n))
    session = he_session(range(n), dim=dim, bound=bound, minimum_cohort=1)
    layout = layout_of(dim, bound=bound, n=n)
    assert layout.chunks * SLOTS * layout.fields >= dim
    inputs = make_inputs(session, data.draw(st.integers(0, 2**32)))
    slots = sum((pack(vector, layout, session) for vector in inputs.values()), np.zeros(1, dtype=np.int64))
    assert abs(slots).max() <= HALF
    assert np.array_equal(unpack(slots, layout, limit=n * bound), sum(inputs.values()))


def test_a_field_out_of_range_or_anything_outside_the_fields_is_noticed() -> None:
    layout = Layout(5, 2)  # three slots, the last one half used
    slots = np.zeros(SLOTS, dtype=np.int64)
    slots[:3] = [7 - (7 << 21), -7, 7]
    assert unpack(slots, layout, limit=7).tolist() == [7, -7, 7, -7, 0]
    for position, value in ((0, 8), (0, -8), (1, 8 << 21), (2, 1 << 21), (3, 1), (SLOTS - 1, -1)):
        altered = slots.copy()
        altered[position] = value
        with pytest.raises(SumOutOfRange):
            unpack(altered, layout, limit=7)


def test_blinds_are_uniform_modulo_t_and_words_beyond_it_are_drawn_again() -> None:
    words = [PLAIN_MODULUS, 5, 2**42 - 1, PLAIN_MODULUS - 1, 2**42 + 3, 9, 2**63 + 1]
    stream_of_words = iter(words)
    drawn = uniform(lambda size: b"".join(next(stream_of_words).to_bytes(8, "little") for _ in range(size // 8)), 4)
    # Positions 0 and 2 are t or more: the next two words, modulo 2^42, take their places.
    assert drawn.tolist() == [3, 5, 9, PLAIN_MODULUS - 1]
    many = blind(b"k" * 32, b"t" * 32, Layout(100_000, 1))
    assert len(many) == 25 * SLOTS
    assert 0 <= many.min() and many.max() < PLAIN_MODULUS
    counts = np.bincount(many * 64 // PLAIN_MODULUS, minlength=64)
    expected = len(many) / 64
    # χ² with 63 degrees of freedom: mean 63, standard deviation √126 ≈ 11.2; 130 is six of them away.
    assert ((counts - expected) ** 2 / expected).sum() < 130


@pytest.mark.parametrize("start", [0, 1, HALF, HALF + 1, PLAIN_MODULUS, PLAIN_MODULUS + HALF])
def test_balanced_gives_the_smallest_representative(start: int) -> None:
    values = np.array([start, -start], dtype=np.int64)
    for value, found in zip(values.tolist(), balanced(values.copy()).tolist(), strict=True):
        assert abs(found) <= HALF
        assert (found - value) % PLAIN_MODULUS == 0


# Encryption


def test_the_largest_cohort_keeps_its_noise_margin_even_if_all_noise_is_the_same() -> None:
    key, rng = RoundKey(1), np.random.default_rng(0)
    public = PublicKey(key.public)
    slots = [rng.integers(-HALF, HALF, SLOTS, endpoint=True) for _ in range(MAX_CLIENTS)]
    for one in slots:
        key.add(public.encrypt(one))
    independent = key._budget(key._sum)
    total = sum(int(one[0]) for one in slots)
    assert key.decrypt()[0] == (total + HALF) % PLAIN_MODULUS - HALF

    worst = RoundKey(1)
    ciphertext = PublicKey(worst.public).encrypt(slots[0])
    for _ in range(MAX_CLIENTS):
        worst.add(ciphertext)
    correlated = worst._budget(worst._sum)
    assert independent > correlated >= RELEASE_BUDGET_BITS
    assert np.array_equal(worst.decrypt(), balanced(MAX_CLIENTS * slots[0] % PLAIN_MODULUS))


def test_coefficients_are_read_alike_whether_or_not_the_library_compressed_them() -> None:
    key = PublicKey(RoundKey(1).public)
    vector = seal.BFVVector(key._context, [5] * SLOTS)
    raw = vector.serialize()[-CHUNK_BYTES:]
    assert raw == _coefficients_one_by_one(vector)


def test_encryption_refuses_what_would_wrap_or_be_cut_off() -> None:
    key = PublicKey(RoundKey(1).public)
    slots = np.zeros(SLOTS, dtype=np.int64)
    for value in (HALF + 1, -HALF - 1):
        slots[5] = value
        with pytest.raises(ValueError, match="beyond the plaintext modulus"):
            key.encrypt(slots)
    for wrong in (slots[:-1], np.zeros(SLOTS), slots.reshape(2, -1), slots[:0]):
        with pytest.raises(ValueError, match="int64 in whole chunks"):
            key.encrypt(wrong)


def test_a_key_decrypts_once() -> None:
    key = RoundKey(1)
    with pytest.raises(LocalProtocolError):
        key.decrypt()
    key.add(PublicKey(key.public).encrypt(np.zeros(SLOTS, dtype=np.int64)))
    assert not key.decrypt().any()
    with pytest.raises(LocalProtocolError):
        key.decrypt()
    assert key._context is None


# Rounds


@pytest.mark.parametrize(
    ("n", "dim", "bound"), [(3, 1, 1), (4, 7, 100), (5, 12289, 800), (5, 8193, 100_000), (3, 5000, 2**20)]
)
def test_the_same_integers_as_masked_and_plain(n: int, dim: int, bound: int) -> None:
    session = make_session(range(n), dim=dim, bound=bound)
    inputs = make_inputs(session, seed=dim)
    he = HeWire(he_session(range(n), dim=dim, bound=bound), inputs)
    total = he.run().total
    assert np.array_equal(total, Wire(*masked_round(session, inputs)).run().total)
    assert np.array_equal(total, Wire(*plain_round(session, inputs)).run().total)
    assert total.dtype == np.int64
    assert he.server.result.contributors == tuple(range(n))
    assert not he.bad and not he.refusals


def test_a_round_of_the_largest_cohort() -> None:
    session = he_session(range(MAX_CLIENTS), dim=5, bound=8192)
    inputs = {i: np.full(5, 8192) for i in session.cohort}
    assert HeWire(session, inputs).run().total.tolist() == [MAX_CLIENTS * 8192] * 5


def test_a_site_may_hold_the_key_and_be_a_client() -> None:
    wire = HeWire(he_session(), key_holder=2)
    assert np.array_equal(wire.run().total, sum(wire.inputs.values()))
    assert all(party == 2 for phase, party, *_ in wire.log if phase in m.KEY_HOLDER_STEPS)


def test_many_deliveries_add_up_to_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "BATCH_BYTES", 2 * CHUNK_BYTES)
    wire = HeWire(he_session(range(5)))
    assert np.array_equal(wire.run().total, sum(wire.inputs.values()))
    assert [phase for phase, *_ in wire.log].count(m.DELIVER) == 3


def test_processes_give_identical_results() -> None:
    session = he_session(range(3), dim=33 * SLOTS + 1, bound=2**24)  # 34 chunks: a whole task and a short one
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        wire = HeWire(session, pool=pool)
        assert np.array_equal(wire.run().total, sum(wire.inputs.values()))


def test_a_client_whose_processes_die_encrypts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CHUNKS_PER_TASK", 1)
    session = he_session(range(3), dim=SLOTS + 1, bound=2**24)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.raises(BrokenExecutor):
            pool.submit(os._exit, 1).result()
        wire = HeWire(session, pool=pool)
        assert np.array_equal(wire.run().total, sum(wire.inputs.values()))


@pytest.mark.parametrize("phase", [m.COMMIT, m.SEND])
def test_whoever_drops_out_is_left_out(phase: str) -> None:
    wire = HeWire(he_session(range(5)), lost={phase: {1, 4}})
    result = wire.run()
    assert result.contributors == (0, 2, 3)
    assert result.dropped[phase] == (1, 4)
    assert np.array_equal(result.total, sum(wire.inputs[i] for i in (0, 2, 3)))


def test_clients_may_drop_out_in_every_phase_of_one_round() -> None:
    wire = HeWire(he_session(range(6)), lost={m.COMMIT: {0}, m.SEND: {3}})
    result = wire.run()
    assert result.contributors == (1, 2, 4, 5)
    assert dict(result.dropped) == {m.COMMIT: (0,), m.SEND: (3,), m.DELIVER: ()}
    assert np.array_equal(result.total, sum(wire.inputs[i] for i in (1, 2, 4, 5)))


@pytest.mark.parametrize("phase", [m.COMMIT, m.SEND])
def test_too_few_clients_end_the_attempt_without_a_sum(phase: str) -> None:
    wire = HeWire(he_session(), lost={phase: {0, 1}})
    with pytest.raises(ThresholdNotMet) as caught:
        wire.run()
    assert (caught.value.stage, caught.value.needed, caught.value.have) == (phase, 3, 2)
    with pytest.raises(LocalProtocolError):
        wire.server.close_phase()
    with pytest.raises(LocalProtocolError):
        _ = wire.server.result
    assert m.RELEASE not in [phase for phase, *_ in wire.log]


@pytest.mark.parametrize("phase", sorted(m.KEY_HOLDER_STEPS))
def test_without_the_key_holder_there_is_no_sum(phase: str) -> None:
    wire = HeWire(he_session(), lost={phase: {KEY_HOLDER}})
    with pytest.raises(KeyHolderSilent, match=f"{phase}: no valid answer from the key holder"):
        wire.run()
    with pytest.raises(LocalProtocolError):
        _ = wire.server.result


@pytest.mark.parametrize(
    ("vector", "error"),
    [
        (np.full(7, 0.5), TypeError),
        (np.full(7, np.nan), TypeError),
        (np.full(7, 1.0), TypeError),
        (np.full(7, 1, dtype=np.uint8), TypeError),
        (np.full(7, 101), ValueError),
        (np.full(7, np.iinfo(np.int64).min), ValueError),
        (np.full(6, 1), ValueError),
    ],
)
def test_inputs_that_are_no_integers_in_range_are_refused_at_the_client(
    vector: IntVector, error: type[Exception]
) -> None:
    session = he_session()
    wire = HeWire(session)
    wire.clients[0] = he_client(session, 0, vector)
    with pytest.raises(error):
        wire.run()
    with pytest.raises(LocalProtocolError):
        wire.clients[0].receive(b"")


def test_the_input_is_asked_for_once_and_not_before_the_key_is_verified() -> None:
    session, asked = he_session(), []

    def vector() -> IntVector:
        asked.append(1)
        return np.zeros(7, dtype=np.int64)

    client = he_client(session, 0, vector)
    honest = HeWire(session)
    honest.run()
    foreign = next(sent for phase, party, sent, _ in honest.log if (phase, party) == (m.COMMIT, 0))
    with pytest.raises(RemoteProtocolError):
        client.receive(foreign[:-1] + bytes([foreign[-1] ^ 1]))
    assert not asked
    wire = HeWire(session)
    wire.clients[0] = he_client(session, 0, vector)
    wire.run()
    assert len(asked) == 1


# One answer


def test_an_identical_retransmission_gets_identical_bytes() -> None:
    wire = HeWire(he_session())
    first = wire.exchange(wire.server.start())
    message = wire.log[0][2]
    assert wire.key_holder.receive(message) == first[KEY_HOLDER]
    wire.server.receive(KEY_HOLDER, first[KEY_HOLDER])
    requests = wire.server.close_phase()
    assert wire.clients[0].receive(requests[0]) == wire.clients[0].receive(requests[0])


# After a crash


def test_a_client_that_crashed_after_its_commitment_makes_another_of_the_same_input(tmp_path: Path) -> None:
    session, journal = he_session(), SQLiteJournal(tmp_path / "journal.db", "site-0")
    wire = HeWire(session)
    lost: list[bytes] = []

    def restarted(phase: str, party: int, message: bytes) -> bytes:
        if (phase, party) == (m.COMMIT, 0):
            lost.append(he_client(session, 0, wire.inputs[0], journal).receive(message))
            wire.clients[0] = he_client(session, 0, wire.inputs[0], journal)
        return message

    wire.to_party = restarted
    assert np.array_equal(wire.run().total, sum(wire.inputs.values()))
    assert lost[0] != next(reply for phase, party, _, reply in wire.log if (phase, party) == (m.COMMIT, 0))


def test_a_restarted_client_with_another_input_is_left_out() -> None:
    """Its noise on another update would be a second release."""
    session, journals = he_session(), {0: Kept()}
    first = HeWire(session, journals=journals)
    first.run()
    again = HeWire(session, {**first.inputs, 0: first.inputs[0][::-1].copy()}, journals=journals)
    assert again.run().contributors == (1, 2, 3)
    assert [(party, type(error)) for party, error in again.refusals] == [(0, ReplayRefused)]
    assert "another input" in str(again.refusals[0][1])


def durable(session: Session) -> dict[int, Journal]:
    return {AGGREGATOR: Kept(), KEY_HOLDER: MemoryJournal(), **{client: Kept() for client in session.cohort}}


class Crash(BaseException):
    pass


@pytest.mark.parametrize("phase", [m.KEY, m.COMMIT, m.CLOSE, m.SEND, m.DELIVER, m.RELEASE])
def test_an_attempt_that_crashed_anywhere_begins_anew_and_ends_with_the_same_sum(phase: str) -> None:
    session = he_session()
    journals = durable(session)

    def crash(at: str, party: int, message: bytes) -> bytes:
        if at == phase:  # the answers of this step were made, and perhaps they have left
            raise Crash
        return message

    first = HeWire(session, to_server=crash, journals=journals)
    with pytest.raises(Crash):
        first.run()
    again = HeWire(session, first.inputs, journals=journals)
    assert np.array_equal(again.run().total, sum(first.inputs.values()))
    assert not again.bad and not again.refusals

    def fresh(wire: HeWire, step: str, kind: type, field: str) -> list[bytes]:
        return [getattr(decode(reply, kind, most=10**7), field) for at, _, _, reply in wire.log if at == step]

    for step, kind, field in ((m.KEY, m.Key, "public_key"), (m.COMMIT, m.Commitment, "sealed")):
        assert not set(fresh(first, step, kind, field)) & set(fresh(again, step, kind, field))


def test_a_key_holder_releases_one_set_of_an_attempt_whatever_an_aggregator_forgets() -> None:
    """Two sums that differ in one client are that client's input."""
    session = he_session()
    journals = durable(session)
    first = HeWire(session, journals=journals)
    first.run()
    del journals[AGGREGATOR]
    with pytest.raises(KeyHolderSilent):
        (forgetful := HeWire(session, first.inputs, lost={m.SEND: {3}}, journals=journals)).run()
    assert [(party, type(error)) for party, error in forgetful.refusals] == [(KEY_HOLDER, ReplayRefused)]
    assert "another set or sum" in str(forgetful.refusals[0][1])
    with pytest.raises(KeyHolderSilent):  # refusing ended the attempt: not even the first answer is given again
        HeWire(session, first.inputs, journals=journals).run()


def test_a_key_holder_that_failed_or_refused_makes_no_key_for_that_attempt_any_more() -> None:
    session, journal = he_session(), MemoryJournal()
    wire = HeWire(session, journals={KEY_HOLDER: journal})
    wire.exchange(wire.server.start())
    request = wire.log[0][2]
    with pytest.raises(RemoteProtocolError):
        wire.key_holder.receive(request[:-1])
    again = he_key_holder(session, journal=journal)
    assert again.receive(request)  # what is no message at all has changed nothing
    with pytest.raises(RemoteProtocolError):
        again.receive(encode(m.CloseRequest(sid=wire.server._sid, members=encode_indices((0, 1, 2)), records=b"")))
    assert again._key is None
    with pytest.raises(ReplayRefused):
        he_key_holder(session, journal=journal).receive(request)


def test_an_interrupt_is_as_good_as_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    session, journal = he_session(), MemoryJournal()
    wire = HeWire(session, journals={KEY_HOLDER: journal})

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(wire.key_holder, "_sign", interrupt)
        wire.run()
    assert wire.key_holder._key is None
    assert HeWire(session, wire.inputs, journals={KEY_HOLDER: journal}).run()


def test_an_aggregator_adds_up_the_blinds_of_one_set_whatever_a_key_holder_claims_to_have_lost() -> None:
    """A key holder saw the sum of all, says that it crashed, and waits for one without the victim."""
    session = he_session()
    journals = durable(session)
    first = HeWire(session, lost={m.RELEASE: {KEY_HOLDER}}, journals=journals)
    with pytest.raises(KeyHolderSilent):
        first.run()
    journals[KEY_HOLDER] = MemoryJournal()
    again = HeWire(session, first.inputs, lost={m.SEND: {2}}, journals=journals)
    with pytest.raises(ReplayRefused, match="over other clients"):
        again.run()
    assert m.RELEASE not in [phase for phase, *_ in again.log]
    journals[KEY_HOLDER] = MemoryJournal()
    assert np.array_equal(HeWire(session, first.inputs, journals=journals).run().total, sum(first.inputs.values()))


def test_what_was_withheld_once_is_not_released_by_trying_again() -> None:
    """An addend crafted to show the key's slots passes by luck at times: it has one chance an attempt."""
    session = he_session()
    journals = durable(session)

    def other_blind(phase: str, party: int, message: bytes) -> bytes:
        if phase != m.RELEASE:
            return message
        request = decode(message, m.ReleaseRequest, most=10**7)
        blinds = np.frombuffer(request.blinds, dtype="<u8").copy()
        blinds[-1] = (blinds[-1] + 1) % PLAIN_MODULUS
        return encode(msgspec.structs.replace(request, blinds=blinds.tobytes()))

    first = HeWire(session, to_party=other_blind, journals=journals)
    with pytest.raises(SumOutOfRange):
        first.run()
    with pytest.raises(KeyHolderSilent):
        (again := HeWire(session, first.inputs, journals=journals)).run()
    assert isinstance(again.refusals[0][1], ReplayRefused)


def test_a_later_round_or_attempt_has_another_key_and_an_earlier_one_is_refused() -> None:
    journal, keys = MemoryJournal(stream("journal")), []
    for round_number, attempt in ((1, 0), (1, 1), (2, 0)):
        session = he_session(round=round_number, attempt=attempt)
        wire = HeWire(session)
        wire.key_holder = he_key_holder(session, journal=journal)
        assert np.array_equal(wire.run().total, sum(wire.inputs.values()))
        keys.append(next(reply for phase, _, _, reply in wire.log if phase == m.KEY))
    assert len(set(keys)) == 3
    session = he_session(round=1, attempt=1)
    wire = HeWire(session)
    wire.key_holder = he_key_holder(session, journal=journal)
    with pytest.raises(KeyHolderSilent):
        wire.run()
    assert isinstance(wire.refusals[0][1], ReplayRefused)


def test_machines_refuse_misuse() -> None:
    session = he_session()
    server = HomomorphicServer(session=session, key_holder=KEY_HOLDER, roster=ROSTER)
    for misuse in (lambda: server.close_phase(), lambda: server.receive(0, b""), lambda: server.result):
        with pytest.raises(LocalProtocolError):
            misuse()
    server.start()
    with pytest.raises(LocalProtocolError):
        server.start()
    with pytest.raises(RemoteProtocolError, match="client 0 was not asked"):
        server.receive(0, b"")
    with pytest.raises(ValueError, match="client 5 is not in the cohort"):
        he_client(session, 5, np.zeros(7, dtype=np.int64))
    wire = HeWire(session)
    wire.run()
    for machine in (wire.key_holder, wire.clients[0]):
        assert machine.done
        with pytest.raises(RemoteProtocolError, match="every step of this session has been answered"):
            machine.receive(b"")


def test_the_aggregator_does_without_the_library() -> None:
    code = "import sys, privfed.crypto.homomorphic.server; print([n for n in sys.modules if 'tenseal' in n])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
