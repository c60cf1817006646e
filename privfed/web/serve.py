"""Where the page is served: on this machine alone, unless somebody says otherwise in so many words."""

import ipaddress
import secrets
import socket
from collections.abc import Callable

from privfed.errors import ConfigError
from privfed.watching import Watcher

_END_SECONDS = 2  # how long streams may take to end with the server


class Page:
    """A server of one run's page, which listens from now on.

    Args:
        host: one address, or a name that is one; port: 0 for a free one.
        allow_remote: whether other machines may reach it.

    Attributes:
        address: where a browser finds it, with the token that it takes.

    Guarantees:
        It listens on the one address that was given, and on none that other machines reach unless ``allow_remote``.
        Who does not know the token keeps nobody out who does; see `visitors`.

    Raises:
        ConfigError: the address is none, is taken, is all addresses at once, or is remote; a package is missing.
    """

    def __init__(self, watcher: Watcher, *, host: str = "127.0.0.1", port: int = 0, allow_remote: bool = False) -> None:
        try:
            import uvicorn

            from .app import app
            from .visitors import visitors
        except ImportError as error:
            raise ConfigError(
                f"the page needs its packages ({error}): pip install -c constraints.txt '.[web]'"
            ) from None
        family, place = _resolved(host, port)
        self.local = _require_allowed(host, place[0], allow_remote=allow_remote)
        try:
            self._socket = socket.create_server(place[:2], family=family)
        except OSError as error:
            raise ConfigError(f"nothing can listen on {host}, port {port}: {error.strerror}") from None
        token = secrets.token_urlsafe(24)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{self._socket.getsockname()[1]}/{token}/"
        numeric = f"[{place[0]}]" if family == socket.AF_INET6 else place[0]
        inside = app(watcher, token=token, hosts=[shown, numeric, *(["localhost"] if self.local else [])],
                     ending=lambda: self._server.should_exit)  # fmt: skip
        self._server = uvicorn.Server(
            uvicorn.Config(
                inside, http=visitors(), ws="none", lifespan="on", log_level="error", access_log=False,
                server_header=False, proxy_headers=False, timeout_graceful_shutdown=_END_SECONDS,
            )
        )  # fmt: skip

    def run(self) -> None:
        """Serve until `stop`, or an interrupt."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Have `run` return, soon; from any thread."""
        self._server.should_exit = True


def serve(watcher: Watcher, *, host: str, port: int, allow_remote: bool, tell: Callable[[str, bool], None]) -> None:
    """Serve the page until an interrupt.

    Args:
        tell: called with the address, and whether it is of this machine alone.
    """
    page = Page(watcher, host=host, port=port, allow_remote=allow_remote)
    tell(page.address, page.local)
    try:
        page.run()
    except KeyboardInterrupt:  # how such a command ends
        return


def _resolved(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise ConfigError(f"--host {host} is no address of this machine") from None
    return family, (str(place[0]), int(place[1]))


def _require_allowed(host: str, address: str, *, allow_remote: bool) -> bool:
    """Whether the address is of this machine alone. Raises `ConfigError` if it is not and may not be."""
    number = ipaddress.ip_address(address.partition("%")[0])
    if number.is_unspecified:
        raise ConfigError(f"--host {host} is every address of this machine: name the one to listen on")
    if not number.is_loopback and not allow_remote:
        raise ConfigError(
            f"--host {host} can be reached by other machines, and the page would go there unencrypted: leave --host "
            "away and use an SSH tunnel, or say --allow-remote"
        )
    return number.is_loopback
