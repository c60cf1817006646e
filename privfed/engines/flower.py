"""An engine on an existing federation: Flower 1.41 carries our bytes between its SuperLink and its SuperNodes.

Flower does TLS to the server, the nodes' signed keys, and runs. Of its messaging one thing is used: a query to a node
and its reply. A node starts a process for each message and keeps a few bytes for the next; so what answers there is a
function that gets those bytes and gives new ones, and not a handler that lives.

This module needs the extra ``[flower]``; nothing else imports it unless a Flower app is started.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from ..errors import PrivfedError

logger = logging.getLogger(__name__)

ACTION, RECORD, BYTES, KEPT = "privfed", "privfed", "bytes", "kept"
POLL_SECONDS = 0.2
"""Flower's own `send_and_receive` looks every three seconds."""
_LOOK_SECONDS = 5.0  # between two looks at which nodes are connected

Answer = Callable[[Mapping[str, Any], bytes, bytes], tuple[bytes, bytes]]
"""(the node's own configuration, request, what was kept) → reply, and what to keep until the next request."""


class SiteFailed(PrivfedError):
    """A site's process could not answer. Flower tells the server this text, so it holds the kind of error alone."""


class FlowerEngine:
    """An `Engine` over the nodes of one Flower run.

    Args:
        grid: Flower's, of a ServerApp.
        nodes: site → id of its SuperNode, which Flower gave to the key that the node proves with every message.
        clock: monotonic seconds.
        sleep: waits so many seconds.

    Raises:
        PrivfedError: two sites on one node.

    Guarantees:
        Those of the contract of engines. A node that Flower no longer hears from is waited for until it says so, a
        minute after; a process that died over a message is reported by its node as late.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Mapping[str, int],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if len(set(nodes.values())) != len(nodes):
            raise PrivfedError("two sites have the same Flower node: each needs one of its own")
        self._grid, self._nodes, self._clock, self._sleep = grid, dict(nodes), clock, sleep

    def wait_for(self, sites: set[str], seconds: float) -> set[str]:
        """The sites among ``sites`` that are connected, when all are or the time is over."""
        end = self._clock() + seconds
        while True:
            online = self._online()
            here = {site for site in sites if self._nodes.get(site) in online}
            if here == sites or self._clock() >= end:
                return here
            self._sleep(1.0)

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        """As of `Engine`."""
        end, looked = self._clock() + deadline_seconds, self._clock()
        waiting: dict[str, str] = {}
        online = self._online()
        for site in requests:
            if self._nodes.get(site) in online:
                # One at a time: a model for every site at once would be in memory
                for number in self._grid.push_messages([self._message(site, requests[site], deadline_seconds)]):
                    if number:
                        waiting[number] = site
        replies: dict[str, bytes] = {}
        while waiting and self._clock() < end:
            for reply in self._grid.pull_messages(list(waiting)):
                site = waiting.pop(reply.metadata.reply_to_message_id, "")
                if (body := self._body(site, reply)) is not None:
                    replies[site] = body
            if self._clock() - looked > _LOOK_SECONDS:
                online, looked = self._online(), self._clock()
                waiting = {number: site for number, site in waiting.items() if self._nodes[site] in online}
            if waiting:
                self._sleep(POLL_SECONDS)
        return replies

    def _online(self) -> set[int]:
        return set(self._grid.get_node_ids())

    def _message(self, site: str, request: bytes, seconds: float) -> Message:
        # A request that nobody took in time is no request any more
        content = RecordDict({RECORD: ConfigRecord({BYTES: request})})
        return Message(content, self._nodes[site], f"query.{ACTION}", ttl=seconds)

    def _body(self, site: str, reply: Message) -> bytes | None:
        """What the site said; None if Flower says that it said nothing."""
        if reply.has_error():
            logger.warning("a request to %s failed: Flower's error %s", site, reply.error.code)
            return None
        body = _bytes(reply.content, BYTES)
        return body if site and reply.metadata.src_node_id == self._nodes[site] else None


def client_app(answer: Answer) -> ClientApp:
    """A site's side: answers one message, in a process that Flower starts for it.

    Guarantees:
        What was kept is handed over once: if answering fails, the node has nothing of it any more. An error that goes
        to the server has no content.
    """
    app = ClientApp()

    @app.query(ACTION)  # type: ignore[untyped-decorator, unused-ignore]  # Flower may not be installed
    def query(message: Message, context: Context) -> Message:
        kept = _bytes(context.state, KEPT) or b""
        context.state.pop(RECORD, None)
        request = _bytes(message.content, BYTES)
        if request is None:
            raise SiteFailed("this is no message of privfed")
        try:
            reply, kept = answer(context.node_config, request, kept)
        except Exception as error:
            logger.error("this site can not answer: %s", error if isinstance(error, PrivfedError) else type(error))
            raise SiteFailed(f"the site can not answer ({type(error).__name__}); its log says why") from None
        if kept:
            context.state[RECORD] = ConfigRecord({KEPT: kept})
        return Message(RecordDict({RECORD: ConfigRecord({BYTES: reply})}), reply_to=message)

    return app


def _bytes(records: RecordDict, name: str) -> bytes | None:
    """The bytes called ``name`` of our record, if they are there."""
    record = records.get(RECORD)
    body = record.get(name) if isinstance(record, ConfigRecord) else None
    return body if isinstance(body, bytes) else None
