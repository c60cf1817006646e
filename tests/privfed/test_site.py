"""What one site does with one message: what it refuses, when it pays, what it repeats, what it never says."""

import logging
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from privfed import wire
from privfed.config import Aggregation, Config, Policy, Privacy
from privfed.crypto.journal import MemoryJournal, SQLiteJournal
from privfed.crypto.masking.server import MaskedServer
from privfed.crypto.plain import PlainServer
from privfed.methods import FedAvg, Fomaml, Local
from privfed.methods.fedavg import FedAvg as FedAvgClass
from privfed.parameters import encode
from privfed.policy import OutsideHours, check_hours
from privfed.privacy.events import Charge, NoiseSite, PoissonGaussian, PrivacyUnit
from privfed.privacy.ledger import Ledger
from privfed.privacy.oracle import plain as plain_module
from privfed.site import Site
from privfed.terms import plan_encoding, session_of, split_id

from .house import MARK, SIGMA, SIZE, House, changed, config, records, state_of

PLAIN = config(aggregation=Aggregation(kind="plain"))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def begin(plan: wire.RoundPlan | bytes, state: bytes | None = None, opening: bytes | None = None) -> bytes:
    """The round's first message as the coordinator makes it."""
    plan_bytes = plan if isinstance(plan, bytes) else wire.encode_plan(plan)
    state = state_of() if state is None else state
    if opening is None:
        decoded = msgspec.msgpack.decode(plan_bytes, type=wire.RoundPlan)
        session = session_of(decoded, wire.context(plan_bytes, state), plan_encoding(decoded, SIZE))
        server = PlainServer(session=session)
        opening = server.start()[0]
    return wire.encode(wire.Begin(0, "submission", plan_bytes, state, opening))


def ask(site: Site, request: bytes) -> wire.Reply:
    return wire.decode_reply(site.handle(request))


def refused(site: Site, request: bytes) -> wire.Refusal:
    reply = ask(site, request)
    assert isinstance(reply, wire.Refusal), reply
    return reply


# What it refuses


