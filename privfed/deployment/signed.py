"""Every request of the coordinator to a site, signed: who speaks as FLARE's server is not the coordinator by that.

A request is 64 bytes of an Ed25519 signature and then what it is over. The public key stands in the consortium's terms,
which the offline authority has signed; the private one is derived from the key of the coordinator's ledger and is in no
kit of FLARE.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from privfed import wire
from privfed.crypto import keys
from privfed.crypto.digest import digest
from privfed.crypto.errors import RemoteProtocolError
from privfed.engines.contract import Engine, Handler
from privfed.errors import PrivfedError
from privfed.keyring import ledger_key, site_key
from privfed.seals import COORDINATOR

from .consortium import LEDGER
from .papers import Terms

logger = logging.getLogger(__name__)


def coordinator_key(home: Path) -> bytes:
    """The coordinator's Ed25519 private key; its public half is ``Terms.coordinator``."""
    return site_key(ledger_key(home / LEDGER), COORDINATOR, "ledger")


def _statement(terms: Terms, site: str, body: bytes) -> bytes:
    # Of this consortium, and for this site: what one was asked is no request to another
    return digest("privfed/request/1", bytes.fromhex(terms.authority), terms.name.encode(), site.encode(), body)


class SigningEngine:
    """An engine whose requests are signed.

    Args:
        engine: carries them.
        private: the coordinator's key.
    """

    def __init__(self, engine: Engine, terms: Terms, private: bytes) -> None:
        self._engine, self._terms, self._private = engine, terms, private

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        return self._engine.exchange(_Signed(requests, self._terms, self._private), deadline_seconds)


class _Signed(Mapping[str, bytes]):
    """Each signed as it is taken: they are not all held at once."""

    def __init__(self, requests: Mapping[str, bytes], terms: Terms, private: bytes) -> None:
        self._requests, self._terms, self._private = requests, terms, private

    def __getitem__(self, site: str) -> bytes:
        body = self._requests[site]
        return keys.sign(self._private, _statement(self._terms, site, body)) + body

    def __iter__(self) -> Iterator[str]:
        return iter(self._requests)

    def __len__(self) -> int:
        return len(self._requests)


class SignedHandler:
    """A site that reads what its consortium's coordinator has signed for it, and nothing else.

    Args:
        handler: the site.
        terms: as this site has accepted them, with their authority's signature.
        site: its own name.

    Guarantees:
        Bytes that the coordinator did not sign for this site, in this consortium, are looked into by nobody. A signed
        request that comes again is the site's affair: it answers each step once, and no round goes back.
    """

    def __init__(self, handler: Handler, terms: Terms, site: str) -> None:
        self._handler, self._terms, self._site = handler, terms, site

    def handle(self, request: bytes) -> bytes:
        try:
            return self._handler.handle(opened(request, self._terms, self._site))
        except NotSigned as error:
            return error.refusal


class NotSigned(PrivfedError):
    """A request that the coordinator has not signed for this site."""

    @property
    def refusal(self) -> bytes:
        """What the site answers."""
        return wire.encode(wire.Refusal("protocol", str(self), final=False))


def opened(request: bytes, terms: Terms, site: str) -> bytes:
    """What the coordinator has signed for ``site``. Raises `NotSigned`."""
    signature, body = request[: keys.SIGNATURE_BYTES], request[keys.SIGNATURE_BYTES :]
    try:
        keys.verify(bytes.fromhex(terms.coordinator), signature, _statement(terms, site, body))
    except RemoteProtocolError:
        logger.error("%s refuses: a request that the coordinator has not signed", site)
        raise NotSigned("the request is not signed by this consortium's coordinator for this site") from None
    return body
