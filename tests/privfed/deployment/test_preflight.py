"""What is looked at before a run, with every folder of a deployment and no network between them."""

import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pytest

from privfed import wire
from privfed.config import Config
from privfed.deployment import inspection, survey
from privfed.deployment.consortium import Consortium
from privfed.deployment.history import CLOCK_SECONDS
from privfed.deployment.hospital import LEDGER, Hospital
from privfed.deployment.inspection import About, Dry, Inspector, Look, Order, Said, decode_reply
from privfed.deployment.preflight import _validity
from privfed.deployment.survey import Finding
from privfed.engines.local import LocalEngine
from privfed.models import Factory
from tests.privfed.deployment import house
from tests.privfed.deployment.house import SITES
from tests.privfed.deployment.test_blocks import spends

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return house.experiment(house.tables(tmp_path / "tables"), model={"hidden": [4]})


@pytest.fixture
def consortium(tmp_path: Path, config: Config) -> Iterator[Consortium]:
    with house.without_flare():
        yield house.found(tmp_path, config, study=False)


def inspectors(consortium: Consortium, **clocks: datetime) -> dict[str, Inspector]:
    def at(site: str) -> Inspector:
        return Inspector(lambda: Hospital.open(consortium.home.parent / site), clock=lambda: clocks.get(site, NOW))

    return {site: at(site) for site in SITES}


def look(
    consortium: Consortium, config: Config | None = None, sites: Mapping[str, Any] | None = None
) -> dict[str, Finding]:
    sites = inspectors(consortium) if sites is None else sites
    found = survey.survey(
        consortium, config, Order.new(), LocalEngine(sites), lambda names: names & set(sites), clock=lambda: NOW
    )
    return {finding.what: finding for finding in found}


def wrong(findings: dict[str, Finding]) -> dict[str, str]:
    assert all(finding.next for finding in findings.values() if not finding.ok), "what to do next"
    return {what: finding.found for what, finding in findings.items() if not finding.ok}


def test_a_consortium_that_is_ready_is_said_to_be(consortium: Consortium, config: Config) -> None:
    assert wrong(look(consortium)) == {}
    found = look(consortium, config)
    assert wrong(found) == {}
    assert found["a secure sum over zeros"].found == "3 sites, 38 numbers, masked: zero"  # 6·4 + 4 + 4·2 + 2
    assert not any(spends(consortium.home.parent / site / LEDGER, site) for site in SITES)


def test_a_homomorphic_experiment_is_tried_with_its_key_holder(consortium: Consortium, config: Config) -> None:
    encrypted = house.experiment(
        config.data.files,  # type: ignore[union-attr]
        aggregation={"kind": "homomorphic", "key_holder": "west"},
        model={"hidden": [4]},
    )
    found = look(consortium, encrypted)
    assert wrong(found) == {}
    assert found["a secure sum over zeros"].found == "3 sites, 38 numbers, encrypted: zero"


def test_what_a_site_says_is_the_same_whatever_its_records(consortium: Consortium, config: Config) -> None:
    home = consortium.home.parent
    question = msgspec.msgpack.encode(Look(msgspec.msgpack.encode(config)))
    path = Path(config.data.files["north"])  # type: ignore[union-attr]
    before = inspectors(consortium)["north"].handle(question)
    frame = pd.read_csv(path)
    texts = {str(value) for column in frame.columns[:-1] for value in frame[column]}
    frame.iloc[1::2].assign(radius=29.123456).to_csv(path, index=False)
    assert inspectors(consortium)["north"].handle(question) == before
    about = decode_reply(before)
    assert isinstance(about, About)
    drawn = (about.ledger, about.roster_hash, "1772366400")  # random digits that may be any, and its time
    text = repr(about)
    for known in drawn:
        text = text.replace(known, "")
    assert not any(value in text for value in texts if len(value) > 4)
    assert "29.123456" not in text and str(home) not in text
    assert str(len(frame)) not in text


