"""A masked client whose process dies after each answer, and whose state a keeper may tamper with."""

from collections.abc import Mapping

import msgspec
import pytest

from privfed.crypto.aggregation import Session
from privfed.crypto.errors import LocalProtocolError, RemoteProtocolError, ReplayRefused
from privfed.crypto.journal import MemoryJournal
from privfed.crypto.masking import messages as m
from privfed.crypto.masking.client import MaskedClient
from privfed.crypto.masking.suspended import Suspended
from privfed.crypto.packing import IntVector

from .consortium import Wire, make_inputs, make_session, masked_client, masked_round, stream

SESSION = make_session(range(5))
INPUTS = make_inputs(SESSION)


class Woken:
    """A client that is made anew for each message, and knows what it left behind and its journal alone."""

    def __init__(self, session: Session, index: int, vector: IntVector) -> None:
        self.session, self.index, self.vector = session, index, vector
        self.journal = MemoryJournal(stream(f"seed {index}"))
        self.left: list[bytes] = []

    def machine(self) -> MaskedClient:
        return masked_client(self.session, self.index, self.vector, self.journal)

    def resumed(self, left: bytes) -> MaskedClient:
        machine = self.machine()
        machine.resume(left)
        return machine

    def receive(self, message: bytes) -> bytes:
        machine = self.resumed(self.left[-1]) if self.left else self.machine()
        reply = machine.receive(message)
        self.left.append(machine.suspend())
        return reply

    @property
    def done(self) -> bool:
        return self.machine().done


def woken(session: Session, inputs: Mapping[int, IntVector]) -> dict[int, Woken]:
    return {index: Woken(session, index, vector) for index, vector in inputs.items()}


def logs(clients: object, session: Session, inputs: Mapping[int, IntVector], **more: object) -> Wire:
    wire = Wire(masked_round(session, inputs)[0], clients, **more)  # type: ignore[arg-type]
    wire.result = wire.run()  # type: ignore[attr-defined]
    return wire


@pytest.mark.parametrize("session", [SESSION, make_session(range(10), degree=6, threshold=5, colluders=1)])
@pytest.mark.parametrize("lost", [{}, {m.MASK: (1,)}, {m.CONSISTENCY: (2,)}])
def test_a_client_that_is_woken_for_each_message_says_what_one_that_lives_says(
    session: Session, lost: dict[str, tuple[int, ...]]
) -> None:
    inputs = make_inputs(session)
    lives = logs(masked_round(session, inputs)[1], session, inputs, lost=lost)
    anew = logs(woken(session, inputs), session, inputs, lost=lost)
    assert anew.log == lives.log and not anew.refusals
    assert (anew.result.total == lives.result.total).all()  # type: ignore[attr-defined]


@pytest.fixture
def played() -> dict[int, Woken]:
    clients = woken(SESSION, INPUTS)
    logs(clients, SESSION, INPUTS)
    return clients


def message(phase: str, index: int = 0) -> bytes:
    wire = logs(woken(SESSION, INPUTS), SESSION, INPUTS)
    return next(sent for at, client, sent, _ in wire.log if (at, client) == (phase, index))


def test_who_has_signed_so_is_known_after_waking_and_no_secret_is(played: dict[int, Woken]) -> None:
    last = Suspended.from_bytes(played[0].left[-1])
    assert last.phase == m.DONE and last.summed == SESSION.cohort
    assert not last.input_secret and not last.held and not last.mask_keys and not last.th
    assert played[0].resumed(played[0].left[-1]).summed == SESSION.cohort


def test_the_seed_and_what_follows_from_it_is_never_in_a_state(played: dict[int, Woken]) -> None:
    # The journal's first draw is the seed; a session's private keys and self mask are expanded from it
    seed = stream("seed 0")(32)
    alive = masked_client(SESSION, 0, INPUTS[0])
    alive.receive(message(m.ADVERTISE))
    alive.receive(message(m.SHARE))
    secrets = [seed, alive._private("mask key"), alive._private("box key"), alive._self_mask]
    assert alive._seed == seed and all(len(secret) == 32 for secret in secrets)
    for left in played[0].left:
        assert not any(secret in left for secret in secrets)


def test_a_state_shows_nothing_in_its_repr(played: dict[int, Woken]) -> None:
    assert repr(Suspended.from_bytes(played[0].left[1])) == "Suspended(phase='mask')"


def test_a_state_of_another_session_is_refused(played: dict[int, Woken]) -> None:
    other = Woken(make_session(range(5), round=2), 0, INPUTS[0])
    with pytest.raises(LocalProtocolError, match="another session"):
        other.resumed(played[0].left[1])


@pytest.mark.parametrize("body", [b"", b"\xc0", b"\x91" * 5000, b"\xdd\xff\xff\xff\xff"])
def test_what_is_no_state_is_refused(body: bytes) -> None:
    with pytest.raises(LocalProtocolError, match="not a suspended machine"):
        Woken(SESSION, 0, INPUTS[0]).resumed(body)


def test_a_phase_that_there_is_not_is_refused(played: dict[int, Woken]) -> None:
    forged = msgspec.msgpack.decode(played[0].left[1]) | {"phase": "unmasked"}
    with pytest.raises(LocalProtocolError):
        played[0].resumed(msgspec.msgpack.encode(forged))


def test_a_state_whose_session_is_over_or_has_been_followed_by_another_is_refused(played: dict[int, Woken]) -> None:
    with pytest.raises(ReplayRefused):
        played[0].resumed(played[0].left[2])
    fresh = Woken(SESSION, 0, INPUTS[0])
    fresh.receive(message(m.ADVERTISE))
    later = masked_client(make_session(range(5), round=2), 0, INPUTS[0], fresh.journal)
    later._journal.begin(later._sid, "test", 2, 0)
    with pytest.raises(ReplayRefused):
        fresh.resumed(fresh.left[0])


def test_a_rolled_back_state_never_answers_a_step_again_otherwise() -> None:
    # U2 without client 4 first; then the older state, and all of them: the masks that would then be left are an input
    fewer = logs(woken(SESSION, INPUTS), SESSION, INPUTS, lost={m.SHARE: (4,)})
    client = Woken(SESSION, 0, INPUTS[0])
    for phase in (m.ADVERTISE, m.SHARE):
        client.receive(message(phase))
    client.receive(message(m.MASK))
    other = next(sent for at, index, sent, _ in fewer.log if (at, index) == (m.MASK, 0))
    rolled_back = client.resumed(client.left[1])
    with pytest.raises(ReplayRefused):
        rolled_back.receive(other)
    with pytest.raises(LocalProtocolError):
        rolled_back.suspend()


def test_only_a_new_machine_resumes_and_only_one_that_has_not_failed_is_suspended(played: dict[int, Woken]) -> None:
    client = masked_client(SESSION, 0, INPUTS[0])
    client.receive(message(m.ADVERTISE))
    with pytest.raises(LocalProtocolError, match="only a new machine"):
        client.resume(played[0].left[0])
    with pytest.raises(RemoteProtocolError):
        client.receive(message(m.MASK))
    client = masked_client(SESSION, 0, INPUTS[0])
    client.receive(message(m.ADVERTISE))
    with pytest.raises(RemoteProtocolError):
        client.receive(message(m.SHARE).replace(client._advertisement[-20:], bytes(20)))
    with pytest.raises(LocalProtocolError, match="failed"):
        client.suspend()
