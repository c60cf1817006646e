"""Requests of the coordinator: signed by it, for one site; and what comes of old ones."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from privfed import wire
from privfed.config import Config
from privfed.crypto import keys
from privfed.deployment import runs
from privfed.deployment.consortium import Consortium
from privfed.deployment.hospital import LEDGER, STATES
from privfed.deployment.papers import Terms
from privfed.deployment.signed import SignedHandler, SigningEngine, coordinator_key
from privfed.engines.local import LocalEngine
from tests.privfed.deployment import house
from tests.privfed.deployment.house import SITES, body_of, signed_block, signed_sites
from tests.privfed.deployment.test_blocks import INSECURE, spends


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return house.experiment(house.tables(tmp_path / "tables"), privacy=INSECURE)


@pytest.fixture
def consortium(tmp_path: Path, config: Config) -> Iterator[Consortium]:
    with house.without_flare():
        yield house.found(tmp_path, config)


class Recording:
    """A site that only writes down what it was asked."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    def handle(self, request: bytes) -> bytes:
        self.asked.append(request)
        return b"an answer"


def refusal(reply: bytes) -> wire.Refusal:
    message = wire.decode_reply(reply)
    assert isinstance(message, wire.Refusal)
    return message


def signed_for(site: str, body: bytes, terms: Terms, private: bytes) -> bytes:
    line = house.Tapped(LocalEngine({}))
    SigningEngine(line, terms, private).exchange({site: body}, 1.0)
    return line.seen[0][site]


def books(consortium: Consortium) -> list[object]:
    return [spends(consortium.home.parent / site / LEDGER, site) for site in SITES]


def test_the_key_that_signs_is_the_one_of_the_terms_and_is_in_no_kit(consortium: Consortium) -> None:
    private = coordinator_key(consortium.home)
    assert keys.verification_key(private).hex() == consortium.terms.coordinator
    kit = b"".join(path.read_bytes() for path in consortium.home.glob("server/**/*") if path.is_file())
    for secret in (private, (consortium.home / "ledger.db.key").read_bytes()):
        for paper in (kit, *(consortium.kit(site) for site in SITES)):
            assert secret not in paper and secret.hex().encode() not in paper


def test_a_run_over_signed_requests_goes_to_its_end(consortium: Consortium, config: Config) -> None:
    run = runs.begin(consortium, config)
    signed_block(consortium, run.path.name, 3)
    summary = runs.finished(run)
    assert summary is not None and summary.complete and not summary.refusals


def test_a_site_does_not_look_into_what_its_coordinator_did_not_sign_for_it(consortium: Consortium) -> None:
    terms, private = consortium.terms, coordinator_key(consortium.home)
    site = Recording()
    handler = SignedHandler(site, terms, "north")
    good = signed_for("north", b"a request", terms, private)
    assert handler.handle(good) == b"an answer" and site.asked == [b"a request"]
    other = msgspec.structs.replace(terms, name="elsewhere")
    for bad in (
        b"",
        b"a request",
        bytes(keys.SIGNATURE_BYTES) + b"a request",
        good[:-1],
        good + b"!",
        good[:64] + b"A request",
        bytes([good[0] ^ 1]) + good[1:],
        signed_for("south", b"a request", terms, private),  # what another was asked
        signed_for("north", b"a request", other, private),
        signed_for("north", b"a request", terms, bytes(range(32))),  # whoever speaks as FLARE's server
    ):
        said = refusal(handler.handle(bad))
        assert said.kind == "protocol" and "not signed by this consortium's coordinator" in said.reason
    assert site.asked == [b"a request"]


def test_signed_requests_that_come_again_spend_nothing_and_get_no_second_answer(
    consortium: Consortium, config: Config
) -> None:
    run = runs.begin(consortium, config)
    seen = signed_block(consortium, run.path.name, 2)
    before, home = books(consortium), consortium.home.parent
    with house.at_work(home) as sites:
        handlers = signed_sites(home, sites)
        begins = [one for one in seen if wire.decode_request(body_of(one["north"])).step == "advertise"]
        assert len(begins) >= 2
        first, last = begins[0], begins[-1]
        assert "can not go back" in refusal(handlers["north"].handle(first["north"])).reason
        # The last round is begun again, as after a crash: the same first word, and no second vector
        assert not isinstance(wire.decode_reply(handlers["north"].handle(last["north"])), wire.Refusal)
        assert "can not go back" in refusal(handlers["north"].handle(first["north"])).reason
    assert books(consortium) == before


def test_a_run_whose_states_a_site_has_lost_is_not_gone_on_with(consortium: Consortium, config: Config) -> None:
    """As after a restore: with other states the update would be another one, under noise that was used."""
    run = runs.begin(consortium, config)
    seen = signed_block(consortium, run.path.name, 2)
    before, home = books(consortium), consortium.home.parent
    shutil.rmtree(home / "north" / STATES)
    (home / "north" / "journal.db").unlink()
    with house.at_work(home) as sites:
        handlers = signed_sites(home, sites)
        for one in seen:
            message = wire.decode_request(body_of(one["north"]))
            said = refusal(handlers["north"].handle(one["north"]))
            assert isinstance(message, wire.Step) or "lost its working memory" in said.reason
    assert books(consortium) == before
    assert not (home / "north" / STATES).exists()