def test_a_site_whose_file_lacks_a_column_says_which_and_no_more(consortium: Consortium, config: Config) -> None:
    path = Path(config.data.files["south"])  # type: ignore[union-attr]
    frame = pd.read_csv(path).rename(columns={"area": "surface"})
    frame["texture"] = frame["texture"].astype(str)
    frame.loc[3, "texture"] = "Mrs Miller"
    frame.to_csv(path, index=False)
    found = look(consortium, config)
    assert wrong(found) == {"columns": "south: column 'area' missing, column 'texture' holds what is no number"}
    assert "consortium.toml" in found["columns"].next
    reply = inspectors(consortium)["south"].handle(msgspec.msgpack.encode(Look()))
    assert b"Miller" not in reply and b"surface" not in reply


def test_a_table_that_can_not_be_read_is_the_sites_own_affair(consortium: Consortium, config: Config) -> None:
    path = Path(config.data.files["south"])  # type: ignore[union-attr]
    path.write_text(path.read_text().replace(",0\n", ",7\n"))  # a label that nobody agreed on
    assert wrong(look(consortium)) == {"sites": "south: it can not read its table: its log says why"}
    path.unlink()
    assert wrong(look(consortium)) == {"sites": "south: it can not read its table: its log says why"}


def test_a_site_whose_records_are_all_of_one_class_says_what_others_say(consortium: Consortium, config: Config) -> None:
    question = msgspec.msgpack.encode(Look(msgspec.msgpack.encode(config)))
    before = inspectors(consortium)["north"].handle(question)
    path = Path(config.data.files["north"])  # type: ignore[union-attr]
    frame = pd.read_csv(path)
    frame[frame["label"] == 1].to_csv(path, index=False)
    assert inspectors(consortium)["north"].handle(question) == before
    assert len(Hospital.open(consortium.home.parent / "north").records()) == (frame["label"] == 1).sum()


def test_no_answer_names_a_file_of_the_site(consortium: Consortium, config: Config) -> None:
    site = consortium.home.parent / "north"
    dry = Dry(order="ab" * 8, step="client", payload=b"", cohort=(0, 1, 2), dim=4, bound=10, threshold=3,
              minimum_cohort=3, colluders=1)  # fmt: skip
    asked: tuple[Any, ...] = (Look(), Look(msgspec.msgpack.encode(config)), dry)

    def answers() -> list[About | Said]:
        return [decode_reply(inspectors(consortium)["north"].handle(msgspec.msgpack.encode(each))) for each in asked]

    def private(reply: About | Said) -> bool:
        text = repr(reply)
        return str(site) not in text and "0600" not in text and "chmod" not in text and "max_epsilom" not in text

    (site / (LEDGER + ".key")).chmod(0o644)
    assert all(map(private, answers()))
    assert getattr(answers()[1], "unready", "") == "it can not read its folder: its log says why"
    (site / (LEDGER + ".key")).chmod(0o600)
    policy = (site / "policy.toml").read_text()
    (site / "policy.toml").write_text(policy + "max_epsilom = 1.0\n")
    assert all(map(private, answers()))
    (site / "policy.toml").write_text(policy)
    (site / "keys.json").chmod(0o644)
    assert all(map(private, answers()))


def test_a_clock_is_told_in_whole_seconds(consortium: Consortium) -> None:
    site = inspectors(consortium, north=NOW + timedelta(microseconds=123456))["north"]
    reply = decode_reply(site.handle(msgspec.msgpack.encode(Look())))
    assert isinstance(reply, About) and reply.clock == NOW.timestamp()


def test_a_model_beyond_the_policy_is_told_beforehand(consortium: Consortium, config: Config) -> None:
    path = consortium.home.parent / "south" / "policy.toml"
    path.write_text(path.read_text().replace("max_parameters = 50000000", "max_parameters = 37"))
    found = wrong(look(consortium, config))
    assert found["policies"] == "south: policy.max_parameters = 37, the plan's model has 38"
    assert "south: policy.max_parameters = 37, the sum has 38" in found["a secure sum over zeros"]


