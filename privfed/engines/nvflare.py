"""The engine of deployments: NVIDIA FLARE 2.9 carries our bytes between processes over mTLS.

FLARE does certificates, registration, jobs and their signatures. Of its messaging one thing is used: the server's job
process pushes an auxiliary request to a site's job process and waits for its reply. (Tasks are polled, and a standing
one is handed again to a client that lost its memory; ``multicast_aux_requests`` of 2.9 loses replies to a TypeError.)

This module needs the extra ``[nvflare]``; nothing else imports it unless a deployment is started.
"""

import logging
import secrets
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReservedTopic, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.job_launcher_spec import JobHandleSpec, JobReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.fuel.f3.cellnet.defs import CellChannel, CellChannelTopic, MessageHeaderKey, MessagePropKey, MessageType
from nvflare.fuel.f3.cellnet.defs import ReturnCode as CellCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply as make_cell_reply
from nvflare.fuel.f3.drivers.net_utils import ssl_required
from nvflare.fuel.f3.streaming.stream_const import (
    STREAM_ACK_TOPIC,
    STREAM_CHANNEL,
    STREAM_DATA_TOPIC,
    STREAM_ERROR_TOPIC,
    StreamHeaderKey,
)
from nvflare.private.defs import TrainingTopic

from ..errors import PrivfedError
from .contract import Handler

logger = logging.getLogger(__name__)

TOPIC, BEAT, BYTES, BOOT = "privfed.exchange", "privfed.beat", "bytes", "boot"
JOB = "privfed.toml"
"""The one file of a job that is ours. It stands beside FLARE's two stubs."""

BEAT_SECONDS = 2.0
ORPHANED_SECONDS = 120.0
"""How long a server may be silent before a site's job gives its folder back. FLARE does not end a job that was still
starting when the server's ended, and the next one needs the folder."""
SILENCE_SECONDS = 30.0
"""A site that has said nothing for so long is gone: nobody waits for it until the deadline."""

_OBEYED = frozenset(
    {
        TrainingTopic.CHECK_RESOURCE,
        TrainingTopic.CANCEL_RESOURCE,
        TrainingTopic.DEPLOY,
        TrainingTopic.START_JOB,
        TrainingTopic.ABORT,
        TrainingTopic.NOTIFY_JOB_STATUS,
    }
)
"""What a site's service does for whoever speaks as the server, or is its own job: take a job, start it, end it. FLARE
looks into the site's permissions only where an order itself says so: all that is not named here the site does not know.
"""

_HEARD_BY_SERVICE = frozenset({(CellChannel.CLIENT_MAIN, "admin"), (CellChannel.CELLNET, CellChannelTopic.Bye)})
_HEARD_BY_JOB = frozenset(
    {
        (CellChannel.AUX_COMMUNICATION, TOPIC),
        (CellChannel.AUX_COMMUNICATION, ReservedTopic.END_RUN),
        (CellChannel.RETURN_ONLY, "*"),  # replies too long for one message
        (CellChannel.CELLNET, CellChannelTopic.Bye),
    }
)
"""Channels and topics on which a request of the server is heard, each by one process of a site."""

Send = Callable[[str, bytes, float], bytes | None]


class EngineStopped(PrivfedError):
    """The job that carried the messages is over. What was under way is done again in the next one."""


@dataclass
class _Presence:
    """What a site's job process last said of itself."""

    boot: str  # one for each start of the process: what an earlier one was asked is lost
    heard: float


@dataclass
class _Asked:
    """One request under way."""

    boot: str
    reply: bytes | None = None
    done: bool = False


