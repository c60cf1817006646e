"""What a site says of itself before a run: who it is, what it runs, what time it has, how its table is made.

None of it depends on a record, but for one thing that no run could hide: whether each agreed column holds what was
agreed on. No count, no range, no row number, no value.
"""

import importlib.metadata
import logging
import secrets
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from privfed import __version__, wire
from privfed.config import Config, Target
from privfed.crypto.aggregation import AggregationClient, Session
from privfed.crypto.digest import digest
from privfed.crypto.errors import AggregationError
from privfed.crypto.homomorphic.client import HomomorphicClient
from privfed.crypto.homomorphic.key_holder import HomomorphicKeyHolder
from privfed.crypto.homomorphic.messages import KEY_HOLDER_STEPS
from privfed.crypto.journal import MemoryJournal
from privfed.crypto.masking.client import MaskedClient
from privfed.data.columns import Numeric, numbers
from privfed.data.databases import is_database
from privfed.data.files import column_names, read_frame
from privfed.data.queries import describe, misfits
from privfed.data.tables import Table
from privfed.errors import DataError, PrivfedError
from privfed.privacy.errors import PrivacyError
from privfed.privacy.ledger import Ledger, utc_now

from . import files, kits, papers
from .history import settled
from .hospital import KIT, LEDGER, Hospital
from .site_status import would_refuse

logger = logging.getLogger(__name__)

COMPARED = ("privfed", "wire", "torch", "opacus")
"""What all parties must have the same of: other versions of these give other models, or none."""


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job's text: a look at the sites, and no run.

    Args:
        preflight: its name, new each time.
    """

    preflight: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]

    @classmethod
    def new(cls) -> "Order":
        return cls(secrets.token_hex(8))

    def to_text(self) -> str:
        return f'preflight = "{self.preflight}"\n'


class Look(msgspec.Struct, frozen=True, tag="look"):
    """What are you?

    Args:
        experiment: a `Config` in MessagePack, which another version may not be able to read; empty for none.
        sequences: entries of the site's chain that the coordinator has words of this site about.
    """

    experiment: bytes = b""
    sequences: tuple[int, ...] = ()


class Dry(msgspec.Struct, frozen=True, tag="dry", kw_only=True):
    """A message of a secure sum over zeros; the first one begins it.

    Args:
        order: of which preflight.
        step: of the aggregation; it tells a key holder's from a client's.
        cohort, dim, bound, threshold, minimum_cohort, colluders, degree: as of `Session`.
        key_holder: roster index of who decrypts; None for masks.
    """

    order: str
    step: str
    payload: bytes
    cohort: tuple[int, ...]
    dim: Annotated[int, Meta(ge=1)]
    bound: int
    threshold: int
    minimum_cohort: int
    colluders: int
    degree: int | None = None
    key_holder: int | None = None

    def session(self) -> Session:
        """The session of the sum. Its context is no round's: what is signed in it counts in no run."""
        return Session(
            run="privfed preflight",
            round=0,
            attempt=0,
            cohort=self.cohort,
            dim=self.dim,
            bound=self.bound,
            threshold=self.threshold,
            minimum_cohort=self.minimum_cohort,
            colluders=self.colluders,
            degree=self.degree,
            context=digest("privfed/preflight/1", self.order.encode()),
        )


class About(msgspec.Struct, frozen=True, tag="about", kw_only=True):
    """A site on itself. Fields that another version has beside these are passed over.

    Args:
        versions: package → version; "wire" is the protocol's.
        clock: seconds since 1970 at the site.
        unready: why it can not work, as far as others may know; empty if it can.
        roster, roster_hash: the list of sites that it has accepted.
        certificate: (begin, end) of its own, seconds since 1970.
        data, task: what it agreed to read and predict.
        columns: those that its table lacks or that hold something else, with what is wrong.
        refuses: what it would say to the experiment; empty if it would take part.
        ledger, entries: id of its ledger, and how many entries its chain has.
        heads: entry → hash in hex, of those it was asked about.
        settled: names of its words about other histories that its chain was charged for.
    """

    versions: dict[str, str]
    clock: float
    unready: str = ""
    roster: int = 0
    roster_hash: str = ""
    certificate: tuple[float, float] | None = None
    data: Table | None = None
    task: Target | None = None
    columns: dict[str, str] = {}
    refuses: str = ""
    ledger: str = ""
    entries: int = 0
    heads: dict[int, str] = {}
    settled: tuple[str, ...] = ()


