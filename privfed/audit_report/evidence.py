"""What a report rests on, read from ledgers and runs' folders: even from a ledger that does not verify.

Reading checks what can be checked and notes what can not be read. What it means is for verdicts.py.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec

from privfed import folder, statements, verification
from privfed.errors import ConfigError, RunChanged, RunFolderError
from privfed.privacy.accountant import Accountant
from privfed.privacy.audit.result import Audit, digest
from privfed.privacy.errors import LedgerCorrupt, NoGuarantee
from privfed.privacy.ledger import Ledger, Recorded
from privfed.report import history
from privfed.report.history import History
from privfed.seals import COORDINATOR
from privfed.statements import StatedAudit
from privfed.verification import Book

from .model import AuditResult, Group

Released = Literal["metrics", "personal-models"]


class Statement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the curator states, in a TOML file or on the command line. It stands in the report as a statement.

    Args:
        curator, purpose, data_product, date: who answers for the data, for what, in which product, when.
        data_domain: who and what the records are about.
        records_per_unit: how many records one unit may have, in words.
        pre_training, tuning, repeated_runs: what else touched the data or chose the model.
        released: what was given to others beside the global model.
        budget_epsilon, budget_delta: what no site may pass, where no run's configuration says it.
    """

    curator: str = ""
    purpose: str = ""
    data_product: str = ""
    date: str = ""
    data_domain: str = ""
    records_per_unit: str = ""
    pre_training: str = ""
    tuning: str = ""
    repeated_runs: str = ""
    released: tuple[Released, ...] = ()
    budget_epsilon: float | None = None
    budget_delta: float | None = None


@dataclass(frozen=True)
class BookEvidence:
    """One ledger.

    Attributes:
        name: its id, or its path where the id can not be read.
        chains: what could be read of the sites' chains and the coordinator's, hashes checked.
        verified: what `verification.verify` found; None where it refused.
        failure, bad_entry: why it refused, and the first entry or signed word that does not hold.
        audits: what attacks found, as its coordinator signed it; nothing of a ledger that does not verify.
        strangers: chains whose signer's key was not among those given.
    """

    path: Path
    name: str
    keys: Literal["elsewhere", "beside", "none"]
    chains: dict[str, tuple[Recorded, ...]]
    verified: verification.Verification | None
    failure: str = ""
    bad_entry: str = ""
    audits: tuple[StatedAudit, ...] = ()
    strangers: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(name for name in self.chains if name != COORDINATOR)


@dataclass(frozen=True)
class RunEvidence:
    """One run's folder.

    Attributes:
        changed: the first file that is not as the ledger has it, and how; empty where all are.
        missing: what the folder lacks and may lack.
        details: digest → whole audit, with the figures that the ledger does not hold.
        readable_by_others: personal models or figures in the folder that other users of the machine can read.
    """

    path: Path
    facts: folder.RunFacts
    history: History
    ledger: Path
    changed: str = ""
    missing: tuple[str, ...] = ()
    details: Mapping[str, Audit] = field(default_factory=dict)
    readable_by_others: tuple[str, ...] = ()

    @property
    def run(self) -> str:
        return self.facts.run

    @property
    def private(self) -> bool:
        """Whether the run claims anything and sends anything."""
        return self.history.config.privacy.unit.value != "none" and self.history.config.method.sends


@dataclass(frozen=True)
class Evidence:
    """Everything that was given."""

    books: tuple[BookEvidence, ...]
    runs: tuple[RunEvidence, ...]
    delta: float
    statement: Statement = field(default_factory=Statement)
    baseline: RunEvidence | None = None

    def run_of(self, name: str) -> RunEvidence | None:
        """The folder of the run that an entry names, if it was given."""
        return next((run for run in self.runs if run.run == base_run(name)), None)

    @property
    def audits(self) -> tuple[AuditResult, ...]:
        """What attacks found, run by run as the ledgers have it, with the figures where the run's folder has them."""
        return tuple(self._whole(book, stated) for book in self.books for stated in book.audits)

    def _whole(self, book: BookEvidence, stated: StatedAudit) -> AuditResult:
        run = self.run_of(stated.run)
        found = run.details.get(stated.digest) if run is not None else None
        audit = found or msgspec.structs.replace(stated.headline, note="its figures are not in a folder given here")
        fields = msgspec.structs.asdict(audit) | {"groups": tuple(_group(group) for group in audit.groups)}
        return AuditResult(ledger=book.name, run=stated.run, sha256=stated.digest, **fields)

    def spends(self) -> Iterable[tuple[BookEvidence, Recorded]]:
        """Every entry with charges."""
        for book in self.books:
            for site in book.sites:
                yield from ((book, line) for line in book.chains[site] if line.entry.charges)


def _group(group: object) -> Group:
    return Group(**msgspec.structs.asdict(group))  # type: ignore[arg-type]  # the same fields


def base_run(name: str) -> str:
    """The run that a series of releases belongs to: figures and moments go by the run's name and a suffix."""
    return name.partition("/")[0]


