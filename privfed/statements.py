"""What a coordinator states of a run in its chain, beside the rounds: what attacks found, and which files it left.

Such an entry is about the run's configuration, whose digest is its ``dataset``. It is signed in the transaction that
writes it.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from privfed.privacy.audit.result import Audit, digest, headline
from privfed.privacy.events import NoiseSite, PrivacyUnit, from_canonical_json, to_canonical_json
from privfed.privacy.ledger import Entry, Recorded

from . import folder
from .errors import PrivfedError, RunChanged, RunFolderError
from .seals import COORDINATOR

AUDIT = "audit.json"
FORMAT = "privfed audit/1"
_MOST_BYTES = 64 * 2**20  # of an audit.json

# Whoever gets a run's folder to look at needs no models: these may be missing, the others may not
_MODELS = (folder.MODEL, folder.PERSONAL, folder.CHECKPOINT)
_FIGURES = (folder.RUN, folder.CONFIG, folder.DATASETS, folder.METRICS, folder.KEYS, folder.SUMMARY)
FILES = (*_FIGURES, *_MODELS)
"""The files of a run that its end binds. report.html is made from them, and can be made again."""


class StatementError(PrivfedError):
    """A coordinator's entry that does not say what its kind says."""


def check(entry: Entry) -> None:
    """Return if an entry of kind "audit" or "end" says what it should. Raises `StatementError`."""
    match entry.kind:
        case "audit":
            audit_in(entry)
        case "end":
            files_in(entry)
        case kind:
            raise StatementError(f"a coordinator states nothing of kind {kind!r}")


# Audits


class AuditFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """audit.json: what the audits of a run, or of a configuration, found, with all figures.

    Args:
        format: of this file.
        run: the run's id, or the configuration's name.
        created: when the latest of them ended, UTC.
        audits: one for each level, and two for level 4.
    """

    format: str
    run: str
    created: str
    audits: tuple[Audit, ...]

    @property
    def violated(self) -> bool:
        """Whether some audit found its claim broken."""
        return any(audit.verdict == "violation" for audit in self.audits)


class StatedAudit(NamedTuple):
    """An audit as a coordinator's entry has it.

    Attributes:
        run: its id.
        config: hex SHA-256 of the configuration that was audited.
        headline: the audit without exact figures.
        digest: hex SHA-256 of the whole audit, which is in the run's audit.json.
    """

    run: str
    config: str
    headline: Audit
    digest: str


def audit_entry(run: str, config: str, found: Audit, *, attempt: int) -> Entry:
    """The entry that states what an attack on a run found.

    Args:
        config: hex SHA-256 of the run's configuration.
        attempt: how many audits of this run were stated before.
    """
    text = to_canonical_json(headline(found)).decode()
    return _entry("audit", run, config, {"audit": text, "sha256": digest(found)}, attempt=attempt)


def audit_in(entry: Entry) -> StatedAudit:
    """What an entry of kind "audit" states. Raises `StatementError` if it is not in order."""
    text, whole = entry.metadata.get("audit", ""), entry.metadata.get("sha256", "")
    try:
        found = from_canonical_json(text.encode(), Audit)
    except (ValueError, TypeError) as error:
        raise StatementError(f"it states no audit: {error}") from None
    if found != headline(found) or not re.fullmatch("[0-9a-f]{64}", whole) or entry.metadata.keys() - _AUDIT_KEYS:
        raise StatementError("it states more, or less, than what an audit found and the digest of the whole")
    return StatedAudit(entry.run, entry.dataset, found, whole)


_AUDIT_KEYS = {"audit", "sha256"}


def audits_in(chain: Iterable[Recorded], run: str | None = None) -> tuple[StatedAudit, ...]:
    """The audits of a run, or of all, that a coordinator's chain states, in order."""
    stated = [line.entry for line in chain if line.entry.kind == "audit" and run in (None, line.entry.run)]
    return tuple(audit_in(entry) for entry in stated)