class FlareEngine:
    """An `Engine` over the job processes of one FLARE job.

    Args:
        send: hands one site one request and waits so many seconds for its reply; None if there is none.
        clock: monotonic seconds.

    Guarantees:
        Those of the contract of engines. A beat is a hint of who is there, and proved by nothing: a false one makes the
        coordinator wait until the deadline, and no more; replies come from whom they were asked of. Of a site that
        restarted in the middle of an exchange nothing is expected any more: what it was asked is lost with its memory,
        and is not sent again.
    """

    def __init__(self, send: Send, clock: Callable[[], float] = time.monotonic) -> None:
        self._send, self._clock = send, clock
        self._changed = threading.Condition()
        self._present: dict[str, _Presence] = {}
        self._stopped = False

    def beat(self, site: str, boot: str) -> None:
        """``site`` lives, in the process that it calls ``boot``."""
        with self._changed:
            self._present[site] = _Presence(boot, self._clock())
            self._changed.notify_all()

    def stop(self) -> None:
        """Nothing more will come: whoever waits, goes on with what there is."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def stopped(self) -> bool:
        return self._stopped

    def wait_for(self, sites: set[str], seconds: float) -> set[str]:
        """The sites among ``sites`` that are here, when all are or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or all(map(self._here, sites)), seconds)
            return {site for site in sites if self._here(site)}

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        """As of `Engine`.

        Raises:
            EngineStopped: the job was ended, by whomever. It is no dropout of all sites.
        """
        end = self._clock() + deadline_seconds
        asked: dict[str, _Asked] = {}
        with self._changed:
            for site in requests:
                if self._here(site) and not self._stopped:
                    asked[site] = _Asked(self._present[site].boot)
        for site, one in asked.items():
            # Threads of their own: one that hangs must not keep a place in a pool from the next exchange
            threading.Thread(target=self._ask, args=(site, requests[site], one, end), daemon=True).start()
        with self._changed:
            while not self._stopped and any(self._expected(site, one) for site, one in asked.items()):
                left = end - self._clock()
                if left <= 0:
                    break
                self._changed.wait(min(left, BEAT_SECONDS))
            if self._stopped:
                raise EngineStopped("the job was ended: go on with the next one")
            return {site: one.reply for site, one in asked.items() if one.reply is not None}

    def _ask(self, site: str, request: bytes, one: _Asked, end: float) -> None:
        reply = None
        try:
            reply = self._send(site, request, max(0.0, end - self._clock()))
        except Exception as error:  # of the engine's own making: a site's failure is a missing reply
            logger.warning("a request to %s failed: %s", site, type(error).__name__)
        with self._changed:
            one.reply, one.done = reply, True
            self._changed.notify_all()

    def _here(self, site: str) -> bool:
        present = self._present.get(site)
        return present is not None and self._clock() - present.heard < SILENCE_SECONDS

    def _expected(self, site: str, one: _Asked) -> bool:
        return not one.done and self._here(site) and self._present[site].boot == one.boot