def test_what_a_site_says_moves_no_cursor_at_the_coordinator(consortium: Consortium) -> None:
    class Painter(Inspector):
        def _about(self, question: Look) -> About:
            said = "\x1b[2J\x1b[31mall is well\nclocks ok"
            return msgspec.structs.replace(super()._about(question), unready=said, refuses=said)

    sites = inspectors(consortium)
    sites["west"] = Painter(lambda: Hospital.open(consortium.home.parent / "west"), clock=lambda: NOW)
    assert wrong(look(consortium, sites=sites))["sites"] == "west: \ufffd[2J\ufffd[31mall is well\ufffdclocks ok"


def test_other_terms_than_the_consortiums_are_named_by_column(consortium: Consortium, config: Config) -> None:
    path = consortium.home.parent / "west" / "consortium.toml"
    text = path.read_text()
    path.write_text(text.replace("0.17", "0.18"))
    assert wrong(look(consortium)) == {"agreed table": "west: column 'smoothness'"}
    path.write_text(text.replace('label = "label"', 'label = "outcome"', 1))
    assert wrong(look(consortium))["agreed table"].startswith("west: the label, its classes")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(86_400, "south: 86400 s ahead"), (-90, "south: 90 s behind"), (CLOCK_SECONDS, None), (-59, None)],
)
def test_a_clock_beyond_the_tolerance_is_named(consortium: Consortium, seconds: float, told: str | None) -> None:
    sites = inspectors(consortium, south=NOW + timedelta(seconds=seconds))
    found = look(consortium, sites=sites)
    assert wrong(found) == ({} if told is None else {"clocks": told})
    assert "60 s" in found["clocks"].found or told


def test_a_certificate_that_does_not_count_yet_or_any_more_is_named(consortium: Consortium) -> None:
    class Dated(Inspector):
        begin, end = NOW.timestamp() + 60, NOW.timestamp() + 1e6

        def _about(self, question: Look) -> About:
            return msgspec.structs.replace(super()._about(question), certificate=(self.begin, self.end))

    sites = inspectors(consortium)
    sites["north"] = Dated(lambda: Hospital.open(consortium.home.parent / "north"), clock=lambda: NOW)
    told = wrong(look(consortium, sites=sites))["sites' certificates"]
    assert told == "north: its certificate does not count yet by its own clock"
    Dated.begin, Dated.end = NOW.timestamp() - 60, NOW.timestamp() - 1
    assert "is expired" in wrong(look(consortium, sites=sites))["sites' certificates"]
    begin, end = NOW - timedelta(days=1), NOW + timedelta(days=900)
    assert _validity("it", begin, end, NOW).ok
    assert "does not count before 2026-02-28" in _validity("it", begin, end, NOW - timedelta(days=2)).found
    soon, late = _validity("it", begin, end, end - timedelta(days=9)), _validity("it", begin, end, end + timedelta(1))
    assert soon.ok and soon.next and not late.ok


