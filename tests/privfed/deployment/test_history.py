"""A ledger that was put back from an older copy is found by the site's own words, also when it has gone on since."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from privfed import wire
from privfed.config import Config
from privfed.deployment import account, files, runs, woken
from privfed.deployment.consortium import LEDGER as BOOK
from privfed.deployment.consortium import Consortium
from privfed.deployment.files import DeploymentError
from privfed.deployment.history import CLOCK_SECONDS, Astray, Reminded
from privfed.deployment.hospital import LEDGER, POLICY, RESTORED
from privfed.deployment.inspection import About, Inspector, Look, Order, decode_reply
from privfed.deployment.signed import Opened, SignedHandler, SigningEngine, coordinator_key, opened
from privfed.deployment.site_status import read
from privfed.deployment.survey import Finding, survey
from privfed.engines.local import LocalEngine
from privfed.folder import RunFolder
from privfed.privacy.ledger import Ledger
from tests.privfed.deployment import house
from tests.privfed.deployment.house import SITES, Tapped, hospital, signed_block
from tests.privfed.deployment.test_blocks import Killed, block, spends

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
LATER = NOW.timestamp() + 3600


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return house.experiment(house.tables(tmp_path / "tables"), rounds=4, evaluation={"local_steps": 1})


@pytest.fixture
def consortium(tmp_path: Path, config: Config) -> Iterator[Consortium]:
    with house.without_flare():
        found = house.found(tmp_path, config, study=False)
        for site in SITES:  # room for several runs, and for what is charged twice
            home = hospital(found, site).home
            policy = msgspec.structs.replace(hospital(found, site).policy, max_epsilon=40.0)
            files.write_toml(home / POLICY, policy, comment="As it was agreed.")
        yield found


def snapshot(consortium: Consortium) -> Path:
    """A copy of the whole site."""
    home = hospital(consortium).home
    copy = home.with_name("snapshot")
    shutil.copytree(home, copy)
    return copy


def put_back(copy: Path) -> None:
    home = copy.with_name("north")
    shutil.rmtree(home)
    shutil.copytree(copy, home)


def put_back_and_noticed(consortium: Consortium, config: Config) -> Path:
    """A run that the copy lacks, the copy in its place, and the request that finds it out; the copy."""
    copy = snapshot(consortium)
    signed_block(consortium, runs.begin(consortium, config).path.name, 1)
    put_back(copy)
    signed_block(consortium, runs.begin(consortium, config).path.name, 1)
    assert hospital(consortium).restored is not None
    return copy


def own(consortium: Consortium) -> list[object]:
    return spends(hospital(consortium).home / LEDGER, "north")


def last_word(consortium: Consortium, site: str = "north") -> bytes:
    with Ledger(consortium.home / BOOK) as book:
        return book.last_statement(site)


def ledgers(consortium: Consortium) -> Finding:
    """What the preflight says of them."""
    engine = LocalEngine({site: Inspector(lambda site=site: hospital(consortium, site)) for site in SITES})
    found = survey(consortium, None, Order.new(), engine, set)
    return next(one for one in found if one.what == "ledgers")


def went_on(consortium: Consortium, config: Config, *, rounds: int) -> tuple[RunFolder, list[object]]:
    """A copy from before one run was put back, and did another run over requests that remind it of nothing.

    Returns:
        The run that the copy has forgotten, and what the site spent in it.
    """
    copy = snapshot(consortium)
    forgotten = runs.begin(consortium, config)
    block(consortium, forgotten, 2)
    spent = own(consortium)
    put_back(copy)
    block(consortium, runs.begin(consortium, config), rounds)
    return forgotten, spent


@pytest.mark.parametrize("rounds", [2, 3], ids=["as long", "longer"])
def test_the_preflight_finds_an_older_copy_that_has_gone_on(
    consortium: Consortium, config: Config, rounds: int
) -> None:
    _, spent = went_on(consortium, config, rounds=rounds)
    assert len(own(consortium)) >= len(spent)  # by its length it lacks nothing
    finding = ledgers(consortium)
    assert not finding.ok and "catch-up" in finding.next
    assert finding.found.startswith("north: ") and "an older copy that has gone on" in finding.found


def test_a_site_refuses_a_round_that_reminds_it_of_another_history_and_marks_itself(
    consortium: Consortium, config: Config
) -> None:
    copy = snapshot(consortium)
    signed_block(consortium, runs.begin(consortium, config).path.name, 2)
    true = read(hospital(consortium)).epsilon
    put_back(copy)
    block(consortium, runs.begin(consortium, config), 3)  # the coordinator sent no word, and no preflight was made
    charged = own(consortium)
    # The last word is now of the copy: what went before is found by the preflight alone. An older one is brought back
    with Ledger(consortium.home / BOOK) as book:
        forgotten = book.statements("north")[1]
    with pytest.raises(Astray, match="waits for an account"):
        Reminded(hospital(consortium))(Opened(datetime.now(UTC).timestamp(), forgotten, b""))
    assert hospital(consortium).restored is not None
    run = runs.begin(consortium, config)
    signed_block(consortium, run.path.name, 1)
    assert own(consortium) == charged and "north" not in runs.progress(run)[-1].contributed
    account.catch_up(hospital(consortium), account.account(consortium, "north"))
    assert read(hospital(consortium)).epsilon > true and ledgers(consortium).ok
    run = runs.begin(consortium, config)
    signed_block(consortium, run.path.name, 1)
    assert "north" in runs.progress(run)[-1].contributed


def test_a_disk_that_was_put_back_spends_nothing_in_the_next_round(consortium: Consortium, config: Config) -> None:
    """Nobody made a preflight: the round itself finds it, by the coordinator's first request."""
    copy = snapshot(consortium)
    signed_block(consortium, runs.begin(consortium, config).path.name, 2)
    put_back(copy)
    run = runs.begin(consortium, config)
    signed_block(consortium, run.path.name, 1)
    assert own(consortium) == [] and hospital(consortium).restored is not None
    assert "waits for an account" in runs.progress(run)[-1].refused["north"]
    with pytest.raises(DeploymentError, match="privfed site catch-up"), hospital(consortium).opened():
        pass


