"""A coordinator that wants more than it pays for: other noise in a retry, lies about who is in a sum, names that
collide, runs at the same time. What a site answers, and what its ledger says afterwards."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from privfed import site as site_module
from privfed import wire
from privfed.cohort import cohort_of
from privfed.config import Policy
from privfed.contribution import Contribution
from privfed.crypto.aggregation import AggregationResult, run_round
from privfed.crypto.errors import AggregationError
from privfed.crypto.masking import messages as m
from privfed.crypto.masking.server import MaskedServer
from privfed.crypto.wire import decode, encode, encode_indices
from privfed.errors import ConfigError
from privfed.noise_levels import noise_levels
from privfed.privacy.events import Charge
from privfed.privacy.ledger import Ledger
from privfed.schedule import check_schedule
from privfed.terms import plan_encoding, session_of

from .house import ACCOUNTANT, SCHEMA, SIZE, House, changed, state_of
from .test_schedule import SPEND
from .test_shared_noise import claim, drive, skellam, spends


def first_level(house: House) -> float:
    return noise_levels(SPEND, cohort_of(SPEND, house.n), SCHEMA, ACCOUNTANT)[0]


def vectors(sent: dict[str, list[bytes]], site: str = "a") -> int:
    """How many of the answers hold more than keys and shares: the vector is in the third."""
    return max(0, len([raw for raw in sent.get(site, []) if isinstance(wire.decode_reply(raw), wire.Answer)]) - 2)


@pytest.mark.parametrize("factor", [1.0001, 1.5])
def test_the_same_attempt_with_other_noise_is_no_second_release(tmp_path: Path, factor: float) -> None:
    """Under "spend" a plan may choose its noise, but only once: of two sums with two shares there is less noise."""
    house = House(tmp_path, n=7)
    level = first_level(house)
    result, refused, _ = drive(house, house.plan(SPEND, noise_multiplier=level), state_of())
    assert isinstance(result, AggregationResult) and refused == {}
    before = house.ledger.entries("a")
    result, refused, sent = drive(house, house.plan(SPEND, noise_multiplier=factor * level), state_of())
    assert isinstance(result, AggregationError) and "a" in refused
    assert vectors(sent) == 0
    assert house.ledger.entries("a") == before
    # Also after a restart, when nothing but the ledger and the journal remembers
    house.sites = {name: house.start(name) for name in house.names}
    result, refused, sent = drive(house, house.plan(SPEND, noise_multiplier=factor * level), state_of())
    assert isinstance(result, AggregationError) and vectors(sent) == 0
    assert house.ledger.entries("a") == before


def test_every_further_attempt_is_paid_for_until_the_pace_or_the_budget_ends_it(tmp_path: Path) -> None:
    house = House(tmp_path, n=7)
    level, totals = first_level(house), []
    for attempt in range(20):
        result, refused, _ = drive(house, house.plan(SPEND, noise_multiplier=level, attempt=attempt), state_of())
        if isinstance(result, AggregationError):
            assert "leaves too little" in refused["a"]
            break
        totals.append(result.total)
        assert len(spends(house, "reserve", "a")) == attempt + 1
    assert 1 <= len(totals) < 6  # the run was planned for six releases in all
    assert len({total.tobytes() for total in totals}) == len(totals)
    assert house.sites["a"].book.spent(1e-5).value <= SPEND.privacy.target_epsilon * (1 + 1e-6)


def test_a_site_that_is_shown_more_sites_than_the_others_does_not_settle(tmp_path: Path) -> None:
    """The server drops two, tells a that all seven are in the sum, and hopes that a books the noise of seven."""
    house = House(tmp_path, n=7)
    plan, state = house.plan(claim()), state_of()
    plan_bytes = wire.encode_plan(plan)
    session = session_of(plan, wire.context(plan_bytes, state), plan_encoding(plan, SIZE))
    server = MaskedServer(session=session, roster=house.roster)
    begun: set[int] = set()
    refused: dict[int, str] = {}

    def exchange(requests: dict[int, bytes]) -> dict[int, bytes]:
        replies = {}
        for index, honest in requests.items():
            payload = honest
            if server.phase == m.MASK and index in (1, 2):
                continue  # their vectors "never came"
            if server.phase == m.CONSISTENCY and index == 0:
                shown = decode(honest, m.Survivors, most=1 << 20)
                payload = encode(msgspec.structs.replace(shown, survivors=encode_indices(tuple(range(7)))))
            message: wire.Request = wire.Step(plan.round, server.phase, payload)
            if index not in begun:
                message = wire.Begin(plan.round, server.phase, plan_bytes, state, payload)
            begun.add(index)
            reply = wire.decode_reply(house.sites[house.names[index]].handle(wire.encode(message)))
            if isinstance(reply, wire.Answer):
                replies[index] = reply.payload
            elif isinstance(reply, wire.Refusal):
                refused[index] = reply.reason
        return replies

    try:
        run_round(server, exchange, lambda index, error: None)
    except AggregationError:
        pass
    assert spends(house, "settle", "a") == []
    (reserved,) = spends(house, "reserve", "a")
    assert skellam(reserved[2][0].event).shares == plan.minimum_cohort
    for name in "defg":  # who saw the truth books it
        assert [skellam(charges[0].event).shares for _, _, charges in spends(house, "settle", name)] in ([], [5])


def test_a_run_named_like_another_ones_figures_gets_nothing_for_free(tmp_path: Path) -> None:
    """The ledger calls the figures of "r" "r/figures". A run of that name meets what they have booked."""
    house = House(tmp_path)
    settings = changed(claim(), "evaluation", release="private")
    plan = house.plan(settings, side_noise=wire.SideNoise(figures=5.0))
    assert isinstance(drive(house, plan, state_of())[0], AggregationResult)
    assert isinstance(drive(house, plan, state_of(), "figures")[0], AggregationResult)
    booked = house.ledger.charges("a", house.sites["a"].book.dataset)
    result, refused, sent = drive(house, house.plan(claim(), run="r/figures"), state_of())
    assert isinstance(result, AggregationError) and "a" in refused and vectors(sent) == 0
    assert house.ledger.charges("a", house.sites["a"].book.dataset) == booked


def test_two_runs_at_once_can_not_both_have_the_last_of_a_budget(tmp_path: Path) -> None:
    """Two processes of one site on one ledger: both find room when they begin, and one of them when it books."""
    one_round = Policy(max_epsilon=0.9)  # of one round of claim() at its worst, and not of two
    house = House(tmp_path, policy=one_round)
    other = House(tmp_path, policy=one_round)
    other.identities, other.roster, other.ledger = house.identities, house.roster, Ledger(tmp_path / "ledger.db")
    other.sites = {name: other.start(name) for name in other.names}
    worst = [charge for _, _, charges in spends_after(house) for charge in charges]
    assert ACCOUNTANT.epsilon(worst, 1e-5).value < 0.9 < ACCOUNTANT.epsilon(worst * 2, 1e-5).value
    outcomes: list[Any] = []

    def beside(*arguments: Any, **options: Any) -> Contribution:
        """When the first run's site a computes its update, the second run's site does its whole round."""
        if not outcomes:
            outcomes.append(None)
            outcomes[0] = drive(other, other.plan(claim(), run="second"), state_of())
        return original(*arguments, **options)

    original = site_module.contribute
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(site_module, "contribute", beside)
        result, refused, sent = drive(house, house.plan(claim(), run="first"), state_of())
    second, _, _ = outcomes[0]
    assert isinstance(second, AggregationResult)
    assert "a" in refused and "0.9" in refused["a"] and vectors(sent) == 0
    assert isinstance(result, AggregationError)
    for name in house.names:
        assert house.sites[name].book.spent(1e-5).value <= 0.9


def spends_after(house: House) -> list[tuple[str, int, tuple[Charge, ...]]]:
    """What one round of `claim` reserves: of a house beside it, whose ledger is another."""
    path = house.path / "aside"
    path.mkdir()
    aside = House(path)
    drive(aside, aside.plan(claim()), state_of())
    return spends(aside, "reserve", "a")


def test_draws_and_noise_are_new_in_every_attempt_round_run_and_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Poisson draw that is used again tells who was in it; a share that is used again cancels."""
    house, keys = House(tmp_path), []
    original = site_module.contribute

    def spy(*arguments: Any, key: bytes, **options: Any) -> Contribution:
        keys.append(key)
        return original(*arguments, key=key, **options)

    monkeypatch.setattr(site_module, "contribute", spy)
    settings = claim(sample_rate=0.5)
    for changes in ({}, {"attempt": 1}, {"round": 1}, {"run": "another"}):
        assert isinstance(drive(house, house.plan(settings, **changes), state_of())[0], AggregationResult)
    other_model = drive(house, house.plan(settings, run="third"), state_of(1.0))[0]
    assert isinstance(other_model, AggregationResult)
    assert len(keys) == len(set(keys)) == 5 * house.n


def test_levels_chosen_on_the_way_are_refused_where_nothing_is_proved_of_them(tmp_path: Path) -> None:
    sampled = changed(SPEND, "privacy", sample_rate=0.5)
    with pytest.raises(ConfigError, match="sample_rate"):
        check_schedule(sampled)
    house = House(tmp_path, n=7)
    for forbidden in (sampled, changed(SPEND, "aggregation", kind="homomorphic")):
        with pytest.raises(ConfigError):
            check_schedule(forbidden)
    result, refused, _ = drive(house, house.plan(sampled, noise_multiplier=50.0), state_of())
    assert isinstance(result, AggregationError) and "sample_rate" in refused["a"]
    assert spends(house, "reserve") == []
