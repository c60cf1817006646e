"""A ledger as text that anybody can check: canonical JSON, one line an entry.

docs/check_export.py does so with the standard library and `cryptography` alone.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from privfed.privacy.errors import LedgerCorrupt
from privfed.privacy.events import to_canonical_json
from privfed.privacy.ledger import Ledger, body_of

from .errors import RunFolderError

FORMAT = "privfed-ledger-export/1"


def lines(path: Path) -> Iterator[str]:
    """A header, every chain's entries in order with their hashes, then every signed word.

    Raises:
        LedgerCorrupt: the ledger does not verify; what does not hold is not exported.
    """
    with Ledger(path) as ledger:
        ledger.verify()
        yield _line({"format": FORMAT, "ledger": ledger.id})
        for site in ledger.sites():
            for recorded in ledger.entries(site):
                # The body as a text of its own: it is these bytes that are hashed
                body = to_canonical_json(body_of(recorded)).decode()
                yield _line({"site": site, "body": body, "hash": recorded.hash})
        for statement in ledger.statements():
            yield _line({"statement": statement.decode()})


def require_since(path: Path, export: Path) -> None:
    """Return if the ledger still holds all that an earlier export of it has.

    A ledger that was replaced by an older copy of itself holds in every other respect. Whoever kept an export, or got
    one, finds it.

    Raises:
        LedgerCorrupt: it is another ledger, or names the first entry or signed word that is no longer there.
        RunFolderError: the file is no export.
    """
    header, entries, words = _read(export)
    with Ledger(path) as ledger:
        if ledger.id != header:
            raise LedgerCorrupt(path, f"{export} is of ledger {header}, this one is {ledger.id}")
        held = {site: [line.hash for line in ledger.entries(site)] for site in ledger.sites()}
        for site, hashes in entries.items():
            chain = held.get(site, [])
            for number, digest in enumerate(hashes, start=1):
                if chain[number - 1 : number] != [digest]:
                    reason = f"{export} has it, the ledger has not: an older copy, or written anew"
                    raise LedgerCorrupt(path, reason, f"site {site!r}, entry {number}")
        known = {statement.decode() for statement in ledger.statements()}
        for number, word in enumerate(words, start=1):
            if word not in known:
                raise LedgerCorrupt(path, f"{export} has it, the ledger has not", f"signed word {number}")


def _read(export: Path) -> tuple[str, dict[str, list[str]], list[str]]:
    """The ledger's id, the hashes of every chain, and the signed words."""
    try:
        header, *lines = map(json.loads, export.read_text(encoding="utf-8").splitlines())
        if header["format"] != FORMAT:
            raise ValueError
        entries: dict[str, list[str]] = {}
        for line in lines:
            if "hash" in line:
                entries.setdefault(line["site"], []).append(line["hash"])
        return str(header["ledger"]), entries, [line["statement"] for line in lines if "statement" in line]
    except OSError as error:
        raise RunFolderError(f"can not read {export}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunFolderError(f"{export} is no export: make one with privfed accountant export") from None


def _line(fields: dict[str, str]) -> str:
    return json.dumps(fields, ensure_ascii=False, sort_keys=True)
