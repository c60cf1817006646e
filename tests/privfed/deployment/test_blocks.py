"""Blocks, checkpoints and restarts, with every folder of a deployment and no network between them."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import privfed
from privfed import exports, wire
from privfed.config import Config
from privfed.deployment import files, runs
from privfed.deployment.blocks import Block, do_block
from privfed.deployment.consortium import Consortium
from privfed.deployment.files import DeploymentError
from privfed.deployment.hospital import LEDGER, Hospital, Strict
from privfed.engines.contract import Engine
from privfed.engines.local import LocalEngine
from privfed.errors import PrivfedError
from privfed.folder import CHECKPOINT, RunFolder
from privfed.parameters import to_vector
from privfed.privacy.accountant import Accountant
from privfed.privacy.errors import LedgerCorrupt
from privfed.privacy.ledger import Ledger
from privfed.seals import COORDINATOR
from privfed.verification import Book, find_book, verify, verify_files
from tests.privfed.deployment import house
from tests.privfed.deployment.house import SITES

INSECURE = {"delta": 1e-5, "target_epsilon": 3.0, "insecure_seed": house.SEED}


class Killed(BaseException):
    """The process is gone."""


class Cut:
    """An engine whose coordinator is killed before or after one step."""

    def __init__(self, engine: Engine, *, round: int, step: str, when: str) -> None:
        self._engine, self._at, self._when = engine, (round, step), when

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        message = wire.decode_request(next(iter(requests.values())))
        if (message.round, message.step) == self._at:
            if self._when == "after":
                self._engine.exchange(requests, deadline_seconds)
            raise Killed
        return self._engine.exchange(requests, deadline_seconds)


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    return house.tables(tmp_path / "tables")


@pytest.fixture
def config(paths: dict[str, str]) -> Config:
    return house.experiment(paths, privacy=INSECURE)


@pytest.fixture
def consortium(tmp_path: Path, config: Config) -> Iterator[Consortium]:
    with house.without_flare():
        yield house.found(tmp_path, config)


def block(consortium: Consortium, run: RunFolder, rounds: int, engine: Engine | None = None, **wrapped: Any) -> bool:
    """One job: every process of it begins, works and ends."""
    with house.at_work(consortium.home.parent) as sites:
        over = do_block(
            consortium, Block(run.path.name, rounds), wrapped.get("wrap", lambda it: it)(LocalEngine(sites)), set
        )
        return over


def spends(ledger: Path, site: str) -> list[Any]:
    """What a ledger says of a site, without times, ids and signatures."""
    with Ledger(ledger) as book:
        entries = [line.entry for line in book.entries(site)]
    return [
        (entry.kind, entry.round, entry.attempt, entry.unit, entry.noise, entry.charges, entry.insecure_seed)
        for entry in entries
    ]


def same_as_in_process(tmp_path: Path, config: Config, run: RunFolder) -> None:
    local = privfed.run(config, out=tmp_path / "in-process")
    checkpoint = run.load_checkpoint()
    assert checkpoint is not None
    assert torch.equal(checkpoint.server["theta"], local.theta)
    summary = runs.finished(run)
    assert summary is not None and summary.complete
    assert summary.privacy.epsilon.per_site == local.summary.privacy.epsilon.per_site
    assert summary.utility.global_ == local.summary.utility.global_
    assert summary.utility.personalized == local.summary.utility.personalized
    for site in SITES:
        assert spends(tmp_path / site / LEDGER, site) == spends(local.folder / "ledger.db", site)


def test_a_run_in_blocks_equals_the_run_in_one_process(tmp_path: Path, config: Config, consortium: Consortium) -> None:
    run = runs.begin(consortium, config)
    assert not block(consortium, run, 1)
    assert not block(consortium, run, 1)
    assert block(consortium, run, 2)
    same_as_in_process(tmp_path, config, run)
    assert (run.path / "report.html").exists()
    book_verifies(run)


def test_homomorphic_sums_in_blocks_equal_those_in_one_process(
    tmp_path: Path, paths: dict[str, str], consortium: Consortium
) -> None:
    """A site holds the key; it and everyone else begin anew with each block."""
    config = house.experiment(
        paths, privacy=INSECURE, aggregation={"kind": "homomorphic", "key_holder": "south"}, model={"hidden": [4]}
    )
    run = runs.begin(consortium, config)
    assert not block(consortium, run, 1)
    assert block(consortium, run, 2)
    same_as_in_process(tmp_path, config, run)
    nobody = house.experiment(paths, aggregation={"kind": "homomorphic"})
    with pytest.raises(PrivfedError, match=r"needs aggregation\.key_holder: .* one of north, south, west"):
        runs.begin(consortium, nobody)


@pytest.mark.parametrize("step", ["key", "commit", "close", "send", "deliver", "release"])
def test_a_coordinator_killed_at_any_homomorphic_step_goes_on_and_pays_once(
    tmp_path: Path, paths: dict[str, str], consortium: Consortium, step: str
) -> None:
    config = house.experiment(
        paths,
        rounds=2,
        privacy=INSECURE,
        aggregation={"kind": "homomorphic", "key_holder": "south"},
        model={"hidden": [4]},
    )
    run = runs.begin(consortium, config)
    with pytest.raises(Killed):
        block(consortium, run, 2, wrap=lambda engine: Cut(engine, round=1, step=step, when="after"))
    assert block(consortium, run, 2)
    same_as_in_process(tmp_path, config, run)


def test_sites_outside_their_hours_leave_the_round_for_later(
    tmp_path: Path, config: Config, consortium: Consortium
) -> None:
    now = datetime.now().astimezone()
    closed = f"{now + timedelta(hours=3):%H:%M}-{now + timedelta(hours=4):%H:%M}"
    policies = [tmp_path / site / "policy.toml" for site in SITES[:2]]
    for policy in policies:
        policy.write_text(policy.read_text() + f'hours = "{closed}"\n')
    run = runs.begin(consortium, config)
    with pytest.raises(DeploymentError, match=f"round 1 waits for sites .*north: policy.hours = {closed}, here it is"):
        block(consortium, run, 4)
    assert run.load_checkpoint() is None and all(not spent(tmp_path, site) for site in SITES)
    for policy in policies:
        policy.write_text(policy.read_text().replace(closed, "00:00-00:00"))
    assert block(consortium, run, 4)
    same_as_in_process(tmp_path, config, run)


def spent(home: Path, site: str) -> list[Any]:
    return [entry for entry in spends(home / site / LEDGER, site) if entry[0] == "charge"]


def test_a_site_whose_disk_is_full_sends_nothing_and_says_so(
    tmp_path: Path, config: Config, consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its states can not be written: the vector that rests on them stays at home."""
    run = runs.begin(consortium, config)
    write, full = files.write, [False]

    def disk(path: Path, content: bytes, *, private: bool = False) -> None:
        if full[0] and "west" in path.parts:
            raise DeploymentError(f"can not write {path}: No space left on device")
        write(path, content, private=private)

    monkeypatch.setattr(files, "write", disk)
    assert not block(consortium, run, 1)
    full[0] = True
    assert not block(consortium, run, 1)
    full[0] = False
    assert block(consortium, run, 1)
    reports = runs.progress(run)
    assert [len(report.contributed) for report in reports] == [3, 0, 3]
    assert reports[1].refused == {"west": "the site can not use its own disk"}
    charged = [entry[1] for entry in spent(tmp_path, "west")]
    assert charged in ([0, 2], [0, 1, 2])  # what may have left is charged, and nothing twice