def test_two_machines_that_are_both_the_site_do_not_spend_a_budget_each(consortium: Consortium, config: Config) -> None:
    """Two containers with copies of one ledger: the coordinator hears now this one, now that."""
    copy = snapshot(consortium)
    run = runs.begin(consortium, config)
    signed_block(consortium, run.path.name, 1)
    home = hospital(consortium).home
    shutil.move(home, home.with_name("first"))
    shutil.move(copy, home)
    signed_block(consortium, run.path.name, 1)
    assert "waits for an account" in runs.progress(run)[-1].refused["north"] and own(consortium) == []


def test_a_marked_site_goes_on_with_nothing_also_if_it_is_reminded_no_more(
    consortium: Consortium, config: Config
) -> None:
    copy = snapshot(consortium)
    signed_block(consortium, runs.begin(consortium, config).path.name, 1)
    put_back(copy)
    gate = Reminded(hospital(consortium), clock=lambda: NOW)
    gate(Opened(LATER, b"", b""))  # a coordinator that sends no word is not found out
    for word in (last_word(consortium), b""):
        with pytest.raises(Astray, match="waits for an account"):
            gate(Opened(LATER, word, b""))


def test_a_word_that_the_site_never_gave_is_refused_and_marks_nothing(consortium: Consortium, config: Config) -> None:
    signed_block(consortium, runs.begin(consortium, config).path.name, 1)
    good = last_word(consortium)
    gate = Reminded(hospital(consortium), clock=lambda: NOW)
    for bad in (b"no word", last_word(consortium, "south"), good.replace(b'"round":0', b'"round":1')):
        with pytest.raises(Astray, match="brings back a word"):
            gate(Opened(LATER, bad, b""))
    gate(Opened(LATER, good, b""))
    assert hospital(consortium).restored is None


def test_a_ledger_that_is_put_back_under_a_site_at_work_is_found_too(consortium: Consortium, config: Config) -> None:
    copy = snapshot(consortium)
    run = runs.begin(consortium, config)
    gate = Reminded(hospital(consortium), clock=lambda: NOW)
    signed_block(consortium, run.path.name, 1)
    gate(Opened(LATER, last_word(consortium), b""))
    signed_block(consortium, run.path.name, 1)
    put_back(copy)
    with pytest.raises(Astray, match="waits for an account"):
        gate(Opened(LATER, last_word(consortium), b""))


def test_a_site_that_is_woken_for_each_message_is_reminded_too(
    tmp_path: Path, config: Config, consortium: Consortium
) -> None:
    copy = snapshot(consortium)
    signed_block(consortium, runs.begin(consortium, config).path.name, 1)
    put_back(copy)
    line = Tapped(LocalEngine({}))
    SigningEngine(
        line, consortium.terms, coordinator_key(consortium.home), last_word=lambda _: last_word(consortium)
    ).exchange({"north": b"whatever"}, 30.0)
    reply, left = woken.answer_signed(tmp_path / "north", line.seen[0]["north"], b"what it left")
    message = wire.decode_reply(reply)
    assert isinstance(message, wire.Refusal) and "waits for an account" in message.reason and left == b"what it left"
    assert hospital(consortium).restored is not None


