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
    """A site's engine whose server answers as often as it is told to, and then never again."""

    def __init__(self, answers: int) -> None:
        self._answers, self.asked = answers, 0

    def new_context(self) -> Any:
        return nullcontext()

    def get_cell(self) -> None:
        """No connections: nothing of it is asked."""

    def register_aux_message_handler(self, topic: str, handler: Any) -> None:
        self.handler = handler

    def send_aux_request(self, *arguments: object, **more: object) -> dict[str, Shareable] | None:
        self.asked += 1
        return {"server": make_reply("OK")} if self.asked <= self._answers else None


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
    """(answers of the server) → a site in a job, and its engine."""
    monkeypatch.setattr(flare, "_job_file", lambda context: "")
    monkeypatch.setattr(flare, "_local", lambda context: Path())
    monkeypatch.setattr(flare, "_hear_the_server_alone", lambda cell: None)  # whom it hears is tested over processes
    monkeypatch.setattr(flare, "BEAT_SECONDS", 0.01)

    def begin(answers: int) -> tuple[Site, Silence, Any]:
        site, engine = Site(), Silence(answers)
        context = SimpleNamespace(get_engine=lambda: engine, get_identity_name=lambda: "north")
        site.handle_event(EventType.START_RUN, context)
        return site, engine, context

    return begin


def test_a_job_that_its_server_forgot_gives_the_folder_back_and_answers_no_more(
    begun: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flare, "ORPHANED_SECONDS", 0.5)
    site, engine, context = begun(answers=3)
    asked = Shareable({flare.BYTES: b"a"})
    assert engine.handler(flare.TOPIC, asked, context).get(flare.BYTES) == b"a"
    assert site.closed.wait(60)
    assert engine.asked > 3
    assert engine.handler(flare.TOPIC, asked, context).get_return_code() != "OK"
    site.handle_event(EventType.END_RUN, context)
    assert site.closings == 1


def test_a_job_whose_server_answers_stays_until_it_is_ended(begun: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flare, "ORPHANED_SECONDS", 60.0)
    site, engine, context = begun(answers=10**9)
    assert not site.closed.wait(0.2) and engine.asked > 0
    site.handle_event(EventType.END_RUN, context)
    assert site.closed.wait(60) and site.closings == 1
