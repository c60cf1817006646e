"""One wait for the disk for many sites: what they write is kept together, and no reply leaves before it is there."""

import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack

from ..engines.contract import Engine

AT_ONCE = 256
"""Sites. Other writers on the ledger wait so long."""


class DurableEngine:
    """Gives the replies of many sites after one write to each of their books.

    Args:
        engine: carries the messages. What it gives has left a site.
        books: what the sites write into; each gives a block at whose end its content is on disk. The last one is first
            on disk.

    Guarantees:
        A ledger entry is durable before the reply that it pays for is given. A process killed before that has given
        nothing, and what it wrote is gone.
    """

    def __init__(self, engine: Engine, *books: Callable[[], AbstractContextManager[None]]) -> None:
        self._engine, self._books = engine, books

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        replies: dict[str, bytes] = {}
        names = iter(requests)
        while some := list(itertools.islice(names, AT_ONCE)):
            with ExitStack() as stack:
                for book in self._books:
                    stack.enter_context(book())
                found = self._engine.exchange({name: requests[name] for name in some}, deadline_seconds)
            replies |= found
        return replies
