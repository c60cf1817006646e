"""What a site keeps between rounds: what may influence an update, what never does, and what never leaves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from privfed import wire
from privfed.architecture import build_model, sent, update_size
from privfed.config import Aggregation, Config, Privacy
from privfed.engines.local import LocalEngine
from privfed.errors import ConfigError
from privfed.federation import Federation
from privfed.folder import Checkpoint, RunFacts, RunFolder
from privfed.methods import MRMTL, Ditto, FedBABU, FedPer, FedRep, LocalNorm, Method, Scaffold
from privfed.models import MLP, layout, pieces
from privfed.parameters import to_vector
from privfed.privacy.events import NoiseSite, PrivacyUnit

from .house import SCHEMA, House, Tap, changed, config

KEEPING = (
    Scaffold(local_steps=1, personal_steps=1),
    MRMTL(local_steps=1, personal_steps=1),
    FedRep(head_steps=1, personal_steps=1),
    FedPer(local_steps=1, personal_steps=1),
    LocalNorm(local_steps=1, personal_steps=1),
)
NOISY = Privacy(noise_multiplier=1.0, target_epsilon=500.0, expected_batch_size=10.0)
BODY = 3 * 4 + 4
NORM = 2 * 4
HEAD = 4 * 2 + 2


def settings(method: Method, **changes: Any) -> Config:
    return config(
        method=method,
        model=MLP(hidden=(4,), norm="group"),
        privacy=NOISY,
        aggregation=Aggregation(kind="plain"),
        **changes,
    )


def house_at(path: Path, **changes: Any) -> House:
    path.mkdir()
    return House(path, **changes)


def rounds(federation: Federation, number: int) -> Mapping[str, Tensor]:
    loop = federation.rounds()
    for _ in range(number):
        report = next(loop)
        assert report.aborted is None and not report.refused, report
    return federation.state


def name_of(method: Any) -> str:
    return str(type(method).__struct_config__.tag)


@pytest.mark.parametrize("method", KEEPING[:3], ids=name_of)
def test_a_run_goes_on_from_its_checkpoint_as_if_nothing_had_happened(method: Method, tmp_path: Path) -> None:
    """Killed after every site had contributed to the last round: it is done again, bit by bit."""
    run = settings(method)
    whole = rounds(house_at(tmp_path / "whole").federation(run), 3)

    house = house_at(tmp_path / "cut")
    federation = house.federation(run)
    rounds(federation, 2)
    folder = RunFolder.create(tmp_path / "run", RunFacts(run="r", ledger="ledger.db", noise_multiplier=1.0), "")
    private = {name: site.private_state for name, site in house.sites.items()}
    shared = {name: site.shared_state for name, site in house.sites.items()}
    folder.save_checkpoint(Checkpoint(2, federation.state, private, {}, {}, shared))
    first = rounds(federation, 1)  # and this is where the kill came

    checkpoint = folder.load_checkpoint()
    assert checkpoint is not None
    for name in house.names:
        house.sites[name] = house.start(name)
        house.sites[name].restore(checkpoint.sites[name], checkpoint.shared.get(name, {}))
    spent = len(house.charged())
    again = house.federation(run)
    again.state, again.next_round = checkpoint.server, checkpoint.next_round
    second = rounds(again, 1)
    for state in (first, second):
        assert state.keys() == whole.keys() and all(torch.equal(state[name], whole[name]) for name in whole)
    assert len(house.charged()) == spent  # the same release is paid for once


@pytest.mark.parametrize("method", KEEPING[:3], ids=name_of)
def test_what_was_kept_decides_the_update(method: Method, tmp_path: Path) -> None:
    """Else the tests of what may be kept would test nothing."""
    house, other = house_at(tmp_path / "a"), house_at(tmp_path / "b")
    run = settings(method)
    one, two = house.federation(run), other.federation(run)
    rounds(one, 1)
    rounds(two, 1)
    for name in other.names:
        other.sites[name].restore(other.sites[name].private_state, {})
    assert not torch.equal(rounds(one, 1)["theta"], rounds(two, 1)["theta"])


@pytest.mark.parametrize("method", [*KEEPING[:3], Ditto(local_steps=1), FedBABU(local_steps=1)], ids=name_of)
def test_personal_models_leave_no_trace_in_what_is_sent(method: Any, tmp_path: Path) -> None:
    """However far the exact local steps go: the same bytes leave the sites, and the same shared state stays."""
    seen = []
    for number, (steps, rate) in enumerate(((1, 0.1), (5, 3.0))):
        house = house_at(tmp_path / str(number), insecure=True)  # the same noise, whatever the plan says
        run = settings(msgspec.structs.replace(method, personal_steps=steps, personal_lr=rate))
        run = changed(run, "privacy", insecure_seed=5)
        federation = house.federation(run)
        state = rounds(federation, 2)
        personal = house.sites["a"].private_state["theta"]
        seen.append((state["theta"], {n: s.shared_state for n, s in house.sites.items()}, personal))
    (one, shared_one, personal_one), (other, shared_other, personal_other) = seen
    assert torch.equal(one, other) and not torch.equal(personal_one, personal_other)
    for name, state in shared_one.items():
        assert all(torch.equal(tensor, shared_other[name][key]) for key, tensor in state.items())


@pytest.mark.parametrize(
    ("method", "size"),
    [
        (FedRep(), BODY + NORM),
        (FedPer(), BODY + NORM),
        (FedBABU(), BODY + NORM),
        (LocalNorm(), BODY + HEAD),
        (Scaffold(), 2 * (BODY + NORM + HEAD)),
        (MRMTL(), BODY + NORM + HEAD),
    ],
    ids=lambda value: name_of(value) if not isinstance(value, int) else "",
)
def test_only_what_may_leave_is_in_the_message(method: Any, size: int, tmp_path: Path) -> None:
    run = settings(msgspec.structs.replace(method, personal_steps=1))
    start = to_vector(build_model(run, SCHEMA))
    assert update_size(run, SCHEMA.features, len(start)) == size
    house = House(tmp_path)
    tap = Tap(LocalEngine(house.sites))
    state = rounds(house.federation(run, engine=tap), 2)
    replies = [wire.decode_reply(reply) for _, _, reply in tap.log]
    payloads = {len(reply.payload) for reply in replies if isinstance(reply, wire.Answer)}
    assert payloads and max(payloads) <= 4 * size + 200  # 32-bit words, and what goes around them
    still = ~sent(run, SCHEMA.features, len(start))[: len(start)]
    assert torch.equal(state["theta"][still], start[still]) and not torch.equal(state["theta"], start)


def test_what_stays_is_out_of_the_noised_sum_too(tmp_path: Path) -> None:
    """Noise of a whole site's update is added to what is sent, not to a head that nobody sends."""
    privacy = Privacy(unit=PrivacyUnit.CLIENT, noise=NoiseSite.DISTRIBUTED, noise_multiplier=1.0, target_epsilon=1e4)
    run = config(method=FedRep(head_steps=1, personal_steps=1), model=MLP(hidden=(4,)), privacy=privacy)
    start = to_vector(build_model(run, SCHEMA))
    state = rounds(House(tmp_path).federation(run), 2)
    head = layout(pieces(build_model(run, SCHEMA)))["head"]
    assert torch.equal(state["theta"][head], start[head])
    assert bool((state["theta"][~head] != start[~head]).all())


