"""One suite for every engine: what `privfed.engines` promises, in the order in which it stands there."""

import hashlib
import os
import random
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from privfed.engines.contract import Engine
from privfed.engines.local import LocalEngine
from tests.privfed.engines.echo import Echo

SITES = ("north", "south", "west")
LONG = 600.0  # only a machine that stands still needs it

# FLARE's session, in this process, leaves sockets to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Rig(Protocol):
    """An engine with three sites that echo, and what the suite may do to them."""

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]: ...

    def wait_for(self, sites: set[str]) -> None:
        """Return when the sites are there again."""

    def logs(self) -> bytes:
        """Whatever was written anywhere."""

    pace: float
    """Seconds that every exchange is answered in."""


class _Local:
    pace = 1.0

    def __init__(self) -> None:
        self._engine = LocalEngine({name: Echo(name) for name in SITES})

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        return self._engine.exchange(requests, deadline_seconds)

    def wait_for(self, sites: set[str]) -> None:
        pass

    def logs(self) -> bytes:
        return b""


@pytest.fixture(scope="module", params=["local", "nvflare", "flower"])
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    if request.param == "local":
        yield _Local()
        return
    if request.param == "flower":
        if not os.environ.get("PRIVFED_FLOWER"):
            pytest.skip("ten seconds a message: make test-flower has it, in an environment of its own")
        from tests.privfed.engines import flower_rig

        with flower_rig.Exchanging(Path(tmp_path_factory.mktemp("flower")), SITES) as flower:
            yield flower
        return
    pytest.importorskip("nvflare", reason="the extra [nvflare] is not installed")
    from tests.privfed.engines import flare_rig

    with flare_rig.quick_certificates():
        home = Path(tmp_path_factory.mktemp("flare"))
        flare = flare_rig.Rig(home, SITES)
    with flare:
        yield flare


def separate(rig: Rig) -> None:
    if isinstance(rig, _Local):
        pytest.skip("the local engine's sites are this process: none can be late or die")


def test_an_engine_has_the_one_method(rig: Rig) -> None:
    engine: Engine = rig
    assert engine.exchange({}, LONG) == {}


@pytest.mark.parametrize("size", [0, 1, 255, 65_536, 12_000_001])
def test_bytes_arrive_exactly_both_ways(rig: Rig, size: int) -> None:
    sent = {site: random.Random(f"{site}{size}").randbytes(size) for site in SITES}
    assert rig.exchange({site: b"echo " + body for site, body in sent.items()}, LONG) == sent
    digests = rig.exchange({site: b"digest " + body for site, body in sent.items()}, LONG)
    assert digests == {site: hashlib.sha256(body).digest() for site, body in sent.items()}


def test_every_byte_value_arrives(rig: Rig) -> None:
    body = bytes(range(256)) * 3 + b"\r\n\0{}\xff\xfe"
    assert rig.exchange({"west": b"echo " + body}, LONG) == {"west": body}


def test_only_the_named_sites_are_asked_each_with_its_own_request(rig: Rig) -> None:
    before = rig.exchange(dict.fromkeys(SITES, b"seen"), LONG)
    assert rig.exchange({"north": b"echo n", "west": b"name"}, LONG) == {"north": b"n", "west": b"west"}
    after = rig.exchange(dict.fromkeys(SITES, b"seen"), LONG)
    assert after["south"] == before["south"] and after["north"] != before["north"]


def of_flare(rig: Rig) -> None:
    separate(rig)
    if not hasattr(rig, "order"):
        pytest.skip("Flower's nodes have no way to each other, and know no orders")


def test_a_site_answers_the_coordinator_alone(rig: Rig) -> None:
    of_flare(rig)
    assert rig.exchange({"south": b"name"}, LONG) == {"south": b"south"}
    assert rig.exchange({"north": b"ask south name"}, LONG) == {"north": b"no answer"}


