"""What a site leaves in another's keeping between two messages: sealed under a key that opens it once.

The keeper has bytes that say nothing to it. The key stays in the site's own 0600 file, and is erased when the deposit
comes back, or is given up. So what was rolled back, copied, replayed or altered does not open.
"""

import secrets
from collections.abc import Callable

from privfed.crypto import keys
from privfed.crypto.digest import digest
from privfed.crypto.errors import RemoteProtocolError
from privfed.crypto.journal import JournalFile
from privfed.errors import PrivfedError


class DepositRefused(PrivfedError):
    """What came back is not what the site left last. The key that it would need is gone, and the round with it."""


class Deposits:
    """One site's, of which one at a time is out.

    Args:
        file: its own.
        owner: the site's name.
        entropy: of the keys.

    Guarantees:
        A deposit opens at most once, and only the last one; only with every bit as it was, and at the site that left
        it. Its key is erased durably before its content is used. Whoever keeps a deposit learns its length. As with the
        journal, in whose file the keys stand, no copy of that file may be restored, and erasure below the file system
        is not promised.
    """

    def __init__(self, file: JournalFile, owner: str, entropy: Callable[[int], bytes] = secrets.token_bytes) -> None:
        self._file, self._owner, self._entropy = file, owner, entropy
        with file.transaction() as db:
            db.execute(
                "CREATE TABLE IF NOT EXISTS deposits"
                " (owner TEXT PRIMARY KEY, counter INTEGER NOT NULL, about BLOB NOT NULL, key BLOB)"
            )

    def leave(self, content: bytes, *, about: bytes) -> bytes:
        """The sealed deposit. An earlier one that is still out does not open any more.

        Args:
            about: what it is bound to beside its number: of which session, and which step.
        """
        key = self._entropy(keys.KEY_BYTES)
        with self._file.transaction() as db:
            counter = 1 + max((row[0] for row in db.execute(_COUNTER, (self._owner,))), default=0)
            db.execute("INSERT OR REPLACE INTO deposits VALUES (?, ?, ?, ?)", (self._owner, counter, about, key))
        return keys.seal(key, content, bound_to=self._bound(about, counter))

    def fetch(self, deposit: bytes) -> bytes:
        """Its content; never again.

        Raises:
            DepositRefused: it is not the last one, or not as it was. The last one is given up all the same.
        """
        with self._file.transaction() as db:
            row = db.execute(
                "SELECT counter, about, key FROM deposits WHERE owner = ? AND key IS NOT NULL", (self._owner,)
            ).fetchone()
            db.execute(_ERASE, (self._owner,))
        if row is None:
            raise DepositRefused("this site has left nothing, or has had it back")
        try:
            return keys.open_sealed(row[2], deposit, bound_to=self._bound(row[1], row[0]))
        except RemoteProtocolError:
            raise DepositRefused("what came back is not what this site left last") from None

    def give_up(self) -> None:
        """Erase the key of the one that is out."""
        with self._file.transaction() as db:
            db.execute(_ERASE, (self._owner,))

    @property
    def out(self) -> bool:
        """Whether there is one."""
        with self._file.transaction() as db:
            return bool(db.execute(f"{_COUNTER} AND key IS NOT NULL", (self._owner,)).fetchone())

    def _bound(self, about: bytes, counter: int) -> bytes:
        return digest("privfed/deposit/1", self._owner.encode(), about, counter.to_bytes(8, "big"))


_COUNTER = "SELECT counter FROM deposits WHERE owner = ?"
_ERASE = "UPDATE deposits SET key = NULL WHERE owner = ?"
