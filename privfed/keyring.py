"""The secret that belongs to a ledger: 32 bytes in a file beside it, for its owner alone."""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from privfed.privacy.noise import KEY_BYTES, derive_key, new_key

from .errors import RunFolderError


def ledger_key(ledger: Path) -> bytes:
    """The key of the ledger at ``ledger``, made on first use and kept in ``<ledger>.key`` (mode 0600).

    Data sets are named in the ledger by a keyed hash: under another key the same records would look new, and their
    spent ε would be forgotten. So a ledger without its key is refused.

    Raises:
        RunFolderError: the ledger exists and its key does not, or the key file is damaged or readable by others.
    """
    path = ledger.with_name(ledger.name + ".key")
    if not path.exists():
        if ledger.exists():
            raise RunFolderError(
                f"{ledger} has no key file {path.name} beside it: without it what the records have spent can not be "
                "found. Restore the file from your copy"
            )
        return _create(path)
    if path.stat().st_mode & 0o077:
        raise RunFolderError(f"{path} can be read by others: chmod 600 {path}")
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise RunFolderError(f"{path} is damaged: it must have {KEY_BYTES} bytes. Restore it from your copy")
    return key


def site_key(key: bytes, site: str, purpose: str) -> bytes:
    """A simulated site's own key for one purpose."""
    return derive_key(key, b"site", site.encode(), purpose.encode())


def _create(path: Path) -> bytes:
    key = new_key()
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # whole under its name at once, and never over another's
    except OSError as error:
        raise RunFolderError(f"can not create {path}: {error.strerror}") from None
    finally:
        with suppress(OSError):
            draft.unlink()
    return key
