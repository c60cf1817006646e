"""A ledger, recomputed by somebody who trusts nobody: hashes, signatures, roots, and every ε from its events."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from privfed.privacy.accountant import Accountant, Epsilon
from privfed.privacy.errors import LedgerCorrupt, PrivacyError
from privfed.privacy.events import Charge
from privfed.privacy.ledger import FEDERATION, Ledger, Recorded

from . import folder, seals, statements
from .errors import RunFolderError
from .seals import COORDINATOR, Seal, SealError
from .statements import StatementError

_AGREES = 0.01  # relative; other versions of the accountant stop at other grids


@dataclass(frozen=True)
class Book:
    """A ledger file, and the keys that its signatures are held against.

    Attributes:
        path: the file.
        keys: name → public key in hex; empty where none are known.
        keys_beside: they come from the run's own folder: whoever could rewrite the ledger could rewrite them too.
        home: the run's folder, whose files are held against the ledger too; None where a ledger alone was given.
    """

    path: Path
    keys: Mapping[str, str]
    keys_beside: bool = False
    home: Path | None = None


@dataclass(frozen=True)
class VerifiedSite:
    """What holds of one chain.

    Attributes:
        entries: how many.
        signed: how many of them the last signed word covers.
        words: signed words.
        epsilon: by recomputation, of all entries; one a data set and audience, the largest. None at a coordinator.
        insecure: some noise came from a seed that others know: ε is void.
    """

    name: str
    entries: int
    signed: int
    words: int
    epsilon: Epsilon | None
    insecure: bool


@dataclass(frozen=True)
class Verification:
    """What `verify` found to hold.

    Attributes:
        rounds: how many a coordinator witnessed.
        audits: how many it states.
        notes: what a reader should know beside it.
    """

    ledger: str
    sites: tuple[VerifiedSite, ...]
    rounds: int
    audits: int
    notes: tuple[str, ...]


def find_book(target: Path, keys: Path | None = None) -> Book:
    """The ledger at ``target``, a ledger file or a run's folder.

    Args:
        keys: a JSON file with name → public key in hex, got from elsewhere.

    Raises:
        RunFolderError: there is no ledger, or no such keys.
    """
    path, beside, home = target, target / folder.KEYS, target if target.is_dir() else None
    if home is not None:
        path = folder.RunFolder.open(home).ledger()
    if not path.is_file():
        raise RunFolderError(f"there is no ledger at {path}: give a ledger file or the folder of a run")
    if keys is not None:
        return Book(path, _keys(keys), home=home)
    return Book(path, _keys(beside), keys_beside=True, home=home) if beside.is_file() else Book(path, {}, home=home)


def spent(book: Ledger, site: str, delta: float, accountant: Accountant) -> Epsilon:
    """ε of a chain's charges: of the data set and audience that have spent most."""
    pairs = {(line.entry.dataset, line.entry.audience) for line in book.entries(site) if line.entry.charges}
    costs = [accountant.epsilon(book.charges(site, *pair), delta) for pair in sorted(pairs)]
    return max(costs, key=lambda cost: cost.value, default=accountant.epsilon((), delta))


def charges_of(books: Sequence[Ledger], site: str) -> tuple[Charge, ...]:
    """Everything that a site of this name was charged in several ledgers, as if it were one data set."""
    found: list[Charge] = []
    for book in books:
        spends = {(line.entry.dataset, line.entry.audience) for line in book.entries(site) if line.entry.charges}
        for pair in sorted(spends):
            found += book.charges(site, *pair)
    return tuple(found)


def verify(
    book: Book,
    *,
    delta: float,
    accountant: Accountant,
    progress: Callable[[str], None] = lambda what: None,
) -> Verification:
    """Everything that the ledger says, checked.

    Args:
        delta: at which ε of the whole chains is given; the signed words are recomputed at their own.
        progress: told what is being looked at.

    Raises:
        LedgerCorrupt: names the first entry or signed word that does not hold, and why.
    """
    with Ledger(book.path) as ledger:
        progress("hashes")
        ledger.verify()
        words, rounds = _check_statements(ledger, book, accountant, progress)
        sites = tuple(_site(ledger, name, words.get(name, []), delta, accountant) for name in ledger.sites())
        audits = len(statements.audits_in(signed_chain(ledger, sites)))
        return Verification(ledger.id, sites, rounds, audits, tuple(_notes(book, sites)))