class ExchangeController(Controller):  # type: ignore[misc]  # FLARE has no types
    """The server's side of a job. What a subclass does in `coordinate` is the job."""

    def __init__(self) -> None:
        super().__init__(task_check_period=0.5)

    @abstractmethod
    def coordinate(self, engine: FlareEngine, job: str, local: Path) -> None:
        """The whole job.

        Args:
            job: text of the job's `JOB` file, submitted by somebody with a login: to be checked.
            local: the server's own folder of settings, which no job can change.
        """

    def start_controller(self, fl_ctx: FLContext) -> None:
        flare = fl_ctx.get_engine()

        def send(site: str, request: bytes, seconds: float) -> bytes | None:
            with flare.new_context() as context:
                found = flare.send_aux_request([site], TOPIC, Shareable({BYTES: request}), seconds, context)
            reply = (found or {}).get(site)
            if reply is None or reply.get_return_code() != ReturnCode.OK:
                return None
            body = reply.get(BYTES)
            return body if isinstance(body, bytes) else None

        self._exchange = FlareEngine(send)
        flare.register_aux_message_handler(BEAT, self._on_beat)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        self._exchange.stop()

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        finished = threading.Event()

        def watch() -> None:  # FLARE says "abort" by a flag alone
            while not finished.wait(0.5):
                if abort_signal.triggered:
                    self._exchange.stop()

        threading.Thread(target=watch, daemon=True).start()
        try:
            self.coordinate(self._exchange, _job_file(fl_ctx), _local(fl_ctx))
        finally:
            finished.set()

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """Nothing: no tasks are given."""

    def _on_beat(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        site, boot = fl_ctx.get_peer_context().get_identity_name(), request.get(BOOT)
        if isinstance(boot, str):
            self._exchange.beat(site, boot)
        return make_reply(ReturnCode.OK)


class ExchangeExecutor(Executor):  # type: ignore[misc]
    """A site's side of a job: its handler is open for as long as the job runs.

    Guarantees:
        No other site is heard: FLARE's server carries messages from site to site, and whoever speaks to a handler
        speaks as the coordinator. Of the server's own requests the job hears the exchange, and that the job is over.
    """

    _handler: Handler | None = None

    @abstractmethod
    def open_handler(self, site: str, job: str, local: Path) -> Handler:
        """What answers for this site. Raises nothing: a site that can not work answers with the reason.

        Args:
            site: this site's name, as its certificate has it.
            job, local: as of `ExchangeController.coordinate`; ``local`` is the site's own.
        """

    def close_handler(self) -> None:
        """The job is over."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            self._over, self._one = threading.Event(), threading.Lock()
            _hear_the_server_alone(fl_ctx.get_engine().get_cell(), _HEARD_BY_JOB)
            self._handler = self.open_handler(fl_ctx.get_identity_name(), _job_file(fl_ctx), _local(fl_ctx))
            fl_ctx.get_engine().register_aux_message_handler(TOPIC, self._answer)
            threading.Thread(target=self._beat, args=(fl_ctx.get_engine(),), daemon=True).start()
        elif event_type in (EventType.END_RUN, EventType.ABORT_TASK) and self._handler is not None:
            self._over.set()
            if event_type == EventType.END_RUN:
                self._close()

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Refused: a task would be handed again to a process that lost its memory."""
        return make_reply(ReturnCode.TASK_UNKNOWN)

    def _close(self) -> None:
        with self._one:  # what is being answered is answered
            if self._handler is not None:
                self._handler = None
                self.close_handler()

    def _answer(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        body = request.get(BYTES)
        with self._one:
            if not isinstance(body, bytes) or self._handler is None:
                return make_reply(ReturnCode.BAD_REQUEST_DATA)
            return Shareable({BYTES: self._handler.handle(body)})

    def _beat(self, flare: Any) -> None:
        # A message that is sent before the handler is there would be lost: so the site speaks first
        boot, wait, heard = secrets.token_hex(8), 0.0, time.monotonic()
        while not self._over.wait(wait):
            if time.monotonic() - heard > ORPHANED_SECONDS:
                return self._close()
            wait = BEAT_SECONDS
            try:
                with flare.new_context() as context:
                    found = flare.send_aux_request(
                        ["server"], BEAT, Shareable({BOOT: boot}), BEAT_SECONDS, context, optional=True
                    )
                reply = (found or {}).get("server")
                if reply is not None and reply.get_return_code() == ReturnCode.OK:
                    heard = time.monotonic()
                else:
                    wait = 0.25
            except Exception:  # the server may be gone for a while
                wait = BEAT_SECONDS


class RespawningLauncher(ClientProcessJobLauncher):  # type: ignore[misc]
    """Starts a site's job process again when it dies: FLARE's own launcher has the whole federation's job fail.

    The new process has the old one's books and none of its memory: it refuses what it can not know, and takes part
    again from the next round on.

    It is the one part of ours in the process that waits for jobs. So it closes there what FLARE leaves open.

    Args:
        tries: how often in one job, of a process that was killed. One that ended by itself, with an error, is tried
            once more: what a job asks for and a site refuses, it refuses again.

    Guarantees:
        The site's process takes a job, starts it and ends it, and does nothing else for the server: no shell command,
        no path told, no log changed, no run deleted, no service ended, no connection moved. Other sites are not heard.
    """

    def __init__(self, tries: int = 10) -> None:
        super().__init__()
        self._tries = tries

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Also closes what FLARE leaves open in the process that waits for jobs,"""
        agent = getattr(fl_ctx.get_engine(), "admin_agent", None)
        if event_type == EventType.SYSTEM_START and agent is not None:  # no job process has one
            _hear_the_server_alone(fl_ctx.get_engine().get_cell(), _HEARD_BY_SERVICE)
            for topic in agent.processors.keys() - _OBEYED:
                del agent.processors[topic]
        super().handle_event(event_type, fl_ctx)

    def launch_job(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> JobHandleSpec:
        start = super().launch_job
        return _Respawning(lambda: start(job_meta, fl_ctx), self._tries)


@dataclass
class _Respawning(JobHandleSpec):  # type: ignore[misc]
    start: Callable[[], JobHandleSpec]
    tries: int
    again: bool = True
    stopped: bool = False
    process: JobHandleSpec = field(init=False)

    def __post_init__(self) -> None:
        self.process = self.start()

    def wait(self) -> None:
        while True:
            self.process.wait()
            if self.stopped or self.process.poll() != JobReturnCode.EXECUTION_ERROR:
                return
            killed = self.process.adapter.poll() < 0
            if self.tries <= 0 or not (killed or self.again):
                return
            self.tries, self.again = self.tries - 1, self.again and killed
            time.sleep(0.5)
            self.process = self.start()

    def poll(self) -> str:
        code: str = self.process.poll()
        # One site's crash is not the others' end
        return JobReturnCode.UNKNOWN if code == JobReturnCode.EXECUTION_ERROR else code

    def terminate(self) -> None:
        self.stopped = True
        self.process.terminate()


def _hear_the_server_alone(cell: Any, heard: frozenset[tuple[str, str]]) -> None:
    """Have a process drop what another site sends it, on whatever channel, and what the server has no business to ask.

    Whose a message is, its origin says; the server passes no other on than that of the token it comes with. The server
    itself can write any: a message of this site's own has to come over a connection of its own.

    Args:
        heard: channels and topics on which the server may ask; the site's own processes may on all, and replies are
            those to what the site has asked.
    """
    own = FQCN.split(cell.get_fqcn())[0]

    def check(message: Any) -> Any:
        origin = FQCN.split(message.get_header(MessageHeaderKey.ORIGIN))[0]
        if origin == own and _is_from_here(cell, message):
            return None
        if origin != FQCN.ROOT_SERVER:
            logger.warning("a message in the name of %r was dropped: only the server is heard from outside", origin)
            return make_cell_reply(CellCode.UNAUTHENTICATED, "not from the server")
        if message.get_header(MessageHeaderKey.MSG_TYPE) != MessageType.REQ:
            return None
        if message.get_header(MessageHeaderKey.DESTINATION) != cell.get_fqcn():
            return None  # the service hands on to its job, which looks for itself
        if _is_heard(message, heard):
            return None
        channel, topic = (message.get_header(key) for key in (MessageHeaderKey.CHANNEL, MessageHeaderKey.TOPIC))
        logger.warning("an order of the server was dropped: %r on channel %r", topic, channel)
        return make_cell_reply(CellCode.INVALID_REQUEST, "a site does not know this order")

    cell.core_cell.add_incoming_filter("*", "*", check)


def _is_from_here(cell: Any, message: Any) -> bool:
    """Whether it came from a process of this site: the connections among those have no TLS, and the server's has."""
    peer = message.get_prop(MessagePropKey.ENDPOINT)
    if peer is None:
        return False
    if peer.name == cell.get_fqcn():  # to itself: FLARE lets nobody else have this name
        return True
    connections = cell.core_cell.communicator.conn_manager.get_connections(peer.name)
    return bool(connections) and not any(ssl_required(one.conn.connector.params) for one in connections)


def _is_heard(message: Any, heard: frozenset[tuple[str, str]]) -> bool:
    channel, topic = (message.get_header(key) for key in (MessageHeaderKey.CHANNEL, MessageHeaderKey.TOPIC))
    if channel == STREAM_CHANNEL:
        if topic != STREAM_DATA_TOPIC:
            return topic in (STREAM_ACK_TOPIC, STREAM_ERROR_TOPIC)  # how far a stream of this site's came
        # A piece of a longer message: every piece says whose callback it is for
        channel, topic = (message.get_header(key) for key in (StreamHeaderKey.CHANNEL, StreamHeaderKey.TOPIC))
    return (channel, topic) in heard or (channel, "*") in heard


def _job_file(fl_ctx: FLContext) -> str:
    # get_app_config_dir() looks elsewhere in kits that `nvflare package` made
    folder = Path(fl_ctx.get_workspace().get_app_dir(fl_ctx.get_job_id()))
    return (folder / "config" / JOB).read_text(encoding="utf-8")


def _local(fl_ctx: FLContext) -> Path:
    return Path(fl_ctx.get_workspace().get_site_config_dir())
