"""What the FLARE adapter does where FLARE does nothing, against a server that is played."""

import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

flare = pytest.importorskip("privfed.engines.nvflare", reason="the extra [nvflare] is not installed")

from nvflare.apis.event_type import EventType  # noqa: E402
from nvflare.apis.shareable import Shareable, make_reply  # noqa: E402


class Silence:
    """A site's engine whose server answers until it falls silent."""

    def __init__(self) -> None:
        self.silent, self.asked = False, 0

    def new_context(self) -> Any:
        return nullcontext()

    def get_cell(self) -> None:
        """No connections: nothing of it is asked."""

    def register_aux_message_handler(self, topic: str, handler: Any) -> None:
        self.handler = handler

    def send_aux_request(self, *arguments: object, **more: object) -> dict[str, Shareable] | None:
        self.asked += 1
        return None if self.silent else {"server": make_reply("OK")}


class Site(flare.ExchangeExecutor):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.closed = threading.Event()
        self.closings = 0

    def open_handler(self, site: str, job: str, local: Path) -> Any:
        return SimpleNamespace(handle=lambda body: body)

    def close_handler(self) -> None:
        self.closings += 1
        self.closed.set()


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Any:
    """() → a site in a job, and its engine."""
    monkeypatch.setattr(flare, "_job_file", lambda context: "")
    monkeypatch.setattr(flare, "_local", lambda context: Path())
    monkeypatch.setattr(
        flare, "_hear_the_server_alone", lambda cell, heard: None
    )  # whom it hears is tested over processes
    monkeypatch.setattr(flare, "BEAT_SECONDS", 0.01)

    def begin() -> tuple[Site, Silence, Any]:
        site, engine = Site(), Silence()
        context = SimpleNamespace(get_engine=lambda: engine, get_identity_name=lambda: "north")
        site.handle_event(EventType.START_RUN, context)
        return site, engine, context

    return begin


def test_of_all_orders_that_flare_knows_a_site_obeys_those_of_a_jobs_life_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of those that a later FLARE adds."""
    from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors

    monkeypatch.setattr(flare, "_hear_the_server_alone", lambda cell, heard: None)
    known = {topic: one for one in ClientRequestProcessors.request_processors for topic in one.get_topics()}
    agent = SimpleNamespace(processors={**known, "sys.of_a_later_version": object()})
    engine = SimpleNamespace(admin_agent=agent, get_cell=lambda: None)
    context = SimpleNamespace(get_engine=lambda: engine, get_prop=lambda *given: None)
    assert len(known) > 20
    flare.RespawningLauncher().handle_event(EventType.SYSTEM_START, context)
    assert sorted(agent.processors) == [
        "scheduler.cancel_resource",
        "scheduler.check_resource",
        "train.abort",
        "train.deploy",
        "train.notify_job_status",
        "train.start_job",
    ]


@pytest.mark.parametrize(
    ("origin", "peer", "secure", "heard"),
    [
        ("north.job", "north.job", [False], True),
        ("north", "north", [], True),  # to itself
        ("server", "server", [True], False),
        ("north.job", "server", [True], False),  # the server writes the site's name over its order
        ("north.job", "north.job", [True], False),  # and says at its connection that this is its own
        ("north.job", "north.job", [False, True], False),
        ("north.job", "nowhere", [], False),
        ("south", "server", [True], False),
    ],
)
def test_an_order_of_the_server_in_the_sites_own_name_is_dropped(
    origin: str, peer: str, secure: list[bool], heard: bool
) -> None:
    from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, MessagePropKey, MessageType
    from nvflare.fuel.f3.endpoint import Endpoint
    from nvflare.fuel.f3.message import Message

    filters: list[Any] = []
    found = {
        peer: [SimpleNamespace(conn=SimpleNamespace(connector=SimpleNamespace(params={"secure": s}))) for s in secure]
    }
    manager = SimpleNamespace(get_connections=found.get)
    core = SimpleNamespace(
        communicator=SimpleNamespace(conn_manager=manager),
        add_incoming_filter=lambda channel, topic, check: filters.append(check),
    )
    flare._hear_the_server_alone(SimpleNamespace(get_fqcn=lambda: "north", core_cell=core), frozenset())
    message = Message(
        {
            MessageHeaderKey.ORIGIN: origin,
            MessageHeaderKey.DESTINATION: "north",
            MessageHeaderKey.MSG_TYPE: MessageType.REQ,
            MessageHeaderKey.CHANNEL: "_net_manager",
            MessageHeaderKey.TOPIC: "config_vars",
        }
    )
    message.set_prop(MessagePropKey.ENDPOINT, Endpoint(peer))
    (check,) = filters
    assert (check(message) is None) == heard


def test_a_job_that_its_server_forgot_gives_the_folder_back_and_answers_no_more(
    begun: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, engine, context = begun()
    asked = Shareable({flare.BYTES: b"a"})
    assert engine.handler(flare.TOPIC, asked, context).get(flare.BYTES) == b"a"
    monkeypatch.setattr(flare, "ORPHANED_SECONDS", 0.5)  # only now: a busy machine took its time
    engine.silent, heard = True, engine.asked
    assert site.closed.wait(600)
    assert engine.asked > heard
    assert engine.handler(flare.TOPIC, asked, context).get_return_code() != "OK"
    site.handle_event(EventType.END_RUN, context)
    assert site.closings == 1


def test_a_job_whose_server_answers_stays_until_it_is_ended(begun: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flare, "ORPHANED_SECONDS", 600.0)
    site, engine, context = begun()
    while engine.asked < 3:
        assert not site.closed.wait(0.01)
    site.handle_event(EventType.END_RUN, context)
    assert site.closed.wait(600) and site.closings == 1
