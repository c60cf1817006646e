"""Starting FLARE's two long-lived programs from a kit, with nothing in between: no shell script, no shell."""

import argparse
import ipaddress
import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

from . import kits

SERVER, CLIENT = "nvflare.private.fed.app.server.server_train", "nvflare.private.fed.app.client.client_train"


def server_command(kit: Path, *, organisation: str, address: str) -> list[str]:
    """What runs the server of ``kit``, listening on ``address`` alone."""
    settings = ["-m", str(kit), "-s", "fed_server.json", "--set", "secure_train=true", f"org={organisation}"]
    module = ["-m", "privfed.deployment.processes", "--address", address]
    return [sys.executable, "-u", *module, *settings, "config_folder="]


def client_command(kit: Path, *, site: str, organisation: str) -> list[str]:
    """What runs a site's client of ``kit``."""
    settings = ["-m", str(kit), "-s", "fed_client.json", "--set", "secure_train=true", f"uid={site}"]
    return [sys.executable, "-u", "-m", CLIENT, *settings, f"org={kits.flare_name(organisation)}", "config_folder="]


def environment() -> Mapping[str, str]:
    """The environment of both: few threads, and little memory kept by the allocator."""
    return {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "4", **os.environ}


def become(command: list[str]) -> None:
    """Go on as ``command``, in this very process: whoever supervises it sees the program itself."""
    kits.require_flare()
    os.umask(0o077)
    os.execve(command[0], command, environment())


def _listen_on(address: str) -> None:
    """Have FLARE's server listen on one address. Its own choice is all of them, unless its name is loopback's."""
    from nvflare.fuel.f3.drivers.tcp_driver import TcpStreamServer

    class Bound(TcpStreamServer):  # type: ignore[misc]  # FLARE has no types
        server_address: tuple[str, int]

        def server_bind(self) -> None:
            given = self.server_address
            if given[0] in ("0", "", "0.0.0.0"):
                self.server_address = (address, given[1])
            super().server_bind()

    import nvflare.fuel.f3.drivers.tcp_driver as driver

    driver.TcpStreamServer = Bound


def main() -> None:
    """The server, in a process that `_listen_on` has prepared."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--address", type=lambda text: str(ipaddress.ip_address(text)), required=True)
    own, rest = parser.parse_known_args()
    _listen_on(own.address)
    sys.argv = [SERVER, *rest]
    runpy.run_module(SERVER, run_name="__main__")


if __name__ == "__main__":
    main()
