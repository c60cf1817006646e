"""Degree and threshold against published answers, the ring itself, and whole rounds on it."""

import math
from fractions import Fraction
from hashlib import sha256
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.crypto import degree, graph
from privfed.crypto.aggregation import default_parameters, default_threshold
from privfed.crypto.errors import RemoteProtocolError, ThresholdNotMet
from privfed.crypto.journal import MemoryJournal
from privfed.crypto.keys import MemoisedVerify
from privfed.crypto.masking.client import MaskedClient
from privfed.crypto.masking.server import MaskedServer
from privfed.crypto.roster import FIRST_PREVIOUS, Identity, Roster

from .consortium import ROSTER, Wire, make_inputs, make_session, masked_round, stream

HONEST: degree.Rule = "semi-honest"
MALICIOUS: degree.Rule = "semi-malicious"

# crypto.md's table for n = 20, 50, 100, 200, 500, 1000.
TABLE: list[tuple[float, float, degree.Rule, list[tuple[int, int]]]] = [
    (0.05, 0.05, HONEST, [(4, 2), (6, 3), (12, 6), (20, 11), (28, 16), (30, 17)]),
    (0.1, 0.1, HONEST, [(6, 3), (12, 6), (22, 11), (34, 19), (42, 24), (48, 27)]),
    (0.2, 0.1, HONEST, [(8, 5), (16, 11), (32, 21), (46, 30), (60, 39), (68, 44)]),
    (0.1, 0.1, MALICIOUS, [(8, 6), (16, 11), (32, 22), (56, 39), (82, 57), (96, 67)]),
    (0.2, 0.2, MALICIOUS, [(14, 10), (32, 22), (62, 42), (118, 80), (220, 150), (302, 206)]),
]


@pytest.mark.parametrize(("corrupt", "dropout", "rule", "answers"), TABLE)
def test_degree_and_threshold_match_the_design(
    corrupt: float, dropout: float, rule: degree.Rule, answers: list[tuple[int, int]]
) -> None:
    for n, answer in zip((20, 50, 100, 200, 500, 1000), answers, strict=True):
        assert degree.degree_and_threshold(n, corrupt=corrupt, dropout=dropout, rule=rule) == answer


@pytest.mark.parametrize(
    ("n", "corrupt", "dropout", "rule", "answer"),
    [
        # google-parfait/federated-compute, fcp/secagg/server/graph_parameter_finder_test.cc
        (10, 0.33, 0.33, HONEST, (8, 4)),
        (100, 0.33, 0.33, HONEST, (68, 34)),
        (1000, 0.33, 0.33, HONEST, (286, 150)),
        (100, 0.45, 0.45, HONEST, (92, 46)),
        (1000, 0.45, 0.45, HONEST, (822, 417)),
        (10, 0.05, 0.33, MALICIOUS, (8, 5)),
        (100, 0.05, 0.05, MALICIOUS, (16, 11)),
        (100, 0.3, 0.3, MALICIOUS, (92, 62)),
        (1000, 0.05, 0.33, MALICIOUS, (398, 223)),
        (1000, 0.3, 0.3, MALICIOUS, (872, 584)),
        (1000, 0.33, 0.05, MALICIOUS, (132, 109)),
        (10_000, 0.05, 0.05, MALICIOUS, (62, 44)),
        (10_000, 0.33, 0.05, MALICIOUS, (178, 146)),
    ],
)
def test_degree_and_threshold_match_googles_finder(
    n: int, corrupt: float, dropout: float, rule: degree.Rule, answer: tuple[int, int]
) -> None:
    assert degree.degree_and_threshold(n, corrupt=corrupt, dropout=dropout, rule=rule) == answer


def test_no_degree_is_better_than_a_wrong_one() -> None:
    with pytest.raises(ValueError, match="complete graph"):
        degree.degree_and_threshold(20, corrupt=0.45, dropout=0.45, rule=MALICIOUS)
    with pytest.raises(ValueError, match="corrupt must be"):
        degree.degree_and_threshold(20, corrupt=1.0)


def test_the_captured_bound_is_the_hypergeometric_tail() -> None:
    n, k, bad = 60, 12, 9
    limit = Fraction(1, n * 2**41)

    def tail(m: int) -> Fraction:
        ways = sum(math.comb(bad, x) * math.comb(n - bad, k - x) for x in range(m + 1, k + 1))
        return Fraction(ways, math.comb(n, k))

    most = degree._most_captured(n, k, bad)
    assert tail(most) < limit <= tail(most - 1)


