"""Is the record whole: chains, keys, signatures and files."""

from collections.abc import Sequence

from ..evidence import BookEvidence, Evidence
from ..model import FILES_AS_LEFT, LEDGER_VERIFIES, Finding
from .finding import SUPPORTED, UNDECIDED, UNSOUND, finding


def ledger_verifies(books: Sequence[BookEvidence]) -> Finding:
    bad = [book for book in books if book.verified is None]
    if bad:
        return finding(
            LEDGER_VERIFIES,
            UNSOUND,
            "A ledger does not verify: it is not what was written, so nothing in it supports a claim.",
            [f"{book.path}: {book.bad_entry}: {book.failure}" for book in bad],
            "Find out who changed the file, and restore it from a copy whose last hash was kept elsewhere.",
        )
    return finding(
        LEDGER_VERIFIES,
        SUPPORTED,
        "Every hash, signature and root was recomputed and holds, and so does every ε that a site signed.",
        [f"{book.path}: {sum(map(len, book.chains.values()))} entries" for book in books],
    )


def signatures_are_held_against_known_keys(books: Sequence[BookEvidence]) -> Finding:
    unknown = [book for book in books if book.keys != "elsewhere"]
    if unknown:
        return finding(
            "keys come from the sites",
            UNDECIDED,
            "The signatures agree with each other, but the public keys were not got from the sites: whoever could "
            "rewrite the ledger could have made them all.",
            [
                f"{book.path}: " + ("keys from the run's own folder" if book.keys == "beside" else "no keys")
                for book in unknown
            ],
            "Get the public keys from the sites, by another way than this folder, and give them with --keys FILE.",
        )
    strangers = [f"{book.path}: no key of {name}" for book in books for name in book.strangers]
    if strangers:
        return finding(
            "keys come from the sites",
            UNDECIDED,
            "Some chains are signed with keys that were not given: whoever wrote them may have made the key too.",
            strangers,
            "Get the missing public keys from their sites, and the coordinator's, and give them all with --keys FILE.",
        )
    return finding(
        "keys come from the sites", SUPPORTED, "The signatures were held against keys that were given separately."
    )


def every_entry_is_signed(books: Sequence[BookEvidence]) -> Finding | None:
    open_ends = [
        f"{site.name}: {site.entries - site.signed} of {site.entries} entries"
        for book in books
        if book.verified is not None
        for site in book.verified.sites
        if site.entries > site.signed
    ]
    if open_ends:
        return finding(
            "every entry is signed",
            UNDECIDED,
            "Some entries are not covered by any signed word: their writer could have left others out after them.",
            open_ends,
            "Have every site sign its chain; privfed run does so after each round that is measured.",
        )
    if not all(book.verified for book in books):
        return None
    return finding("every entry is signed", SUPPORTED, "Signed words cover every entry of every chain.")


def files_are_as_left(evidence: Evidence) -> Finding | None:
    runs = [*evidence.runs, *([evidence.baseline] if evidence.baseline is not None else [])]
    changed = [run.changed for run in runs if run.changed]
    if changed:
        return finding(
            FILES_AS_LEFT,
            UNSOUND,
            "A file of a run was changed, or is of another run: what it says supports nothing.",
            changed,
            "Restore the folder from a copy, and find out who changed it.",
        )
    if not runs or not all(book.verified for book in evidence.books):
        return None
    return finding(
        FILES_AS_LEFT,
        SUPPORTED,
        "The runs' configurations, rounds, summaries and audits are those that the coordinator signed at their end.",
        [f"run {run.run}: {note}" for run in runs for note in run.missing],
    )