@pytest.mark.parametrize(
    ("topic", "body"),
    [
        ("sys.shell", "pwd"),
        ("sys.shell", "ls"),
        ("sys.shell", "cat /etc/hostname"),
        ("sys.report_env", ""),
        ("sys.configure_site_log", "DEBUG"),
        ("train.configure_job_log", "DEBUG"),
        ("train.delete_run", ""),
        ("train.shutdown", ""),
        ("train.restart", ""),
        ("train.check_status", ""),
        ("sys.info", ""),
        ("info.show_stats", ""),
        ("resource_manager.report_resources", ""),
    ],
)
def test_a_server_that_asks_for_no_permission_gets_nothing_of_a_sites_machine(rig: Rig, topic: str, body: str) -> None:
    of_flare(rig)
    said = rig.order("south", topic, body)  # type: ignore[attr-defined]  # FLARE's rig
    assert said == "invalid_request"
    assert rig.exchange({"south": b"name"}, LONG) == {"south": b"south"}


@pytest.mark.parametrize("job", [False, True], ids=["service", "job"])
@pytest.mark.parametrize(
    ("channel", "topic"),
    [
        ("_net_manager", "process_info"),
        ("_net_manager", "config_vars"),
        ("client_command", "show_stats"),
        ("aux_communication", "__do_task__"),
        ("aux_communication", "fed.event"),
    ],
)
def test_a_site_hears_no_order_of_the_server_that_no_round_needs(rig: Rig, channel: str, topic: str, job: bool) -> None:
    of_flare(rig)
    assert rig.order("south", topic, "", channel=channel, job=job) == ""  # type: ignore[attr-defined]
    assert rig.exchange({"south": b"name"}, LONG) == {"south": b"south"}


def test_a_site_that_nobody_knows_is_a_dropout(rig: Rig) -> None:
    assert rig.exchange({"north": b"echo n", "nowhere": b"echo x"}, LONG) == {"north": b"n"}


def test_a_late_reply_is_dropped_and_never_the_reply_to_another_request(rig: Rig, tmp_path: Path) -> None:
    separate(rig)
    late = b"until %s late" % bytes(tmp_path / "over")
    # The whole deadline is waited for: long enough for the south of a busy machine, and the north is late by no clock
    assert rig.exchange({"north": late, "south": b"echo in time"}, max(15.0, rig.pace)) == {"south": b"in time"}
    (tmp_path / "over").touch()
    assert rig.exchange({"north": b"echo second"}, LONG) == {"north": b"second"}
    time.sleep(3.0)
    assert rig.exchange({"north": b"echo third"}, LONG) == {"north": b"third"}


def test_requests_are_done_one_by_one_in_order(rig: Rig) -> None:
    (before,) = rig.exchange({"south": b"seen"}, LONG).values()
    times = 20 if rig.pace <= 1 else 3
    for word in range(times):
        rig.exchange({"south": b"echo %d" % word}, LONG)
    (after,) = rig.exchange({"south": b"seen"}, LONG).values()
    assert len(eval(after)) == len(eval(before)) + times


def test_refusals_are_replies_like_others(rig: Rig) -> None:
    refusal = b"\x83\xa4type\xa7refusal"
    assert rig.exchange({"north": b"echo " + refusal, "south": b"name"}, LONG) == {"north": refusal, "south": b"south"}


def test_a_site_that_dies_is_a_dropout_that_delays_nobody_and_is_not_asked_again(rig: Rig) -> None:
    separate(rig)
    (before,) = rig.exchange({"west": b"seen"}, LONG).values()
    assert rig.exchange({"west": b"die", "north": b"echo n", "south": b"echo s"}, 600.0) == {
        "north": b"n",
        "south": b"s",
    }
    rig.wait_for({"west"})
    # The new process has seen nothing, or what was kept for it: the request that killed the old one was not sent again
    (after,) = rig.exchange({"west": b"seen"}, LONG).values()
    assert after in (b"[0]", before)


def test_no_payload_is_in_any_log(rig: Rig) -> None:
    secret = secrets.token_hex(16)
    for body in (f"echo {secret}", f"digest {secret}", f"until / {secret}", f"unheard-of {secret}"):
        rig.exchange(dict.fromkeys(SITES, body.encode()), LONG)
    assert secret.encode() not in rig.logs()