def test_mixed_versions_are_refused_with_who_has_what(consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = inspection.versions()

    class Older(Inspector):
        def _about(self, question: Look) -> About:
            older = {**mine, "privfed": "0.0.9", "torch": "2.1"}
            return msgspec.structs.replace(super()._about(question), versions=older)

    sites = inspectors(consortium)
    sites["west"] = Older(lambda: Hospital.open(consortium.home.parent / "west"), clock=lambda: NOW)
    assert wrong(look(consortium, sites=sites)) == {
        "versions": f"privfed {mine['privfed']} at the coordinator and north and south, 0.0.9 at west; "
        f"torch {mine['torch']} at the coordinator and north and south, 2.1 at west"
    }


def test_a_site_that_does_not_answer_or_is_too_old_to_is_named(consortium: Consortium) -> None:
    class Old:
        def handle(self, request: bytes) -> bytes:
            return wire.encode(wire.Refusal("protocol", "not a message", final=False))

    sites: dict[str, Any] = {**inspectors(consortium), "north": Old()}
    del sites["west"]
    found = wrong(look(consortium, sites=sites))
    assert found["answers"] == "north: no answer; west: no answer"
    assert found["a secure sum over zeros"] == "it needs 3 sites, 1 answer"


def test_another_roster_is_named_and_no_sum_comes_of_it(consortium: Consortium, tmp_path: Path) -> None:
    body = Hospital.request(tmp_path / "east", consortium="consortium", name="east", organisation="east", contact="it")
    consortium.approve(body)
    consortium.next_roster()
    path = consortium.roster_file()
    assert path is not None
    for site in ("north", "south"):
        Hospital.open(tmp_path / site).accept_roster(path.read_bytes())
    found = wrong(look(consortium))
    assert found["rosters"] == "west: it has accepted version 1, not 2"
    assert "west: cohort names client 3, the roster has 3 members" in found["a secure sum over zeros"]


def test_a_policy_that_would_refuse_the_experiment_is_told_with_its_line(
    consortium: Consortium, config: Config
) -> None:
    path = consortium.home.parent / "south" / "policy.toml"
    path.write_text(path.read_text() + 'methods = ["ditto"]\n')
    assert wrong(look(consortium, config)) == {"policies": "south: policy.methods = ditto, the plan has 'reptile'"}


def test_a_look_imports_nothing_that_the_site_does_not_trust(consortium: Consortium, config: Config) -> None:
    asked = msgspec.structs.replace(config, model=Factory(factory="never_imported_by_a_look:make"))
    reply = decode_reply(
        inspectors(consortium)["north"].handle(msgspec.msgpack.encode(Look(msgspec.msgpack.encode(asked))))
    )
    assert isinstance(reply, About)
    assert (
        reply.refuses
        == "the plan names 'never_imported_by_a_look:make', which policy.trusted of this site does not list"
    )


def test_a_dry_sum_is_one_an_order_and_of_a_size_that_the_site_allows(consortium: Consortium) -> None:
    site = inspectors(consortium)["north"]
    fields: dict[str, Any] = {
        "order": "ab" * 8, "step": "client", "payload": b"", "cohort": (0, 1, 2), "bound": 10,
        "threshold": 3, "minimum_cohort": 3, "colluders": 1,
    }  # fmt: skip

    def ask(**changes: Any) -> str:
        reply = decode_reply(site.handle(msgspec.msgpack.encode(Dry(**{**fields, "dim": 4, **changes}))))
        assert isinstance(reply, Said)
        return reply.refused

    assert "policy.max_parameters = 50000000, the sum has 50000001" in ask(dim=50_000_001)
    assert "threshold" in ask(threshold=1) or "unmask" in ask(threshold=1)
    first = ask()  # begins, and is refused for what it says
    assert first != "" and "another sum" in ask(dim=5)
    assert "another sum" in ask(order="cd" * 8)


def test_nothing_but_a_preflight_is_answered_in_its_job(consortium: Consortium) -> None:
    site = inspectors(consortium)["north"]
    for request in (b"", b"\xc1", wire.encode(wire.Step(0, "mask", b""))):
        reply = wire.decode_reply(site.handle(request))
        assert isinstance(reply, wire.Refusal) and not reply.final


def test_a_run_under_way_is_not_disturbed(consortium: Consortium, config: Config) -> None:
    with house.at_work(consortium.home.parent):  # all folders are locked by it
        done: list[dict[str, str]] = []
        thread = threading.Thread(target=lambda: done.append(wrong(look(consortium, config))))
        thread.start()
        thread.join(600)
    assert done == [{}]
