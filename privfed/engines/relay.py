"""One request handed from process to process on a site's own machine, over a Unix socket.

Where an engine's process runs code that others sent, a site's keys and records should not be in its reach. It gets a
socket instead: through it goes what a coordinator may send anyway, and nothing else.

Of a connection each side sends one frame: two lengths (8 bytes each, big-endian), and two byte strings. The answer has
a byte before it: 0, or 1 for a failure, whose reason stays at the site.
"""

import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import PrivfedError

logger = logging.getLogger(__name__)

LIMIT = 1 << 30
"""Bytes of each string, refused before any of it is read."""
_READ_SECONDS = 60.0
_PIECE = 1 << 20

Answer = Callable[[bytes, bytes], tuple[bytes, bytes]]


class RelayError(PrivfedError):
    """Nobody answers at the socket, or not as a site does. No content is in it."""


def ask(path: Path, request: bytes, kept: bytes, *, seconds: float | None = None) -> tuple[bytes, bytes]:
    """What the site behind the socket answers.

    Args:
        seconds: at most so long; None as long as it takes, which is for the engine's own deadline.

    Raises:
        RelayError: it does not.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(seconds)
            connection.connect(str(path))
            _send(connection, b"", request, kept)
            if _read(connection, 1) != b"\0":
                raise RelayError("the site can not answer: its own log says why")
            return _receive(connection)
    except OSError as error:
        raise RelayError(f"no site answers at its socket ({type(error).__name__})") from None


def serve(path: Path, answer: Answer, *, mode: int = 0o660) -> None:
    """Answer at a new socket, one request after another, until the process is ended.

    Args:
        mode: of the socket's file: who may write to it may send what a coordinator may send.

    Raises:
        RelayError: somebody serves there already, or it can not be made.
    """
    with listening(path, mode) as listener:
        while True:
            serve_one(listener, answer)


@contextmanager
def listening(path: Path, mode: int = 0o660) -> Iterator[socket.socket]:
    """A socket at ``path``, in the place of one that a dead process left."""
    _require_free(path)
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o777 & ~mode)
    try:
        listener.bind(str(path))
        listener.listen(8)
    except OSError as error:
        listener.close()
        raise RelayError(f"can not listen at {path}: {error.strerror or error}") from None
    finally:
        os.umask(before)
    try:
        yield listener
    finally:
        listener.close()
        path.unlink(missing_ok=True)


def serve_one(listener: socket.socket, answer: Answer) -> None:
    """One connection; whatever is wrong with it, the next one is served."""
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(_READ_SECONDS)
        try:
            request, kept = _receive(connection)
        except (OSError, RelayError) as error:
            logger.warning("a connection was no request: %s", type(error).__name__)
            return
        with suppress(OSError):  # who asked is gone
            try:
                reply, kept = answer(request, kept)
            except Exception as error:
                # Of the site's own making it may name local files: this log is the site's
                logger.error("no answer: %s", error if isinstance(error, PrivfedError) else type(error).__name__)
                connection.sendall(b"\1")
                return
            _send(connection, b"\0", reply, kept)


def _send(connection: socket.socket, first: bytes, one: bytes, other: bytes) -> None:
    connection.sendall(first + len(one).to_bytes(8, "big") + len(other).to_bytes(8, "big"))
    for body in (one, other):
        if body:  # who needs no more may have gone
            connection.sendall(body)


def _receive(connection: socket.socket) -> tuple[bytes, bytes]:
    sizes = [int.from_bytes(_read(connection, 8), "big") for _ in range(2)]
    if max(sizes) > LIMIT:
        raise RelayError(f"a message of {max(sizes)} bytes is above the limit of {LIMIT}")
    return _read(connection, sizes[0]), _read(connection, sizes[1])


def _read(connection: socket.socket, size: int) -> bytes:
    body = bytearray()  # it grows with what comes, not with what was announced
    while len(body) < size:
        piece = connection.recv(min(_PIECE, size - len(body)))
        if not piece:
            raise RelayError("the connection ended in the middle of a message")
        body += piece
    return bytes(body)


def _require_free(path: Path) -> None:
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise RelayError(f"{path} is no socket: nothing was changed")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
                return
            except OSError as error:
                raise RelayError(f"{path} can not be looked at: {error.strerror}") from None
        raise RelayError(f"a site is at work at {path} already")
