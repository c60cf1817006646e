"""A site's backup, and what comes after a restore: a ledger that is older than the spends it should hold.

A backup is one zip file with what a site can not make again: its keys, certificate, policy, terms and ledger. Working
memory of runs, personal models and logs are not in it. It holds secrets, and is for its owner alone.

A restored ledger may lack what was spent since. So a restore leaves a mark, and a marked site takes part in nothing
until `account.catch_up` has charged what the ledger may lack.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from privfed.privacy.errors import LedgerCorrupt
from privfed.privacy.ledger import Ledger, utc_now

from . import files, papers
from .files import DeploymentError
from .hospital import ACCOUNTS, KEYS, KIT, LEDGER, LOCK, POLICY, REQUEST, RESTORED, SITE, Hospital, Restored

MANIFEST = "backup.json"
_FORMAT = "privfed backup/1"
_KEY = f"{LEDGER}.key"
_ALWAYS = (SITE, POLICY, KEYS, _KEY, papers.TERMS, papers.ROSTER)
_FOLDERS = (f"{KIT}/startup", f"{KIT}/local", REQUEST, ACCOUNTS)


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """backup.json.

    Args:
        site: whose it is.
        made: UTC, ISO 8601.
        ledger: id of the ledger.
        sequence, head: its last entry, and that entry's hash in hex.
        sha256: of every other file.
    """

    format: str = _FORMAT
    site: str
    made: str
    ledger: str
    sequence: int
    head: str
    sha256: dict[str, str]


def make(hospital: Hospital, out: Path) -> Manifest:
    """Write a backup of a site, which may be at work meanwhile.

    Raises:
        DeploymentError: ``out`` is there already, or a file of the site can not be read.
        PrivacyError: the ledger is damaged: there is nothing worth a backup.
    """
    hospital.require_ledger()
    if out.exists():
        raise DeploymentError(f"{out} is there already: nothing was changed; give a new name")
    home = hospital.home
    with tempfile.TemporaryDirectory(dir=home) as work:
        copy = Path(work) / LEDGER
        with Ledger(home / LEDGER) as book:
            book.copy(copy)
        with Ledger(copy) as book:
            book.verify()
            chain, name = book.entries(hospital.file.name), hospital.file.name
            ledger, head = book.id, book.head(name)
        parts = {path: files.read(home / path) for path in _named(home)} | {LEDGER: copy.read_bytes()}
    manifest = Manifest(
        site=name,
        made=utc_now().isoformat(),
        ledger=ledger,
        sequence=len(chain),
        head=head,
        sha256={path: hashlib.sha256(body).hexdigest() for path, body in parts.items()},
    )
    files.write(out, papers.pack({MANIFEST: msgspec.json.encode(manifest), **parts}), private=True)
    read(files.read(out))  # what could not be read back is no backup
    return manifest


def _named(home: Path) -> Iterator[str]:
    yield from _ALWAYS
    for folder in _FOLDERS:
        for path in sorted((home / folder).rglob("*")):
            if path.is_file():
                yield str(path.relative_to(home))


def read(body: bytes) -> tuple[Manifest, dict[str, bytes]]:
    """What a backup holds, every file as it was written.

    Raises:
        DeploymentError: it is no backup, or was changed.
    """
    try:
        parts = papers.unpack_any(body)
        manifest = msgspec.json.decode(parts.pop(MANIFEST), type=Manifest)
        found = {path: hashlib.sha256(part).hexdigest() for path, part in parts.items()}
        good = manifest.format == _FORMAT and found == manifest.sha256 and {LEDGER, *_ALWAYS} <= found.keys()
    except (KeyError, msgspec.MsgspecError):
        good = False
    if not good or not all(_is_own(path) for path in parts):
        raise DeploymentError("this is no backup of a site, or it was changed or cut short: take another copy")
    return manifest, parts


def _is_own(path: str) -> bool:
    """Whether a backup may write it: nothing outside the site's folder, whatever an archive says."""
    within = any(path.startswith(f"{folder}/") for folder in _FOLDERS)
    return path in (LEDGER, *_ALWAYS) or (within and ".." not in Path(path).parts)


