"""The coordinator's own book: what the sites told it round by round, what audits found, how runs ended; all signed."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime

from privfed.crypto import keys
from privfed.privacy.accountant import Epsilon
from privfed.privacy.audit.result import Audit
from privfed.privacy.errors import LedgerCorrupt
from privfed.privacy.events import NoiseSite, PrivacyUnit
from privfed.privacy.ledger import Entry, Ledger, Recorded, utc_now

from . import seals
from .seals import COORDINATOR, SealError
from .statements import audit_entry, end_entry


class Witness:
    """Writes the Merkle root over the sites' signed words into a chain of its own, and signs that chain.

    A site that later shows another history than it had shown then is found out, by whoever kept the coordinator's word.

    Args:
        ledger: where the chain and the words are kept. In a simulation it is the sites' ledger too.
        private: the coordinator's Ed25519 key.
        members: name → public ledger key, of the sites whose words count.

    Guarantees:
        An entry is signed in the transaction that writes it. What somebody else put into the chain is never signed:
        the next entry is then refused.
    """

    def __init__(
        self,
        ledger: Ledger,
        private: bytes,
        members: Mapping[str, bytes],
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._ledger, self._private, self._members, self._clock = ledger, private, members, clock

    @property
    def public_keys(self) -> dict[str, str]:
        """name → public key in hex, of the sites and the coordinator: what an auditor should get from elsewhere."""
        own = {COORDINATOR: keys.verification_key(self._private).hex()}
        return {**{name: key.hex() for name, key in self._members.items()}, **own}

    def round(self, run: str, round: int, words: Mapping[str, bytes]) -> None:
        """Have the sites' words of one round on disk, and the root over them in the chain.

        A word that is not signed by its site, or is about another, is left out: the site did not give one.
        """
        valid = {site: body for site, body in sorted(words.items()) if self._is_word_of(site, run, round, body)}
        if not valid:
            return
        entry = Entry(
            kind="witness",
            site=COORDINATOR,
            dataset=seals.root(tuple(valid.values())),
            run=run,
            round=round,
            # a round that is done again after a crash is witnessed again
            attempt=sum(line.entry.round == round for line in self._lines("witness", run)),
            unit=PrivacyUnit.NONE,
            noise=NoiseSite.LOCAL,
            metadata={"words": str(len(valid))},
        )
        self._write(entry, valid)

    def audited(self, run: str, config: str, audits: Iterable[Audit]) -> None:
        """Have what attacks on a run found in the chain. The same audit again, with the same result, stands there once.

        Args:
            config: hex SHA-256 of the run's configuration.
        """
        for found in audits:
            earlier = self._lines("audit", run)
            entry = audit_entry(run, config, found, attempt=len(earlier))
            if not any((line.entry.dataset, line.entry.metadata) == (config, entry.metadata) for line in earlier):
                self._write(entry)

    def ended(self, run: str, files: Mapping[str, str]) -> None:
        """Have the digests of the files that a run leaves in the chain.

        Args:
            files: name → hex SHA-256, of `statements.FILES`.
        """
        self._write(end_entry(run, files, attempt=len(self._lines("end", run))))

    def _lines(self, kind: str, run: str) -> list[Recorded]:
        chain = self._ledger.entries(COORDINATOR)
        return [line for line in chain if (line.entry.kind, line.entry.run) == (kind, run)]

    def _write(self, entry: Entry, words: Mapping[str, bytes] | None = None) -> None:
        """An entry, with the words that it is about, and the coordinator's own over its whole chain."""

        def signed(recorded: Recorded) -> list[tuple[str, bytes]]:
            if recorded.sequence != self._signed() + 1:
                where = f"site {COORDINATOR!r}, entry {recorded.sequence - 1}"
                reason = "the coordinator has not signed it: somebody else wrote it"
                raise LedgerCorrupt(self._ledger.path, reason, where)
            own = seals.seal(
                ledger=self._ledger.id,
                site=COORDINATOR,
                dataset="",
                last=recorded,
                genesis="",
                run=entry.run,
                round=entry.round,
                spent=Epsilon(0.0, 1.0, "pld", 0.0, {}),
                time=self._clock(),
                private=self._private,
            )
            return [*(words or {}).items(), (COORDINATOR, own)]

        self._ledger.witness(entry, signed)

    def _signed(self) -> int:
        """How many entries of the chain this coordinator's last word covers."""
        own = keys.verification_key(self._private).hex()
        for body in reversed(self._ledger.statements(COORDINATOR)):
            with suppress(SealError):
                word = seals.read(body)
                if word.key == own:
                    return word.sequence
        return 0

    def _is_word_of(self, site: str, run: str, round: int, body: bytes) -> bool:
        try:
            word = seals.read(body)
        except SealError:
            return False
        return (word.site, word.run, word.round, bytes.fromhex(word.key)) == (
            site,
            run,
            round,
            self._members.get(site),
        )
