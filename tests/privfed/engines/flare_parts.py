"""What the engines' suite has FLARE run: a controller that exchanges for the test, and a site that echoes."""

from collections.abc import Callable
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.private.admin_defs import Message
from nvflare.private.defs import CellChannel, new_cell_message

from privfed.engines.contract import Handler
from privfed.engines.nvflare import BYTES, TOPIC, ExchangeController, ExchangeExecutor, FlareEngine
from tests.privfed.engines.echo import Echo


class RemoteControlled(ExchangeController):
    """Hands the suite's exchanges to the engine, through a socket in the job's text."""

    def coordinate(self, engine: FlareEngine, job: str, local: Path) -> None:
        with Listener(job.strip(), family="AF_UNIX") as listener, listener.accept() as connection:
            while not engine.stopped:
                try:
                    method, arguments = connection.recv()
                except EOFError:
                    return
                result = self._ordered(*arguments) if method == "order" else getattr(engine, method)(*arguments)
                connection.send(dict(result) if method == "exchange" else result)

    def _ordered(self, site: str, topic: str, body: str, channel: str, job: bool) -> str:
        """What a site's service, or its job, says to an order; "" if it does not hear it."""
        administration = channel == CellChannel.CLIENT_MAIN
        order = new_cell_message({}, Message(topic=topic, body=body) if administration else body)
        name, cell = "admin" if administration else topic, self._engine.get_cell()
        target = f"{site}.{FQCN.split(cell.get_fqcn())[-1]}" if job else site
        reply = cell.send_request(channel, name, target, order, timeout=120.0 if administration else 2.0)
        if reply.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.TIMEOUT:
            return ""
        return str(getattr(reply.payload, "body", reply.payload))


class Echoing(ExchangeExecutor):
    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        self._flare = fl_ctx.get_engine()
        super().handle_event(event_type, fl_ctx)

    def open_handler(self, site: str, job: str, local: Path) -> Handler:
        return _Meddling(site, lambda: self._flare)


class _Meddling(Echo):
    """Also answers b"ask SITE …": by what another site says, asked as the coordinator asks."""

    def __init__(self, name: str, flare: Callable[[], Any]) -> None:
        super().__init__(name)
        self._flare = flare

    def handle(self, request: bytes) -> bytes:
        command, _, rest = request.partition(b" ")
        if command != b"ask":
            return super().handle(request)
        site, _, word = rest.partition(b" ")
        with self._flare().new_context() as context:
            found = self._flare().send_aux_request([site.decode()], TOPIC, Shareable({BYTES: word}), 10.0, context)
        reply = found.get(site.decode())
        return b"no answer" if reply is None or BYTES not in reply else bytes(reply[BYTES])
