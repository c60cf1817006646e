"""Ports for servers of the tests."""

import itertools
import os
import socket

# Below those that the system gives to whoever asks for any, and far from those of another worker: nobody takes one
# between the look and the server's own start
_ports = itertools.count(20_000 + 37 * os.getpid() % 10_000)


def free_port() -> int:
    """A port of 127.0.0.1 at which nobody listens, another one each time."""
    for port in _ports:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError
