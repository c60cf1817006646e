"""A ledger as text that anybody can check: canonical JSON, one line an entry.

docs/check_export.py does so with the standard library and `cryptography` alone.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from privfed.privacy.events import to_canonical_json
from privfed.privacy.ledger import Ledger, body_of

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


def _line(fields: dict[str, str]) -> str:
    return json.dumps(fields, ensure_ascii=False, sort_keys=True)
