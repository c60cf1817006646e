"""Processes that encrypt beside this one: threads gain nothing, for TenSEAL holds the interpreter's lock."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process


@contextmanager
def workers(count: int) -> Iterator[Executor | None]:
    """A pool of ``count`` processes, started when it is first given work; None where one would be alone.

    Guarantees:
        They end with this process, whatever ends it: what they were given does not outlive it in their memory.
    """
    if count <= 1:
        yield None
        return
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_begin) as pool:
        yield pool


def _begin() -> None:
    """In a worker, before its first task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