# Catching up on two histories


def test_two_histories_mark_the_site_before_they_are_an_error(consortium: Consortium, config: Config) -> None:
    went_on(consortium, config, rounds=3)
    with pytest.raises(DeploymentError, match="have the coordinator send a new one"):  # this one may be any old one
        account.catch_up(hospital(consortium), account.account(consortium, "north"))
    assert hospital(consortium).restored is not None
    with pytest.raises(DeploymentError, match="privfed site catch-up"), hospital(consortium).opened():
        pass


def test_with_two_histories_both_count(consortium: Consortium, config: Config) -> None:
    forgotten, spent = went_on(consortium, config, rounds=3)
    kept = own(consortium)
    with pytest.raises(DeploymentError, match="have the coordinator send a new one"):
        account.catch_up(hospital(consortium), account.account(consortium, "north"))
    done = account.catch_up(hospital(consortium), account.account(consortium, "north"))
    assert forgotten.path.name in done.charged
    after = own(consortium)
    assert after[: len(kept)] == kept
    # All that was ever spent, in whichever history, and no less: every charge of the forgotten one is there again
    paid = [charge for entry in after for charge in entry[5] for _ in range(charge.count)]  # type: ignore[index]
    for charge in [charge for entry in [*kept, *spent] for charge in entry[5]]:  # type: ignore[index]
        paid.remove(charge)
    assert ledgers(consortium).ok
    with hospital(consortium).opened():
        pass


def test_a_run_that_was_charged_is_not_gone_on_with_by_a_copy_that_still_knows_it(
    consortium: Consortium, config: Config
) -> None:
    """Its states are of before: another update under noise that was used."""
    run = runs.begin(consortium, config)
    signed_block(consortium, run.path.name, 1)
    copy = snapshot(consortium)
    signed_block(consortium, run.path.name, 1)
    put_back(copy)
    signed_block(consortium, run.path.name, 1)
    account.catch_up(hospital(consortium), account.account(consortium, "north"))
    before = own(consortium)
    signed_block(consortium, run.path.name, 1)
    assert "lost its working memory" in runs.progress(run)[-1].refused["north"]
    assert own(consortium) == before


def test_a_run_whose_last_rounds_were_not_measured_is_charged(tmp_path: Path, consortium: Consortium) -> None:
    """The site's word is of before its last spends, and covered by the backup: that the run is over says nothing."""
    config = house.experiment(house.tables(tmp_path / "tables"), rounds=4, evaluation={"local_steps": 1, "every": 2})
    run = runs.begin(consortium, config)
    block(consortium, run, 2)
    copy = snapshot(consortium)
    block(consortium, run, 1)  # spent, and not measured
    true = read(hospital(consortium)).epsilon
    put_back(copy)
    hospital(consortium).mark(account.history.as_it_is(Ledger(copy / LEDGER), ()))
    signed_block(consortium, run.path.name, 1)  # the site is not there any more when the run ends
    assert (run.path / "summary.json").exists()
    done = account.catch_up(hospital(consortium), account.account(consortium, "north"))
    assert done.charged == (run.path.name,) and done.epsilon >= true


def test_what_was_settled_before_is_not_charged_by_a_second_catching_up(consortium: Consortium, config: Config) -> None:
    whole = runs.begin(consortium, config)
    signed_block(consortium, whole.path.name, 4)
    copy = snapshot(consortium)
    charged: list[str] = []
    for _ in range(2):  # each time a run is forgotten
        lost = runs.begin(consortium, config)
        signed_block(consortium, lost.path.name, 1)
        put_back(copy)
        signed_block(consortium, runs.begin(consortium, config).path.name, 1)
        done = account.catch_up(hospital(consortium), account.account(consortium, "north"))
        assert lost.path.name in done.charged and whole.path.name not in done.charged
        shutil.rmtree(copy)
        copy = snapshot(consortium)
        charged += done.charged
    assert len(charged) == len(set(charged))


