"""One wait for the disk for many sites: what they write is kept together, and no reply leaves before it is there."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack

from ..engines.contract import Engine, Progress, Watch
from ..wire import decode_request

AT_ONCE = 256
"""Sites. Other writers on the ledger wait so long."""


class DurableEngine:
    """Gives the replies of many sites after one write to each of their books.

    Args:
        engine: carries the messages. What it gives has left a site.
        books: what the sites write into; each gives a block at whose end its content is on disk. The last one is first
            on disk.
        watch: told how far an exchange is, before each write.

    Guarantees:
        A ledger entry is durable before the reply that it pays for is given. A process killed before that has given
        nothing, and what it wrote is gone.
    """

    def __init__(
        self, engine: Engine, *books: Callable[[], AbstractContextManager[None]], watch: Watch | None = None
    ) -> None:
        self._engine, self._books, self._watch = engine, books, watch

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        replies: dict[str, bytes] = {}
        names = list(requests)
        for asked in range(0, len(names), AT_ONCE):
            block = {name: requests[name] for name in names[asked : asked + AT_ONCE]}
            if self._watch is not None:
                message = decode_request(block[names[asked]])
                self._watch(Progress(f"round {message.round + 1}: {message.step}", asked, len(names)))
            with ExitStack() as stack:
                for book in self._books:
                    stack.enter_context(book())
                found = self._engine.exchange(block, deadline_seconds)
            replies |= found
        return replies
