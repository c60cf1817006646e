"""A client's durable memory: which round it is in, one seed for it, and a digest of every answer it gave.

One idea, *deterministic replay*: all entropy of a client in a session is expanded from one seed. A process killed and
restarted in the middle of a session derives byte-identical answers from the stored seed, so that neither answers nor
keys need storing; and an answer that would differ from the one that may already have left is refused.
"""

import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from .errors import LocalProtocolError, ReplayRefused

SEED_BYTES = 32


class Journal(Protocol):
    """What a client must remember.

    **Guarantees**: (round, attempt) of a run only ever rises; one session has one seed; one step of it has one answer.
    They hold across crashes exactly as far as the implementation is durable and its file is not rolled back.
    """

    def begin(self, sid: bytes, run: str, round: int, attempt: int) -> bytes:
        """The session's 32-byte seed: fresh above the run's high-water mark, the same again for the unfinished session.

        Raises:
            ReplayRefused: (round, attempt) is not above the mark and `sid` is not the unfinished session at the mark.
        """
        ...

    def answer(self, sid: bytes, step: str, request_digest: bytes, reply_digest: bytes) -> None:
        """Records an answer, durably, before it leaves.

        Raises:
            ReplayRefused: the step was answered with other digests.
            LocalProtocolError: the session is not in progress.
        """
        ...

    def finish(self, sid: bytes) -> None:
        """Erases the seed; the mark stays. Finishing twice does nothing."""
        ...


@dataclass(kw_only=True)
class _Entry:
    mark: tuple[int, int]
    sid: bytes
    seed: bytes | None = field(repr=False)
    answers: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)


class MemoryJournal:
    """A journal that dies with its process: for simulations and tests, never for a site."""

    def __init__(self, entropy: Callable[[int], bytes] = secrets.token_bytes) -> None:
        self._entropy = entropy
        self._runs: dict[str, _Entry] = {}

    def begin(self, sid: bytes, run: str, round: int, attempt: int) -> bytes:
        entry = self._runs.get(run)
        if entry is not None and (round, attempt) <= entry.mark:
            if entry.sid != sid or entry.seed is None:
                raise _refused(run, round, attempt)
            return entry.seed
        seed = self._entropy(SEED_BYTES)
        self._runs[run] = _Entry(mark=(round, attempt), sid=sid, seed=seed)
        return seed

    def answer(self, sid: bytes, step: str, request_digest: bytes, reply_digest: bytes) -> None:
        entry = next((entry for entry in self._runs.values() if entry.sid == sid and entry.seed is not None), None)
        if entry is None:
            raise LocalProtocolError("this session is not in progress: begin it first")
        if entry.answers.setdefault(step, (request_digest, reply_digest)) != (request_digest, reply_digest):
            raise _answered(step)

    def finish(self, sid: bytes) -> None:
        for entry in self._runs.values():
            if entry.sid == sid:
                entry.seed = None


