"""A site that is woken for each message: the same run, and what a keeper of its deposit may try."""

import random
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import privfed
from privfed import wire
from privfed.config import Config
from privfed.crypto.journal import JournalFile
from privfed.deployment import runs, woken
from privfed.deployment.blocks import Block, do_block
from privfed.deployment.consortium import Consortium
from privfed.deployment.deposits import DepositRefused, Deposits
from privfed.deployment.durable import DurableSite
from privfed.deployment.hospital import JOURNAL, LEDGER, Hospital
from privfed.deployment.signed import SigningEngine, coordinator_key
from privfed.folder import RunFolder
from tests.privfed.deployment import house
from tests.privfed.deployment.house import SITES
from tests.privfed.deployment.test_blocks import INSECURE, Cut, Killed, same_as_in_process, spends

Tamper = Callable[["Waking", str, wire.Request], None]


class Waking:
    """An engine that wakes a site for each message, as Flower does, and keeps what each leaves."""

    def __init__(self, home: Path, tamper: Tamper = lambda engine, site, message: None) -> None:
        self.home, self._tamper = home, tamper
        self.kept: dict[str, list[bytes]] = {site: [b""] for site in SITES}
        self.replies: list[tuple[str, str, wire.Reply]] = []

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        found = {}
        for site, request in requests.items():
            message = wire.decode_request(request)
            self._tamper(self, site, message)
            found[site], deposit = woken.answer(self.home / site, request, self.kept[site][-1])
            self.kept[site].append(deposit)
            self.replies.append((site, message.step, wire.decode_reply(found[site])))
        return found

    def said(self, site: str) -> dict[str, wire.Reply]:
        """What it answered last, by step."""
        return {step: reply for name, step, reply in self.replies if name == site}


def done(consortium: Consortium, config: Config, engine: Waking, rounds: int = 100) -> RunFolder:
    run = runs.begin(consortium, config)
    do_block(consortium, Block(run.path.name, rounds), engine, set)
    return run


@pytest.fixture(autouse=True)
def tables_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a site's answer most time goes into its table; here they are all in one process."""
    monkeypatch.setattr(Hospital, "records", cache(Hospital.records))


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    return house.tables(tmp_path / "tables")


@pytest.fixture
def config(paths: dict[str, str]) -> Config:
    return house.experiment(paths, rounds=2, privacy=INSECURE)


@pytest.fixture
def consortium(tmp_path: Path, config: Config) -> Iterator[Consortium]:
    with house.without_flare():
        yield house.found(tmp_path, config)


def test_a_run_of_woken_sites_equals_the_run_in_one_process(
    tmp_path: Path, config: Config, consortium: Consortium
) -> None:
    engine = Waking(tmp_path)
    same_as_in_process(tmp_path, config, done(consortium, config, engine))
    for site in SITES:
        # Five answers and a measurement a round: something is left after each but the last
        assert [bool(deposit) for deposit in engine.kept[site][1:]] == [True] * 5 + [False] + [True] * 5 + [False]
        assert not Deposits(JournalFile(tmp_path / site / JOURNAL), site).out


def test_a_woken_site_reads_what_the_coordinator_has_signed_for_it_and_nothing_else(
    tmp_path: Path, consortium: Consortium
) -> None:
    body = b"no message at all"
    line = Signed(consortium)
    good = line.of("north", body)
    reply, left = woken.answer_signed(tmp_path / "north", good, b"")
    assert "not a message" in refusal(reply).reason  # it was read
    for bad in (body, good[:-1], line.of("south", body), b""):
        reply, left = woken.answer_signed(tmp_path / "north", bad, b"what it left")
        assert "not signed by this consortium's coordinator" in refusal(reply).reason and left == b"what it left"


class Signed:
    """What goes over the line of a coordinator that signs."""

    def __init__(self, consortium: Consortium) -> None:
        self._engine = SigningEngine(self, consortium.terms, coordinator_key(consortium.home))

    def of(self, site: str, body: bytes) -> bytes:
        return self._engine.exchange({site: body}, 1.0)[site]

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        return dict(requests)


