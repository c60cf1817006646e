"""Where the spending is written down: append-only, hash-chained, durable before bytes leave.

One SQLite file holds the chain of one hospital, or of every site of a simulation. For each site,

    h₀ = SHA256("privfed-ledger/1" ‖ 0 ‖ ledger id ‖ 0 ‖ site),    hᵢ = SHA256(hᵢ₋₁ ‖ bodyᵢ),

where body is the canonical JSON of {entry, sequence, time}. Entries are read once per process and checked against the
chain as they are read, so that no budget is ever decided on an entry that fails it.
"""

import hashlib
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import msgspec

from .errors import ChargeConflict, LedgerCorrupt, NoGuarantee, PrivacyError
from .events import (
    Charge,
    NoiseSite,
    PrivacyUnit,
    Skellam,
    from_canonical_json,
    is_noiseless,
    to_canonical_json,
)

_APPLICATION_ID = 0x70764C32  # "pvL2" in the SQLite header: tells our files from others
_BUSY_SECONDS = 30.0
_MAX_NAME = 200
FEDERATION = "federation"
"""The audience of what a run releases: its coordinator, its sites, and whoever gets the model."""
_SPENDS = ("charge", "reserve", "settle")
# What SQLite calls a file that is cut short, overwritten, or no database at all
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR_SHORT_READ}
_SCHEMA = {
    "ledger": "CREATE TABLE ledger (id TEXT NOT NULL)",
    "entries": """CREATE TABLE entries (
        id INTEGER PRIMARY KEY AUTOINCREMENT, site TEXT NOT NULL, sequence INTEGER NOT NULL, kind TEXT NOT NULL,
        run TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, body BLOB NOT NULL, hash BLOB NOT NULL,
        UNIQUE (site, sequence), UNIQUE (site, kind, run, round, attempt))""",
    "statements": """CREATE TABLE statements (
        id INTEGER PRIMARY KEY AUTOINCREMENT, site TEXT NOT NULL, body BLOB NOT NULL)""",
    "entries_no_update": """CREATE TRIGGER entries_no_update BEFORE UPDATE ON entries
        BEGIN SELECT RAISE(ABORT, 'a ledger is append-only'); END""",
    "entries_no_delete": """CREATE TRIGGER entries_no_delete BEFORE DELETE ON entries
        BEGIN SELECT RAISE(ABORT, 'a ledger is append-only'); END""",
    "statements_no_update": """CREATE TRIGGER statements_no_update BEFORE UPDATE ON statements
        BEGIN SELECT RAISE(ABORT, 'a ledger is append-only'); END""",
    "statements_no_delete": """CREATE TRIGGER statements_no_delete BEFORE DELETE ON statements
        BEGIN SELECT RAISE(ABORT, 'a ledger is append-only'); END""",
    "ledger_no_update": """CREATE TRIGGER ledger_no_update BEFORE UPDATE ON ledger
        BEGIN SELECT RAISE(ABORT, 'a ledger keeps its id'); END""",
    "ledger_no_delete": """CREATE TRIGGER ledger_no_delete BEFORE DELETE ON ledger
        BEGIN SELECT RAISE(ABORT, 'a ledger keeps its id'); END""",
}


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the ledger, as its writer states it. Never a record, a gradient or a key.

    Args:
        kind: "charge" for a spend; "reserve" for a spend at its worst case, written before a release whose noise
            depends on who contributes, and "settle" for what it turned out to be; "run" for the promises that a run
            starts with. A coordinator writes "witness" for what it was told, "audit" for what an attack found and
            "end" for what a run left. These four have no charges.
        site: whose records were touched; or the coordinator.
        dataset: hex fingerprint of the data set under a key of the site's own; of a coordinator's entry, the digest of
            what it is about.
        run, round, attempt: with kind and site, the name of this entry. A repeated round with fresh noise is a new
            attempt.
        unit, noise: what the run claims to protect, and where its noise is added.
        audience: who sees the release; spends towards different audiences are composed apart.
        charges: what happened, in public constants.
        insecure_seed: the noise came from a fixed seed: whoever knows the seed sees through it.
        metadata: further public facts as text.
    """

    kind: Literal["charge", "run", "reserve", "settle", "witness", "audit", "end"] = "charge"
    site: str
    dataset: str
    run: str
    round: int
    attempt: int = 0
    unit: PrivacyUnit
    noise: NoiseSite
    audience: str = FEDERATION
    charges: tuple[Charge, ...] = ()
    insecure_seed: bool = False
    metadata: dict[str, str] = {}

    def __post_init__(self) -> None:
        for name in ("site", "run", "audience"):
            value = getattr(self, name)
            if not (0 < len(value) <= _MAX_NAME and value.isprintable()):
                raise ValueError(f"{name} must be 1 to {_MAX_NAME} printable characters, got {value!r}")
        if not self.dataset or not set(self.dataset) <= set("0123456789abcdef"):
            raise ValueError(f"dataset must be a lower-case hex fingerprint, got {self.dataset!r}")
        msgspec.structs.force_setattr(self, "charges", tuple(self.charges))
        msgspec.structs.force_setattr(self, "metadata", dict(self.metadata))
        for name in ("round", "attempt"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**63:
                raise ValueError(f"{name} must be an integer from 0, got {value!r}")
        if (self.kind in _SPENDS) != bool(self.charges):
            raise ValueError(f"a charge has charges and a run entry has none, got {self.kind!r} with {self.charges!r}")


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """An entry as it stands in a chain.

    Attributes:
        entry: what was written.
        sequence: its place in its site's chain, from 1.
        time: when it was written, UTC, ISO 8601.
        hash: hᵢ in hex.
    """

    entry: Entry
    sequence: int
    time: str
    hash: str


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bytes that are hashed."""

    entry: Entry
    sequence: int
    time: str


