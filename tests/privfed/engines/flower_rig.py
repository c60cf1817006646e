"""A Flower federation over TLS on loopback, in a folder: a SuperLink, SuperNodes with keys, real processes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

from privfed.engines.contract import Engine
from tests.privfed.engines.flare_rig import ROOT, until
from tests.privfed.ports import free_port

BIN = Path(sys.executable).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PATH": f"{BIN}:{os.environ['PATH']}",
}
NAME = "suite"  # of the SuperLink, in the configuration of Flower's command


def certificates(home: Path) -> None:
    """A CA's certificate, and a server's for loopback: ``ca.pem``, ``server.pem``, ``server.key``."""
    now = datetime.now(UTC)

    def made(name: str, key: ec.EllipticCurvePrivateKey, by: ec.EllipticCurvePrivateKey, *, ca: bool) -> bytes:
        addresses = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))])
        common = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, "suite CA")]
        identity = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key())
        builder = (
            x509.CertificateBuilder(common[1], common[0], key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(identity, critical=False)
            .add_extension(issuer, critical=False)
        )
        if not ca:
            builder = builder.add_extension(addresses, critical=False)
        return builder.sign(by, SHA256()).public_bytes(serialization.Encoding.PEM)

    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    (home / "ca.pem").write_bytes(made("suite CA", authority, authority, ca=True))
    (home / "server.pem").write_bytes(made("localhost", server, authority, ca=False))
    _private(home / "server.key", server, serialization.PrivateFormat.PKCS8)


def node_key(path: Path) -> Path:
    """A SuperNode's key at ``path``; its public half beside it."""
    key = ec.generate_private_key(ec.SECP384R1())
    _private(path, key, serialization.PrivateFormat.OpenSSH)
    public = path.with_suffix(".pub")
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )
    return public


