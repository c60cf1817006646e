"""Processes that share the encryption: same sums, and nothing of them outlives the process they work for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import privfed
from privfed.config import Aggregation, Config, Simulation
from privfed.crypto.homomorphic import client
from privfed.models import MLP
from privfed.workers import workers

from .test_homomorphic_run import small


def wide(threads: int) -> Config:
    # 30 · 150 + 150 + 150 · 2 + 2 = 4952 parameters: two ciphertexts of one field
    return small(
        rounds=1,
        model=MLP(hidden=(150,)),
        aggregation=Aggregation(kind="homomorphic"),
        simulation=Simulation(threads=threads),
    )


def test_a_run_whose_encryption_is_shared_gives_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = privfed.run(wide(1), out=tmp_path / "alone")
    monkeypatch.setattr(client, "CHUNKS_PER_TASK", 1)
    shared = privfed.run(wide(2), out=tmp_path / "shared")
    assert shared.summary.aggregation.aborted_rounds == 0
    torch.testing.assert_close(shared.theta, alone.theta, rtol=0, atol=1e-6)  # torch sums in another order on 2 threads


def test_one_process_makes_no_pool() -> None:
    with workers(1) as pool:
        assert pool is None


CODE = """
import os, time
from privfed.workers import workers

def pid(_):
    time.sleep(0.2)
    return os.getpid()

if __name__ == "__main__":
    with workers(2) as pool:
        print(*{*pool.map(pid, range(4))}, flush=True)
        time.sleep(600)
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(CODE)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        ids = [int(word) for word in parent.stdout.readline().split()]
        assert ids and parent.pid not in ids
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 300
    while any(alive(pid) for pid in ids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in ids if alive(pid)]


def alive(pid: int) -> bool:
    """Running: neither gone nor a zombie that nobody has asked after."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
