import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from privfed.crypto.errors import LocalProtocolError, ReplayRefused
from privfed.crypto.journal import Journal, JournalFile, MemoryJournal, SQLiteJournal

from .consortium import Wire, make_inputs, make_session, masked_client, masked_round

A, B, C = b"a" * 32, b"b" * 32, b"c" * 32


@pytest.fixture(params=["memory", "sqlite"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Journal:
    return MemoryJournal() if request.param == "memory" else SQLiteJournal(tmp_path / "journal.db", "site")


def test_the_unfinished_session_gets_its_seed_again_and_no_other_does(journal: Journal) -> None:
    seed = journal.begin(A, "run", 3, 0)
    assert len(seed) == 32 and journal.begin(A, "run", 3, 0) == seed
    with pytest.raises(ReplayRefused):
        journal.begin(B, "run", 3, 0)
    for lower in ((2, 9), (0, 0)):
        with pytest.raises(ReplayRefused):
            journal.begin(C, "run", *lower)
    assert journal.begin(B, "run", 3, 1) != seed
    with pytest.raises(ReplayRefused):
        journal.begin(A, "run", 3, 0)
    journal.begin(C, "another run", 0, 0)


def test_a_finished_session_is_refused_for_ever(journal: Journal) -> None:
    journal.begin(A, "run", 1, 0)
    journal.finish(A)
    journal.finish(A)
    with pytest.raises(ReplayRefused):
        journal.begin(A, "run", 1, 0)
    with pytest.raises(LocalProtocolError):
        journal.answer(A, "step", B, C)
    journal.begin(B, "run", 1, 1)


def test_a_step_has_one_answer(journal: Journal) -> None:
    journal.begin(A, "run", 1, 0)
    journal.answer(A, "step", B, C)
    journal.answer(A, "step", B, C)
    for request, reply in ((B, B), (C, C)):
        with pytest.raises(ReplayRefused):
            journal.answer(A, "step", request, reply)
    journal.answer(A, "next step", B, B)


def test_owners_share_a_file_without_sharing_marks(tmp_path: Path) -> None:
    one, two = (SQLiteJournal(tmp_path / "journal.db", owner) for owner in ("one", "two"))
    assert one.begin(A, "run", 1, 0) != two.begin(A, "run", 1, 0)
    one.finish(A)
    two.answer(A, "step", B, C)


def test_the_file_is_private_and_a_finished_seed_is_gone_from_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal = SQLiteJournal(path, "site")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    seed = journal.begin(A, "run", 1, 0)
    assert seed in path.read_bytes()
    journal.finish(A)
    assert seed not in path.read_bytes()
    path.chmod(0o644)
    with pytest.raises(PermissionError, match="chmod 600"):
        SQLiteJournal(path, "site")


def test_what_was_recorded_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    code = (
        "import os, signal, sys; from pathlib import Path; from privfed.crypto.journal import SQLiteJournal\n"
        "j = SQLiteJournal(Path(sys.argv[1]), 'site'); s = j.begin(b'a' * 32, 'run', 1, 0)\n"
        "j.answer(b'a' * 32, 'step', b'b' * 32, b'c' * 32); os.write(1, s); os.kill(os.getpid(), signal.SIGKILL)"
    )
    child = subprocess.run([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=os.getcwd())
    assert child.returncode == -signal.SIGKILL
    journal = SQLiteJournal(path, "site")
    assert journal.begin(A, "run", 1, 0) == child.stdout
    with pytest.raises(ReplayRefused):
        journal.answer(A, "step", B, B)


@pytest.mark.parametrize("answered", range(1, 6))
def test_a_client_killed_after_any_step_answers_byte_identically(tmp_path: Path, answered: int) -> None:
    session = make_session(range(4))
    inputs = make_inputs(session)
    journal = SQLiteJournal(tmp_path / "journal.db", "site-0")
    server, clients = masked_round(session, inputs)
    clients[0] = masked_client(session, 0, inputs[0], journal)

    class Restarting:
        done = False

        def __init__(self) -> None:
            self.messages: list[bytes] = []
            self.replies: list[bytes] = []
            self.machine = clients[0]

        def receive(self, message: bytes) -> bytes:
            self.messages.append(message)
            self.replies.append(self.machine.receive(message))
            if len(self.messages) == answered < 5:
                self.machine = masked_client(session, 0, inputs[0], journal)
                assert [self.machine.receive(m) for m in self.messages] == self.replies
            return self.replies[-1]

    restarting = Restarting()
    wire = Wire(server, {**clients, 0: restarting})
    assert np.array_equal(wire.run().total, sum(inputs.values()))
    with pytest.raises(ReplayRefused):  # finished: the seed is gone
        masked_client(session, 0, inputs[0], journal).receive(restarting.messages[0])


def test_a_restarted_client_with_another_vector_sends_nothing(tmp_path: Path) -> None:
    session = make_session(range(4))
    inputs = make_inputs(session)
    server, clients = masked_round(session, inputs)
    journal = SQLiteJournal(tmp_path / "journal.db", "site-0")
    clients[0] = masked_client(session, 0, inputs[0], journal)
    wire = Wire(server, clients)
    requests = server.start()
    for _ in range(3):
        for client, reply in wire.exchange(requests).items():
            server.receive(client, reply)
        requests = server.close_phase()
    messages = [sent for _, client, sent, _ in wire.log if client == 0]
    again = masked_client(session, 0, -inputs[0], journal)
    for message in messages[:2]:
        again.receive(message)
    with pytest.raises(ReplayRefused):
        again.receive(messages[2])


def test_journals_of_one_file_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    file = JournalFile(tmp_path / "journal.db")
    one, two = SQLiteJournal(file, "one"), SQLiteJournal(file, "two")
    with file.together():
        seed = one.begin(A, "run", 1, 0)
        two.begin(B, "run", 1, 0)
        with pytest.raises(LocalProtocolError):
            two.answer(C, "step", A, A)  # one owner's trouble is not the other's
        two.answer(B, "step", A, A)
    with pytest.raises(KeyboardInterrupt), file.together():
        one.answer(A, "step", B, B)
        raise KeyboardInterrupt
    again = SQLiteJournal(tmp_path / "journal.db", "one")
    assert again.begin(A, "run", 1, 0) == seed
    again.answer(A, "step", C, C)  # the other answer never left
    with pytest.raises(ReplayRefused):
        two.answer(B, "step", C, C)