def _private(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


class Rig:
    """A federation; with `begin`, the suite's engine over a run of it.

    Args:
        home: a short path: Flower's servers and ours have sockets there.
        nodes: site → the configuration of its SuperNode.
    """

    def __init__(self, home: Path, nodes: Mapping[str, Mapping[str, str]]) -> None:
        self.home, self.nodes, self.port = home, dict(nodes), free_port()
        self.parties: dict[str, subprocess.Popen[bytes]] = {}
        self.ids: dict[str, int] = {}
        certificates(home)
        self._folder("command")
        (home / "command" / "config.toml").write_text(
            f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{home / "ca.pem"}"\n'
        )

    def __enter__(self) -> Self:
        try:
            self.begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.parties):
            self.kill(name)

    def begin(self) -> None:
        """The SuperLink, and a SuperNode for each site."""
        self.start_link()
        for site in self.nodes:
            self.register(site)
            self.start(site)
        until(lambda: self.online() == set(self.nodes))

    def start_link(self) -> None:
        tls = {"certfile": "server.pem", "keyfile": "server.key", "ca-certfile": "ca.pem"}
        self._start(
            "link",
            "flower-superlink",
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            *("--host", "127.0.0.1", "--port", self.port),
            *(word for name, file in tls.items() for word in (f"--ssl-{name}", self.home / file)),
        )
        until(lambda: self.command("supernode", "list", check=False).returncode == 0)

    def register(self, site: str) -> None:
        """Have the SuperLink know a site's key; the number that it gives the node."""
        public = node_key(self.home / f"{site}.key")
        said = self.command("supernode", "register", public, NAME, "--format", "json").stdout
        self.ids[site] = int(json.loads(said[said.index(b"{") :])["node-id"])

    def start(self, site: str) -> None:
        words = " ".join(f'{key}="{value}"' for key, value in self.nodes[site].items())
        self._start(
            site,
            "flower-supernode",
            *("--superlink", f"127.0.0.1:{self.port}", "--root-certificates", self.home / "ca.pem"),
            *("--auth-supernode-private-key", self.home / f"{site}.key", "--node-config", words),
            *("--host", "127.0.0.1", "--port", free_port()),
        )

    def restart(self, site: str) -> None:
        """End a site's SuperNode as its supervisor does, and start it again: what it had in memory is gone.

        After a kill -9 the SuperLink lets a node in again only when it has missed it for a minute.
        """
        self.parties[site].terminate()
        self.parties[site].wait(60)
        self.kill(site)
        before = (self.home / f"{site}.out").stat().st_size
        self.start(site)
        until(lambda: b"SuperNode ID" in (self.home / f"{site}.out").read_bytes()[before:])

    def kill(self, name: str) -> None:
        """kill -9 of a party and of all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.parties[name].pid, signal.SIGKILL)
        self.parties.pop(name).wait()

    def online(self) -> set[str]:
        said = self.command("supernode", "list", NAME, "--format", "json").stdout
        found = json.loads(said[said.index(b"{") :])["nodes"]
        here = {int(node["node-id"]) for node in found if node["status"] == "online"}
        return {site for site, number in self.ids.items() if number in here}

    def command(self, *words: Any, check: bool = True) -> "subprocess.CompletedProcess[bytes]":
        """``flwr …``, as a user types it."""
        environment = {**os.environ, **QUIET, "FLWR_HOME": str(self.home / "command")}
        done = subprocess.run(
            [str(BIN / "flwr"), *map(str, words)], env=environment, capture_output=True, timeout=120, cwd=self.home
        )
        assert not check or done.returncode == 0, (done.stdout + done.stderr).decode()
        return done

    def run(self, app: Path, **config: str) -> int:
        """Start a run of an app; its number."""
        words = " ".join(f'{key}="{value}"' for key, value in config.items())
        said = self.command("run", app, NAME, "--run-config", words, "--format", "json").stdout
        return int(json.loads(said[said.index(b"{") :])["run-id"])

    def logs(self) -> bytes:
        """Every file that Flower and the programs wrote, but keys and certificates."""
        paths = [path for path in self.home.rglob("*") if path.is_file() and path.suffix in (".out", ".log", ".txt")]
        return b"".join(path.read_bytes() for path in paths)

    def _folder(self, name: str) -> Path:
        folder = self.home / name
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def _start(self, name: str, *words: Any) -> None:
        environment = {**os.environ, **QUIET, "FLWR_HOME": str(self._folder(f"{name}.flwr"))}
        with (self.home / f"{name}.out").open("ab") as output:
            self.parties[name] = subprocess.Popen(
                [str(BIN / str(words[0])), *map(str, words[1:])],
                env=environment,
                stdout=output,
                stderr=output,
                cwd=self.home,
                start_new_session=True,
            )


APP = """[project]
name = "privfed-suite"
version = "1.0.0"
description = "The engines' suite"
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.42"]

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.flwr.app]
publisher = "privfed"

[tool.flwr.app.components]
serverapp = "suite:server"
clientapp = "suite:client"

[tool.flwr.app.config]
home = ""
"""


class Exchanging(Rig):
    """The suite's engine over Flower. ``exchange`` runs in the process of the ServerApp."""

    pace = 40.0

    def __init__(self, home: Path, sites: Sequence[str]) -> None:
        super().__init__(home, {site: {"site": site} for site in sites})
        app = self._folder("app")
        (app / "pyproject.toml").write_text(APP)
        (app / "suite.py").write_text(
            "from tests.privfed.engines import flower_parts\n\n"
            "client = flower_parts.client\nserver = flower_parts.server\n"
        )

    def begin(self) -> None:
        super().begin()
        (self.home / "nodes.json").write_text(json.dumps(self.ids))
        self.run(self.home / "app", home=str(self.home))
        self._connection: Connection = until(self._connect)

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        found: dict[str, bytes] = self._call("exchange", dict(requests), deadline_seconds)
        return found

    def wait_for(self, sites: set[str]) -> None:
        assert self._call("wait_for", sites, 120.0) == sites

    def _call(self, method: str, *arguments: object) -> Any:
        self._connection.send((method, arguments))
        return self._connection.recv()

    def _connect(self) -> Connection | None:
        with suppress(OSError):
            return Client(str(self.home / "exchange.socket"), family="AF_UNIX")
        return None


_: type[Engine] = Exchanging
