"""What a report rests on, read from ledgers and runs' folders: even from a ledger that does not verify.

Reading checks what can be checked and notes what can not be read. What it means is for verdicts.py.
"""

import json
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from privfed import folder, verification
from privfed.errors import ConfigError, RunFolderError
from privfed.privacy.accountant import Accountant
from privfed.privacy.errors import LedgerCorrupt, NoGuarantee
from privfed.privacy.ledger import Ledger, Recorded
from privfed.report import history
from privfed.report.history import History
from privfed.seals import COORDINATOR
from privfed.verification import Book

from .model import AuditResult

AUDIT = "audit.json"
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
    """

    path: Path
    name: str
    keys: Literal["elsewhere", "beside", "none"]
    chains: dict[str, tuple[Recorded, ...]]
    verified: verification.Verification | None
    failure: str = ""
    bad_entry: str = ""

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(name for name in self.chains if name != COORDINATOR)


@dataclass(frozen=True)
class RunEvidence:
    """One run's folder.

    Attributes:
        audits: what `privfed audit` left; None where it was not run.
        audit_failure: why its results can not be read.
        readable_by_others: personal models or figures in the folder that other users of the machine can read.
    """

    path: Path
    facts: folder.RunFacts
    history: History
    ledger: Path
    audits: tuple[AuditResult, ...] | None
    audit_failure: str = ""
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

    def spends(self) -> Iterable[tuple[BookEvidence, Recorded]]:
        """Every entry with charges."""
        for book in self.books:
            for site in book.sites:
                yield from ((book, line) for line in book.chains[site] if line.entry.charges)


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
    """
    statement = statement or Statement()
    runs = tuple(_run(target) for target in targets if target.is_dir())
    if delta is None:
        deltas = [run.history.summary.privacy.delta for run in runs if run.private]
        delta = max(deltas, default=1e-5)
    books: dict[Path, Book] = {}
    for target in targets:
        book = verification.find_book(target, keys)
        known = books.get(book.path.resolve())
        if known is None or (book.keys and not known.keys):
            books[book.path.resolve()] = book
    return Evidence(
        books=tuple(_book(book, delta, accountant) for book in books.values()),
        runs=runs,
        delta=delta,
        statement=statement,
        baseline=_run(baseline) if baseline is not None else None,
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
    name, chains = str(book.path), dict[str, tuple[Recorded, ...]]()
    try:
        with Ledger(book.path) as ledger:
            name = ledger.id
            for site in ledger.sites():
                try:
                    chains[site] = ledger.entries(site)
                except LedgerCorrupt:
                    continue  # named above already: verify stops at the first
    except LedgerCorrupt as error:
        failure, bad = failure or error.reason, bad or error.entry or "the file as a whole"
    return BookEvidence(book.path, name, keys, chains, verified, failure, bad)


def _run(path: Path) -> RunEvidence:
    home = folder.RunFolder.open(path)
    audits, failure = _audits(path / AUDIT, home.facts().run)
    open_files = tuple(
        name
        for name in (folder.PERSONAL, folder.METRICS, folder.CHECKPOINT)
        if (path / name).exists() and (path / name).stat().st_mode & 0o077 and path.stat().st_mode & 0o077
    )
    return RunEvidence(path, home.facts(), history.read(path), home.ledger(), audits, failure, open_files)


def _audits(path: Path, run: str) -> tuple[tuple[AuditResult, ...] | None, str]:
    if not path.exists():
        return None, ""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            if found.get("run", run) != run:
                raise ValueError(f"it is about {found['run']}, not about {run}")
            found = found["audits"]
        if not isinstance(found, list):
            raise ValueError("it must be a list of results")
        return tuple(_audit(line) for line in found), ""
    except (OSError, ValueError, TypeError, KeyError, AttributeError, msgspec.ValidationError) as error:
        return None, f"{path.name} can not be read: {error}"


def _audit(line: dict[str, Any]) -> AuditResult:
    known = {name: line.get(name) for name in AuditResult.__struct_fields__}
    level = str(known["level"]).removeprefix("L")
    known |= {"level": int(level), "seeds": known["seeds"] or (), "figures": known["figures"] or {}}
    known |= {"note": known["note"] or "", "verdict": str(known["verdict"]).lower()}
    return msgspec.convert(known, AuditResult)


def check_delta(delta: float | None) -> None:
    """Raises ConfigError unless δ is in (0, 1), or not given."""
    if delta is not None and not 0 < delta < 1:
        raise ConfigError(f"--delta must be between 0 and 1, got {delta:g}")


def check_targets(targets: Sequence[Path]) -> None:
    """Raises RunFolderError for a target that is not there."""
    for target in targets:
        if not target.exists():
            raise RunFolderError(f"there is nothing at {target}: give a ledger file or the folder of a run")
