"""Signed words about a chain: a site on what it has spent, a coordinator on what the sites told it.

A hash chain shows that an entry was changed, unless somebody who can write the file computed every hash anew. A
signature over the last hash ends that, for whoever knows the signer's public key from elsewhere.
"""

import math
from collections.abc import Sequence
from datetime import datetime

import msgspec

from privfed.crypto import keys, merkle
from privfed.crypto.digest import digest
from privfed.crypto.errors import RemoteProtocolError
from privfed.privacy.accountant import Epsilon
from privfed.privacy.events import from_canonical_json, to_canonical_json
from privfed.privacy.ledger import Recorded

from .errors import PrivfedError

COORDINATOR = "coordinator"
"""The name of the coordinator's chain. No site may have it."""


class SealError(PrivfedError):
    """A signed word that is not what it claims to be."""


class Seal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One signed word.

    Args:
        ledger: id of the ledger.
        site: whose chain.
        dataset: hex, which records its ε is about; empty at a coordinator.
        sequence, head: the last entry covered, and its hash in hex.
        run, round: after which round.
        delta, epsilon, accountant: ε of all entries covered; ``epsilon`` is None where there is no bound.
        time: UTC, ISO 8601.
        key: the signer's Ed25519 public key, hex.
        signature: Ed25519 over everything else, hex.
    """

    ledger: str
    site: str
    dataset: str
    sequence: int
    head: str
    run: str
    round: int
    delta: float
    epsilon: float | None
    accountant: str
    time: str
    key: str
    signature: str = ""

    @property
    def statement(self) -> bytes:
        """bytes[32]: what is signed."""
        return digest("privfed/seal/1", to_canonical_json(msgspec.structs.replace(self, signature="")))


def seal(
    *,
    ledger: str,
    site: str,
    dataset: str,
    last: Recorded | None,
    genesis: str,
    run: str,
    round: int,
    spent: Epsilon,
    time: datetime,
    private: bytes,
) -> bytes:
    """A site's signed word on its chain as it stands, as canonical JSON.

    Args:
        last: the chain's last entry; None if it has none.
        genesis: the hash that the chain starts from, hex.
        spent: ε of all its entries.
        private: the signer's Ed25519 key.
    """
    word = Seal(
        ledger=ledger,
        site=site,
        dataset=dataset,
        sequence=last.sequence if last else 0,
        head=last.hash if last else genesis,
        run=run,
        round=round,
        delta=spent.delta,
        epsilon=spent.value if math.isfinite(spent.value) else None,
        accountant=spent.accountant,
        time=time.isoformat(),
        key=keys.verification_key(private).hex(),
    )
    return to_canonical_json(msgspec.structs.replace(word, signature=keys.sign(private, word.statement).hex()))


def read(body: bytes) -> Seal:
    """The signed word in ``body``, its signature checked against the key that it names.

    Raises:
        SealError: it is none, or the signature is not over it.
    """
    try:
        word = from_canonical_json(body, Seal)
        keys.verify(bytes.fromhex(word.key), bytes.fromhex(word.signature), word.statement)
    except (ValueError, TypeError, msgspec.MsgspecError):
        raise SealError("it is no signed word of a site") from None
    except RemoteProtocolError:
        raise SealError("its signature is not over what it says") from None
    return word


def root(seals: Sequence[bytes]) -> str:
    """Hex root of the Merkle tree over the sites' words, in the order of their names: what a coordinator witnesses."""
    return merkle.tree(seals)[-1][0].hex()