def gather(
    targets: Sequence[Path],
    *,
    keys: Path | None = None,
    delta: float | None = None,
    statement: Statement | None = None,
    baseline: Path | None = None,
    accountant: Accountant,
) -> Evidence:
    """Read ledgers and runs.

    Args:
        targets: ledger files and folders of runs that have ended. A ledger that several of them use is read once.
        keys: public keys that were got elsewhere.
        delta: at which ε is given; a run's own where none is given, else 1e-5.
        baseline: the folder of a run without privacy, for its figures alone.

    Raises:
        RunFolderError, ConfigError: a target is no ledger and no run that has ended, with the reason.
        RunChanged, LedgerCorrupt: a run's files can not be read, because they were changed.
    """
    statement = statement or Statement()
    runs = tuple(_run(target, accountant) for target in targets if target.is_dir())
    if delta is None:
        deltas = [run.history.summary.privacy.delta for run in runs if run.private]
        delta = max(deltas, default=1e-5)
    found: dict[Path, Book] = {}
    for target in targets:
        book = verification.find_book(target, keys)
        known = found.get(book.path.resolve())
        if known is None or (book.keys and not known.keys):
            found[book.path.resolve()] = book
    books = {path: _book(book, delta, accountant) for path, book in found.items()}
    compared = None
    if baseline is not None:
        own = verification.find_book(baseline)
        beside = books.get(own.path.resolve()) or _book(own, delta, accountant)
        compared = _held(_run(baseline, accountant), beside)
    return Evidence(
        books=tuple(books.values()),
        runs=tuple(_held(run, books[run.ledger.resolve()]) for run in runs),
        delta=delta,
        statement=statement,
        baseline=compared,
    )


def read_statement(path: Path) -> Statement:
    """The curator's statement in a TOML file.

    Raises:
        ConfigError: it can not be read, with the reason and the known keys.
    """
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Statement)
    except OSError as error:
        raise ConfigError(f"can not read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}. Known keys: {', '.join(Statement.__struct_fields__)}") from None


def _book(book: Book, delta: float, accountant: Accountant) -> BookEvidence:
    keys: Literal["elsewhere", "beside", "none"] = "none"
    if book.keys:
        keys = "beside" if book.keys_beside else "elsewhere"
    verified, failure, bad = None, "", ""
    try:
        verified = verification.verify(book, delta=delta, accountant=accountant)
    except LedgerCorrupt as error:
        failure, bad = error.reason, error.entry or "the file as a whole"
    except NoGuarantee as error:
        failure, bad = str(error), "the spends of one data set"
    name, chains, audits = str(book.path), dict[str, tuple[Recorded, ...]](), tuple[StatedAudit, ...]()
    try:
        with Ledger(book.path) as ledger:
            name = ledger.id
            for site in ledger.sites():
                try:
                    chains[site] = ledger.entries(site)
                except LedgerCorrupt:
                    continue  # named above already: verify stops at the first
            if verified is not None:
                audits = statements.audits_in(verification.signed_chain(ledger, verified.sites))
    except LedgerCorrupt as error:
        failure, bad = failure or error.reason, bad or error.entry or "the file as a whole"
    strangers = tuple(verification.strangers(book, verified.sites)) if verified is not None else ()
    return BookEvidence(book.path, name, keys, chains, verified, failure, bad, audits, strangers)


def _run(path: Path, accountant: Accountant) -> RunEvidence:
    home = folder.RunFolder.open(path)
    try:
        past = history.read(path)
    except (RunFolderError, ConfigError):
        # It can not be read; if that is because somebody changed it, that is what has to be said
        book = verification.find_book(path)
        verification.verify_files(book, verification.verify(book, delta=1e-5, accountant=accountant))
        raise
    open_files = tuple(
        name
        for name in (folder.PERSONAL, folder.METRICS, folder.CHECKPOINT, statements.AUDIT)
        if (path / name).exists() and (path / name).stat().st_mode & 0o077 and path.stat().st_mode & 0o077
    )
    return RunEvidence(path, home.facts(), past, home.ledger(), readable_by_others=open_files)


def _held(run: RunEvidence, book: BookEvidence) -> RunEvidence:
    """The run with its files held against its ledger; of a ledger that does not verify there is nothing to hold to."""
    if book.verified is None:
        return run
    signed = next((site.signed for site in book.verified.sites if site.name == COORDINATOR), 0)
    try:
        missing = statements.check_files(run.path, run.run, book.chains.get(COORDINATOR, ())[:signed])
    except RunChanged as error:
        return replace(run, changed=str(error))
    path = run.path / statements.AUDIT
    details = statements.read_audits(path).audits if path.exists() else ()
    return replace(run, missing=missing, details={digest(audit): audit for audit in details})


def check_delta(delta: float | None) -> None:
    """Raises ConfigError unless δ is in (0, 1), or not given."""
    if delta is not None and not 0 < delta < 1:
        raise ConfigError(f"--delta must be between 0 and 1, got {delta:g}")


def check_targets(targets: Sequence[Path]) -> None:
    """Raises RunFolderError for a target that is not there."""
    for target in targets:
        if not target.exists():
            raise RunFolderError(f"there is nothing at {target}: give a ledger file or the folder of a run")