def refusal(reply: bytes) -> wire.Refusal:
    message = wire.decode_reply(reply)
    assert isinstance(message, wire.Refusal)
    return message


@pytest.mark.parametrize(
    "more",
    [
        {"method": {"name": "scaffold"}},
        {
            "method": {"name": "ditto"},
            "privacy": {**INSECURE, "standardise_epsilon": 0.5},
            "evaluation": {"release": "private"},
        },
        {"method": {"name": "local"}, "evaluation": {"every": 2}},
    ],
    ids=["states", "several sums", "no sum"],
)
def test_whatever_a_run_adds_up_and_keeps(tmp_path: Path, paths: dict[str, str], more: dict[str, Any]) -> None:
    config = house.experiment(paths, **{"rounds": 2, "privacy": INSECURE, **more})
    with house.without_flare():
        consortium = house.found(tmp_path, config)
    same_as_in_process(tmp_path, config, done(consortium, config, Waking(tmp_path)))


def test_noise_in_shares_is_settled_when_the_last_message_says_who_is_in_the_sum(
    tmp_path: Path, paths: dict[str, str], consortium: Consortium
) -> None:
    shares = {"privacy": {**INSECURE, "noise": "distributed"}, "method": {"name": "fedsgd"}, "rounds": 1}
    config = house.experiment(paths, **shares)
    run = done(consortium, config, Waking(tmp_path))
    local = privfed.run(config, out=tmp_path / "in-process")
    summary = runs.finished(run)
    assert summary is not None and summary.complete
    assert summary.privacy.epsilon.per_site == local.summary.privacy.epsilon.per_site
    for site in SITES:  # each run turns its vectors in its own way before it rounds them: charges agree, models do not
        spent = spends(tmp_path / site / LEDGER, site)
        assert spent == spends(local.folder / "ledger.db", site) and spent[-1][0] == "settle"


def rolled_back(engine: Waking, site: str) -> bytes:
    return engine.kept[site][-2]


def one_bit_flipped(engine: Waking, site: str) -> bytes:
    body = bytearray(engine.kept[site][-1])
    at = random.Random(7).randrange(len(body))
    body[at] ^= 1 << at % 8
    return bytes(body)


def of_another_site(engine: Waking, site: str) -> bytes:
    return engine.kept["south"][-1]


def lost(engine: Waking, site: str) -> bytes:
    return b""


def under_another_key(engine: Waking, site: str) -> bytes:
    Deposits(JournalFile(engine.home / site / JOURNAL), site).leave(b"", about=b"")
    return engine.kept[site][-1]


def well_sealed_and_not_ours(engine: Waking, site: str) -> bytes:
    return Deposits(JournalFile(engine.home / site / JOURNAL), site).leave(b"\x93\x00\x00\x00", about=b"")


TAMPERED = [
    ("share", one_bit_flipped),
    ("mask", rolled_back),
    ("mask", one_bit_flipped),
    ("mask", of_another_site),
    ("mask", lost),
    ("mask", under_another_key),
    ("mask", well_sealed_and_not_ours),
    ("consistency", lost),
    ("unmask", rolled_back),
]
"""By round."""


