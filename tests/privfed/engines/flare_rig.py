"""A FLARE federation over mTLS on loopback, in a folder: real certificates, real processes."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, Self
from unittest import mock

from privfed.deployment import jobs, kits, processes
from tests.privfed.ports import free_port

ROOT = Path(__file__).parents[3]


def until(ready: Callable[[], Any], seconds: float = 240.0) -> Any:
    """What ``ready`` gives when it gives something; a failure after so long: no test waits for ever."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := ready():
            return found
        time.sleep(0.1)
    raise TimeoutError(f"{ready} gave nothing in {seconds} s")


@contextmanager
def quick_certificates() -> Iterator[None]:
    """FLARE's own commands in this process: importing them anew for each takes longer than all else together."""
    from nvflare.cli import main

    def flare(*commands: Sequence[str | Path], home: Path) -> None:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        for command in commands:
            with mock.patch.object(sys, "argv", ["nvflare", *map(str, command)]), redirect_stdout(io.StringIO()) as out:
                with mock.patch.dict(os.environ, {"HOME": str(home)}), redirect_stderr(out):
                    try:
                        main()
                    except SystemExit as end:
                        if end.code:
                            raise kits.DeploymentError(f"nvflare: {out.getvalue().strip()}") from None

    before = os.umask(0o077)
    try:
        with mock.patch.object(kits, "flare", flare):
            yield
    finally:
        os.umask(before)


class Party:
    """One started program, and its whole process group."""

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                env={**processes.environment(), "PYTHONPATH": str(ROOT), **(environment or {})},
                stdout=output,
                stderr=output,
                cwd=log.parent,
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def job_processes(kit: Path) -> list[int]:
    """The processes of jobs that work in ``kit``: not the program that started them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if any(word.startswith(str(kit)) for word in words) and any(
                "runner_process" in word or "worker_process" in word for word in words
            ):
                found.append(int(entry.name))
    return found


class Rig:
    """The suite's engine over FLARE. ``exchange`` runs in the server's job process."""

    pace = 1.0

    def __init__(self, home: Path, sites: tuple[str, ...]) -> None:
        self.home, self.sites, self.port = home, sites, free_port()
        self.parties: dict[str, Party] = {}
        mark = kits.new_authority(home / "authority", "suite", "localhost", self.port)
        for name, kind in [("localhost", "server"), *((site, "client") for site in sites), ("lead@suite.org", "admin")]:
            more: dict[str, Any] = {"org": "suite"}
            if kind == "server":
                more |= {"fed_learn_port": self.port, "admin_port": self.port}
            if kind == "admin":
                more |= {"role": "lead"}
            asked = kits.request(home / f"request-{name}", "suite", name=name, type=kind, **more)
            signed = kits.approve(home / "authority", asked, home / f"{name}.signed.zip")
            kit = kits.package(signed, asked.parent, fingerprint=mark, out=home / name, name=name, home=home / ".flare")
            own = "tests.privfed.engines.flare_parts."
            if kind == "server":
                kits.harden(kit, "server", home, classes=(own + "RemoteControlled",))
            if kind == "client":
                kits.harden(kit, "site", home, classes=(own + "Echoing",))

    def __enter__(self) -> Self:
        self.start("localhost")
        for site in self.sites:
            self.start(site)
        self.session = until(lambda: jobs.login(self.home / "lead@suite.org"))
        until(lambda: set(jobs.clients(self.session)) == set(self.sites))
        folder = self.home / "job"
        jobs.write_job(
            folder,
            str(self.socket),
            sites=len(self.sites),
            controller="tests.privfed.engines.flare_parts.RemoteControlled",
            executor="tests.privfed.engines.flare_parts.Echoing",
        )
        self.job = self.session.submit_job(str(folder))
        self._connection: Connection = until(self._connect)
        here = self._call("wait_for", set(self.sites), 240.0)
        assert here == set(self.sites), here
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(Exception):
            self.session.close()
        for party in self.parties.values():
            party.kill()
        for name in ("localhost", *self.sites):
            for pid in job_processes(self.home / name):
                os.kill(pid, 9)

    @property
    def socket(self) -> Path:
        return self.home / "exchange.socket"

    def start(self, name: str) -> None:
        kit = self.home / name
        command = (
            processes.server_command(kit, organisation="suite", address="127.0.0.1")
            if name == "localhost"
            else processes.client_command(kit, site=name, organisation="suite")
        )
        self.parties[name] = Party(command, self.home / f"{name}.out")

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        found: dict[str, bytes] = self._call("exchange", dict(requests), deadline_seconds)
        return found

    def order(self, site: str, topic: str, body: str, *, channel: str = "admin", job: bool = False) -> str:
        return str(self._call("order", site, topic, body, channel, job))

    def wait_for(self, sites: set[str]) -> None:
        assert self._call("wait_for", sites, 240.0) == sites

    def _call(self, method: str, *arguments: object) -> Any:
        self._connection.send((method, arguments))
        return self._connection.recv()

    def _connect(self) -> Connection | None:
        try:
            return Client(str(self.socket), family="AF_UNIX")
        except OSError:
            return None

    def logs(self) -> bytes:
        """Every file that FLARE and the programs wrote, but keys and certificates."""
        paths = [
            path for path in self.home.rglob("*") if path.is_file() and path.suffix in (".txt", ".out", ".json", ".log")
        ]
        return b"".join(path.read_bytes() for path in paths)