class Said(msgspec.Struct, frozen=True, tag="said"):
    """The answer to a message of the dry sum; empty with the reason why there is none."""

    payload: bytes
    refused: str = ""


Question = Look | Dry
_questions: "msgspec.msgpack.Decoder[Question]" = msgspec.msgpack.Decoder(Look | Dry)


def versions() -> dict[str, str]:
    """What this process runs."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "opacus")}
    return {"privfed": __version__, "wire": wire.PROTOCOL, **packages}


class Inspector:
    """A site's side of a preflight. It writes to no ledger and no state, and a run may be under way beside it.

    Args:
        open_site: reads the site's folder.
        clock: gives an aware datetime.

    Guarantees:
        What it says is the same whatever records the table holds, as long as each agreed column holds what was agreed
        on and there is a record at all. It names none of the site's own files. What it adds to a sum is zeros. One sum
        an order, with this site's keys, in a session that is no round's.
    """

    def __init__(self, open_site: Callable[[], Hospital], *, clock: Callable[[], datetime] = utc_now) -> None:
        self._open_site, self._clock = open_site, clock
        self._sums: dict[bool, tuple[Dry, AggregationClient | HomomorphicKeyHolder]] = {}

    def handle(self, request: bytes) -> bytes:
        """As of `Handler`: never raises."""
        try:
            question = _questions.decode(request)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return wire.encode(wire.Refusal("protocol", "this job looks at sites, and has no rounds", final=False))
        try:
            reply: About | Said = self._about(question) if isinstance(question, Look) else self._dry(question)
        except Exception as error:
            logger.error("unexpected %s in a preflight", type(error).__name__)
            reply = Said(b"", f"unexpected {type(error).__name__} at the site")
        return msgspec.msgpack.encode(reply)

    def _about(self, look: Look) -> About:
        now = self._clock()
        # Whole seconds: more would tell how long reading the table took
        known: dict[str, Any] = {"versions": versions(), "clock": float(int(now.timestamp()))}
        try:
            hospital = self._open_site()
            roster, terms = hospital.roster, hospital.terms
            _ = hospital.identity, hospital.policy
            hospital.require_ledger()
            with Ledger(hospital.home / LEDGER) as book:
                chain = book.entries(hospital.file.name)
                asked = (number for number in look.sequences if 0 < number <= len(chain))
                known |= {
                    "ledger": book.id,
                    "entries": len(chain),
                    "heads": {number: chain[number - 1].hash for number in asked},
                    "settled": tuple(sorted(settled(chain))),
                }
            hospital.require_current()
            known |= {
                "roster": roster.version,
                "roster_hash": roster.hash.hex(),
                "certificate": _validity(hospital),
                "data": terms.data,
                "task": terms.task,
                "columns": column_faults(terms.data, terms.task, hospital.file.data),
            }
            fits = not known["columns"]
            if fits and not is_database(hospital.file.data):
                hospital.records()
            if fits and look.experiment:
                known["refuses"] = self._refuses(hospital, look.experiment, now)
        except (PrivfedError, PrivacyError, AggregationError, ValueError, OSError) as error:
            logger.error("this site can not work: %s", error)  # its own log: the message names local files
            what = "its table" if isinstance(error, DataError) else "its folder"
            return About(**known, unready=f"it can not read {what}: its log says why")
        return About(**known)

    def _refuses(self, hospital: Hospital, experiment: bytes, now: datetime) -> str:
        try:
            config = msgspec.msgpack.decode(experiment, type=Config)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return "it can not read the experiment: another version wrote it"
        return would_refuse(hospital, config, now.astimezone()) or ""

    def _dry(self, dry: Dry) -> Said:
        try:
            holds_key = dry.step in KEY_HOLDER_STEPS
            bare = msgspec.structs.replace(dry, step="", payload=b"")
            if holds_key not in self._sums:
                self._sums[holds_key] = bare, self._machine(dry, holds_key)
            began, machine = self._sums[holds_key]
            if began != bare:
                return Said(b"", "another sum than the one that was begun in this job")
            return Said(machine.receive(dry.payload))
        except files.DeploymentError as error:
            logger.error("this site can not work: %s", error)  # as above
            return Said(b"", "it can not read its folder: its log says why")
        except (PrivfedError, AggregationError, ValueError) as error:
            return Said(b"", str(error))

    def _machine(self, dry: Dry, holds_key: bool) -> AggregationClient | HomomorphicKeyHolder:
        hospital = self._open_site()
        most = hospital.policy.max_parameters
        if dry.dim > most:
            raise ValueError(f"policy.max_parameters = {most}, the sum has {dry.dim}")
        given: dict[str, Any] = {
            "session": dry.session(),
            "identity": hospital.identity,
            "roster": hospital.roster,
            "journal": MemoryJournal(),
        }
        if holds_key:
            return HomomorphicKeyHolder(**given)

        def zeros() -> np.ndarray[Any, np.dtype[np.int64]]:
            return np.zeros(dry.dim, dtype=np.int64)

        if dry.key_holder is None:
            return MaskedClient(**given, vector=zeros)
        return HomomorphicClient(**given, vector=zeros, key_holder=dry.key_holder)


def column_faults(table: Table, task: Target, file: str) -> dict[str, str]:
    """Agreed columns that a site's file lacks, or that hold something else: name → what is wrong.

    A database is asked for its columns and types alone, here and by the whole preflight: no record is read.

    Raises:
        DataError: the file is no table at all.
    """
    if is_database(file):
        return misfits(table, task, describe(file))
    there = set(column_names(file, header=table.header, separator=table.separator))
    wanted = table.needed(task)
    faults = {name: "missing" for name in wanted if name not in there}
    frame = read_frame(
        file,
        [name for name in wanted if name in there],
        header=table.header,
        separator=table.separator,
        maximum_rows=table.maximum_rows,
    )
    missing = frozenset(table.missing_values)
    for column in table.columns:
        if isinstance(column, Numeric) and column.name in frame.columns:
            try:
                numbers(frame[column.name], missing, table.decimal)
            except DataError:
                faults[column.name] = "holds what is no number"
    return faults


def decode_reply(body: bytes) -> About | Said:
    """What a site answered.

    Raises:
        ValueError: it is no answer to a preflight.
    """
    try:
        return msgspec.convert(_printable(msgspec.msgpack.decode(body)), About | Said)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise ValueError("no answer to a preflight") from None


def _printable(value: Any) -> Any:
    """The same, every text in it as it may be shown."""
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_printable(item) for item in value]
    return wire.printable(value) if isinstance(value, str) else value


def _validity(hospital: Hospital) -> tuple[float, float] | None:
    """When this site's certificate counts; None without one, with which it could not have come here."""
    path = hospital.home / KIT / "startup" / "client.crt"
    if not path.exists():
        return None
    begin, end = kits.validity(files.read(path))
    return begin.timestamp(), end.timestamp()


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ."""
    return sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))


def agreement_faults(terms: papers.Terms, about: About) -> list[str]:
    """In what a site's idea of the table differs from the consortium's."""
    if about.data is None or about.data == terms.data:
        return [] if about.task in (None, terms.task) else ["the task"]
    ours = {column.name: column for column in terms.data.columns}
    theirs = {column.name: column for column in about.data.columns}
    found = [f"column {name!r}" for name in differing(ours, theirs)]
    return found or ["the label, its classes, or how the file is read"]
