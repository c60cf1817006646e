"""A PostgreSQL server of a test's own: in a new folder, on loopback, for as long as it is needed."""

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.privfed.ports import free_port


@dataclass(frozen=True)
class Server:
    """Where it is, and the password of its owner."""

    port: int
    password: str

    def url(self, user: str = "owner") -> str:
        return f"postgresql://{user}@127.0.0.1:{self.port}/postgres"

    def do(self, *statements: str) -> None:
        """As the owner, each on its own."""
        with self.connection() as connection:
            for statement in statements:
                connection.execute(statement)

    def connection(self) -> Any:
        import psycopg

        where = {"host": "127.0.0.1", "port": self.port, "dbname": "postgres"}
        return psycopg.connect(**where, user="owner", password=self.password, autocommit=True)


def binaries() -> Path | None:
    """The folder of the newest server that is installed."""
    found = [Path(path).resolve() for path in [shutil.which("postgres")] if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), reverse=True)
    return found[0].parent if found else None


@contextmanager
def serving(password: str) -> Iterator[Server]:
    """A server; `binaries` must know one. PostgreSQL refuses to run as root: there it runs as nobody."""
    place = binaries()
    assert place is not None
    nobody = pwd.getpwnam("nobody") if os.getuid() == 0 else None
    user: dict[str, Any] = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []} if nobody else {}
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="privfed-pg-") as folder:  # not below pytest's, which nobody may enter
        home, secret = Path(folder), Path(folder) / "password"
        secret.write_text(password)
        if nobody:
            for path in (home, secret):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
        first = [place / "initdb", "-D", home / "data", "-U", "owner", "-A", "scram-sha-256", "--pwfile", secret]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": folder, **user}
        subprocess.run([*first, "-E", "UTF8", "--locale=C", "--no-sync"], check=True, **quiet)
        settings = [
            f"-cport={port}",
            "-clisten_addresses=127.0.0.1",
            f"-cunix_socket_directories={home}",
            "-cfsync=off",
        ]
        quiet["stderr"] = subprocess.DEVNULL
        process = subprocess.Popen([place / "postgres", "-D", home / "data", *settings], **quiet)
        try:
            server = Server(port, password)
            _wait_for(server, process)
            yield server
        finally:
            process.terminate()
            process.wait()


def _wait_for(server: Server, process: "subprocess.Popen[bytes]") -> None:
    import psycopg

    for _ in range(3000):
        assert process.poll() is None, "postgres has ended"
        try:
            server.connection().close()
            return
        except psycopg.OperationalError:
            time.sleep(0.1)
    raise AssertionError("postgres does not answer")