class JournalFile:
    """The 0600 file of one or several journals.

    Args:
        path: created if missing.

    Raises:
        PermissionError: the file exists and others may read it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: sqlite3.Connection | None = None  # of a block of `together`
        # Created before SQLite opens it: between its creation and a chmod, others could open it.
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            mode = os.fstat(descriptor).st_mode & 0o777
        finally:
            os.close(descriptor)
        if mode & 0o077:
            raise PermissionError(f"{path} must be readable by its owner alone, has mode {mode:04o}; chmod 600 it")
        with self.transaction() as db:
            db.execute(
                "CREATE TABLE IF NOT EXISTS sessions (owner TEXT, run TEXT, round INTEGER NOT NULL,"
                " attempt INTEGER NOT NULL, sid BLOB NOT NULL, seed BLOB, PRIMARY KEY (owner, run))"
            )
            db.execute(
                "CREATE TABLE IF NOT EXISTS answers (owner TEXT, run TEXT, step TEXT, request BLOB NOT NULL,"
                " reply BLOB NOT NULL, PRIMARY KEY (owner, run, step))"
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is written in this block is on disk when the block ends, and not before: all of it, or nothing.

        For a process that simulates many sites and lets no answer out before the block has ended.
        """
        with self._connected(check_same_thread=False) as db:
            self._open = db
            try:
                yield
            finally:
                self._open = None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block or nothing; on disk when it ends, or when the block of `together` around it does."""
        if self._open is None:
            with self._connected() as db:
                yield db
            return
        db = self._open
        db.execute("SAVEPOINT one")
        try:
            yield db
        except BaseException:
            db.execute("ROLLBACK TO one")
            raise
        finally:
            db.execute("RELEASE one")

    @contextmanager
    def _connected(self, check_same_thread: bool = True) -> Iterator[sqlite3.Connection]:
        """One connection, one write transaction: nothing is held open between calls, in any thread or process."""
        connection = sqlite3.connect(self._path, timeout=60, isolation_level=None, check_same_thread=check_same_thread)
        with closing(connection) as db:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA secure_delete = ON")
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")


class SQLiteJournal:
    """A journal in a file that survives kill -9; several owners (sites) may share it.

    Args:
        file: the file, or its path.
        owner: whose memory this is, the site's name.
        entropy: system entropy; a test may inject its own.

    Raises:
        PermissionError: the file exists and others may read it.

    **Guarantees**: every method returns after the change is on disk (synchronous=FULL; in a block of
    `JournalFile.together`, when that ends) and a finished seed's page is overwritten (secure_delete). Not promised:
    erasure from SQLite's rollback file or from flash below the file system, and detection of a restored backup; never
    restore this file.
    """

    def __init__(
        self, file: Path | JournalFile, owner: str, entropy: Callable[[int], bytes] = secrets.token_bytes
    ) -> None:
        self._file = file if isinstance(file, JournalFile) else JournalFile(file)
        self._owner, self._entropy = owner, entropy

    def begin(self, sid: bytes, run: str, round: int, attempt: int) -> bytes:
        with self._file.transaction() as db:
            row = db.execute(
                "SELECT round, attempt, sid, seed FROM sessions WHERE owner = ? AND run = ?", (self._owner, run)
            ).fetchone()
            if row is not None and (round, attempt) <= (row[0], row[1]):
                if row[2] != sid or row[3] is None:
                    raise _refused(run, round, attempt)
                return bytes(row[3])
            seed = self._entropy(SEED_BYTES)
            db.execute("DELETE FROM answers WHERE owner = ? AND run = ?", (self._owner, run))
            db.execute(
                "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?)",
                (self._owner, run, round, attempt, sid, seed),
            )
            return seed

    def answer(self, sid: bytes, step: str, request_digest: bytes, reply_digest: bytes) -> None:
        with self._file.transaction() as db:
            row = db.execute(
                "SELECT run FROM sessions WHERE owner = ? AND sid = ? AND seed IS NOT NULL", (self._owner, sid)
            ).fetchone()
            if row is None:
                raise LocalProtocolError("this session is not in progress: begin it first")
            earlier = db.execute(
                "SELECT request, reply FROM answers WHERE owner = ? AND run = ? AND step = ?",
                (self._owner, row[0], step),
            ).fetchone()
            if earlier is None:
                db.execute(
                    "INSERT INTO answers VALUES (?, ?, ?, ?, ?)",
                    (self._owner, row[0], step, request_digest, reply_digest),
                )
            elif earlier != (request_digest, reply_digest):
                raise _answered(step)

    def finish(self, sid: bytes) -> None:
        with self._file.transaction() as db:
            db.execute("UPDATE sessions SET seed = NULL WHERE owner = ? AND sid = ?", (self._owner, sid))


class Answers:
    """One session's side of the journal, with the last answer kept for a peer whose network lost it."""

    def __init__(self, journal: Journal, sid: bytes) -> None:
        self._journal, self._sid = journal, sid
        self._last: tuple[bytes, bytes] | None = None

    def repeated(self, message: bytes) -> bytes | None:
        """The identical bytes again for an identical retransmission of the last message, else None."""
        return self._last[1] if self._last is not None and self._last[0] == sha256(message).digest() else None

    def record(self, step: str, message: bytes, reply: bytes, fingerprint: bytes | None = None) -> bytes:
        """The reply, once the journal holds its digest, or that of a fingerprint no other reply of the step has."""
        request_digest = sha256(message).digest()
        self._journal.answer(self._sid, step, request_digest, sha256(fingerprint or reply).digest())
        self._last = (request_digest, reply)
        return reply

    def keep(self, message: bytes, reply: bytes) -> bytes:
        """The reply, for retransmissions alone: of a protocol that bounds its answers otherwise than by their bytes."""
        self._last = (sha256(message).digest(), reply)
        return reply

    def finish(self) -> None:
        """No further answer will be derived in this session."""
        self._journal.finish(self._sid)


def _refused(run: str, round: int, attempt: int) -> ReplayRefused:
    return ReplayRefused(f"run {run!r}: round {round}, attempt {attempt} is not above the last one answered")


def _answered(step: str) -> ReplayRefused:
    return ReplayRefused(f"step {step} has been answered already, and otherwise")