def test_a_round_that_is_tried_again_begins_with_the_same_state(tmp_path: Path) -> None:
    house = House(tmp_path)
    run = settings(Scaffold(local_steps=1, personal_steps=1))
    federation = house.federation(run)
    rounds(federation, 1)
    site = house.sites["a"]
    before = {name: tensor.clone() for name, tensor in site.shared_state.items()}
    plan = house.plan(run, round=1)
    assert torch.equal(site._shared_before(plan)["control"], before["control"])
    site._after = (1, {"control": torch.zeros_like(before["control"])})  # what a first attempt left
    assert torch.equal(site._shared_before(plan)["control"], before["control"])
    with pytest.raises(wire.WireError, match="can not go back to 0"):
        site._shared_before(house.plan(run, round=0))
    assert torch.equal(site._shared_before(house.plan(run, round=2))["control"], torch.zeros_like(before["control"]))


@pytest.mark.parametrize(
    ("method", "model", "reason"),
    [
        (FedRep(), MLP(), "keeps the model's last layer at the sites, and this model has no other: set model.hidden"),
        (FedBABU(), MLP(), "set model.hidden"),
        (LocalNorm(), MLP(hidden=(4,)), "set model.hidden and model.norm = 'group'"),
    ],
    ids=["fedrep", "fedbabu", "local-norm"],
)
def test_a_model_without_the_parts_is_refused(method: Method, model: MLP, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        House(tmp_path).federation(config(method=method, model=model))