def signed_chain(ledger: Ledger, sites: Sequence[VerifiedSite]) -> tuple[Recorded, ...]:
    """The coordinator's entries that its last word covers: what stands after them, anybody may have written."""
    signed = next((site.signed for site in sites if site.name == COORDINATOR), 0)
    return ledger.entries(COORDINATOR)[:signed]


def require_signed(book: Book, verified: Verification) -> None:
    """Return if every entry is covered by a word under one of the keys that were given.

    Hashes alone prove nothing against whoever can write the file: all signed words can be taken out, and the chains
    written anew. `verify` notes it, since a run that goes on, or was killed, has such entries too.

    Raises:
        LedgerCorrupt: names the first entry of the first such chain.
    """
    for site in verified.sites:
        signed = site.signed if site.name in book.keys else 0
        if site.entries > signed:
            reason = "no signed word covers it" if site.name in book.keys else "there is no key of its chain in --keys"
            raise LedgerCorrupt(
                book.path, f"{reason}: anybody may have written it", f"site {site.name!r}, entry {signed + 1}"
            )


def verify_files(book: Book, verified: Verification) -> tuple[str, ...]:
    """Hold the files in the run's folder against the ledger, which `verify` has found to hold.

    Returns:
        What a reader should know beside it; nothing where a ledger alone was given.

    Raises:
        RunChanged: names the first file that is not as it was left.
    """
    if book.home is None:
        return ()
    run = folder.RunFolder.open(book.home).facts().run
    with Ledger(book.path) as ledger:
        return statements.check_files(book.home, run, signed_chain(ledger, verified.sites))


def _check_statements(
    ledger: Ledger, book: Book, accountant: Accountant, progress: Callable[[str], None]
) -> tuple[dict[str, list[Seal]], int]:
    """Every signed word, and every root over the words that a coordinator signed after them."""
    chains = {name: ledger.entries(name) for name in ledger.sites()}
    signers = dict(book.keys)
    spends: dict[tuple[str, str], Spends] = {}
    words: dict[str, list[Seal]] = {}
    batch: list[bytes] = []
    homes: dict[str, str] = {}
    rounds = 0
    for number, body in enumerate(ledger.statements(), start=1):
        where, other = f"signed word {number}", "it is of another ledger, or signed with another key than that site's"
        try:
            word = seals.read(body)
        except SealError as error:
            raise LedgerCorrupt(book.path, str(error), where) from None
        where = f"{where} (site {word.site!r}, round {word.round})"
        progress(where)
        chain = chains.get(word.site, ())
        # A site of a deployment signs what stands in its own ledger: here its word counts, not what it is about
        elsewhere = word.site != COORDINATOR and word.site not in chains and word.ledger != ledger.id
        home = homes.setdefault(word.site, word.ledger) if elsewhere else ledger.id
        if word.ledger != home or signers.setdefault(word.site, word.key) != word.key:
            raise LedgerCorrupt(book.path, other, where)
        if elsewhere and book.keys and word.site not in book.keys:
            raise LedgerCorrupt(book.path, "there is no key of this site in --keys: anybody may have signed it", where)
        head = chain[word.sequence - 1].hash if 0 < word.sequence <= len(chain) else ""
        if not elsewhere and (word.sequence > len(chain) or (word.sequence and head != word.head)):
            raise LedgerCorrupt(book.path, f"entry {word.sequence} is not the one that was signed", where)
        if word.sequence < (words[word.site][-1].sequence if word.site in words else 0):
            raise LedgerCorrupt(book.path, "it covers fewer entries than an earlier one", where)
        words.setdefault(word.site, []).append(word)
        if word.site == COORDINATOR:
            rounds += _check_witnessed(book, chain, word, batch, where)
            batch = []
        else:
            if not elsewhere:
                running = spends.setdefault((word.site, word.dataset), Spends(chain, word.dataset))
                _check_epsilon(book, word, running.upto(word.sequence), accountant, where)
            batch.append(body)
    return words, rounds


def _check_witnessed(book: Book, chain: Sequence[Recorded], word: Seal, batch: Sequence[bytes], where: str) -> int:
    """What a coordinator signed last is what it should be; gives the number of roots: 1 or 0."""
    entry = chain[word.sequence - 1].entry if word.sequence else None
    if entry is not None and entry.kind != "witness" and not batch:
        try:
            statements.check(entry)
        except StatementError as error:
            raise LedgerCorrupt(book.path, str(error), f"site {COORDINATOR!r}, entry {word.sequence}") from None
        return 0
    if entry is None or not batch or entry.dataset != seals.root(batch):
        raise LedgerCorrupt(book.path, "its root is not that of the sites' words of the round", where)
    return 1