def body_of(recorded: Recorded) -> _Body:
    """What the hash of an entry is over, in canonical JSON."""
    return _Body(recorded.entry, recorded.sequence, recorded.time)


Check = Callable[[tuple[Charge, ...], tuple[Charge, ...]], None]
Sign = Callable[[Recorded], Iterable[tuple[str, bytes]]]
"""``sign(recorded)``: site and signed word, of an entry as it will stand in its chain."""


def utc_now() -> datetime:
    """The clock of whoever brings none."""
    return datetime.now(UTC)


class Ledger:
    """Opens the ledger at `path`, or creates it (mode 0600) if nothing is there. One thread at a time; many processes.

    **Guarantees.** An entry is on disk when the call that writes it returns, and survives kill -9 and power loss (as
    far as the disk honours fsync). An entry is written whole or not at all. Writers on one file take turns, so a check
    sees everything that was ever charged. An edited, dropped, swapped or truncated entry is found when it is read.
    What is *not* found: a file replaced by an older copy of itself, or rewritten from the start by someone who
    recomputes every hash. Against that, keep `head(site)` elsewhere, signed.

    Args:
        path: the file; its folder must exist.
        clock: gives an aware datetime.

    Raises:
        LedgerCorrupt: the file is not a ledger, is damaged, or has lost entries.
        PrivacyError: the file cannot be opened, or another process holds it for longer than 30 seconds.
        OSError: the file cannot be created.
    """

    def __init__(self, path: str | os.PathLike[str], clock: Callable[[], datetime] = utc_now) -> None:
        self.path = Path(path)
        self._clock = clock
        self._chains: dict[str, _Chain] = {}
        self._grouped = False
        self._complete: tuple[int, int] | None = None  # the state of the file in which nothing was missing
        with self._explained():
            if not self.path.exists():
                _create(self.path)
            self._connection = _connect(self.path)
            try:
                self._id = self._open()
            except BaseException:
                self._connection.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is written in this block is on disk when the block ends, and not before: all of it, or nothing.

        For a process that simulates many sites and lets nothing out before the block has ended. Other writers on the
        file wait from the block's first entry on.

        Raises:
            PrivacyError, LedgerCorrupt: at the end: nothing of the block was written.
        """
        self._grouped = True
        try:
            yield
            with self._explained():
                if self._connection.in_transaction:
                    self._connection.execute("COMMIT")
        except BaseException:
            self._roll_back()
            self._chains.clear()  # they hold what was not written
            raise
        finally:
            self._grouped = False

    def charge(self, entry: Entry, check: Check | None = None) -> Recorded:
        """Writes a spend, durably, before the release that it pays for.

        The same entry again (a restarted process that replays its round) gives back the earlier one and spends
        nothing; `check` is not asked.

        Args:
            entry: of kind "charge".
            check: called as check(prior, new) inside the transaction, with all earlier charges of this site, data set
                and audience over all runs, and those of `entry`; raises to refuse, and nothing is written. It must
                not use this ledger.

        Raises:
            ChargeConflict: a different entry stands under the same site, run, round and attempt.
            NoGuarantee: this data set was charged by another unit, towards this audience.
            LedgerCorrupt: an earlier entry fails its hash. Nothing is written.
        """
        if entry.kind != "charge":
            raise ValueError(f'charge() takes an entry of kind "charge", got {entry.kind!r}')
        return self._append(entry, check)

    def reserve(self, entry: Entry, check: Check | None = None) -> Recorded:
        """Writes what a release may cost at worst: with the fewest shares of noise that its sum may carry.

        Like `charge`, before bytes leave. The reserve counts until `settle` replaces it, and for good if nothing ever
        does: an aborted round may have shown its vector.

        Raises:
            NoGuarantee, ChargeConflict, LedgerCorrupt: as `charge`.
        """
        if entry.kind != "reserve":
            raise ValueError(f'reserve() takes an entry of kind "reserve", got {entry.kind!r}')
        return self._append(entry, check)

    def settle(self, entry: Entry) -> Recorded:
        """Writes what a reserved release turned out to be: the same events, with at least as many shares of noise.

        Call it when the set of contributors is certain (the signed survivor set, whose digest belongs into the
        metadata). Idempotent like `charge`.

        Raises:
            PrivacyError: nothing was reserved under this site, run, round and attempt, or the entry does not settle
                it: other events, or fewer shares than were reserved.
            ChargeConflict: it was settled otherwise before.
        """
        if entry.kind != "settle":
            raise ValueError(f'settle() takes an entry of kind "settle", got {entry.kind!r}')
        return self._append(entry, None)

    def begin_run(self, entry: Entry) -> Recorded:
        """Writes what a run promises before its first round. Idempotent and raising like `charge`."""
        if entry.kind != "run":
            raise ValueError(f'begin_run() takes an entry of kind "run", got {entry.kind!r}')
        return self._append(entry, None)

    def witness(self, entry: Entry, sign: "Sign | None" = None) -> Recorded:
        """Writes what a coordinator states, of kind "witness", "audit" or "end". Idempotent and raising like `charge`.

        Args:
            sign: gives the signed words that go with the entry, written in the same transaction: an entry that a crash
                left unsigned could not be told from one that somebody slipped in.
        """
        if entry.kind not in ("witness", "audit", "end"):
            raise ValueError(f'witness() takes an entry of kind "witness", "audit" or "end", got {entry.kind!r}')
        return self._append(entry, None, sign)

    def charges(self, site: str, dataset: str, audience: str = FEDERATION) -> tuple[Charge, ...]:
        """Every charge of a site's data set towards an audience, over all runs: ε never restarts.

        A reserved release counts as it was settled, or at its worst case until it is.

        Raises:
            NoGuarantee: the charges are of different units, which do not compose.
        """
        with self._explained():
            chain = self._read_on(site)
        return _spends(chain, dataset, audience)

    def entries(self, site: str | None = None) -> tuple[Recorded, ...]:
        """The entries of one chain, or of all, site by site in order."""
        with self._explained():
            sites = self._sites() if site is None else [site]
            return tuple(recorded for name in sites for recorded in self._read_on(name).recorded)

    def head(self, site: str) -> str:
        """The last hash of a site's chain in hex, h₀ for an empty one: what a signature should cover."""
        with self._explained():
            return self._read_on(site).head.hex()

    @property
    def id(self) -> str:
        """Drawn when the ledger was made; every chain starts from it."""
        return self._id

    def sites(self) -> tuple[str, ...]:
        """Names with a chain, in order."""
        with self._explained():
            return tuple(self._sites())

    def add_statements(self, statements: Iterable[tuple[str, bytes]]) -> None:
        """Keep, durably, what was signed about each site's chain. Its content is the signers' business."""
        with self._explained():
            with self._writing():
                self._insert_statements(statements)

    def statements(self, site: str | None = None) -> tuple[bytes, ...]:
        """What was signed about one chain, or about all, in the order in which it came."""
        with self._explained():
            self._check_complete()
            rows = self._connection.execute(
                "SELECT id, body FROM statements WHERE ?1 IS NULL OR site = ?1 ORDER BY id", (site,)
            ).fetchall()
        return self._bodies(rows)

    def last_statement(self, site: str) -> bytes:
        """The last of `statements`; empty where there is none."""
        with self._explained():
            self._check_complete()
            rows = self._connection.execute(
                "SELECT id, body FROM statements WHERE site = ? ORDER BY id DESC LIMIT 1", (site,)
            ).fetchall()
        return self._bodies(rows)[0] if rows else b""

    def copy(self, path: Path) -> None:
        """A copy of the whole file at a new ``path``, as it stands at one instant, whoever writes to it meanwhile.

        Raises:
            PrivacyError, LedgerCorrupt: it can not be made.
        """
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with self._explained(), closing(sqlite3.connect(path)) as other:
            self._connection.backup(other)

    def verify(self) -> None:
        """Reads everything again and recomputes every hash, sequence number and canonical form.

        Raises:
            LedgerCorrupt: naming the first bad entry and why.
        """
        with self._explained():
            self._chains.clear()
            self._complete = None
            for site in self._sites():
                self._read_on(site)
            self._check_complete()
            self._check_schema()

    # Inside

    def _append(self, entry: Entry, check: Check | None, sign: Sign | None = None) -> Recorded:
        with self._explained():
            with self._writing():
                chain = self._read_on(entry.site)
                earlier = chain.by_key.get(_key(entry))
                if earlier is None:
                    if entry.kind == "settle":
                        _check_settlement(chain, entry)
                    elif entry.charges:
                        _check_unit(chain, entry)
                    if check is not None:
                        check(_spends(chain, entry.dataset, entry.audience), entry.charges)
                    recorded = self._insert(chain, entry)
                    if sign is not None:
                        self._insert_statements(sign(recorded))
                elif to_canonical_json(earlier.entry) != to_canonical_json(entry):
                    raise ChargeConflict(
                        f"site {entry.site!r}, run {entry.run!r}, round {entry.round}, attempt {entry.attempt} is "
                        "already in the ledger with another content. A retry must repeat the same release; give a "
                        "release with fresh noise a new attempt"
                    )
            return earlier or self._read_on(entry.site).by_key[_key(entry)]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """All of the block or nothing; durable when it ends, or when the block of `together` around it does."""
        if not self._connection.in_transaction:
            # IMMEDIATE takes the write lock before reading: two runs cannot both see the last of a budget
            self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute("SAVEPOINT one")
        try:
            yield
            self._connection.execute("RELEASE one")
            if not self._grouped:
                self._connection.execute("COMMIT")
        except BaseException:
            if not self._grouped:
                self._roll_back()
            elif self._connection.in_transaction:
                self._complete = None
                self._connection.execute("ROLLBACK TO one")
                self._connection.execute("RELEASE one")
            raise

    def _bodies(self, rows: Iterable[tuple[int, bytes]]) -> tuple[bytes, ...]:
        found = tuple(rows)
        for number, body in found:
            if type(body) is not bytes:  # SQLite stores what it is given, whatever the column says
                raise LedgerCorrupt(self.path, "it is not a byte string", f"signed word {number}")
        return tuple(body for _, body in found)

    def _roll_back(self) -> None:
        self._complete = None
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def _insert_statements(self, statements: Iterable[tuple[str, bytes]]) -> None:
        self._connection.executemany("INSERT INTO statements (site, body) VALUES (?, ?)", statements)

    def _insert(self, chain: "_Chain", entry: Entry) -> Recorded:
        moment = self._clock()
        if moment.utcoffset() is None:
            raise ValueError("the clock must give an aware datetime, such as datetime.now(UTC)")
        sequence = len(chain.recorded) + 1
        time = moment.astimezone(UTC).isoformat()
        body = to_canonical_json(_Body(entry, sequence, time))
        digest = hashlib.sha256(chain.head + body).digest()
        _decode_body(body)  # what could not be read back must not be written
        self._connection.execute(
            "INSERT INTO entries (site, sequence, kind, run, round, attempt, body, hash) VALUES (?,?,?,?,?,?,?,?)",
            (
                *(entry.site, sequence, entry.kind, entry.run, entry.round, entry.attempt),
                *(body, digest),
            ),
        )
        self._complete = self._state()  # it was, a moment ago under this lock, and one more row changes nothing
        return Recorded(entry=entry, sequence=sequence, time=time, hash=digest.hex())

    def _read_on(self, site: str) -> "_Chain":
        """The site's chain with what was added since the last look, each entry checked as it is read."""
        self._check_complete()
        chain = self._chains.get(site)
        if chain is None:
            chain = _Chain(_genesis(self._id, site))
        rows = self._connection.execute(
            "SELECT sequence, kind, run, round, attempt, body, hash FROM entries "
            "WHERE site = ? AND sequence > ? ORDER BY sequence",
            (site, len(chain.recorded)),
        )
        for sequence, *key, body, digest in rows:
            chain.add(self._checked(chain, site, sequence, tuple(key), body, digest), digest)
        self._chains[site] = chain
        return chain

    def _checked(
        self, chain: "_Chain", site: str, sequence: int, key: tuple[object, ...], body: bytes, digest: bytes
    ) -> Recorded:
        expected = len(chain.recorded) + 1
        where = f"site {site!r}, entry {expected}"
        if sequence != expected:
            raise LedgerCorrupt(self.path, f"it is missing: entry {sequence} follows entry {expected - 1}", where)
        if {type(body), type(digest)} != {bytes}:  # SQLite stores what it is given, whatever the column says
            raise LedgerCorrupt(self.path, "its body or its hash is not a byte string", where)
        if hashlib.sha256(chain.head + body).digest() != digest:
            raise LedgerCorrupt(self.path, "its hash does not follow from its content and the entry before it", where)
        try:
            read = _decode_body(body)
        except (ValueError, TypeError) as error:
            raise LedgerCorrupt(self.path, f"its content cannot be read: {error}", where) from error
        if read.sequence != sequence or read.entry.site != site or _key(read.entry) != key:
            raise LedgerCorrupt(self.path, "it stands under another site, round or number than it names", where)
        return Recorded(entry=read.entry, sequence=sequence, time=read.time, hash=digest.hex())

    def _sites(self) -> list[str]:
        return [site for (site,) in self._connection.execute("SELECT DISTINCT site FROM entries ORDER BY site")]

    def _open(self) -> str:
        """Checks that this is a whole ledger, and gives its id."""
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        if application != _APPLICATION_ID:
            raise LedgerCorrupt(self.path, "it is not a privfed ledger")
        pages, page = (self._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        if self.path.stat().st_size < pages * page:  # SQLite may take what is cut off for empty
            raise LedgerCorrupt(self.path, "it is cut short")
        (health,) = self._connection.execute("PRAGMA integrity_check(1)").fetchone()
        if health != "ok":
            raise LedgerCorrupt(self.path, f"the database is damaged: {health}")
        self._check_schema()
        rows = self._connection.execute("SELECT id FROM ledger").fetchall()
        if len(rows) != 1 or not isinstance(rows[0][0], str):
            raise LedgerCorrupt(self.path, "it has lost its id")
        self._check_complete()
        return str(rows[0][0])

    def _check_schema(self) -> None:
        tables_and_triggers = "SELECT name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite!_%' ESCAPE '!'"
        found = dict(self._connection.execute(tables_and_triggers).fetchall())
        for name in sorted(_SCHEMA.keys() | found.keys()):
            if found.get(name) != _SCHEMA.get(name):
                raise LedgerCorrupt(self.path, f"its schema was changed: {name} is not as created")

    def _check_complete(self) -> None:
        """No chain shows that its last entry is gone. SQLite's own count of numbers given out does."""
        state = self._state()
        if state == self._complete:
            return
        for table in ("entries", "statements"):
            held, last, given = self._connection.execute(
                f"SELECT (SELECT COUNT(*) FROM {table}), (SELECT COALESCE(MAX(id), 0) FROM {table}), "
                f"(SELECT COALESCE(MAX(seq), 0) FROM sqlite_sequence WHERE name = '{table}')"
            ).fetchone()
            if not held == last == given:
                raise LedgerCorrupt(self.path, f"{max(last, given) - held} of {max(last, given)} {table} are missing")
        self._complete = state

    def _state(self) -> tuple[int, int]:
        """Changes with every write to the file, by whomever."""
        (others,) = self._connection.execute("PRAGMA data_version").fetchone()
        return others, self._connection.total_changes

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's errors in the ledger's words."""
        try:
            yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) in _DAMAGE:
                raise LedgerCorrupt(self.path, f"SQLite says: {error}") from error
            raise PrivacyError(f"cannot use the ledger {self.path}: {error}") from error


class _Chain:
    """What this process has read of one site's chain."""

    def __init__(self, genesis: bytes) -> None:
        self.head = genesis
        self.recorded: list[Recorded] = []
        self.by_key: dict[tuple[object, ...], Recorded] = {}

    def add(self, recorded: Recorded, digest: bytes) -> None:
        self.head = digest
        self.recorded.append(recorded)
        self.by_key[_key(recorded.entry)] = recorded


def _key(entry: Entry) -> tuple[object, ...]:
    return entry.kind, entry.run, entry.round, entry.attempt


def _spends(chain: _Chain, dataset: str, audience: str) -> tuple[Charge, ...]:
    """What counts: a settlement in the place of its reserve.

    Raises:
        NoGuarantee: spends of different units, which do not compose.
    """
    spends = [
        recorded.entry
        for recorded in chain.recorded
        if recorded.entry.dataset == dataset and recorded.entry.audience == audience and recorded.entry.charges
    ]
    units = {entry.unit for entry in spends if not _voids_all(entry)}
    if len(units) > 1:
        raise NoGuarantee(_MIXED_UNITS.format(*sorted(units)))
    return tuple(charge for entry in spends if entry.kind != "settle" for charge in _settled(chain, entry).charges)


def _settled(chain: _Chain, entry: Entry) -> Entry:
    if entry.kind != "reserve":
        return entry
    settlement = chain.by_key.get(("settle", *_key(entry)[1:]))
    return entry if settlement is None else settlement.entry


_MIXED_UNITS = (
    "this data set was charged by {0} and by {1}, and neither bounds the other: one record moves a patient's or a "
    "client's clipped vector by up to 2C, and a patient holds several records. Keep to one unit for a data set and "
    "audience"
)


def _voids_all(entry: Entry) -> bool:
    """Whether the entry's ε is infinite, for any unit."""
    return any(is_noiseless(charge.event) for charge in entry.charges)


def _check_unit(chain: _Chain, entry: Entry) -> None:
    """ε of different units do not compose: refuse before the first spend of another one."""
    for recorded in chain.recorded:
        other = recorded.entry
        if (other.dataset, other.audience) != (entry.dataset, entry.audience) or not other.charges:
            continue
        if other.unit != entry.unit and not _voids_all(other) and not _voids_all(entry):
            raise NoGuarantee(_MIXED_UNITS.format(other.unit, entry.unit))


def _check_settlement(chain: _Chain, entry: Entry) -> None:
    reserve = chain.by_key.get(("reserve", *_key(entry)[1:]))
    if reserve is None:
        raise PrivacyError(f"nothing is reserved for run {entry.run!r}, round {entry.round}, attempt {entry.attempt}")
    reserved = reserve.entry
    same = ("dataset", "unit", "noise", "audience", "insecure_seed")
    agrees = all(getattr(entry, name) == getattr(reserved, name) for name in same)
    if not (
        agrees
        and len(entry.charges) == len(reserved.charges)
        and all(_settles(*pair) for pair in zip(reserved.charges, entry.charges, strict=True))
    ):
        raise PrivacyError(
            f"run {entry.run!r}, round {entry.round}, attempt {entry.attempt}: a settlement repeats what was reserved, "
            "with at least as many shares of noise"
        )


def _settles(reserved: Charge, settled: Charge) -> bool:
    event, worst = settled.event, reserved.event
    if isinstance(event, Skellam) and isinstance(worst, Skellam) and event.shares >= worst.shares:
        settled = msgspec.structs.replace(settled, event=msgspec.structs.replace(event, shares=worst.shares))
    return settled == reserved


def _genesis(ledger_id: str, site: str) -> bytes:
    return hashlib.sha256(b"\0".join([b"privfed-ledger/1", ledger_id.encode(), site.encode()])).digest()


def _decode_body(body: bytes) -> _Body:
    return from_canonical_json(body, _Body)


def _connect(path: Path) -> sqlite3.Connection:
    # mode=rw: a file that vanished is an error, never silently a new and empty ledger
    uri = f"{path.resolve().as_uri()}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    # With a rollback journal, FULL may lose the last commit to a power cut (the folder is not synced after the
    # journal is deleted). EXTRA syncs it.
    connection.execute("PRAGMA synchronous = EXTRA")
    return connection


def _create(path: Path) -> None:
    """A whole empty ledger appears under its name at once, or not at all; whoever comes second uses the first's."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    try:
        connection = _connect(draft)
        try:
            connection.execute("BEGIN")
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            for statement in _SCHEMA.values():
                connection.execute(statement)
            connection.execute("INSERT INTO ledger VALUES (?)", (secrets.token_hex(16),))
            connection.execute("COMMIT")
        finally:
            connection.close()
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