def test_a_site_whose_deposit_was_touched_refuses_and_takes_part_again_in_the_next_round(
    tmp_path: Path, paths: dict[str, str], consortium: Consortium
) -> None:
    rounds = len(TAMPERED) + 1
    config = house.experiment(paths, rounds=rounds + 1, evaluation={"local_steps": 1}, privacy=INSECURE)
    touched: list[int] = []

    def tamper(engine: Waking, site: str, message: wire.Request) -> None:
        step, how = TAMPERED[message.round] if message.round < len(TAMPERED) else ("", lost)
        if (site, message.step) == ("north", step):
            engine.kept[site].append(how(engine, site))
            touched.append(message.round)

    engine = Waking(tmp_path, tamper)
    run = done(consortium, config, engine, rounds)
    assert touched == list(range(len(TAMPERED)))
    reports = runs.progress(run)
    # With three sites all are needed for a sum; the others are asked for theirs as always
    assert [report.aborted is None for report in reports] == [False] * len(TAMPERED) + [True]
    assert [set(report.refused) for report in reports] == [{"north"}] * len(TAMPERED) + [set()]
    words = [report.refused["north"] for report in reports[:-1]]
    for (_, how), said in zip(TAMPERED, words, strict=True):
        assert (
            "no round" if how is lost else "another version" if how is well_sealed_and_not_ours else "left last"
        ) in said
    # What was not yet given to the aggregation was not paid for; the others had given theirs in the same phase
    for site, rounds_paid in {"north": [7, 8, 9], "south": [1, 2, 3, 4, 5, 6, 7, 8, 9]}.items():
        spent = spends(tmp_path / site / LEDGER, site)
        assert [entry[1] for entry in spent if entry[0] == "charge"] == rounds_paid


def test_a_process_that_dies_over_a_message_has_spent_its_deposit(
    tmp_path: Path, config: Config, consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tamper(engine: Waking, site: str, message: wire.Request) -> None:
        if (site, message.round, message.step) == ("north", 0, "mask"):
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(DurableSite, "handle", lambda *_: (_ for _ in ()).throw(Killed()))
                woken.answer(engine.home / site, wire.encode(message), engine.kept[site][-1])

    engine = Waking(tmp_path, tamper)
    run = done(consortium, config, engine, 1)
    assert "had it back" in runs.progress(run)[0].refused["north"]
    assert not any(
        isinstance(reply, wire.Answer) for site, at, reply in engine.replies if (site, at) == ("north", "mask")
    )


def test_a_round_that_its_coordinator_gave_up_is_begun_anew_and_leaves_no_second_deposit(
    tmp_path: Path, config: Config, consortium: Consortium
) -> None:
    run = runs.begin(consortium, config)
    engine = Waking(tmp_path)
    with pytest.raises(Killed):
        do_block(consortium, Block(run.path.name, 1), Cut(engine, round=0, step="consistency", when="before"), set)
    masked = {site: engine.said(site)["mask"] for site in SITES}
    first = {site: engine.kept[site][-1] for site in SITES}
    do_block(consortium, Block(run.path.name, 1), engine, set)
    # The same round again, to the bit: no second vector has left
    assert {site: engine.said(site)["mask"] for site in SITES} == masked
    assert runs.progress(run)[0].aborted is None
    for site in SITES:
        with pytest.raises(DepositRefused):
            Deposits(JournalFile(tmp_path / site / JOURNAL), site).fetch(first[site])


def test_nothing_but_lengths_is_in_a_deposit_and_no_key_in_what_stays(
    tmp_path: Path, config: Config, consortium: Consortium
) -> None:
    engine = Waking(tmp_path)
    done(consortium, config, engine, 1)
    deposits = [deposit for site in SITES for deposit in engine.kept[site] if deposit]
    assert len(set(deposits)) == len(deposits) == 15
    assert not any(b"secagg" in deposit or b"pilot" in deposit or b"north" in deposit for deposit in deposits)


def test_homomorphic_sums_are_refused_before_anything_is_done(
    tmp_path: Path, paths: dict[str, str], consortium: Consortium
) -> None:
    config = house.experiment(
        paths, rounds=1, privacy=INSECURE, aggregation={"kind": "homomorphic", "key_holder": "south"}
    )
    engine = Waking(tmp_path)
    run = done(consortium, config, engine, 1)
    assert "lives through a round" in runs.progress(run)[0].refused["south"]
    assert not any(entry[5] for site in SITES for entry in spends(tmp_path / site / LEDGER, site))
