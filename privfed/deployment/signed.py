"""Every request of the coordinator to a site, signed: who speaks as FLARE's server is not the coordinator by that.

A request is 64 bytes of an Ed25519 signature and then what it is over: a header and the message. The header says until
when the request counts, and brings the site's own last signed word back to it. The public key stands in the
consortium's terms, which the offline authority has signed; the private one is derived from the key of the
coordinator's ledger and is in no kit of FLARE.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from privfed import wire
from privfed.crypto import keys
from privfed.crypto.digest import digest
from privfed.crypto.errors import RemoteProtocolError
from privfed.engines.contract import Engine, Handler
from privfed.errors import PrivfedError
from privfed.keyring import ledger_key, site_key
from privfed.privacy.ledger import Ledger, utc_now
from privfed.seals import COORDINATOR

from .consortium import LEDGER, Consortium
from .papers import Terms

logger = logging.getLogger(__name__)


def coordinator_key(home: Path) -> bytes:
    """The coordinator's Ed25519 private key; its public half is ``Terms.coordinator``."""
    return site_key(ledger_key(home / LEDGER), COORDINATOR, "ledger")


class _Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    until: float
    word: bytes


_LENGTH_BYTES = 4
_headers = msgspec.msgpack.Decoder(_Header)


@dataclass(frozen=True)
class Opened:
    """A request whose signature holds.

    Attributes:
        until: when its deadline is over, seconds since 1970 by the coordinator's clock.
        word: the last word of this site that the coordinator has; empty where it has none, or sent none.
        body: the message.
    """

    until: float
    word: bytes
    body: bytes


def _statement(terms: Terms, site: str, header: bytes, body: bytes) -> bytes:
    # Of this consortium, and for this site: what one was asked is no request to another
    about = (bytes.fromhex(terms.authority), terms.name.encode(), site.encode())
    return digest("privfed/request/2", *about, header, body)


class SigningEngine:
    """An engine whose requests are signed.

    Args:
        engine: carries them.
        private: the coordinator's key.
        last_word: site → the last word that it gave; empty for none. See `reminding`.
        clock: gives an aware datetime.
    """

    def __init__(
        self,
        engine: Engine,
        terms: Terms,
        private: bytes,
        *,
        last_word: Callable[[str], bytes] = lambda site: b"",
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._engine, self._terms, self._private = engine, terms, private
        self._last_word, self._clock = last_word, clock

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        until = self._clock().timestamp() + deadline_seconds
        words = {site: self._last_word(site) for site in requests}  # here: an engine may take them in other threads

        def signed(site: str) -> bytes:
            body, header = requests[site], msgspec.msgpack.encode(_Header(until, words[site]))
            signature = keys.sign(self._private, _statement(self._terms, site, header, body))
            return b"".join((signature, len(header).to_bytes(_LENGTH_BYTES, "big"), header, body))

        return self._engine.exchange(_Signed(requests, signed), deadline_seconds)


@contextmanager
def reminding(engine: Engine, consortium: Consortium) -> Iterator[SigningEngine]:
    """An engine for rounds: signed by the coordinator, and each site is reminded of the last word that it gave."""
    with Ledger(consortium.home / LEDGER) as book:
        private = coordinator_key(consortium.home)
        yield SigningEngine(engine, consortium.terms, private, last_word=book.last_statement)


class _Signed(Mapping[str, bytes]):
    """Each signed as it is taken: they are not all held at once."""

    def __init__(self, requests: Mapping[str, bytes], signed: Callable[[str], bytes]) -> None:
        self._requests, self._sign = requests, signed

    def __getitem__(self, site: str) -> bytes:
        return self._sign(site)

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
        admit: raises `PrivfedError`, with a reason that may leave, for a signed request that the site does not look
            into; `history.Reminded` where there are rounds.

    Guarantees:
        Bytes that the coordinator did not sign for this site, in this consortium, are looked into by nobody. A signed
        request that comes again is the site's affair: it answers each step once, and no round goes back.
    """

    def __init__(
        self, handler: Handler, terms: Terms, site: str, *, admit: Callable[[Opened], None] = lambda request: None
    ) -> None:
        self._handler, self._terms, self._site, self._admit = handler, terms, site, admit

    def handle(self, request: bytes) -> bytes:
        try:
            found = opened(request, self._terms, self._site)
            self._admit(found)
        except PrivfedError as error:
            return refusal(error)
        return self._handler.handle(found.body)


class NotSigned(PrivfedError):
    """A request that the coordinator has not signed for this site."""


def refusal(error: PrivfedError) -> bytes:
    """What the site answers to a request that it does not look into."""
    return wire.encode(wire.Refusal("protocol", str(error), final=False))


def opened(request: bytes, terms: Terms, site: str) -> Opened:
    """What the coordinator has signed for ``site``. Raises `NotSigned`."""
    start = keys.SIGNATURE_BYTES + _LENGTH_BYTES
    signature, length = request[: keys.SIGNATURE_BYTES], request[keys.SIGNATURE_BYTES : start]
    end = start + int.from_bytes(length, "big")
    header, body = request[start:end], request[end:]
    try:
        keys.verify(bytes.fromhex(terms.coordinator), signature, _statement(terms, site, header, body))
        said = _headers.decode(header)
    except (RemoteProtocolError, msgspec.MsgspecError):
        logger.error("%s refuses: a request that the coordinator has not signed", site)
        raise NotSigned("the request is not signed by this consortium's coordinator for this site") from None
    return Opened(said.until, said.word, body)