def read_audits(path: Path) -> AuditFile:
    """An audit.json. Raises `RunFolderError` if it is not one."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError
        found = msgspec.json.decode(path.read_bytes(), type=AuditFile)
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} is damaged ({type(error).__name__}): move it away, or restore it") from None
    if found.format != FORMAT:
        raise RunFolderError(f"{path} has format {found.format!r}, this version reads {FORMAT!r}")
    return found


# Files


def end_entry(run: str, files: Mapping[str, str], *, attempt: int) -> Entry:
    """The entry that states which files a run left.

    Args:
        files: name → hex SHA-256.
        attempt: how often the run ended before: a kill between this and the summary has it end twice.
    """
    return _entry("end", run, files[folder.CONFIG], dict(files), attempt=attempt)


def files_in(entry: Entry) -> dict[str, str]:
    """What an entry of kind "end" states. Raises `StatementError` if it is not in order."""
    files = entry.metadata
    if not (set(_FIGURES) <= files.keys() <= set(FILES)) or entry.dataset != files[folder.CONFIG]:
        raise StatementError("it does not name the files that a run leaves")
    if not all(re.fullmatch("[0-9a-f]{64}", value) for value in files.values()):
        raise StatementError("it does not give the digests of the files that a run leaves")
    return files


def digests(home: Path) -> dict[str, str]:
    """name → hex SHA-256 of those of the `FILES` that are there."""
    return {name: _sha256(home / name) for name in FILES if (home / name).is_file()}


def check_files(home: Path, run: str, chain: Iterable[Recorded]) -> tuple[str, ...]:
    """Hold a run's folder against what its coordinator's chain states.

    Returns:
        What a reader should know: files that are not there, or that nothing binds yet.

    Raises:
        RunChanged: names the first file that is not as it was left.
        StatementError: the chain's own entries are not in order.
    """
    lines = [line.entry for line in chain if line.entry.run == run]
    ends = [files_in(entry) for entry in lines if entry.kind == "end"]
    here = digests(home)
    stated = [audit_in(entry) for entry in lines if entry.kind == "audit"]
    for audit in stated:
        if audit.config != here.get(folder.CONFIG):
            raise RunChanged(f"{home / folder.CONFIG} is not the configuration that the ledger says was audited")
    if (home / AUDIT).exists():
        _check_audits(home / AUDIT, run, {audit.digest for audit in stated})
    notes = []
    if ends:
        bound = ends[-1]
        for name in FILES:
            if name in here and here[name] != bound.get(name):
                raise RunChanged(f"{home / name} is not as the run left it")
            if name in bound and name not in here:
                if name not in _MODELS:
                    raise RunChanged(f"{home / name} is missing; the run left one")
                notes.append(f"{name} is not in the run's folder")
    elif folder.SUMMARY in here:
        raise RunChanged(
            f"{home / folder.SUMMARY} says that the run has ended, and its ledger does not: the ledger is an older "
            "copy, or another, or the summary was not written by the run"
        )
    else:
        notes.append("the run has not ended: nothing binds the files in its folder yet")
    return tuple(notes)


def _check_audits(path: Path, run: str, stated: set[str]) -> None:
    try:
        found = read_audits(path)
    except RunFolderError as error:
        raise RunChanged(str(error)) from None
    if found.run != run:
        raise RunChanged(f"{path} is about run {found.run}, not about {run}")
    for audit in found.audits:
        if digest(audit) not in stated:
            raise RunChanged(f"{path}: the audit of level {audit.level} ({audit.name}) is not one that the ledger has")


def _entry(kind: str, run: str, config: str, metadata: dict[str, str], *, attempt: int) -> Entry:
    return Entry(
        kind=kind,  # type: ignore[arg-type]  # one of ours
        site=COORDINATOR,
        dataset=config,
        run=run,
        round=0,
        attempt=attempt,
        unit=PrivacyUnit.NONE,
        noise=NoiseSite.LOCAL,
        metadata=metadata,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
