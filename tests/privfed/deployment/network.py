"""A wire between a site and the server that a test can cut."""

import contextlib
import socket
import threading
from typing import Self


class Wire:
    """A TCP proxy on loopback.

    Args:
        port: where it leads to.

    `cut` ends all connections and takes no new one; `hold` keeps them open and lets nothing through, as a router does
    that drops packets; `mend` undoes either.
    """

    def __init__(self, port: int) -> None:
        self._to, self._through = port, threading.Event()
        self._through.set()
        self._cut = False
        self._open: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._listening.close()

    def cut(self) -> None:
        self._cut = True
        self._through.set()
        for end in list(self._open):
            self._close(end)

    def hold(self) -> None:
        self._through.clear()

    def mend(self) -> None:
        self._cut = False
        self._through.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                if self._cut:
                    near.close()
                    continue
                try:
                    far = socket.create_connection(("127.0.0.1", self._to), timeout=5)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                self._open |= {near, far}
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._through.wait()
                if self._cut:
                    break
                sink.sendall(data)
        for end in (source, sink):
            self._close(end)

    def _close(self, end: socket.socket) -> None:
        self._open.discard(end)
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