class Spends:
    """What a chain has spent on one data set, entry by entry: a second reading of the rules, apart from the ledger's.

    A settlement takes the place of its reserve. Equal charges are counted together, so that a long chain stays cheap.
    """

    def __init__(self, chain: Sequence[Recorded], dataset: str, audience: str = FEDERATION) -> None:
        self._chain, self._dataset, self._audience, self._read = chain, dataset, audience, 0
        self._counts: Counter[Charge] = Counter()
        self._reserved: dict[tuple[str, int, int], tuple[Charge, ...]] = {}

    def upto(self, sequence: int) -> tuple[Charge, ...]:
        """All charges of the first ``sequence`` entries. Never asked to go back."""
        for recorded in self._chain[self._read : sequence]:
            entry = recorded.entry
            if entry.dataset != self._dataset or entry.audience != self._audience:
                continue
            key = (entry.run, entry.round, entry.attempt)
            if entry.kind == "reserve":
                self._reserved[key] = entry.charges
            if entry.kind == "settle":
                self._add(self._reserved.pop(key, ()), -1)
            self._add(entry.charges, 1)
        self._read = max(self._read, sequence)
        return tuple(
            msgspec.structs.replace(charge, count=count) for charge, count in self._counts.items() if count > 0
        )

    def _add(self, charges: Sequence[Charge], sign: int) -> None:
        for charge in charges:
            self._counts[msgspec.structs.replace(charge, count=1)] += sign * charge.count


def _check_epsilon(book: Book, word: Seal, charges: tuple[Charge, ...], accountant: Accountant, where: str) -> None:
    try:
        own = accountant.epsilon(charges, word.delta).value
    except PrivacyError as error:
        raise LedgerCorrupt(book.path, f"its ε can not be recomputed: {error}", where) from None
    claimed = math.inf if word.epsilon is None else word.epsilon
    if not (own == claimed or abs(own - claimed) <= _AGREES * own):
        raise LedgerCorrupt(book.path, f"it says ε = {claimed:.6g}, its events give {own:.6g}", where)


def _site(ledger: Ledger, name: str, words: Sequence[Seal], delta: float, accountant: Accountant) -> VerifiedSite:
    chain = ledger.entries(name)
    return VerifiedSite(
        name=name,
        entries=len(chain),
        signed=words[-1].sequence if words else 0,
        words=len(words),
        epsilon=None if name == COORDINATOR else spent(ledger, name, delta, accountant),
        insecure=any(line.entry.insecure_seed for line in chain if line.entry.charges),
    )


def _notes(book: Book, sites: Sequence[VerifiedSite]) -> list[str]:
    notes = []
    if not book.keys:
        notes.append(
            "no public keys were given: signatures agree with each other, but anybody could have made them all; give "
            "--keys FILE with keys that you got from the sites"
        )
    elif book.keys_beside:
        notes.append(
            "the public keys come from the run's own folder: against whoever can write there, give --keys FILE with "
            "keys that you got from the sites"
        )
    else:
        notes += [
            f"{name}: its key is not among those given: anybody may have signed" for name in strangers(book, sites)
        ]
    missing = sorted(book.keys.keys() - {site.name for site in sites})
    notes += [f"{name}: it has a key and no chain on this ledger" for name in missing]
    notes += [
        f"{site.name}: {site.entries - site.signed} entries after its last signed word"
        for site in sites
        if site.entries > site.signed
    ]
    notes += [f"{site.name}: a known seed made its noise, its ε is void" for site in sites if site.insecure]
    notes.append(
        "hashes and signatures show that nothing was changed since; whether noise was really added is what "
        "`privfed audit` looks at"
    )
    return notes


def strangers(book: Book, sites: Sequence[VerifiedSite]) -> list[str]:
    """Chains whose signer's key nobody gave: signed with whatever key they name."""
    return [site.name for site in sites if site.name not in book.keys]


def _keys(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError
        for name, key in found.items():
            if not (isinstance(name, str) and isinstance(key, str) and len(bytes.fromhex(key)) == 32):
                raise ValueError
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it must be JSON, name: public key in hex"
        raise RunFolderError(f"can not read the keys in {path}: {reason}") from None
    return found