def test_catching_up_on_what_cost_nothing_settles_the_words_too(tmp_path: Path, consortium: Consortium) -> None:
    local = house.experiment(house.tables(tmp_path / "tables"), rounds=2, method={"name": "local"})
    copy = snapshot(consortium)
    signed_block(consortium, runs.begin(consortium, local).path.name, 1)
    put_back(copy)
    signed_block(consortium, runs.begin(consortium, local).path.name, 1)
    assert hospital(consortium).restored is not None
    account.catch_up(hospital(consortium), account.account(consortium, "north"))
    assert read(hospital(consortium)).epsilon == 0 and ledgers(consortium).ok
    run = runs.begin(consortium, local)
    signed_block(consortium, run.path.name, 1)
    assert not runs.progress(run)[-1].refused


def test_a_clock_that_was_set_back_after_a_catching_up_hides_nothing(
    consortium: Consortium, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words of after it are dated before it: they count all the same."""
    copy = put_back_and_noticed(consortium, config)
    with monkeypatch.context() as tomorrow:
        ahead = datetime.now(UTC) + timedelta(days=1)
        tomorrow.setattr(account, "Ledger", lambda path: Ledger(path, clock=lambda: ahead))
        account.catch_up(hospital(consortium), account.account(consortium, "north"))
    shutil.rmtree(copy)
    copy = snapshot(consortium)
    signed_block(consortium, runs.begin(consortium, config).path.name, 1)
    put_back(copy)
    assert not ledgers(consortium).ok
    before = own(consortium)
    signed_block(consortium, runs.begin(consortium, config).path.name, 1)
    assert hospital(consortium).restored is not None and own(consortium) == before


def test_a_catching_up_that_is_killed_is_done_again_with_the_same_account_or_a_newer_one(
    consortium: Consortium, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_back_and_noticed(consortium, config)
    given = account.account(consortium, "north")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(account.durable, "forget", lambda *_: (_ for _ in ()).throw(Killed()))
        account.catch_up(hospital(consortium), given)  # charged, and the mark is still there
    charged = own(consortium)
    shutil.copytree(hospital(consortium).home, marked := hospital(consortium).home.with_name("marked"))
    for again in (given, account.account(consortium, "north")):
        put_back(marked)
        assert account.catch_up(hospital(consortium), again).charged == ()
        assert [entry for entry in own(consortium) if entry[5]] == [entry for entry in charged if entry[5]]  # type: ignore[index]
        with hospital(consortium).opened():
            pass


# What a site tells, and until when it listens


def test_a_site_tells_hashes_of_entries_that_it_has(consortium: Consortium, config: Config) -> None:
    block(consortium, runs.begin(consortium, config), 1)
    with Ledger(hospital(consortium).home / LEDGER) as book:
        chain = book.entries("north")
    look = Look(sequences=(0, 1, len(chain), len(chain) + 1, -1))
    about = decode_reply(Inspector(lambda: hospital(consortium)).handle(msgspec.msgpack.encode(look)))
    assert isinstance(about, About)
    assert about.heads == {1: chain[0].hash, len(chain): chain[-1].hash}


@pytest.mark.parametrize("late", [0.0, CLOCK_SECONDS, CLOCK_SECONDS + 1, float("nan")])
def test_a_request_counts_until_its_deadline_and_what_clocks_may_differ(consortium: Consortium, late: float) -> None:
    gate = Reminded(hospital(consortium), clock=lambda: NOW)
    request = Opened(NOW.timestamp() - late, b"", b"")
    if late <= CLOCK_SECONDS:
        gate(request)
    else:
        with pytest.raises(Astray, match="deadline is over"):
            gate(request)


def test_an_order_of_a_run_never_begun_is_refused_when_its_time_is_over(consortium: Consortium, config: Config) -> None:
    """Somebody on the line kept it back; nobody at the site has ever heard of the run."""
    line = Tapped(LocalEngine({}))
    signing = SigningEngine(line, consortium.terms, coordinator_key(consortium.home), clock=lambda: NOW)
    run = runs.begin(consortium, config)
    house.do_block(consortium, house.Block(run.path.name, 1), signing, set)
    order = line.seen[0]["north"]
    deadline = config.simulation.deadline_seconds
    assert opened(order, consortium.terms, "north").until == NOW.timestamp() + deadline
    for seconds, refused in ((deadline + CLOCK_SECONDS + 1, True), (deadline, False)):
        with hospital(consortium).opened() as site:
            gate = Reminded(hospital(consortium), clock=lambda at=seconds: NOW + timedelta(seconds=at))
            handler = SignedHandler(site, consortium.terms, "north", admit=gate)
            reply = wire.decode_reply(handler.handle(order))
        assert isinstance(reply, wire.Refusal) == refused
        assert not refused or spends(hospital(consortium).home / LEDGER, "north") == []
    assert not (hospital(consortium).home / RESTORED).exists()
