"""A request over a Unix socket: exact, bounded, and nothing of a failure but that it was one."""

import logging
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from privfed.engines import relay
from privfed.engines.relay import RelayError, ask


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r") / "site.sock"


def echo(request: bytes, kept: bytes) -> tuple[bytes, bytes]:
    return request[::-1], kept + b"+"


@contextmanager
def serving(path: Path, answer: relay.Answer = echo, times: int = 1) -> Iterator[None]:
    with relay.listening(path) as listener:
        thread = threading.Thread(target=lambda: [relay.serve_one(listener, answer) for _ in range(times)])
        thread.start()
        yield
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("size", [0, 1, 65_537, 3_000_001])
def test_bytes_arrive_exactly_both_ways(path: Path, size: int) -> None:
    body = os.urandom(size)
    with serving(path):
        assert ask(path, body, b"kept") == (body[::-1], b"kept+")


def test_a_site_that_fails_tells_nothing_of_it_and_goes_on(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failures = iter([ValueError("a record"), None])

    def answer(request: bytes, kept: bytes) -> tuple[bytes, bytes]:
        if failure := next(failures):
            raise failure
        return b"", b""

    with serving(path, answer, times=2), caplog.at_level(logging.DEBUG):
        with pytest.raises(RelayError, match="the site can not answer"):
            ask(path, b"secret", b"sealed")
        assert ask(path, b"", b"") == (b"", b"")
    assert "ValueError" in caplog.text
    assert not any(word in caplog.text for word in ("a record", "secret", "sealed"))


def raw(path: Path, body: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(body)
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(100)


@pytest.mark.parametrize(
    "body",
    [b"", b"\0" * 15, b"\xff" * 16, (2**30 + 1).to_bytes(8, "big") + bytes(8), (9).to_bytes(8, "big") + bytes(16)],
    ids=["nothing", "half a length", "enormous", "above the limit", "cut short"],
)
def test_what_is_no_request_reaches_no_site_and_the_next_one_is_served(path: Path, body: bytes) -> None:
    asked: list[bytes] = []

    def answer(request: bytes, kept: bytes) -> tuple[bytes, bytes]:
        asked.append(request)
        return b"", b""

    with serving(path, answer, times=2):
        assert raw(path, body) == b""
        ask(path, b"well formed", b"")
    assert asked == [b"well formed"]


def test_only_those_who_may_use_the_socket_may(path: Path) -> None:
    with serving(path):
        mode = path.stat().st_mode
        assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o660
        ask(path, b"", b"")
    assert not path.exists()


def test_a_socket_in_use_and_a_file_are_left_alone_and_one_that_was_left_is_replaced(path: Path) -> None:
    with relay.listening(path), pytest.raises(RelayError, match="at work"), relay.listening(path):
        pass
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    with serving(path):
        ask(path, b"", b"")
    path.write_bytes(b"a file")
    with pytest.raises(RelayError, match="no socket"), relay.listening(path):
        pass
    assert path.read_bytes() == b"a file"


def refuse(connection: socket.socket) -> None:
    connection.close()


def half(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.sendall(b"\0" + bytes(10))
    connection.close()


def too_much(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.sendall(b"\0" + b"\xff" * 16)
    connection.close()


@pytest.mark.parametrize("behave", [refuse, half, too_much])
def test_who_answers_as_no_site_does_is_no_site(path: Path, behave: Callable[[socket.socket], None]) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=lambda: behave(listener.accept()[0]))
        thread.start()
        with pytest.raises(RelayError):
            ask(path, b"a", b"b")
        thread.join(60)
    with pytest.raises(RelayError, match="no site answers"):
        ask(path, b"a", b"b")
