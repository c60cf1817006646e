"""What the Flower adapter does where Flower does nothing, against a grid that is played. In ``make test-flower``."""

from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra [flower] is not installed: it has an environment of its own")

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from privfed.engines import flower
from privfed.engines.flower import BYTES, KEPT, RECORD, FlowerEngine, client_app
from privfed.errors import PrivfedError

NODES = {"north": 11, "south": 22}


@pytest.fixture(autouse=True)
def in_a_run() -> Iterator[None]:
    """Flower's messages say of which run they are, as its processes are told at their start."""
    before = {name: value for name, value in vars(TaskIdentity).items() if name in ("_run_id", "_node_id", "_task_id")}
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    yield
    for name, value in before.items():
        setattr(TaskIdentity, name, value)


class Played:
    """A grid whose nodes answer as they are told to, and a clock that its sleeps move."""

    def __init__(self, replies: Mapping[int, Any]) -> None:
        self.replies, self.online, self.now = dict(replies), {11, 22}, 0.0
        self.sent: list[Message] = []
        self.leave_at: dict[int, float] = {}

    def get_node_ids(self) -> set[int]:
        return {node for node in self.online if self.now < self.leave_at.get(node, 1e9)}

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        numbers: list[str | None] = []
        for message in messages:
            self.sent.append(message)
            refused = self.replies[message.metadata.dst_node_id] == "refused"
            numbers.append(None if refused else str(len(self.sent)))
        return numbers

    def pull_messages(self, numbers: list[str]) -> list[Any]:
        found = []
        for number in numbers:
            sent = self.sent[int(number) - 1]
            node = sent.metadata.dst_node_id
            at, content, by = self.replies[node]
            if self.now >= at:
                metadata = SimpleNamespace(reply_to_message_id=number, src_node_id=by or node)
                failed = isinstance(content, Error)
                records = None if failed else RecordDict({RECORD: ConfigRecord({BYTES: content})})
                error = content if failed else None
                found.append(
                    SimpleNamespace(metadata=metadata, content=records, error=error, has_error=lambda it=failed: it)
                )
        return found

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def engine(self) -> FlowerEngine:
        return FlowerEngine(self, NODES, clock=lambda: self.now, sleep=self.sleep)  # type: ignore[arg-type]


def asked(played: Played, deadline: float = 60.0, **requests: bytes) -> Mapping[str, bytes]:
    return played.engine().exchange(requests, deadline)


def test_each_site_gets_its_own_request_at_its_own_node_and_a_reply_is_its_own() -> None:
    played = Played({11: (3.0, b"n", 0), 22: (1.0, b"", 0)})
    assert asked(played, north=b"to north", south=b"to south") == {"north": b"n", "south": b""}
    sent = {message.metadata.dst_node_id: message.content[RECORD][BYTES] for message in played.sent}
    assert sent == {11: b"to north", 22: b"to south"}
    assert {message.metadata.message_type for message in played.sent} == {"query.privfed"}
    assert 3.0 <= played.now < 4.0  # not until the deadline


def test_the_deadline_is_ours_and_a_request_does_not_outlive_it() -> None:
    played = Played({11: (100.0, b"late", 0), 22: (1.0, b"s", 0)})
    assert asked(played, deadline=10.0, north=b"a", south=b"b") == {"south": b"s"}
    assert 10.0 <= played.now < 10.5
    assert {message.metadata.ttl for message in played.sent} == {10.0}


def test_a_late_reply_is_never_the_reply_to_another_request() -> None:
    played = Played({11: (100.0, b"late", 0), 22: (0.0, b"s", 0)})
    engine = played.engine()
    assert engine.exchange({"north": b"a"}, 10.0) == {}
    played.now, played.replies[11] = 200.0, (300.0, b"second", 0)
    pulled: list[str] = []
    pull = played.pull_messages
    played.pull_messages = lambda numbers: (pulled.extend(numbers), pull(numbers))[1]  # type: ignore[method-assign]
    assert engine.exchange({"north": b"b"}, 200.0) == {"north": b"second"}
    assert set(pulled) == {"2"}


@pytest.mark.parametrize(
    "reply",
    [(1.0, Error(8, "crashed"), 0), (1.0, b"another's", 22), (1.0, "no bytes", 0), "refused"],
    ids=["flower's error", "another node", "another kind", "not sent"],
)
def test_what_is_no_reply_of_the_site_is_a_dropout_that_delays_nobody(reply: Any) -> None:
    played = Played({11: reply, 22: (2.0, b"s", 0)})
    assert asked(played, north=b"a", south=b"b") == {"south": b"s"}
    assert played.now < 3.0


def test_who_is_away_unknown_or_leaves_is_not_waited_for() -> None:
    played = Played({11: (1e9, b"", 0), 22: (2.0, b"s", 0)})
    played.leave_at[11] = 20.0
    assert asked(played, deadline=600.0, north=b"a", south=b"b", nowhere=b"c") == {"south": b"s"}
    assert played.now < 30.0
    assert played.engine().wait_for({"north", "south"}, 10.0) == {"south"}
    assert asked(played, deadline=600.0, north=b"a") == {} and len(played.sent) == 2


def test_two_sites_on_one_node_are_refused() -> None:
    with pytest.raises(PrivfedError, match="two sites"):
        FlowerEngine(Played({}), {"north": 1, "south": 1})  # type: ignore[arg-type]


def message(body: object = b"request") -> Message:
    sent = Message(RecordDict({RECORD: ConfigRecord({BYTES: body})}), 11, "query.privfed")  # type: ignore[dict-item]
    sent.metadata.__dict__["_src_node_id"] = 1
    return sent


def context(kept: bytes | None = None) -> Context:
    state = RecordDict({} if kept is None else {RECORD: ConfigRecord({KEPT: kept})})
    return Context(run_id=1, node_id=11, node_config={"privfed": "/a/folder"}, state=state, run_config={})


def test_a_site_gets_what_was_kept_once_and_keeps_what_it_gives() -> None:
    seen = []

    def answer(node: Mapping[str, Any], request: bytes, kept: bytes) -> tuple[bytes, bytes]:
        seen.append((node["privfed"], request, kept))
        return b"reply", b"two" if kept == b"one" else b""

    here, app = context(b"one"), client_app(answer)
    assert app(message(), here).content[RECORD][BYTES] == b"reply"
    assert here.state[RECORD][KEPT] == b"two"
    app(message(), here)
    assert RECORD not in here.state  # wiped
    app(message(), here)
    assert seen == [("/a/folder", b"request", kept) for kept in (b"one", b"two", b"")]


def test_a_site_that_fails_keeps_nothing_and_tells_the_server_the_kind_of_error_alone() -> None:
    def answer(node: Mapping[str, Any], request: bytes, kept: bytes) -> tuple[bytes, bytes]:
        raise ValueError(f"a record: {request!r} {kept!r}")

    here = context(b"one")
    with pytest.raises(flower.SiteFailed) as failed:
        client_app(answer)(message(), here)
    assert str(failed.value) == "the site can not answer (ValueError); its log says why"
    assert failed.value.__suppress_context__ and RECORD not in here.state


def test_what_is_no_message_of_ours_reaches_no_site() -> None:
    def answer(node: Mapping[str, Any], request: bytes, kept: bytes) -> tuple[bytes, bytes]:
        raise AssertionError

    for wrong in (message("text"), Message(RecordDict(), 11, "query.privfed")):
        wrong.metadata.__dict__["_src_node_id"] = 1
        with pytest.raises(flower.SiteFailed, match="no message of privfed"):
            client_app(answer)(wrong, context())
