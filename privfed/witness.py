"""The coordinator's own book: what the sites told it of their ledgers, round by round, and its signature over that."""

from collections.abc import Callable, Mapping
from datetime import datetime

from privfed.crypto import keys
from privfed.privacy.accountant import Epsilon
from privfed.privacy.events import NoiseSite, PrivacyUnit
from privfed.privacy.ledger import Entry, Ledger, utc_now

from . import seals
from .seals import COORDINATOR, SealError


class Witness:
    """Writes the Merkle root over the sites' signed words into a chain of its own, and signs that chain.

    A site that later shows another history than it had shown then is found out, by whoever kept the coordinator's word.

    Args:
        ledger: where the chain and the words are kept. In a simulation it is the sites' ledger too.
        private: the coordinator's Ed25519 key.
        members: name → public ledger key, of the sites whose words count.
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
        root = seals.root(tuple(valid.values()))
        attempt = sum(
            line.entry.run == run and line.entry.round == round for line in self._ledger.entries(COORDINATOR)
        )  # a round that is done again after a crash is witnessed again
        recorded = self._ledger.witness(
            Entry(
                kind="witness",
                site=COORDINATOR,
                dataset=root,
                run=run,
                round=round,
                attempt=attempt,
                unit=PrivacyUnit.NONE,
                noise=NoiseSite.LOCAL,
                metadata={"words": str(len(valid))},
            )
        )
        own = seals.seal(
            ledger=self._ledger.id,
            site=COORDINATOR,
            dataset="",
            last=recorded,
            genesis="",
            run=run,
            round=round,
            spent=Epsilon(0.0, 1.0, "pld", 0.0, {}),
            time=self._clock(),
            private=self._private,
        )
        self._ledger.add_statements([*valid.items(), (COORDINATOR, own)])

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
