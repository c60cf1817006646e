"""The ledger under kill -9, tampering, and several writers."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from privfed.privacy.accountant import Accountant
from privfed.privacy.budget import Budget
from privfed.privacy.errors import BudgetExhausted, ChargeConflict, LedgerCorrupt, NoGuarantee, PrivacyError
from privfed.privacy.events import Charge, Gaussian, NoiseSite, PoissonGaussian, PrivacyUnit, Skellam
from privfed.privacy.ledger import _SCHEMA, Entry, Ledger

STEP = Charge(PoissonGaussian(0.1, 2.0), count=5)
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def entry(round: int, *, site: str = "a", run: str = "r1", dataset: str = "d0", **changes: object) -> Entry:
    fields: dict[str, object] = {"charges": (STEP,), "unit": PrivacyUnit.RECORD, "noise": NoiseSite.LOCAL, **changes}
    return Entry(site=site, run=run, round=round, dataset=dataset, **fields)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def filled(path: Path) -> Path:
    """Two interleaved chains of four entries."""
    with Ledger(path, clock=lambda: NOON) as ledger:
        for round in range(4):
            ledger.charge(entry(round))
            ledger.charge(entry(round, site="b"))
    return path


def test_entries_are_kept_in_order_and_private_to_the_owner(filled: Path) -> None:
    assert stat.S_IMODE(filled.stat().st_mode) == 0o600
    assert [file.name for file in filled.parent.iterdir()] == [filled.name]
    with Ledger(filled) as ledger:
        ledger.verify()
        assert [r.entry.round for r in ledger.entries("a")] == [0, 1, 2, 3]
        assert [r.sequence for r in ledger.entries()] == [1, 2, 3, 4] * 2
        assert ledger.entries("a")[0].time == "2026-01-02T12:00:00+00:00"
        assert ledger.entries("a")[-1].hash == ledger.head("a") != ledger.head("b")


def test_spends_compose_over_runs_and_apart_by_data_set_and_audience(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.begin_run(entry(0, charges=(), kind="run", metadata={"config": "c0ffee"}))
        ledger.charge(entry(0))
        ledger.charge(entry(0, run="r2"))
        ledger.charge(entry(1, dataset="d1"))
        ledger.charge(entry(2, audience="own users"))
        assert ledger.charges("a", "d0") == (STEP, STEP)
        assert ledger.charges("a", "d1") == ledger.charges("a", "d0", "own users") == (STEP,)
        assert ledger.charges("b", "d0") == ()


def test_the_same_charge_again_spends_nothing_and_another_is_refused(path: Path) -> None:
    with Ledger(path) as ledger:
        first = ledger.charge(entry(0))
    with Ledger(path) as ledger:

        def never(prior: tuple[Charge, ...], new: tuple[Charge, ...]) -> None:
            raise AssertionError("a replay is not checked again")

        assert ledger.charge(entry(0), check=never) == first
        with pytest.raises(ChargeConflict, match="round 0, attempt 0"):
            ledger.charge(entry(0, charges=(Charge(PoissonGaussian(0.1, 2.0), count=4),)))
        ledger.charge(entry(0, attempt=1))
        assert len(ledger.entries("a")) == 2


def test_a_refused_check_writes_nothing(path: Path) -> None:
    accountant = Accountant()
    budget = Budget(epsilon=accountant.epsilon([Charge(STEP.event, 10)], 1e-5).value, delta=1e-5)

    def check(prior: tuple[Charge, ...], new: tuple[Charge, ...]) -> None:
        budget.ensure(accountant, prior, new, site="a")

    with Ledger(path) as ledger:
        ledger.charge(entry(0), check)
        ledger.charge(entry(1, run="r2"), check)  # exactly at the limit
        head = ledger.head("a")
        with pytest.raises(BudgetExhausted):
            ledger.charge(entry(2), check)
        assert ledger.head("a") == head
        ledger.charge(entry(2, dataset="d1"), check)
        ledger.verify()


def test_epsilon_from_the_raw_file_by_another_path_is_the_reported_one(path: Path) -> None:
    with Ledger(path) as ledger:
        for round in range(40):
            ledger.charge(entry(round, run=f"r{round % 3}", charges=(STEP, Charge(PoissonGaussian(0.05, 1.5), 2))))
        reported = Accountant().epsilon(ledger.charges("a", "d0"), 1e-5)

    steps: Counter[tuple[float, float]] = Counter()
    raw = sqlite3.connect(path)
    for (body,) in raw.execute("SELECT body FROM entries"):
        for charge in json.loads(body)["entry"]["charges"]:
            steps[charge["event"]["sample_rate"], charge["event"]["noise_multiplier"]] += charge["count"]
    raw.close()
    other = PLDAccountant(value_discretization_interval=2e-4)
    for (rate, sigma), times in steps.items():
        other.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)), times)
    recomputed = other.get_epsilon(1e-5)
    assert reported.value == pytest.approx(recomputed, rel=2e-3)  # two grids: each is within 0.1 % from above


@pytest.mark.parametrize(
    "changes",
    [
        {"site": ""},
        {"site": "a\nb"},
        {"run": "x" * 201},
        {"dataset": "Not Hex"},
        {"round": -1},
        {"round": True},
        {"charges": ()},
        {"kind": "run"},
    ],
)
def test_malformed_entries_are_refused(changes: dict[str, object]) -> None:
    fields: dict[str, object] = {"round": 0, **changes}
    with pytest.raises(ValueError, match=r"must be|a charge has charges"):
        entry(**fields)  # type: ignore[arg-type]


def test_what_cannot_be_read_back_is_not_written(path: Path) -> None:
    with Ledger(path) as ledger:
        for bad in ({"metadata": {"a": 1}}, {"unit": "household"}):
            with pytest.raises(ValueError, match=r"Expected|Invalid"):
                ledger.charge(entry(0, **bad))
        with pytest.raises(ValueError, match="kind"):
            ledger.begin_run(entry(0))
        assert ledger.entries() == ()
    with Ledger(path, clock=lambda: datetime(2026, 1, 1)) as ledger, pytest.raises(ValueError, match="aware"):
        ledger.charge(entry(0))


# Tampering: through a second connection, with the guards out of the way and put back


@pytest.fixture
def tamper(filled: Path) -> Iterator[Callable[..., None]]:
    def run(*statements: str) -> None:
        raw = sqlite3.connect(filled)
        guards = raw.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        for name, _ in guards:
            raw.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            raw.execute(statement)
        for _, sql in guards:
            raw.execute(sql)
        raw.commit()
        raw.close()

    yield run


def found(path: Path) -> str:
    """What opening, and then verifying, says of a damaged ledger."""
    with pytest.raises(LedgerCorrupt) as caught, Ledger(path) as ledger:
        ledger.verify()
    assert str(path) in str(caught.value)
    return str(caught.value)


A3 = "site = 'a' AND sequence = 3"


def test_the_guards_refuse_updates_and_deletes(filled: Path) -> None:
    raw = sqlite3.connect(filled)
    for statement in ("UPDATE entries SET run = 'x'", "DELETE FROM entries", "UPDATE ledger SET id = 'x'"):
        with pytest.raises(sqlite3.IntegrityError, match="a ledger"):
            raw.execute(statement)
    raw.close()


@pytest.mark.parametrize(
    ("statements", "named"),
    [
        ([f"UPDATE entries SET body = replace(body, ':5', ':1') WHERE {A3}"], "site 'a', entry 3: its body"),
        (
            [f"UPDATE entries SET body = CAST(replace(CAST(body AS TEXT), ':5', ':1') AS BLOB) WHERE {A3}"],
            "site 'a', entry 3: its hash",
        ),
        ([f"UPDATE entries SET hash = zeroblob(32) WHERE {A3}"], "site 'a', entry 3: its hash"),
        ([f"UPDATE entries SET run = 'r9' WHERE {A3}"], "site 'a', entry 3: it stands under another"),
        ([f"DELETE FROM entries WHERE {A3}"], "1 of 8 entries are missing"),
        (["DELETE FROM entries WHERE sequence = 4"], "2 of 8 entries are missing"),
        (["DELETE FROM entries WHERE site = 'a'"], "4 of 8 entries are missing"),
        (
            [  # the count is repaired: the chain still shows it
                f"DELETE FROM entries WHERE {A3}",
                "UPDATE entries SET id = id - 1 WHERE id > 5",
                "UPDATE sqlite_sequence SET seq = 7 WHERE name = 'entries'",
            ],
            "site 'a', entry 3: it is missing",
        ),
        (
            [
                f"UPDATE entries SET sequence = 99 WHERE {A3}",
                "UPDATE entries SET sequence = 3 WHERE site = 'a' AND sequence = 2",
                "UPDATE entries SET sequence = 2 WHERE sequence = 99",
            ],
            "site 'a', entry 2: its hash",
        ),
        (["UPDATE ledger SET id = 'another'"], "site 'a', entry 1: its hash"),
        (["DROP TABLE entries"], "its schema was changed"),
        (["CREATE TRIGGER more AFTER INSERT ON entries BEGIN SELECT 1; END"], "its schema was changed: more"),
    ],
)
def test_tampering_is_found_and_named(
    filled: Path, tamper: Callable[..., None], statements: list[str], named: str
) -> None:
    if statements == ["DROP TABLE entries"]:
        raw = sqlite3.connect(filled)
        raw.execute("DROP TABLE entries")
        raw.close()
    else:
        tamper(*statements)
    assert named in found(filled)


def test_dropped_guards_are_found(filled: Path) -> None:
    raw = sqlite3.connect(filled)
    raw.execute("DROP TRIGGER entries_no_delete")
    raw.close()
    assert "entries_no_delete" in found(filled)


def test_nothing_is_charged_to_a_tampered_chain(filled: Path, tamper: Callable[..., None]) -> None:
    with Ledger(filled) as ledger:
        tamper(f"UPDATE entries SET hash = zeroblob(32) WHERE {A3}")
        with pytest.raises(LedgerCorrupt):
            ledger.charge(entry(9))
        tamper("DELETE FROM entries WHERE id = 8")
        with pytest.raises(LedgerCorrupt, match="missing"):
            ledger.charges("a", "d0")


def test_another_spelling_of_the_same_entry_is_found(path: Path) -> None:
    with Ledger(path) as ledger:
        genesis = bytes.fromhex(ledger.head("a"))
        ledger.charge(entry(0))
    raw = sqlite3.connect(path)
    (body,) = raw.execute("SELECT body FROM entries").fetchone()
    spaced = body.replace(b":", b": ", 1)
    raw.execute("DROP TRIGGER entries_no_update")
    raw.execute("UPDATE entries SET body = ?, hash = ?", (spaced, hashlib.sha256(genesis + spaced).digest()))
    raw.commit()
    raw.close()
    with pytest.raises(LedgerCorrupt, match="schema"):
        Ledger(path)
    raw = sqlite3.connect(path)
    raw.execute(_SCHEMA["entries_no_update"])
    raw.close()
    assert "site 'a', entry 1: its content cannot be read: not in canonical form" in found(path)


@pytest.mark.parametrize("keep", [0, 1, 50, 4096, 5000, 0.5, 0.9])
def test_a_truncated_file_is_refused(filled: Path, keep: float) -> None:
    whole = filled.read_bytes()
    filled.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    found(filled)


def test_foreign_files_are_refused_and_left_alone(path: Path) -> None:
    path.write_text("not a ledger at all, but longer than the hundred bytes of an SQLite header" * 3)
    before = path.read_bytes()
    found(path)
    assert path.read_bytes() == before
    path.unlink()
    raw = sqlite3.connect(path)
    raw.execute("CREATE TABLE t (x)")
    raw.close()
    assert "not a privfed ledger" in found(path)


def test_a_missing_folder_and_a_closed_ledger_are_not_called_corrupt(tmp_path: Path, path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Ledger(tmp_path / "nowhere" / "ledger.db")
    ledger = Ledger(path)
    ledger.close()
    with pytest.raises(PrivacyError, match="closed"):
        ledger.entries()


# Several processes

FORK = multiprocessing.get_context("fork")


def _write_for_ever(path: Path, acknowledge: int) -> None:
    with Ledger(path) as ledger:
        for round in count(len(ledger.entries("a"))):
            ledger.charge(entry(round))
            os.write(acknowledge, b".")


def test_kill_9_loses_no_committed_charge(path: Path) -> None:
    """Forty writers in a row are killed at random instants; what one had reported is there for the next."""
    chance = random.Random(7)
    acknowledged = 0
    for writers in count():
        if writers >= 40 and acknowledged > 40:  # a busy machine gets a writer to its first entry less often
            break
        assert writers < 400
        reader, acknowledge = os.pipe()
        writer = FORK.Process(target=_write_for_ever, args=(path, acknowledge))
        writer.start()
        os.close(acknowledge)
        time.sleep(chance.uniform(0, 0.1 * 2 ** (writers // 40)))  # longer, where forty were too many for the machine
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        with open(reader, "rb") as pipe:
            acknowledged += len(pipe.read())
        if path.exists():
            with Ledger(path) as ledger:
                ledger.verify()
                durable = len(ledger.entries("a"))
                assert durable - acknowledged in (0, 1)  # one may be on disk and not yet reported
                acknowledged = durable
    assert acknowledged > 40


def _write(path: Path, run: str, rounds: int, limit: int) -> None:
    def check(prior: tuple[Charge, ...], new: tuple[Charge, ...]) -> None:
        if len(prior) + len(new) > limit:
            raise PrivacyError("enough")

    with Ledger(path) as ledger:
        for round in range(rounds):
            try:
                ledger.charge(entry(round, run=run), check)
            except PrivacyError as error:
                assert str(error) == "enough"


def test_writers_take_turns_and_cannot_overspend_together(path: Path) -> None:
    writers = [FORK.Process(target=_write, args=(path, f"r{n}", 15, 40)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    with Ledger(path) as ledger:
        ledger.verify()
        assert len(ledger.charges("a", "d0")) == 40  # of 45 tried
    assert os.listdir(path.parent) == [path.name]


# Reserve and settle


def shared(shares: int, colluders: int = 1) -> Charge:
    return Charge(
        Skellam(share_variance=4000, shares=shares, colluders=colluders, dim=64, l2_squared=900, l1=240), group="all"
    )


def release(kind: str, shares: int, round: int = 0, **changes: object) -> Entry:
    fields = {"noise": NoiseSite.DISTRIBUTED, "charges": (shared(shares),), "kind": kind, **changes}
    return entry(round, **fields)  # type: ignore[arg-type]


def test_a_reserve_counts_at_its_worst_case_until_it_is_settled(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.reserve(release("reserve", 6))
        ledger.reserve(release("reserve", 6, 1))
        assert ledger.charges("a", "d0") == (shared(6), shared(6))
        ledger.settle(release("settle", 9, 1, metadata={"survivors": "c0ffee"}))
        assert ledger.charges("a", "d0") == (shared(6), shared(9))
        settled = Accountant().epsilon(ledger.charges("a", "d0"), 1e-5).value
        assert settled < Accountant().epsilon([shared(6), shared(6)], 1e-5).value
    with Ledger(path) as ledger:  # and so after a restart
        ledger.verify()
        assert ledger.charges("a", "d0") == (shared(6), shared(9))
        assert ledger.charges("a", "d1") == ()


def test_settling_again_is_the_same_and_settling_otherwise_is_refused(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.reserve(release("reserve", 6))
        assert ledger.settle(release("settle", 8)) == ledger.settle(release("settle", 8))
        with pytest.raises(ChargeConflict):
            ledger.settle(release("settle", 9))
        assert ledger.charges("a", "d0") == (shared(8),)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"charges": (shared(5),)}, id="fewer shares"),
        pytest.param({"charges": (shared(8, colluders=0),)}, id="fewer colluders"),
        pytest.param({"charges": (Charge(PoissonGaussian(0.1, 2.0)),)}, id="another event"),
        pytest.param({"charges": (shared(8), shared(8))}, id="more events"),
        pytest.param({"audience": "own users"}, id="another audience"),
        pytest.param({"dataset": "d1"}, id="another data set"),
        pytest.param({"round": 7}, id="nothing reserved"),
        pytest.param({"attempt": 1}, id="another attempt"),
    ],
)
def test_a_settlement_that_is_not_of_its_reserve_is_refused(path: Path, changes: dict[str, object]) -> None:
    with Ledger(path) as ledger:
        ledger.reserve(release("reserve", 6))
        with pytest.raises(PrivacyError, match=r"reserved"):
            ledger.settle(release("settle", 8, **changes))  # type: ignore[arg-type]
        assert ledger.charges("a", "d0") == (shared(6),)


def test_a_reserve_is_checked_against_the_budget_and_a_settlement_is_not(path: Path) -> None:
    accountant = Accountant()
    budget = Budget(epsilon=accountant.epsilon([shared(6)], 1e-5).value, delta=1e-5)

    def check(prior: tuple[Charge, ...], new: tuple[Charge, ...]) -> None:
        budget.ensure(accountant, prior, new, site="a")

    with Ledger(path) as ledger:
        ledger.reserve(release("reserve", 6), check)
        with pytest.raises(BudgetExhausted):
            ledger.reserve(release("reserve", 6, 1), check)
        ledger.settle(release("settle", 10))
        with pytest.raises(ValueError, match="kind"):
            ledger.reserve(release("charge", 6))
        with pytest.raises(ValueError, match="kind"):
            ledger.settle(release("reserve", 6))


@pytest.mark.parametrize("first", ["charge", "reserve"])
def test_units_that_do_not_compose_are_refused(path: Path, first: str) -> None:
    with Ledger(path) as ledger:
        opening = entry(0) if first == "charge" else release("reserve", 6)
        (ledger.charge if first == "charge" else ledger.reserve)(opening)
        with pytest.raises(NoGuarantee, match=r"2C"):
            ledger.charge(entry(1, unit=PrivacyUnit.PATIENT))
        ledger.charge(entry(1, unit=PrivacyUnit.PATIENT, dataset="d1"))
        ledger.charge(entry(2, unit=PrivacyUnit.CLIENT, audience="own users"))
        # A release without noise is without bound for any unit: it may stand beside the others
        ledger.charge(entry(3, unit=PrivacyUnit.NONE, charges=(Charge(Gaussian(0.0)),)))
        assert Accountant().epsilon(ledger.charges("a", "d0"), 1e-5).value == float("inf")


# Many sites of one process, written together


def test_entries_written_together_are_on_disk_when_the_block_ends(path: Path) -> None:
    with Ledger(path) as ledger, Ledger(path) as reader:
        with ledger.together():
            for site in "abc":
                ledger.charge(entry(0, site=site))
            assert ledger.charges("a", "d0") == (STEP,)  # its own next check counts them
            assert reader.sites() == ()
        assert reader.sites() == ("a", "b", "c")
        reader.verify()


def test_one_refusal_in_a_block_takes_nothing_else_with_it(path: Path) -> None:
    def refuse(prior: object, new: object) -> None:
        raise PrivacyError("no")

    with Ledger(path) as ledger:
        with ledger.together():
            ledger.charge(entry(0, site="a"))
            with pytest.raises(PrivacyError, match="no"):
                ledger.charge(entry(0, site="b"), refuse)
            with pytest.raises(ChargeConflict):
                ledger.charge(entry(0, site="a", insecure_seed=True))
            ledger.charge(entry(0, site="c"))
        ledger.verify()
        assert [line.entry.site for line in ledger.entries()] == ["a", "c"]


def test_a_block_that_fails_leaves_nothing_in_the_file_nor_in_mind(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.charge(entry(0))
        with pytest.raises(KeyboardInterrupt), ledger.together():
            ledger.charge(entry(1))
            raise KeyboardInterrupt
        assert len(ledger.entries()) == 1
        ledger.charge(entry(1, charges=(Charge(PoissonGaussian(0.1, 9.0), count=1),)))  # no conflict: it never was
        ledger.verify()
        assert len(ledger.charges("a", "d0")) == 2


def test_a_budget_is_kept_within_a_block(path: Path) -> None:
    def at_most_one(prior: tuple[Charge, ...], new: tuple[Charge, ...]) -> None:
        if prior:
            raise PrivacyError("no")

    with Ledger(path) as ledger, ledger.together():
        ledger.charge(entry(0), at_most_one)
        with pytest.raises(PrivacyError, match="no"):
            ledger.charge(entry(1), at_most_one)


def test_entries_that_another_process_removes_are_missed_at_the_next_look(filled: Path) -> None:
    with Ledger(filled) as ledger:
        assert len(ledger.entries()) == 8
        with sqlite3.connect(filled, isolation_level=None) as other:
            other.execute("DROP TRIGGER entries_no_delete")
            other.execute("DELETE FROM entries WHERE id = 8")
        with pytest.raises(LedgerCorrupt, match="1 of 8 entries are missing"):
            ledger.entries()
