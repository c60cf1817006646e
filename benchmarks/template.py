"""Processes forked from one that has imported everything: many sites of one machine share their libraries' pages.

For `many_hospitals.py` alone. A hospital has a machine of its own, and its processes are started as ordinary ones. Each
process forked here is one all the same: with its own certificate, folder, connection and memory from then on.

    python benchmarks/template.py SOCKET
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

MODULES = (
    "nvflare.private.fed.app.client.client_train",
    "nvflare.private.fed.app.client.worker_process",
    "privfed.deployment.flare",
    "sklearn.metrics",
)
PLACE = "PRIVFED_TEMPLATE"
"""In the environment of what was forked: the template's socket."""


class Forked:
    """A process that the template has forked; as FLARE's own adapter of a process, and as `Party`."""

    def __init__(self, place: str, words: list[str], env: dict[str, str], cwd: str, out: str) -> None:
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(place)
        asked = json.dumps({"words": words, "env": {**env, PLACE: place}, "cwd": cwd, "out": out}).encode()
        self._line.sendall(len(asked).to_bytes(4, "big") + asked)
        self.pid = int.from_bytes(_exactly(self._line, 4), "big")
        self._code: int | None = None

    @property
    def process(self) -> "Forked":
        return self

    def poll(self) -> int | None:
        if self._code is None and select.select([self._line], [], [], 0)[0]:
            self.wait()
        return self._code

    def wait(self) -> None:
        if self._code is None:
            said = _exactly(self._line, 4)
            self._code = int.from_bytes(said, "big", signed=True) if said else -signal.SIGKILL

    def terminate(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    kill = terminate


def spawn(words: list[str], env: dict[str, str]) -> Forked:
    """In the place of FLARE's own way to start a site's job."""
    return Forked(os.environ[PLACE], words, dict(env), os.getcwd(), os.environ["PRIVFED_OUT"])


def of_parties(home: Path) -> dict[int, str]:
    """Process → whose it is, by the file in ``home`` that it prints to: jobs inherit it."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                out = Path(os.readlink(entry / "fd" / "1"))
                if out.parent == home and out.suffix == ".out":
                    found[int(entry.name)] = out.stem
    return found


def end(home: Path) -> None:
    """kill -9 of all of them."""
    for pid in of_parties(home):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def templated() -> Any:
    """`Loopback`, with sites' services and jobs forked; the server and its job are not."""
    from privfed.deployment import processes
    from privfed.deployment.consortium import SERVER
    from privfed.deployment.hospital import KIT
    from tests.privfed.deployment.loopback import Loopback
    from tests.privfed.engines.flare_rig import Party, until

    class Templated(Loopback):
        def __enter__(self) -> Any:
            place = self.home / "template.socket"
            command = [sys.executable, __file__, str(place)]
            self.parties["template"] = Party(command, self.home / "template.out")
            until(place.exists)
            return self

        def __exit__(self, *_: object) -> None:
            end(self.home)

        def start(self, *names: str, environment: Mapping[str, str] | None = None) -> None:
            place, env = str(self.home / "template.socket"), {**processes.environment(), **(environment or {})}
            for name in names:
                if name == SERVER:
                    super().start(name, environment=environment)
                else:
                    command = processes.client_command(
                        self.home / name / KIT, site=name, organisation=f"{name}-hospital"
                    )
                    out = str(self.home / f"{name}.out")
                    self.parties[name] = Forked(place, command, env, str(self.home), out)  # type: ignore[assignment]

    return Templated


def main(place: str) -> None:
    for module in MODULES:
        importlib.import_module(module)
    import nvflare.app_common.job_launcher.process_launcher as launcher

    launcher.spawn_process = spawn
    gc.collect()
    gc.freeze()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(place)
    listening.listen(256)
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    lines: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listening, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _report(lines)
        if listening in ready:
            line, _ = listening.accept()
            asked = json.loads(_exactly(line, int.from_bytes(_exactly(line, 4), "big")))
            if (pid := os.fork()) == 0:
                for other in (listening, line, *lines.values()):
                    other.close()
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _become(asked)
            lines[pid] = line
            line.sendall(pid.to_bytes(4, "big"))


def _report(lines: dict[int, socket.socket]) -> None:
    """Tell whoever asked for a process that it has ended."""
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            line = lines.pop(found[0])
            with suppress(OSError):
                line.sendall(os.waitstatus_to_exitcode(found[1]).to_bytes(4, "big", signed=True))
            line.close()


def _become(asked: dict[str, Any]) -> None:
    """Go on as ``python -u -m MODULE …``."""
    code = 1
    try:
        os.setsid()
        os.umask(0o077)
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["env"], PRIVFED_OUT=asked["out"])
        with Path(asked["out"]).open("ab") as output:
            for standard in (1, 2):
                os.dup2(output.fileno(), standard)
        at = asked["words"].index("-m")
        sys.argv = asked["words"][at + 1 :]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _exactly(line: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (more := line.recv(size - len(found))):
        found += more
    return found


if __name__ == "__main__":
    main(sys.argv[1])
