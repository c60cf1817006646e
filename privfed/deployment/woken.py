"""A site that is woken for each message, in a process of its own that ends with the answer: as Flower has it.

What it knows of the round under way goes into the engine's keeping as a deposit and comes back with the next message.
Everything else a site knows stands on its own disk, as with every engine.
"""

from pathlib import Path
from typing import Literal

import msgspec

from privfed import wire
from privfed.crypto.digest import digest
from privfed.crypto.errors import AggregationError
from privfed.crypto.journal import JournalFile
from privfed.errors import PrivfedError
from privfed.interrupted import Interrupted
from privfed.policy import PolicyRefusal

from .deposits import DepositRefused, Deposits
from .durable import DurableSite
from .history import Astray, Reminded
from .hospital import JOURNAL, Hospital
from .signed import NotSigned, opened, refusal

LEAVE_SECONDS = 20.0
"""How long an earlier process of the same site may take to end."""


class _Left(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A deposit's content: the request that began the round, and where the site stood."""

    begin: bytes
    site: Interrupted

    def __repr__(self) -> str:
        return "_Left()"


def answer_signed(home: Path, request: bytes, deposit: bytes) -> tuple[bytes, bytes]:
    """`answer` to what the coordinator has signed for this site and `Reminded` lets in.

    All else is refused, and what was left stays left.
    """
    hospital = Hospital.open(home)
    try:
        found = opened(request, hospital.terms, hospital.file.name)
        Reminded(hospital)(found)
    except (NotSigned, Astray) as error:
        return refusal(error), deposit
    return answer(home, found.body, deposit)


def answer(home: Path, request: bytes, deposit: bytes) -> tuple[bytes, bytes]:
    """The site's answer to one request, and its new deposit.

    Args:
        home: the site's folder.
        deposit: what the engine kept since the last answer; empty if it has nothing.

    Returns:
        The reply, and what is to be kept until the next request: empty when a round is over.

    Raises:
        PrivfedError: the site can not work; its reason may name local files.

    Guarantees:
        Those of `DurableSite` and of `Deposits`. A deposit that does not open gets a refusal: nothing is learnt, masked
        or revealed on the word of who kept it. Without one, a site knows of no round: it begins one, or refuses.
        Whatever is asked, one deposit at most can be opened afterwards, and none after the round's last message.
    """
    hospital = Hospital.open(home)
    with hospital.opened(wait_seconds=LEAVE_SECONDS) as site:
        deposits = Deposits(JournalFile(home / JOURNAL), hospital.file.name)
        try:
            message = wire.decode_request(request)
            _require_carried(message)
            begin = _resumed(site, message, deposits, deposit)
        except (PrivfedError, AggregationError) as error:
            deposits.give_up()
            kind: Literal["policy", "protocol"] = "policy" if isinstance(error, PolicyRefusal) else "protocol"
            return wire.encode(wire.Refusal(kind, str(error), final=kind == "policy")), b""
        if isinstance(message, wire.Begin):
            begin = request
        reply = site.handle(request)
        left = site.site.suspend()
        if left is None or not begin or isinstance(message, wire.Evaluate):  # a measurement is a round's end
            return reply, b""
        about = digest("privfed/round/1", begin, message.step.encode())
        return reply, deposits.leave(msgspec.msgpack.encode(_Left(begin, left)), about=about)


def _require_carried(message: wire.Request) -> None:
    """Return unless the message is of an aggregation that some party has to live through."""
    if isinstance(message, wire.Begin) and wire.decode_plan(message.plan).config.aggregation.kind == "homomorphic":
        raise PolicyRefusal("homomorphic aggregation needs a key holder that lives through a round: not over Flower")


def _resumed(site: DurableSite, message: wire.Request, deposits: Deposits, deposit: bytes) -> bytes:
    """Have the site where its deposit says it stood; the request that began the round, or nothing."""
    if not deposit:
        deposits.give_up()
        return b""
    try:
        left = msgspec.msgpack.decode(deposits.fetch(deposit), type=_Left)
    except msgspec.MsgspecError:
        raise DepositRefused("what this site left is of another version") from None
    begun = wire.decode_request(left.begin)
    assert isinstance(begun, wire.Begin)  # nothing else is left
    if not isinstance(message, wire.Step):
        now, then = wire.decode_plan(message.plan), wire.decode_plan(begun.plan)
        if (now.run, now.round) != (then.run, then.round):
            return b""  # that round is over, for whatever reason
    site.resume(left.begin, left.site)
    return left.begin