def restore(home: Path, body: bytes, *, now: datetime | None = None) -> Manifest:
    """Put a site back, in a new folder or in one whose ledger is lost, damaged or older.

    Cut short anywhere, the same call does it all again: the mark stands before the ledger, and the ledger comes last.

    Raises:
        DeploymentError: the folder is another site's, or has a ledger that is as long or of another history, or the
            key of another ledger: nothing was changed. A longer ledger is never overwritten.
    """
    manifest, parts = read(body)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    home = home.absolute()
    # Hidden ones are a lock's, and drafts of a restore that was cut short
    if any(not path.name.startswith(".") for path in home.iterdir()):
        if (found := Hospital.open(home).file.name) != manifest.site:
            raise DeploymentError(f"{home} is the site {found!r}, the backup is of {manifest.site!r}")
    with files.locked(home / LOCK, str(home)):
        if (home / _KEY).exists() and files.read(home / _KEY, private=True) != parts[_KEY]:
            # Under another key the ledger's data set would have another name, and its spends would be forgotten
            raise DeploymentError(
                f"{home / _KEY} is the key of another ledger than the backup's: move it away. Nothing was changed"
            )
        damaged = _require_older(home, manifest)
        mark = Restored(
            ledger=manifest.ledger,
            sequence=manifest.sequence,
            head=manifest.head,
            made=manifest.made,
            restored=(now or datetime.now(UTC)).astimezone(UTC).isoformat(),
        )
        _remove_drafts(home, parts)
        if not (home / SITE).exists():
            files.write(home / SITE, parts[SITE], private=True)  # whose folder it is: then this can be done again
        Hospital.open(home).mark(mark)  # from now on the site takes part in nothing
        if damaged:
            (home / LEDGER).rename(home / f"{LEDGER}.damaged-{mark.restored.replace(':', '')}")
        # SQLite would play what a lost ledger left half done into the restored one
        (home / f"{LEDGER}-journal").unlink(missing_ok=True)
        for path, part in parts.items():
            if path != LEDGER and not (home / path).exists():
                files.write(home / path, part, private=not path.startswith(f"{KIT}/local"))
        files.write(home / LEDGER, parts[LEDGER], private=True)
    with Ledger(home / LEDGER) as book:
        book.verify()
    return manifest


def _remove_drafts(home: Path, parts: Iterable[str]) -> None:
    """What `files.write` left of a restore that was killed: it may hold keys."""
    for path in map(Path, (RESTORED, *parts)):
        for draft in (home / path.parent).glob(f".{path.name}.*.new"):
            draft.unlink()


def _require_older(home: Path, manifest: Manifest) -> bool:
    """Return if the ledger in ``home`` is none, or an older one of the same history; whether it is a damaged one."""
    key, path = home / _KEY, home / LEDGER
    if not path.exists():
        return False
    if not key.exists():
        raise DeploymentError(f"{path} has no key beside it: move it away, or put its key back")
    try:
        with Ledger(path) as book:
            book.verify()
            chain, ledger, head = book.entries(manifest.site), book.id, book.head(manifest.site)
    except LedgerCorrupt:
        return True
    if ledger != manifest.ledger:
        raise DeploymentError(f"{path} is another ledger than the backup's: nothing was changed")
    if head == manifest.head and Hospital.open(home).restored is not None:
        return False  # this very ledger, by a restore that was cut short: its mark is still there
    if len(chain) >= manifest.sequence:
        raise DeploymentError(
            f"{path} has {len(chain)} entries, the backup of {manifest.made} has {manifest.sequence}: what was spent "
            "since would be forgotten. Nothing was changed"
        )
    return False
