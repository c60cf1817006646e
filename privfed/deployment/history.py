"""Whether a site's ledger is the one that its own signed words are about: a copy that was put back is found out.

A word names an entry of the site's chain and the hash up to there, so one word vouches for every entry before it. The
coordinator brings a site's last word back with each request. A chain that lacks the entry, or has another one in its
place, is an older copy, however much was added to it since. What the words hold is the site's own signature: nobody has
to be believed.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime

from privfed import seals
from privfed.errors import PrivfedError
from privfed.privacy.errors import PrivacyError
from privfed.privacy.ledger import Ledger, Recorded, utc_now
from privfed.seals import Seal, SealError

from .hospital import LEDGER, Hospital, Restored
from .signed import Opened

CLOCK_SECONDS = 60.0
"""How far a site's clock may be from the coordinator's: certificates, hours, deadlines and signed dates go by it."""

logger = logging.getLogger(__name__)


class Astray(PrivfedError):
    """A request that a site does not look into, for what it says of its time or of the site's ledger."""


class Reminded:
    """Lets a signed request in whose time has not passed, and whose word is about this site's own chain.

    Args:
        clock: gives an aware datetime.

    Guarantees:
        A request counts until its deadline and `CLOCK_SECONDS` more, by this site's clock: one that somebody kept back
        begins nothing later. A site whose chain is not the one that its own word is about marks itself as restored and
        takes part in nothing, from that request on, until `account.catch_up` takes the mark away.

    Not guaranteed: a copy is found by the words that the coordinator sends. It has none on rounds that were not
    measured, and may keep some back.
    """

    def __init__(self, hospital: Hospital, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._hospital, self._clock = hospital, clock
        self._checked = b""  # the last word that held

    def __call__(self, request: Opened) -> None:
        """Return if the site may look into the request. Raises `Astray`."""
        late = self._clock().timestamp() - request.until
        if not late <= CLOCK_SECONDS:
            raise Astray(
                f"the request's deadline is over for {late:.0f} s by this site's clock: it was kept back, or a clock "
                "is wrong (privfed coordinator preflight compares them)"
            )
        if request.word not in (b"", self._checked) and self._hospital.restored is None:
            self._check(request.word)
        if self._hospital.restored is not None:  # also where the coordinator sends no word any more
            raise Astray(
                "this site's ledger may lack what was spent: it waits for an account (privfed consortium account), "
                "and privfed site catch-up"
            )

    def _check(self, body: bytes) -> None:
        hospital = self._hospital
        try:
            word = own_word(body, hospital.file.name, own_keys(hospital))
            hospital.require_ledger()
            with Ledger(hospital.home / LEDGER) as book:  # the file as it is now: it may have been put back meanwhile
                chain = book.entries(hospital.file.name)
                if not lost_words([word], book.id, chain):
                    self._checked = body
                    return
                logger.error("%s: its ledger is not the one that its own signed word is about", hospital.file.name)
                hospital.mark(as_it_is(book, chain))
        except SealError as error:
            raise Astray(f"the request brings back {error} (privfed site catch-up learns of keys it had)") from None
        except (PrivfedError, PrivacyError) as error:
            logger.error("%s: %s", hospital.file.name, error)  # its own log: the message names local files
            raise Astray("the site can not use its ledger") from None


def own_keys(hospital: Hospital) -> frozenset[str]:
    """Public keys, hex, that this site signs its words with, or did."""
    return frozenset({hospital.identity.member.ledger_key.hex(), *hospital.former_keys})


def own_word(body: bytes, site: str, keys: frozenset[str]) -> Seal:
    """A word that this site gave. Raises `SealError`: somebody else did, or nobody."""
    try:
        word = seals.read(body)
    except SealError as error:
        raise SealError(f"a word that this site never gave: {error}") from None
    if word.key not in keys or word.site != site:
        raise SealError("a word of another site, or under keys that this site does not know as its own")
    return word


def on_chain(word: Seal, ledger: str, chain: Sequence[Recorded]) -> bool:
    """Whether what a word is about stands in a chain, with all that was before it.

    Args:
        ledger: id of the chain's ledger.
    """
    if word.ledger != ledger or word.sequence > len(chain):
        return False
    return word.sequence == 0 or chain[word.sequence - 1].hash == word.head


def lost_words(words: Iterable[Seal], ledger: str, chain: Sequence[Recorded]) -> list[Seal]:
    """Those that are about another history than a chain, of which the chain has not been charged yet."""
    known = settled(chain)
    return [word for word in words if not on_chain(word, ledger, chain) and name_of(word) not in known]


def name_of(word: Seal) -> str:
    """What a chain calls a word that it was charged for."""
    return word.statement.hex()


def settled(chain: Iterable[Recorded]) -> frozenset[str]:
    """The words about other histories that a chain was charged for: by their names, as no clock has to be right."""
    return frozenset(name for line in chain for name in line.entry.metadata.get("words", "").split(",") if name)


def as_it_is(book: Ledger, chain: Sequence[Recorded]) -> Restored:
    """The mark of a ledger that nobody marked."""
    now = utc_now().isoformat()
    head = chain[-1].hash if chain else ""
    return Restored(ledger=book.id, sequence=len(chain), head=head, made=now, restored=now)
