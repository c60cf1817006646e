"""A whole consortium on this machine: three folders, real certificates, real processes, mTLS on loopback."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from privfed.config import Config, Policy
from privfed.deployment import jobs, kits, processes, runs
from privfed.deployment.consortium import ADMIN, ORGANISATION, SERVER, Consortium
from privfed.deployment.hospital import KIT
from privfed.folder import RunFolder
from tests.privfed.deployment import house
from tests.privfed.deployment.house import SITES
from tests.privfed.engines.flare_rig import ROOT, Party, job_processes, quick_certificates, until
from tests.privfed.ports import free_port


class Loopback:
    """A consortium whose parts can be started, killed and started again."""

    def __init__(self, home: Path, config: Config, *, policy: Policy = house.OPEN, study: bool = True) -> None:
        with quick_certificates():
            self.consortium: Consortium = house.found(home, config, port=free_port(), policy=policy, study=study)
        self.home, self.sites = home, tuple(config.data.files)  # type: ignore[union-attr]
        self.parties: dict[str, Party] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.parties):
            self.kill(name)

    def start(self, *names: str, environment: Mapping[str, str] | None = None) -> None:
        """Start the server, or a site, as their commands do."""
        for name in names:
            command = (
                processes.server_command(self._kit(name), organisation=ORGANISATION, address="127.0.0.1")
                if name == SERVER
                else processes.client_command(self._kit(name), site=name, organisation=f"{name}-hospital")
            )
            self.parties[name] = Party(command, self.home / f"{name}.out", environment)

    def everybody(self) -> None:
        self.start(SERVER, *self.sites)
        self.connected()

    def connected(self, *sites: str) -> None:
        """Return once they are there; default all."""
        until(lambda: set(self.clients()) >= set(sites or self.sites))

    def preflight(self, path: Path) -> dict[str, dict[str, Any]]:
        """What ``privfed coordinator preflight`` finds, by what was looked at; its exit code agrees."""
        command = self.command("coordinator", "preflight", self.consortium.home, path, "--json")
        out, errors = command.communicate(timeout=400)
        found = json.loads(out or errors)
        assert command.returncode == (0 if all(one["ok"] for one in found) else 1), errors.decode()
        assert all(one["next"] for one in found if not one["ok"])
        return {one["what"]: one for one in found}

    def kill(self, name: str) -> None:
        """kill -9 of a party and of what it started."""
        for pid in self.job_pids(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.parties.pop(name).kill()
        for pid in self.job_pids(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def job_pids(self, name: str) -> list[int]:
        return job_processes(self._kit(name))

    def clients(self) -> list[str]:
        with self.session() as session:
            return jobs.clients(session) if session else []

    def session(self) -> "_Session":
        return _Session(self.consortium.home / ADMIN)

    def submit(self, path: Path, *, block: int = 10, join_seconds: int = 30) -> "subprocess.Popen[bytes]":
        waits = ("--block", block, "--join-seconds", join_seconds)
        return self.command("coordinator", "submit", self.consortium.home, path, *waits, "--json")

    def command(self, *words: Any) -> "subprocess.Popen[bytes]":
        """``privfed …``, in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "privfed", *map(str, words)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self) -> RunFolder:
        """The latest run, once it is there."""
        found: RunFolder = until(self._run)
        return found

    def rounds(self) -> int:
        return len(runs.progress(self.run()))

    def logs(self) -> bytes:
        """Everything that was written, but keys, certificates, tables and books."""
        found = [path for path in self.home.rglob("*") if path.is_file() and path.suffix in (".txt", ".out", ".log")]
        text = b""
        for path in found:
            with suppress(FileNotFoundError):  # FLARE takes the folder of a job away that has ended
                text += path.read_bytes()
        return text

    def _run(self) -> RunFolder | None:
        with suppress(Exception):
            return runs.find(self.consortium, None)
        return None

    def _kit(self, name: str) -> Path:
        return self.consortium.home / SERVER if name == SERVER else self.home / name / KIT


class _Session:
    def __init__(self, kit: Path) -> None:
        self._session = jobs.login(kit)

    def __enter__(self) -> Any:
        return self._session

    def __exit__(self, *_: object) -> None:
        if self._session is not None:
            with suppress(Exception):
                self._session.close()


def over(loopback: Loopback, job: str) -> Callable[[], str]:
    """FLARE's word on a job, once it has one that is final."""

    def status() -> str:
        with loopback.session() as session:
            found = jobs.status(session, job) if session else ""
        return found if jobs.is_over(found) else ""

    return status


__all__ = ["SITES", "Loopback", "kits", "over", "until"]