def test_the_disconnection_bound_covers_every_cut_of_a_small_ring() -> None:
    n, k, bad = 11, 4, 5
    ring = graph.Graph(tuple(range(n)), k // 2)
    cuts = 0
    for removed in combinations(range(n), bad):
        left = set(range(n)) - set(removed)
        reached, frontier = set(), [min(left)]
        while frontier:
            member = frontier.pop()
            if member not in reached:
                reached.add(member)
                frontier += [other for other in ring.neighbours(member) if other in left]
        cuts += reached != left
    assert 0 < cuts / math.comb(n, bad) <= 2 ** degree._log2_disconnected(n, k, bad)


@given(n=st.integers(4, 60), half=st.integers(1, 10), seed=st.integers(0, 100))
def test_the_ring_is_regular_mutual_and_knows_its_positions(n: int, half: int, seed: int) -> None:
    members = tuple(range(7, 7 + 3 * n, 3))
    built = graph.build(members, degree=2 * half, th=sha256(bytes([seed])).digest())
    assert set(built.ring) == set(members)
    for member in members:
        around = built.neighbours(member)
        assert len(set(around)) == len(around) == built.size == min(n, 2 * half + 1)
        assert all(around[built.position(member, other)] == other for other in around)
        assert all(member in built.neighbours(other) for other in around)
        for stranger in set(members) - set(around):
            with pytest.raises(ValueError):
                built.position(member, stranger)


def test_the_transcript_keys_the_permutation() -> None:
    members = tuple(range(200))
    rings = {graph.build(members, degree=8, th=bytes([i]) * 32).ring for i in range(20)}
    assert len(rings) == 20
    assert graph.build(members, degree=8, th=b"\1" * 32) == graph.build(members, degree=8, th=b"\1" * 32)
    # Every client is a given one's neighbour about equally often: 8 of 199 over 300 rings is 12 times.
    met = np.zeros(200)
    for i in range(300):
        met[list(graph.build(members, degree=8, th=sha256(bytes([i % 256, i // 256])).digest()).neighbours(0))] += 1
    assert met[0] == 300 and met[1:].sum() == 8 * 300 and met[1:].max() < 35  # Poisson(12): P < 1e-7 each


def test_defaults_are_complete_up_to_128_and_safe_above() -> None:
    small, large = default_parameters(128), default_parameters(1000)
    assert (small.degree, small.threshold) == (None, default_threshold(128))
    assert (large.degree, large.threshold, large.minimum_cohort, large.colluders) == (96, 67, 900, 100)
    for n in (129, 150, 333, 1000):
        parameters = default_parameters(n)
        assert parameters.degree is not None
        degree.check(n, **{**vars(parameters), "degree": parameters.degree})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"degree": 7}, "even"),
        ({"degree": 1000}, "degree must"),
        ({"threshold": 48}, "threshold must"),
        ({"threshold": 97}, "threshold must"),
        ({"colluders": 899}, "colluders must"),
        ({"colluders": 450}, "too small for degree"),
        ({"degree": 20, "threshold": 15}, "too small"),
        ({"minimum_cohort": 200, "colluders": 10}, "fall apart"),
    ],
)
def test_a_client_refuses_a_graph_too_thin_for_what_it_is_to_withstand(changes: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        degree.check(1000, **{"degree": 96, "threshold": 67, "colluders": 100, "minimum_cohort": 900, **changes})


PHASES = ["advertise", "share", "mask", "consistency", "unmask"]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(9, 12), k=st.sampled_from([4, 6]))
def test_a_sparse_round_gives_the_integer_sum_or_a_typed_abort(data: st.DataObject, n: int, k: int) -> None:
    session = make_session(
        range(n), degree=k, threshold=k // 2 + 1, minimum_cohort=n - k // 2, colluders=1, run=f"run {n}"
    )
    inputs = make_inputs(session, seed=n)
    when = {client: data.draw(st.sampled_from([*PHASES, *["never"] * 20])) for client in session.cohort}
    lost = {phase: [c for c in session.cohort if when[c] in PHASES[: i + 1]] for i, phase in enumerate(PHASES)}
    wire = Wire(*masked_round(session, inputs), lost=lost)
    try:
        result = wire.run()
    except ThresholdNotMet as aborted:
        assert sum(when[c] != "never" for c in session.cohort) and aborted.have < aborted.needed
        assert wire.server.phase == "failed"
    else:
        assert np.array_equal(result.total, sum(inputs[i] for i in result.contributors))
        assert len(result.contributors) >= session.quorum


def test_on_a_sparse_graph_a_client_holds_and_reveals_its_neighbours_shares_only() -> None:
    session = make_session(range(12), degree=4, threshold=3, minimum_cohort=10, colluders=1)
    server, clients = masked_round(session, make_inputs(session))
    wire = Wire(server, clients, lost={"mask": [3]})
    seen: dict[int, int] = {}

    def count(phase: str, client: int, message: bytes) -> bytes:
        if phase == "unmask":
            seen[client] = len(message)
        return message

    wire.to_server = count
    wire.run()
    # Five shares of 40 bytes for five neighbours, itself included, whether they stayed or went.
    assert set(seen) == set(range(12)) - {3} and max(seen.values()) < 5 * 40 + 100


def test_an_accusation_of_a_stranger_is_refused() -> None:
    from privfed.crypto import keys
    from privfed.crypto.masking import messages as m
    from privfed.crypto.wire import decode, encode, encode_indices

    from .consortium import IDENTITIES

    session = make_session(range(12), degree=4, threshold=3, minimum_cohort=10, colluders=1)
    server, clients = masked_round(session, make_inputs(session))
    wire = Wire(server, clients)
    requests = server.start()
    for _ in range(2):
        for client, reply in wire.exchange(requests).items():
            server.receive(client, reply)
        requests = server.close_phase()
    delivery = decode(requests[0], m.Delivery, most=10**6)
    strangers = set(range(12)) - set(server._graph.neighbours(0))
    for accused in ((min(strangers),), (0,)):
        complaints = encode_indices(accused)
        statement = m.complaint_statement(delivery.sid, server._th, 0, delivery.dealers, complaints)
        signature = keys.sign(IDENTITIES[0].secagg_private, statement)
        forged = m.MaskedInput(sid=delivery.sid, masked=memoryview(b""), complaints=complaints, proof=signature)
        with pytest.raises(RemoteProtocolError, match="no honest client"):
            server.receive(0, encode(forged))


def test_many_clients_in_one_process_with_memoised_signatures() -> None:
    n, dim = 150, 500
    identities = [Identity.generate(f"site-{i}", stream(f"many {i}")) for i in range(n)]
    roster = Roster(version=1, previous=FIRST_PREVIOUS, members=tuple(i.member for i in identities))
    session = make_session(range(n), dim=dim, **vars(default_parameters(n)))
    assert (session.degree, session.threshold) == (44, 30)
    inputs, verify = make_inputs(session), MemoisedVerify()
    clients = {
        i: MaskedClient(
            session=session, identity=identities[i], roster=roster, vector=lambda v=inputs[i]: v,  # type: ignore[misc]
            journal=MemoryJournal(), verify=verify,
        )
        for i in range(n)
    }  # fmt: skip
    gone = [3, 50, 51, 52, 99, 149, 20]  # 5 %
    wire = Wire(MaskedServer(session=session, roster=roster, verify=verify), clients, lost={"mask": gone})
    result = wire.run()
    assert set(result.contributors) == set(range(n)) - set(gone) and not wire.bad and not wire.refusals
    assert np.array_equal(result.total, sum(inputs[i] for i in result.contributors))


def test_memoised_verification_still_refuses() -> None:
    from privfed.crypto import keys

    verify, private = MemoisedVerify(), b"\3" * 32
    public, signature = keys.verification_key(private), keys.sign(private, b"statement")
    for _ in range(2):
        verify(public, signature, b"statement")
        bad: list[tuple[Any, ...]] = [
            (public, signature, b"other"),
            (keys.verification_key(b"\4" * 32), signature, b"statement"),
            (public, bytes(64), b"statement"),
        ]
        for arguments in bad:
            with pytest.raises(RemoteProtocolError):
                verify(*arguments)


def test_sessions_on_a_thin_graph_are_refused_by_the_machine() -> None:
    with pytest.raises(ValueError, match="fall apart"):
        MaskedServer(
            session=make_session(range(12), degree=4, threshold=3, minimum_cohort=6, colluders=1), roster=ROSTER
        )
