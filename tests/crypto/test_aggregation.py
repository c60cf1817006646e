"""What plain and masked aggregation must share: exact sums, drop schedules, aborts, misuse."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.crypto.aggregation import default_colluders, default_minimum_cohort, default_threshold, session_id
from privfed.crypto.errors import LocalProtocolError, RemoteProtocolError, ThresholdNotMet

from .consortium import Wire, make_inputs, make_session, masked_client, masked_round, plain_round

PHASES = ["advertise", "share", "mask", "consistency", "unmask"]


def test_defaults_tolerate_a_dropout_from_four_clients_on() -> None:
    assert [default_threshold(n) for n in (1, 2, 3, 4, 5, 6, 9, 10, 100)] == [1, 2, 3, 3, 4, 5, 7, 7, 67]
    assert [default_minimum_cohort(t) for t in (2, 3, 7)] == [3, 3, 7]
    # 2t − n − 1: 2·3−3−1, 2·3−4−1, 2·4−5−1, 2·7−10−1.
    assert [default_colluders(n, default_threshold(n)) for n in (3, 4, 5, 10)] == [2, 1, 2, 3]


@pytest.mark.parametrize(("bound", "n", "bits"), [(1, 1, 2), (100, 5, 10), (2**31 - 1, 1, 32), (127, 257, 16)])
def test_bits_hold_the_largest_sum_exactly(bound: int, n: int, bits: int) -> None:
    session = make_session(range(n), bound=bound, threshold=1, minimum_cohort=1, colluders=0)
    assert session.bits == bits and 2 ** (bits - 1) < 2 * n * bound + 1 <= session.modulus


@pytest.mark.parametrize(
    "changes",
    [
        {"cohort": (1, 0, 2)},
        {"cohort": (0, 0, 1)},
        {"cohort": ()},
        {"threshold": 6},
        {"threshold": 0},
        {"minimum_cohort": 6},
        {"colluders": 5},
        {"colluders": -1},
        {"dim": 0},
        {"bound": 0},
        {"bound": 2**30},
        {"context": b"short"},
        {"run": ""},
        {"round": -1},
        {"degree": 3},
        {"degree": 4},
    ],
)
def test_session_refuses_what_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must"):
        make_session(**changes)


def test_every_field_changes_the_session_id() -> None:
    changes: list[dict[str, Any]] = [
        {"run": "other"}, {"round": 2}, {"attempt": 1}, {"cohort": range(1, 6)}, {"dim": 8}, {"bound": 101},
        {"threshold": 5}, {"minimum_cohort": 5}, {"colluders": 1}, {"context": b"\1" * 32},
        {"degree": 2},
    ]  # fmt: skip
    ids = {session_id(make_session(**change), b"") for change in [{}, *changes]}
    assert len(ids | {session_id(make_session(), bytes(32))}) == len(changes) + 2


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(3, 7), dim=st.integers(1, 40), bits=st.integers(6, 32))
def test_masked_sum_is_the_integer_sum_for_every_drop_schedule(
    data: st.DataObject, n: int, dim: int, bits: int
) -> None:
    cohort = tuple(sorted(data.draw(st.lists(st.integers(0, 11), min_size=n, max_size=n, unique=True))))
    t = data.draw(st.integers(max(2, n // 2 + 1), n))
    session = make_session(
        cohort,
        dim=dim,
        bound=((1 << bits) - 1) // (2 * n),
        threshold=t,
        minimum_cohort=data.draw(st.integers(2, n)),
        colluders=default_colluders(n, t),
    )
    inputs = make_inputs(session, seed=n)
    inputs[cohort[0]][:] = session.bound
    when = {client: data.draw(st.sampled_from([*PHASES, *["never"] * 5])) for client in cohort}
    lost = {phase: [c for c in cohort if when[c] in PHASES[: i + 1]] for i, phase in enumerate(PHASES)}
    wire = Wire(*masked_round(session, inputs), lost=lost)
    alive = [n - len(lost[phase]) for phase in PHASES]
    view_quorum = (alive[0] + session.colluders) // 2 + 1
    needed = [session.quorum] * 3 + [view_quorum, t]
    short = next((i for i in range(5) if alive[i] < needed[i]), None)
    if short is None:
        result = wire.run()
        assert np.array_equal(result.total, sum(inputs[i] for i in result.contributors))
        assert result.contributors == tuple(i for i in cohort if i not in lost["mask"])
        assert result.total.dtype == np.int64 and not wire.bad and not wire.refusals
    else:
        with pytest.raises(ThresholdNotMet) as aborted:
            wire.run()
        assert (aborted.value.stage, aborted.value.needed, aborted.value.have) == (
            PHASES[short], needed[short], alive[short],
        )  # fmt: skip
        assert wire.server.phase == "failed"
        with pytest.raises(LocalProtocolError):
            _ = wire.server.result


@pytest.mark.parametrize("lost", [[], [1]])
def test_plain_and_masked_give_the_same_integers(lost: list[int]) -> None:
    session = make_session(range(5))
    inputs = make_inputs(session)
    plain = Wire(*plain_round(session, inputs), lost={"submission": lost}).run()
    masked = Wire(*masked_round(session, inputs), lost={"mask": lost}).run()
    assert np.array_equal(plain.total, masked.total)
    assert plain.contributors == masked.contributors


def test_plain_refuses_values_beyond_the_bound_repeats_and_small_cohorts() -> None:
    session = make_session(range(4))
    inputs = make_inputs(session)
    server, clients = plain_round(session, inputs)
    wider = make_session(range(4), bound=101)
    requests = server.start()
    reply = clients[0].receive(requests[0])
    assert clients[0].receive(requests[0]) == reply and clients[0].done
    server.receive(0, reply)
    for client, bad in ((0, reply), (9, reply), (1, b""), (1, reply + b"\0")):
        with pytest.raises(RemoteProtocolError):
            server.receive(client, bad)
    outside = bytearray(reply)
    outside[-session.dim * session.bits // 8 :] = b"\xf3" * (
        len(outside) - len(outside[: -session.dim * session.bits // 8])
    )
    with pytest.raises(RemoteProtocolError):
        server.receive(1, bytes(outside))
    with pytest.raises(RemoteProtocolError):
        plain_round(wider, inputs)[1][1].receive(requests[1])
    with pytest.raises(ThresholdNotMet):
        server.close_phase()
    with pytest.raises(LocalProtocolError):
        server.receive(1, reply)


@pytest.mark.parametrize("make", [plain_round, masked_round])
def test_machines_refuse_misuse_by_their_caller(make: Callable[..., Any]) -> None:
    session = make_session()
    server, clients = make(session, make_inputs(session))
    for call in (lambda: server.receive(0, b""), server.close_phase, lambda: server.result):
        with pytest.raises(LocalProtocolError):
            call()
    requests = server.start()
    with pytest.raises(LocalProtocolError):
        server.start()
    wire = Wire(server, clients)
    while not server.done:
        for client, reply in wire.exchange(requests).items():
            server.receive(client, reply)
        requests = server.close_phase()
    for call in (lambda: server.receive(0, b""), server.close_phase, server.start):
        with pytest.raises(LocalProtocolError):
            call()
    with pytest.raises(RemoteProtocolError):
        clients[0].receive(b"more")
    assert clients[0].receive(wire.log[-5][2]) == wire.log[-5][3]


def test_the_vector_is_not_asked_for_when_a_round_dies_before_its_step() -> None:
    session = make_session(range(4))

    def never() -> np.ndarray[Any, np.dtype[np.int64]]:
        raise AssertionError("asked")

    server, _ = masked_round(session, {})
    clients = {i: masked_client(session, i, never) for i in session.cohort}
    with pytest.raises(ThresholdNotMet):
        Wire(server, clients, lost={"share": [0, 1]}).run()


def test_an_exception_of_the_vector_propagates_and_ends_the_machine() -> None:
    session = make_session(range(4))
    inputs: dict[int, Any] = dict(make_inputs(session))

    class BudgetExhausted(Exception):
        pass

    def refuse() -> np.ndarray[Any, np.dtype[np.int64]]:
        raise BudgetExhausted

    inputs[2] = refuse
    server, clients = masked_round(session, inputs)
    with pytest.raises(BudgetExhausted):
        Wire(server, clients).run()
    with pytest.raises(LocalProtocolError):
        clients[2].receive(b"")


@pytest.mark.parametrize("bad", [np.zeros(6, np.int64), np.full(7, 101), np.zeros(7)])
def test_a_bad_vector_ends_the_machine_before_anything_leaves(bad: Any) -> None:
    session = make_session(range(4))
    inputs = {**make_inputs(session), 1: bad}
    server, clients = masked_round(session, inputs)
    wire = Wire(server, clients)
    with pytest.raises((ValueError, TypeError)):
        wire.run()
    assert not any(phase == "mask" and client == 1 for phase, client, _, _ in wire.log)