def book_verifies(run: RunFolder) -> None:
    """The coordinator's book holds: its chain, the sites' signatures, the roots over their words; and no other."""
    book = find_book(run.path)
    found = verify(book, delta=1e-5, accountant=Accountant())
    assert [site.name for site in found.sites] == [COORDINATOR] and found.rounds == 3
    assert verify_files(book, found) is not None
    for site in SITES:
        assert any(note.startswith(f"{site}: it has a key and no chain") for note in found.notes)
    forged = Book(book.path, {**book.keys, "north": book.keys["south"]})
    with pytest.raises(LedgerCorrupt, match="another key"):
        verify(forged, delta=1e-5, accountant=Accountant())
    some = Book(book.path, {name: key for name, key in book.keys.items() if name != "north"})
    with pytest.raises(LedgerCorrupt, match="no key of this site"):
        verify(some, delta=1e-5, accountant=Accountant())
    without_privfed(book)


def without_privfed(book: Book) -> None:
    """The check that needs no privfed says the same of all keys, of some, and of a word under another ledger."""
    export, keys = book.path.with_suffix(".jsonl"), book.path.with_suffix(".keys")

    def said(lines: Sequence[str], known: Mapping[str, str]) -> str:
        export.write_text("\n".join(lines) + "\n", encoding="utf-8")
        keys.write_text(json.dumps(dict(known)))
        script = Path(__file__).parents[3] / "docs" / "check_export.py"
        done = subprocess.run([sys.executable, script, export, keys], capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == ("verified:" in done.stdout)
        return done.stdout + done.stderr

    lines = list(exports.lines(book.path))
    whole = said(lines, book.keys)
    assert "verified:" in whole and all(f"{site}: signed words alone" in whole for site in SITES)
    some = {name: key for name, key in book.keys.items() if name != "north"}
    assert "(site 'north', round 0): there is no key of this site" in said(lines, some)
    assert "(site 'north', round 0): another key" in said(lines, {**book.keys, "north": book.keys["south"]})
    lost = [line for line in lines if not (line.startswith('{"statement"') and "north" in line)]
    assert len(lost) < len(lines) and "NOT VERIFIED" in said(lost, book.keys)


STEPS = ("advertise", "share", "mask", "consistency", "unmask", "evaluate")


@pytest.mark.parametrize(("step", "when"), [("mask", "before"), *((step, "after") for step in STEPS)])
def test_a_coordinator_killed_at_any_step_loses_a_round_in_progress_and_no_entry(
    tmp_path: Path, config: Config, consortium: Consortium, step: str, when: str
) -> None:
    """The round is done again, byte for byte: the same model, and ε is paid once."""
    run = runs.begin(consortium, config)

    with pytest.raises(Killed):
        block(consortium, run, 4, wrap=lambda engine: Cut(engine, round=1, step=step, when=when))
    checkpoint = run.load_checkpoint()
    assert checkpoint is not None and checkpoint.next_round == 1
    assert block(consortium, run, 4)
    same_as_in_process(tmp_path, config, run)


def test_a_lost_checkpoint_is_not_made_up_for(tmp_path: Path, config: Config, consortium: Consortium) -> None:
    run = runs.begin(consortium, config)
    block(consortium, run, 2)
    (run.path / CHECKPOINT).unlink()
    with pytest.raises(PrivfedError, match="checkpoint"):
        block(consortium, run, 2)


def test_a_site_that_restarts_in_a_round_refuses_it_and_joins_the_next(
    tmp_path: Path, paths: dict[str, str], consortium: Consortium
) -> None:
    config = house.experiment(paths, privacy=INSECURE)
    run = runs.begin(consortium, config)
    replies: list[wire.Reply] = []

    class Restarting:
        """South forgets all after the first step of round 1, as a new process would."""

        def __init__(self, engine: LocalEngine) -> None:
            self._engine, self._done = engine, False

        def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
            message = wire.decode_request(next(iter(requests.values())))
            if (message.round, message.step) == (1, "mask") and not self._done:
                self._done = True
                south = self._engine._sites["south"]
                south.site._current = None  # type: ignore[attr-defined]
                found = self._engine.exchange(requests, deadline_seconds)
                replies.append(wire.decode_reply(found["south"]))
                return found
            return self._engine.exchange(requests, deadline_seconds)

    block(consortium, run, 4, wrap=Restarting)
    (refusal,) = replies
    assert isinstance(refusal, wire.Refusal) and not refusal.final  # it never answers unmasked
    reports = runs.progress(run)
    assert "south" not in reports[1].contributed and "south" in reports[2].contributed
    assert len([entry for entry in spends(tmp_path / "south" / LEDGER, "south") if entry[0] == "charge"]) in (2, 3)


def test_a_stricter_policy_refuses_with_its_line_and_the_run_ends_cleanly(
    tmp_path: Path, config: Config, consortium: Consortium
) -> None:
    path = tmp_path / "west" / "policy.toml"
    path.write_text(path.read_text().replace("max_epsilon = 4.0", "max_epsilon = 0.01"))
    run = runs.begin(consortium, config)
    over = block(consortium, run, 4)
    assert over
    summary = runs.finished(run)
    assert summary is not None and not summary.complete
    assert "policy.max_epsilon" in summary.refusals["west"]
    assert not [entry for entry in spends(tmp_path / "west" / LEDGER, "west") if entry[0] == "charge"]


def test_a_run_over_other_columns_is_refused_by_the_site(
    tmp_path: Path, config: Config, consortium: Consortium
) -> None:
    other = msgspec.structs.replace(
        config,
        data=msgspec.structs.replace(config.data, numeric=config.data.numeric[:3]),  # type: ignore[union-attr]
    )
    with pytest.raises(PrivfedError, match="would refuse"):
        runs.begin(consortium, other)
    with house.at_work(tmp_path) as sites:
        plan = wire.RoundPlan(
            run="x", round=0, attempt=0, cohort=(0, 1, 2), threshold=3, minimum_cohort=3, colluders=0, degree=None,
            noise_multiplier=1.0, config=other, roster_version=1,
        )  # fmt: skip
        begin = wire.Begin(0, "advertise", wire.encode_plan(plan), b"", b"")
        reply = wire.decode_reply(sites["north"].handle(wire.encode(begin)))
    assert isinstance(reply, wire.Refusal) and reply.final and "agreed" in reply.reason
    assert spends(tmp_path / "north" / LEDGER, "north") == []


def test_one_process_at_a_time_works_in_a_sites_folder(tmp_path: Path, consortium: Consortium) -> None:
    with house.at_work(tmp_path), pytest.raises(DeploymentError, match="another process"):
        with Hospital.open(tmp_path / "north").opened():
            pass


def test_a_second_question_for_figures_of_a_round_is_refused_even_after_a_restart(
    tmp_path: Path, config: Config, consortium: Consortium
) -> None:
    run = runs.begin(consortium, config)
    asked: list[bytes] = []

    class Listening:
        def __init__(self, engine: Engine) -> None:
            self._engine = engine

        def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
            if wire.decode_request(requests["north"]).step == "evaluate":
                asked.append(requests["north"])
            return self._engine.exchange(requests, deadline_seconds)

    block(consortium, run, 1, wrap=Listening)
    question = wire.decode_request(asked[0])
    assert isinstance(question, wire.Evaluate)
    plan = wire.decode_plan(question.plan)
    state = privfed_parameters(question.state, shift=1.0)
    with house.at_work(tmp_path) as sites:
        again = wire.decode_reply(sites["north"].handle(asked[0]))
        other = wire.decode_reply(
            sites["north"].handle(wire.encode(wire.Evaluate(plan.round, "evaluate", question.plan, state)))
        )
    assert isinstance(again, wire.Measurement)
    assert isinstance(other, wire.Refusal)


def privfed_parameters(state: bytes, *, shift: float) -> bytes:
    from privfed.parameters import decode, encode

    return encode({name: tensor + shift for name, tensor in decode(state).items()})


__all__ = ["Strict", "to_vector"]