@pytest.mark.parametrize(
    ("policy", "asked", "told"),
    [
        (Policy(require_privacy=True), changed(PLAIN, "privacy", unit=PrivacyUnit.NONE), "require_privacy"),
        (Policy(require_secure_aggregation=True), PLAIN, "require_secure_aggregation"),
        (Policy(max_delta=1e-7), PLAIN, "max_delta = 1e-07, the plan has delta = 1e-05"),
        (Policy(), changed(PLAIN, "privacy", insecure_seed=3), "insecure_seed"),
        (Policy(methods=("ditto", "fedprox")), PLAIN, "policy.methods = ditto, fedprox, the plan has 'fed"),
        (Policy(models=()), PLAIN, "policy.models = none, the plan has 'mlp'"),
        (Policy(minimum_noise_multiplier=50.0), PLAIN, "policy.minimum_noise_multiplier = 50, the plan has"),
        (
            Policy(max_epsilon_per_run=1.0),
            changed(PLAIN, "privacy", unit=PrivacyUnit.NONE),
            "policy.max_epsilon_per_run = 1, the plan has privacy.unit = 'none'",
        ),
        (Policy(minimum_cohort=5), config(), "minimum_cohort = 5, the plan would release a sum of 4"),
        (Policy(), changed(PLAIN, "privacy", unit=PrivacyUnit.CLIENT), "leaves nothing to learn"),
        (Policy(), changed(config(), "privacy", noise=NoiseSite.DISTRIBUTED), "use method.name = 'fedsgd'"),
    ],
)
def test_a_plan_below_the_policy_is_refused_for_good_with_the_line(
    tmp_path: Path, policy: Policy, asked: Config, told: str
) -> None:
    house = House(tmp_path, policy=policy)
    answer = refused(house.sites["a"], begin(house.plan(asked), opening=b""))
    assert (answer.kind, answer.final) == ("policy", True)
    assert told in answer.reason
    assert house.charged() == ()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"threshold": 3, "colluders": 1}, "threshold must be above"),
        ({"roster_version": 2}, "roster version 2"),
        ({"noise_multiplier": 0.0}, "noise_multiplier = 0"),
        ({"noise_multiplier": 0.1}, "noise_multiplier = 0.1"),
        ({"cohort": (1, 2, 3)}, "not in the plan's cohort"),
        ({"minimum_cohort": 6}, "minimum_cohort"),
        ({"round": 2**63}, "round"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(house: House, changes: dict[str, Any], told: str) -> None:
    answer = refused(house.sites["a"], begin(house.plan(config(), **changes), opening=b""))
    assert told in answer.reason
    assert house.charged() == ()


def test_no_noise_under_a_claim_is_refused_even_without_a_budget(house: House) -> None:
    """With a calibrated noise the configuration names none: the plan's own number is all there is."""
    asked = config(
        aggregation=Aggregation(kind="plain"), privacy=Privacy(target_epsilon=math.inf, noise_multiplier=None)
    )
    assert "noise_multiplier = 0" in refused(house.sites["a"], begin(house.plan(asked, noise_multiplier=0.0))).reason


def test_a_configuration_or_noise_that_changes_in_a_run_is_refused(house: House) -> None:
    site = house.sites["a"]
    assert isinstance(ask(site, begin(house.plan(PLAIN))), wire.Answer)
    for asked, noise in (
        (changed(PLAIN, "privacy", max_grad_norm=2.0), SIGMA),
        (msgspec.structs.replace(PLAIN, seed=1), SIGMA),
    ):
        answer = refused(site, begin(house.plan(asked, round=1, noise_multiplier=noise)))
        assert answer.final and "must not change" in answer.reason and "the version that began it" in answer.reason
    free = changed(PLAIN, "privacy", noise_multiplier=None)
    assert isinstance(ask(site, begin(house.plan(free, run="s", noise_multiplier=3.0))), wire.Answer)
    assert "must not change" in refused(site, begin(house.plan(free, run="s", round=1, noise_multiplier=2.0))).reason
    assert [recorded.entry.round for recorded in house.charged()] == [0, 0]


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(state_of(theta=torch.zeros(SIZE + 1)), id="another size"),
        pytest.param(state_of(theta=torch.zeros(1, SIZE)), id="another shape"),
        pytest.param(state_of(theta=torch.zeros(SIZE, dtype=torch.float64)), id="float64"),
        pytest.param(state_of(theta=torch.zeros(SIZE, dtype=torch.int64)), id="integers"),
        pytest.param(state_of(float("nan")), id="NaN"),
        pytest.param(state_of(float("inf")), id="infinite"),
        pytest.param(encode({"phi": torch.zeros(SIZE)}), id="without theta"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x93\0\0\0\0\0\0\0{garbage", id="garbage"),
    ],
)
def test_a_model_that_is_none_is_refused_and_costs_nothing(house: House, state: bytes) -> None:
    plan = wire.encode_plan(house.plan(PLAIN))
    refused(house.sites["a"], begin(plan, state))
    refused(house.sites["a"], wire.encode(wire.Evaluate(0, "evaluate", plan, state)))
    assert house.charged() == ()


@pytest.mark.parametrize(
    "request_bytes", [b"", b"\xc1", b"garbage", bytes(1000), b"\x81\xa4type\xa5begin", b"\x90" * 99999]
)
def test_garbage_is_refused_in_words_of_ours(house: House, request_bytes: bytes) -> None:
    answer = refused(house.sites["a"], request_bytes)
    assert (answer.kind, answer.final) == ("protocol", False)
    assert "not a message of privfed/1" in answer.reason


@pytest.mark.parametrize("plan", [b"{}", b"garbage", b'{"run": "r"}', b"[" * 100_000])
def test_a_plan_that_is_none_is_refused(house: House, plan: bytes) -> None:
    message = wire.encode(wire.Begin(0, "submission", plan, state_of(), b""))
    assert "not a message of privfed/1" in refused(house.sites["a"], message).reason


def test_a_plan_of_another_code_version_is_refused(house: House) -> None:
    plan = house.plan(PLAIN, code_version="0.0.9")
    assert "privfed 0.0.9, this site runs" in refused(house.sites["a"], begin(plan, opening=b"")).reason


def test_a_round_of_a_method_that_sends_nothing_is_refused(house: House) -> None:
    asked = config(method=Local(), aggregation=Aggregation(kind="plain"))
    assert "sends nothing" in refused(house.sites["a"], begin(house.plan(asked), opening=b"")).reason


def test_a_step_without_its_round_is_refused(house: House) -> None:
    site = house.sites["a"]
    for number in (0, 1):
        assert f"no round {number} in progress" in refused(site, wire.encode(wire.Step(number, "mask", b"x"))).reason
    ask(site, begin(house.plan(PLAIN)))
    assert "no round 1 in progress" in refused(site, wire.encode(wire.Step(1, "mask", b"x"))).reason
    # and after an evaluation, the round is over
    ask(site, wire.encode(wire.Evaluate(0, "evaluate", wire.encode_plan(house.plan(PLAIN)), state_of())))
    assert "no round 0 in progress" in refused(site, wire.encode(wire.Step(0, "mask", b"x"))).reason


def test_a_refusal_ends_the_round_in_progress(house: House) -> None:
    """Whoever sends what no honest coordinator sends gets nothing more of this round."""
    site, plan = house.sites["a"], wire.encode_plan(house.plan(config()))
    decoded = wire.decode_plan(plan)
    server = MaskedServer(
        session=session_of(decoded, wire.context(plan, state_of()), plan_encoding(decoded, SIZE)), roster=house.roster
    )
    assert isinstance(ask(site, begin(plan, opening=server.start()[0])), wire.Answer)
    assert "no round" not in refused(site, wire.encode(wire.Step(0, "share", b"garbage"))).reason
    assert "no round 0 in progress" in refused(site, wire.encode(wire.Step(0, "share", b"garbage"))).reason


# When it pays


def test_the_charge_is_in_the_ledger_before_the_answer_exists(house: House, tmp_path: Path) -> None:
    """Seen from another connection to the file, at the moment when the encoded vector is handed over."""
    seen: list[int] = []

    class Watching(MemoryJournal):
        def answer(self, sid: bytes, step: str, request_digest: bytes, reply_digest: bytes) -> None:
            with Ledger(tmp_path / "ledger.db") as other:
                seen.append(sum(line.entry.kind == "charge" for line in other.entries("a")))
            super().answer(sid, step, request_digest, reply_digest)

    site = house.start("a", journal=Watching())
    assert isinstance(ask(site, begin(house.plan(PLAIN))), wire.Answer)
    assert seen == [1]
    (entry,) = (recorded.entry for recorded in house.charged("a"))
    # q = 0.5 is the default; one local step is one fresh draw
    assert entry.charges == (Charge(PoissonGaussian(0.5, SIGMA)),)
    assert (entry.unit, entry.noise, entry.insecure_seed) == (PrivacyUnit.RECORD, NoiseSite.LOCAL, False)


def test_a_masked_round_charges_nothing_before_the_mask_step(house: House) -> None:
    plan = house.plan(config())
    plan_bytes = wire.encode_plan(plan)
    server = MaskedServer(
        session=session_of(plan, wire.context(plan_bytes, state_of()), plan_encoding(plan, SIZE)), roster=house.roster
    )
    requests, opening, paid = server.start(), True, {}
    while not server.done:
        for index, payload in requests.items():
            message: wire.Request = wire.Step(0, server.phase, payload)
            if opening:
                message = wire.Begin(0, server.phase, plan_bytes, state_of(), payload)
            reply = ask(house.sites[house.names[index]], wire.encode(message))
            assert isinstance(reply, wire.Answer), reply
            server.receive(index, reply.payload)
        paid[server.phase] = len(house.charged())
        requests, opening = server.close_phase(), False
    assert list(paid.values()) == [0, 0, 5, 5, 5]


def test_a_spent_budget_refuses_and_writes_nothing(house: House) -> None:
    tight = changed(PLAIN, "privacy", target_epsilon=1.5)
    site, round = house.sites["a"], 0
    while isinstance(reply := ask(site, begin(house.plan(tight, round=round))), wire.Answer):
        round += 1
        assert round < 20
    assert isinstance(reply, wire.Refusal) and (reply.kind, reply.final) == ("budget", True)
    assert f"site 'a' has spent ε = {site.book.spent(1e-5).value:.6g} of 1.5" in reply.reason
    assert round > 0 and len(house.charged("a")) == round
    assert site.book.spent(1e-5).value <= 1.5 * (1 + 1e-6)
    # another run on the same records finds the spend; the site's own limit is above the plan's
    again = house.start("a", policy=Policy(max_epsilon=1.5))
    generous = changed(PLAIN, "privacy", target_epsilon=100.0)
    assert refused(again, begin(house.plan(generous, run="other"))).kind == "budget"
    assert len(house.charged("a")) == round


def test_a_method_that_asks_for_more_than_it_declares_releases_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(self: FedAvg, broadcast: Any, shared: Any, door: Any) -> tuple[torch.Tensor, Any]:
        batch = door.draw()
        door.gradient(broadcast["theta"].unsqueeze(0), batch)
        return door.gradient(broadcast["theta"].unsqueeze(0), batch), {}

    monkeypatch.setattr(FedAvgClass, "contribute", greedy)
    assert "not released" in refused(house.sites["a"], begin(house.plan(PLAIN))).reason
    assert house.charged() == ()


@pytest.mark.parametrize(
    "asked",
    [PLAIN, msgspec.structs.replace(PLAIN, method=Fomaml(inner_steps=2))],
    ids=lambda c: type(c.method).__name__,
)
def test_the_ledger_holds_what_the_method_declared(house: House, asked: Config) -> None:
    ask(house.sites["a"], begin(house.plan(asked)))
    (entry,) = (recorded.entry for recorded in house.charged("a"))
    groups = {charge.group: charge.count for charge in entry.charges}
    name = split_id(asked)
    expected = {f"{name}/support": 2, f"{name}/query": 1} if isinstance(asked.method, Fomaml) else {"all": 1}
    assert groups == expected


def test_a_run_without_a_claim_never_reaches_the_private_door_and_books_an_infinite_epsilon(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original = plain_module.PlainDoor.gradient
    monkeypatch.setattr(plain_module.PlainDoor, "gradient", lambda self, *a: asked.append(1) or original(self, *a))
    free = changed(changed(PLAIN, "privacy", unit=PrivacyUnit.NONE), "privacy", noise_multiplier=None)
    assert isinstance(ask(house.sites["a"], begin(house.plan(free))), wire.Answer)
    assert asked == [1]
    assert [line.entry.site for line in house.charged()] == ["a"]
    assert (
        house.sites["a"].book.spent(1e-5).value == math.inf
    )  # a later private run on these records can not claim less


# What it repeats


def test_a_killed_round_is_repeated_byte_for_byte_and_paid_once(tmp_path: Path) -> None:
    """The first process dies after the ledger's commit and before the answer left: as a kill would have it."""

    class Killed(BaseException):
        pass

    class Dying(SQLiteJournal):
        armed = False

        def answer(self, sid: bytes, step: str, request_digest: bytes, reply_digest: bytes) -> None:
            super().answer(sid, step, request_digest, reply_digest)
            if Dying.armed:
                raise Killed

    house = House(tmp_path, journals=lambda name: Dying(tmp_path / "journal.db", name))
    message = begin(house.plan(PLAIN))
    Dying.armed = True
    with pytest.raises(Killed):
        house.sites["a"].handle(message)
    Dying.armed = False
    first = house.charged("a")
    assert len(first) == 1
    reply = house.start("a").handle(message)
    assert isinstance(wire.decode_reply(reply), wire.Answer)
    assert house.start("a").handle(message) == reply
    assert house.charged("a") == first
    # with no budget left either: what is paid is paid
    tight = house.start("a", policy=Policy(max_epsilon=first_cost(house)))
    assert tight.handle(message) == reply


def test_a_run_that_means_to_spend_more_than_one_run_may_is_refused_at_once(house: House) -> None:
    asked = changed(PLAIN, "privacy", noise_multiplier=None, target_epsilon=2.0)
    plan = house.plan(asked, noise_multiplier=4.0)
    for limit, told in ((2.0, None), (1.0, "policy.max_epsilon_per_run = 1, the plan has target_epsilon = 2")):
        reply = ask(house.start("a", policy=Policy(max_epsilon_per_run=limit, max_epsilon=8.0)), begin(plan))
        assert isinstance(reply, wire.Answer) if told is None else told in getattr(reply, "reason", "")


def test_one_run_may_not_spend_what_only_all_runs_together_may(house: House) -> None:
    """With a fixed noise the target says nothing: what stands in the ledger does."""
    assert isinstance(ask(house.sites["a"], begin(house.plan(PLAIN))), wire.Answer)
    one = first_cost(house)
    site = house.start("a", policy=Policy(max_epsilon=8 * one, max_epsilon_per_run=1.05 * one))
    assert isinstance(ask(site, begin(house.plan(PLAIN))), wire.Answer)  # done again: it is paid
    answer = refused(site, begin(house.plan(PLAIN, round=1)))
    assert (answer.kind, answer.final) == ("policy", True)
    assert "policy.max_epsilon_per_run" in answer.reason and "round 1 would bring the run to" in answer.reason
    assert isinstance(ask(site, begin(house.plan(PLAIN, run="another"))), wire.Answer)
    assert len(house.charged("a")) == 2


@pytest.mark.parametrize(
    ("hours", "at", "told"),
    [
        ("20:00-06:00", "19:59", "policy.hours = 20:00-06:00, here it is 19:59"),
        ("20:00-06:00", "20:00", None),
        ("20:00-06:00", "05:59", None),
        ("20:00-06:00", "06:00", "here it is 06:00"),
        ("08:00-18:00", "12:00", None),
        ("08:00-18:00", "18:00", "here it is 18:00"),
        ("07:30-07:30", "03:00", None),
    ],
)
def test_a_site_begins_rounds_in_its_hours_alone(hours: str, at: str, told: str | None) -> None:
    now = datetime.fromisoformat(f"2026-03-01T{at}+09:00")
    if told is None:
        check_hours(Policy(hours=hours), now)
        return
    with pytest.raises(OutsideHours, match=told):
        check_hours(Policy(hours=hours), now)


def test_outside_its_hours_a_site_refuses_for_now_and_ends_what_it_began(house: House) -> None:
    now = [datetime.fromisoformat("2026-03-01T23:30").astimezone()]
    site = house.start("a", policy=Policy(hours="20:00-23:45"), clock=lambda: now[0].astimezone(UTC))
    plan = house.plan(PLAIN)
    assert isinstance(ask(site, begin(plan)), wire.Answer)
    now[0] += timedelta(hours=1)
    question = wire.encode(wire.Evaluate(0, "evaluate", wire.encode_plan(plan), state_of()))
    assert isinstance(ask(site, question), wire.Measurement)
    answer = refused(site, begin(house.plan(PLAIN, round=1)))
    assert (answer.kind, answer.final) == ("policy", False)
    assert "policy.hours = 20:00-23:45" in answer.reason
    assert len(house.charged("a")) == 1


def test_a_policy_with_a_name_that_nothing_has_is_no_policy() -> None:
    with pytest.raises(ValueError, match=r"policy\.methods: there is no 'fedavgg'; there are fedavg"):
        Policy(methods=("fedavgg",))


def first_cost(house: House) -> float:
    return house.sites["a"].book.spent(1e-5).value


def test_the_same_round_on_another_model_is_refused_after_a_restart(house: House) -> None:
    plan = house.plan(PLAIN)
    assert isinstance(ask(house.sites["a"], begin(plan, state_of(0.0))), wire.Answer)
    # another model, a lost journal: the ledger still knows the round
    for site in (house.start("a"), house.start("a", journal=MemoryJournal())):
        assert not refused(site, begin(plan, state_of(0.5))).final
    assert len(house.charged("a")) == 1


def test_every_round_run_and_model_has_its_own_noise(house: House) -> None:
    site = house.sites["a"]
    plans = [house.plan(PLAIN), house.plan(PLAIN, round=1), house.plan(PLAIN, run="s")]
    replies = [ask(site, begin(plan)) for plan in plans]
    replies.append(ask(house.start("a"), begin(house.plan(PLAIN, run="t"), state_of(1e-6))))
    vectors = {msgspec.msgpack.decode(reply.payload)[-1] for reply in replies if isinstance(reply, wire.Answer)}
    assert len(vectors) == 4


def test_a_known_seed_gives_the_same_noise_in_every_run_and_is_written_down(tmp_path: Path) -> None:
    house = House(tmp_path, insecure=True)
    asked = changed(PLAIN, "privacy", insecure_seed=1)
    vectors = set()
    for run in ("r", "s"):
        reply = ask(house.sites["a"], begin(house.plan(asked, run=run)))
        assert isinstance(reply, wire.Answer)
        vectors.add(msgspec.msgpack.decode(reply.payload)[-1])
    assert len(vectors) == 1
    assert all(recorded.entry.insecure_seed for recorded in house.charged())


# What it never says


def test_no_record_shows_in_a_reply_a_log_or_a_repr(house: House, caplog: pytest.LogCaptureFixture) -> None:
    site = house.sites["a"]
    free = changed(PLAIN, "privacy", unit=PrivacyUnit.NONE)
    plan = wire.encode_plan(house.plan(PLAIN))
    with caplog.at_level(logging.DEBUG):
        replies = [
            site.handle(begin(plan)),
            site.handle(wire.encode(wire.Evaluate(0, "evaluate", plan, state_of()))),
            site.handle(b"garbage"),
            house.sites["b"].handle(begin(house.plan(free, run="s", noise_multiplier=0.0))),
            house.start("c", policy=Policy(max_epsilon=1e-3)).handle(begin(plan)),
        ]
    everything = b"".join(replies) + caplog.text.encode() + repr([site, site.__dict__]).encode()
    assert str(MARK).encode() not in everything
    for record in site._data.ids.tolist():
        assert str(record).encode() not in everything
        assert int(record).to_bytes(8, "little") not in everything
        assert int(record).to_bytes(8, "big") not in everything
    assert site._data.inputs.numpy().tobytes()[:16] not in everything
    for secret in (site._noise_key, site._identity.secagg_private, site._identity.ledger_private):
        assert secret not in b"".join(replies)
    measured = wire.decode_reply(replies[1])
    assert isinstance(measured, wire.Measurement) and measured.epsilon == site.book.spent(1e-5).value > 0


def test_another_record_in_the_table_does_not_start_epsilon_again(house: House) -> None:
    run = house.federation(config(rounds=1))
    list(run.rounds())
    before = house.sites["a"].book.spent(1e-5).value
    grown = house.start("a", data=records(ord("a"), n=41))
    assert grown.fingerprint != house.sites["a"].fingerprint
    assert grown.book.spent(1e-5).value == before > 0


def test_exact_figures_are_given_once_a_round(house: House) -> None:
    asked = config()
    message = wire.encode(wire.Evaluate(0, "evaluate", wire.encode_plan(house.plan(asked)), state_of(0.0)))
    early = wire.decode_reply(house.sites["a"].handle(message))
    assert isinstance(early, wire.Refusal) and "did not begin" in early.reason
    ask(house.sites["a"], begin(house.plan(PLAIN, run="q")))
    message, other = (
        wire.encode(wire.Evaluate(0, "evaluate", wire.encode_plan(house.plan(PLAIN, run="q")), state_of(value)))
        for value in (0.0, 0.5)
    )
    assert isinstance(wire.decode_reply(house.sites["a"].handle(message)), wire.Measurement)
    refusal = wire.decode_reply(house.sites["a"].handle(other))
    assert isinstance(refusal, wire.Refusal) and "measured round 0 already" in refusal.reason
