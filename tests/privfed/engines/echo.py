"""A site that does what the bytes say, for the suite that every engine passes."""

import hashlib
import os
import random
import time


class Echo:
    """Answers b"echo …", b"until FILE …" when there is such a file, b"size N", b"seen", b"die"."""

    def __init__(self, name: str) -> None:
        self._name, self._seen = name, [0]

    def handle(self, request: bytes) -> bytes:
        command, _, rest = request.partition(b" ")
        if command == b"seen":
            return repr(self._seen).encode()
        self._seen.append(self._seen[-1] + 1)
        match command:
            case b"echo":
                return rest
            case b"name":
                return self._name.encode()
            case b"digest":
                return hashlib.sha256(rest).digest()
            case b"until":
                file, _, word = rest.partition(b" ")
                while not os.path.exists(file):
                    time.sleep(0.05)
                return word
            case b"size":
                return random.Random(int(rest)).randbytes(int(rest))
            case b"die":
                os.kill(os.getpid(), 9)
        return b""
