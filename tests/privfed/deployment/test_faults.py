"""kill -9 of every part of a deployment, over real processes: a block may be lost, never an entry of a ledger.

``make test-pilot`` runs these; they take minutes.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from privfed import config_io
from privfed.deployment import runs
from privfed.deployment.hospital import LEDGER, Hospital
from privfed.deployment.site_status import read
from privfed.federation import RoundReport
from tests.privfed.deployment import house
from tests.privfed.deployment.house import SITES
from tests.privfed.deployment.test_blocks import INSECURE, same_as_in_process, spends

pytest.importorskip("nvflare", reason="the extra [nvflare] is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.skipif(not os.environ.get("PRIVFED_PILOT"), reason="minutes over real processes: make test-pilot"),
]

ROUNDS = 12


@pytest.fixture
def federation(tmp_path: Path) -> Iterator["Federation"]:
    with Federation(tmp_path) as federation:
        yield federation


class Federation:
    """A consortium at work on a run of `ROUNDS` rounds."""

    def __init__(self, home: Path, **more: Any) -> None:
        from tests.privfed.deployment.loopback import Loopback

        # Rounds that last long enough to be cut short
        self.config = house.experiment(
            house.tables(home / "tables"), rounds=ROUNDS, privacy=INSECURE, evaluation={"local_steps": 400}, **more
        )
        self.home, self.path = home, home / "experiment.toml"
        self.path.write_text(config_io.to_toml(self.config))
        self.loopback = Loopback(home, self.config)

    def __enter__(self) -> "Federation":
        self.loopback.__enter__().everybody()
        self.command = self.loopback.submit(self.path, block=4)
        return self

    def __exit__(self, *_: object) -> None:
        if self.command.poll() is None:
            self.command.kill()
        self.command.communicate()
        self.loopback.__exit__()

    def after(self, rounds: int) -> None:
        """Return once so many rounds stand in the checkpoint."""
        end = time.monotonic() + 200
        while self.loopback.rounds() < rounds:
            assert time.monotonic() < end and self.command.poll() is None, self.command.poll()
            time.sleep(0.02)

    def until(self, happened: Callable[[list[RoundReport]], bool]) -> None:
        """Return once the rounds so far show it."""
        end = time.monotonic() + 200
        while not happened(runs.progress(self.loopback.run())):
            assert time.monotonic() < end and self.command.poll() is None, self.command.poll()
            time.sleep(0.1)

    def finish(self) -> dict[str, object]:
        """The summary, and nothing lost: what left a site stands in its ledger, and ε is that of its entries."""
        out, errors = self.command.communicate(timeout=400)
        assert self.command.returncode == 0, errors.decode()[-2000:]
        summary: dict[str, object] = json.loads(out)
        reports = runs.progress(self.loopback.run())
        assert [report.round for report in reports] == list(range(ROUNDS))
        assert summary["complete"]
        for site in SITES:
            charged = [entry[1] for entry in spends(self.home / site / LEDGER, site) if entry[0] == "charge"]
            assert len(charged) == len(set(charged)), "a round is paid for once"
            assert {report.round for report in reports if site in report.contributed} <= set(charged)
            status = read(Hospital.open(self.home / site))
            measured = [r.measurements[site].epsilon for r in reports if site in r.measurements]
            assert measured[-1] is not None and status.epsilon >= measured[-1] - 1e-9
        return summary

    def resume(self) -> None:
        self.command = self.loopback.command(
            "coordinator",
            "resume",
            self.loopback.consortium.home,
            self.loopback.run().path.name,
            "--block",
            4,
            "--json",
        )


def test_a_killed_command_of_the_coordinator_changes_nothing(federation: Federation) -> None:
    federation.after(2)
    federation.command.send_signal(signal.SIGKILL)
    federation.command.communicate()
    federation.resume()
    federation.finish()
    same_as_in_process(federation.home, federation.config, federation.loopback.run())


def test_a_killed_server_loses_no_round_and_no_entry(federation: Federation) -> None:
    federation.after(2)
    federation.loopback.kill("server")
    federation.loopback.start("server")
    federation.finish()
    same_as_in_process(federation.home, federation.config, federation.loopback.run())


def test_a_killed_job_of_the_coordinator_loses_no_round_and_no_entry(federation: Federation) -> None:
    federation.after(2)
    for pid in federation.loopback.job_pids("server"):
        os.kill(pid, signal.SIGKILL)
    federation.finish()
    same_as_in_process(federation.home, federation.config, federation.loopback.run())


def test_a_killed_job_of_a_site_costs_at_most_the_round_and_the_site_comes_back(federation: Federation) -> None:
    federation.after(1)
    for pid in federation.loopback.job_pids("south"):
        os.kill(pid, signal.SIGKILL)
    federation.finish()
    reports = runs.progress(federation.loopback.run())
    assert "south" in reports[-1].contributed
    assert sum("south" not in report.contributed for report in reports) <= 4


def test_a_killed_site_comes_back_with_the_next_block(federation: Federation) -> None:
    federation.after(1)
    federation.loopback.kill("west")
    federation.loopback.start("west")
    federation.finish()
    assert "west" in runs.progress(federation.loopback.run())[-1].contributed


def test_a_stop_ends_after_a_round_and_resume_goes_on(federation: Federation) -> None:
    federation.after(1)
    stop = federation.loopback.command("coordinator", "stop", federation.loopback.consortium.home)
    assert stop.wait(timeout=300) == 0
    stop.communicate()
    _, errors = federation.command.communicate(timeout=300)
    assert federation.command.returncode == 3, errors.decode()
    assert federation.loopback.rounds() < ROUNDS
    federation.resume()
    federation.finish()
    same_as_in_process(federation.home, federation.config, federation.loopback.run())


__all__ = ["subprocess"]
