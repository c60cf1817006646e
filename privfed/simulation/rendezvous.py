"""Tasks that meet at their questions: each runs as if alone, all of them are answered together."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar, cast

Q = TypeVar("Q")
A = TypeVar("A")
R = TypeVar("R")

MOST = 256
"""Threads. More tasks than that meet in groups: a pass over so many has nothing to gain from more."""


class Cancelled(BaseException):
    """The rendezvous was interrupted: a waiting task unwinds. No `Exception`, so that nobody mistakes it for one."""


class Rendezvous(Generic[Q, A]):
    """Runs tasks one at a time, each until it asks or ends, and answers all that have asked at once.

    Args:
        answer: the answers to questions, in order; an exception is raised where the question was asked.

    Guarantees:
        At no moment do two tasks run, nor a task and `answer`; who runs when depends on the tasks alone. So tasks may
        share what is not made for threads, as long as it is not bound to one. A task that ends, fails or is never
        answered holds up no other. When `run` returns or raises, no task is left.
    """

    def __init__(self, answer: Callable[[Sequence[Q]], Sequence[A | Exception]]) -> None:
        self._answer = answer
        self._threads = ThreadPoolExecutor(MOST, thread_name_prefix="site")
        self._here = threading.local()

    def close(self) -> None:
        """Give the threads back."""
        self._threads.shutdown()

    def ask(self, question: Q) -> A:
        """The answer to a task's question; the task waits for it, while others go on. Elsewhere: at once."""
        task: _Task[Q, A] | None = getattr(self._here, "task", None)
        answer = self._answer([question])[0] if task is None else task.ask(question)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def run(self, tasks: Sequence[Callable[[], R]]) -> list[R]:
        """What the tasks return, in order.

        Raises:
            BaseException: what the first task that raised has raised, after all have ended.
        """
        results: list[R] = []
        for low in range(0, len(tasks), MOST):
            results += self._group(tasks[low : low + MOST])
        return results

    def _group(self, bodies: Sequence[Callable[[], R]]) -> list[R]:
        tasks: list[_Task[Q, A]] = [_Task() for _ in bodies]
        try:
            for task, body in zip(tasks, bodies, strict=True):
                task.begin(self._threads, self._here, body)
            while asking := [task for task in tasks if not task.ended]:
                answers = self._answer([cast(Q, task.question) for task in asking])
                for task, answer in zip(asking, answers, strict=True):
                    task.resume(answer)
        finally:
            for task in tasks:
                task.cancel()
        for task in tasks:
            if task.error is not None:
                raise task.error
        return [cast(R, task.result) for task in tasks]


class _Task(Generic[Q, A]):
    """A thread that runs only while whoever began it waits."""

    def __init__(self) -> None:
        self.question: Q | None = None
        self.result: object = None
        self.error: BaseException | None = None
        self.ended = True  # until it begins
        self._answer: A | Exception | Cancelled | None = None
        self._running = False
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()

    # For whoever began it

    def begin(self, threads: ThreadPoolExecutor, here: threading.local, body: Callable[[], object]) -> None:
        def run() -> None:
            if self.ended:  # it could not begin, and its place in the queue came up later
                return
            here.task = self
            try:
                self.result = body()
            except BaseException as error:
                self.error = error
            here.task = None
            self.ended = True
            self._back.release()

        self.ended = False
        try:
            threads.submit(run)
        except BaseException:  # no thread to be had
            self.ended = True
            raise
        self._running = True
        self._wait()

    def resume(self, answer: A | Exception | Cancelled) -> None:
        self._answer, self.question, self._running = answer, None, True
        self._go.release()
        self._wait()

    def cancel(self) -> None:
        if self._running:
            self._wait()
        while not self.ended:
            self.resume(Cancelled())

    def _wait(self) -> None:
        self._back.acquire()
        self._running = False

    # For the task

    def ask(self, question: Q) -> A:
        self.question = question
        self._back.release()
        self._go.acquire()
        answer, self._answer = self._answer, None
        if isinstance(answer, Cancelled):
            raise answer
        return cast(A, answer)
