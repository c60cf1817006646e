"""Each method on a toy door, with numbers worked by hand."""

import inspect
import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from privfed.methods import (
    MRMTL,
    Anil,
    Ditto,
    FedAvg,
    FedBABU,
    FederatedMethod,
    FedPer,
    FedProx,
    FedRep,
    FedSGD,
    Fomaml,
    Local,
    LocalNorm,
    Maml,
    MetaSGD,
    Method,
    PerFedAvg,
    PFedMe,
    Reptile,
    Scaffold,
    Weighted,
)
from privfed.models import Layout, Part
from privfed.privacy.events import Charge, NoiseSite, PrivacyUnit
from privfed.privacy.oracle.door import ALL, Batch, Meter, charge, group

METHODS: tuple[FederatedMethod, ...] = (
    FedAvg(),
    FedProx(),
    Scaffold(),
    MRMTL(),
    Ditto(),
    Reptile(),
    Fomaml(),
    PerFedAvg(),
    Maml(),
    Anil(),
    Anil(first_order=True),
    MetaSGD(),
    MetaSGD(first_order=True),
    PFedMe(),
    FedRep(),
    FedPer(),
    FedBABU(),
    LocalNorm(),
    FedSGD(),
    Weighted(),
    Local(),
)
PERSONAL = (FedAvg(), FedProx(), Scaffold(), Reptile(), Fomaml(), PerFedAvg(), Maml(), FedSGD(), FedBABU())


class ToyDoor:
    """∇L(θ) = θ − target of the part: a step of rate r leads from θ to (1 − r)θ + r·target."""

    def __init__(self, **targets: float) -> None:
        self.targets, self.asked = targets, list[tuple[str, float]]()
        self._meter = Meter(0.5, 2.0, "hash-0")

    def draw(self, part: str = ALL) -> Batch:
        return self._meter.drawn(Batch(part, torch.arange(1)))

    def gradient(self, theta: Tensor, batch: Batch) -> Tensor:
        assert theta.shape == (1, 1)
        self._meter.query(batch)
        self.asked.append((batch._part, theta.item()))
        return theta - self.targets[batch._part]

    def curvature(self, theta: Tensor, batch: Batch, vector: Tensor) -> Tensor:
        return vector

    def source_gradient(self, theta: Tensor) -> Tensor:
        return theta

    @property
    def charges(self) -> tuple[Charge, ...]:
        return self._meter.charges


LAYOUT: Layout = {name: torch.tensor([name == "body"]) for name in get_args(Part)}


def start(value: float = 2.0) -> dict[str, Tensor]:
    return {"theta": torch.tensor([value])}


def test_fedavg_sends_the_way_its_steps_went() -> None:
    door = ToyDoor(all=10.0)
    update, _ = FedAvg(local_steps=2, lr=0.5).contribute(start(), {}, door)
    # 2 → (2+10)/2 = 6 → (6+10)/2 = 8; the update is 8 − 2
    assert update.tolist() == [[6.0]]
    assert door.asked == [("all", 2.0), ("all", 6.0)]
    assert FedAvg().serve(start(), torch.tensor([6.0]), 0.75)["theta"].tolist() == [8.0]


def test_reptile_moves_part_of_the_way_and_less_towards_the_end() -> None:
    door = ToyDoor(all=10.0)
    method = Reptile(inner_steps=2, inner_lr=0.5, outer_lr=0.5)
    assert method.contribute(start(), {}, door)[0].tolist() == [[6.0]]
    # w + ε(1 − progress) · 6: 2 + .5·6, 2 + .25·6, 2 + .125·6
    for progress, expected in ((0.0, 5.0), (0.5, 3.5), (0.75, 2.75)):
        assert method.serve(start(), torch.tensor([6.0]), progress)["theta"].tolist() == [expected]


def test_fomaml_adapts_on_support_and_sends_the_query_gradient_there() -> None:
    door = ToyDoor(support=10.0, query=4.0)
    update, _ = Fomaml(inner_steps=2, inner_lr=0.5, outer_lr=3.0).contribute(start(), {}, door)
    # support: 2 → 6 → 8; query gradient at 8 is 8 − 4 = 4; the update is −3 · 4, at w and not at 8
    assert door.asked == [("support", 2.0), ("support", 6.0), ("query", 8.0)]
    assert update.tolist() == [[-12.0]]
    assert Fomaml().serve(start(), torch.tensor([-12.0]), 0.5)["theta"].tolist() == [-10.0]


def test_fedsgd_sends_the_gradient_itself_and_the_server_steps_with_momentum() -> None:
    door = ToyDoor(all=10.0)
    method = FedSGD(lr=0.5, momentum=0.5)
    # ∇L(2) = 2 − 10, untouched: what noise in shares covers
    assert method.contribute(start(), {}, door)[0].tolist() == [[-8.0]] and method.point(start()).tolist() == [[2.0]]
    state = method.serve(method.init_server(torch.tensor([2.0])), torch.tensor([-8.0]), 0.0)
    assert state["theta"].tolist() == [6.0]
    # m ← .5 · (−8) + (−4) = −8 once more
    assert method.serve(state, torch.tensor([-4.0]), 0.5)["theta"].tolist() == [10.0]


@pytest.mark.parametrize("method", PERSONAL, ids=lambda m: type(m).__name__)
def test_personalisation_starts_from_the_broadcast_and_uses_the_local_door(method: Any) -> None:
    personal = type(method)(personal_steps=2, personal_lr=0.5)
    for private in ({}, {"theta": torch.tensor([99.0])}):
        shared, _ = personal.init_site(torch.tensor([99.0]), LAYOUT)
        assert personal.personalize(start(), shared, private, ToyDoor(all=10.0))["theta"].tolist() == [8.0]


def test_local_goes_on_from_its_own_model_and_sends_nothing() -> None:
    method = Local(steps=1, lr=0.5)
    shared, private = method.init_site(torch.tensor([2.0]), LAYOUT)
    private = method.personalize(start(99.0), shared, private, ToyDoor(all=10.0))
    assert private["theta"].tolist() == [6.0]
    assert method.personalize(start(99.0), shared, private, ToyDoor(all=10.0))["theta"].tolist() == [8.0]
    assert not method.sends
    with pytest.raises(RuntimeError, match="sends nothing"):
        method.contribute(start(), {}, ToyDoor(all=10.0))
    assert method.serve(start(), torch.tensor([5.0]), 0.0)["theta"].tolist() == [2.0]


SENDING = (
    *(method for method in METHODS if method.sends),
    FedAvg(local_steps=3),
    Reptile(inner_steps=1),
    Fomaml(inner_steps=3),
    PerFedAvg(local_steps=2),
    PFedMe(local_steps=3, inner_steps=2),
    FedRep(head_steps=2, body_steps=3),
    Maml(inner_steps=3),
)


@pytest.mark.parametrize("method", SENDING, ids=repr)
def test_what_a_method_declares_is_what_it_executes(method: FederatedMethod) -> None:
    door = ToyDoor(all=1.0, support=1.0, query=1.0)
    shared, _ = method.init_site(torch.tensor([2.0]), LAYOUT)
    for _ in range(2):  # with the state of a first round too
        door = ToyDoor(all=1.0, support=1.0, query=1.0)
        update, shared = method.contribute(method.init_server(torch.tensor([2.0])), shared, door)
        assert update.shape == (1, method.blocks)
        declared = {charge(group("hash-0", q.part), 0.5, 2.0 / math.sqrt(q.each), q.count) for q in method.queries()}
        assert set(door.charges) == declared
        assert {part for part, _ in door.asked} <= {ALL, *method.parts}


# Under each unit, with noise local, distributed, central: y where there is a guarantee. Record and patient are alike.
STEPS = {"none": "yyy", "record": "y--", "patient": "y--", "client": "-yy"}
SECOND_ORDER = {**STEPS, "record": "---", "patient": "---"}
ONE_ANSWER = {**STEPS, "record": "yy-", "patient": "yy-"}
NOTHING_LEAVES = dict.fromkeys(STEPS, "yyy")
GUARANTEES = {
    "fedavg": STEPS,
    "fedprox": STEPS,
    "scaffold": STEPS,
    "mr-mtl": STEPS,
    "ditto": STEPS,
    "reptile": STEPS,
    "fomaml": STEPS,
    "per-fedavg": STEPS,
    "maml": SECOND_ORDER,
    "anil": SECOND_ORDER,
    "anil, first order": STEPS,
    "meta-sgd": SECOND_ORDER,
    "meta-sgd, first order": STEPS,
    "pfedme": STEPS,
    "fedrep": STEPS,
    "fedper": STEPS,
    "fedbabu": STEPS,
    "local-norm": STEPS,
    "fedsgd": ONE_ANSWER,
    "weighted": STEPS,
    "local": NOTHING_LEAVES,
}


def name_of(method: Any) -> str:
    return type(method).__struct_config__.tag + ", first order" * getattr(method, "first_order", False)


@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.parametrize("unit", PrivacyUnit)
def test_a_guarantee_is_given_only_where_it_is_proved(method: FederatedMethod, unit: PrivacyUnit) -> None:
    reasons = [method.guarantee(unit, noise) for noise in NoiseSite]
    assert "".join("y" if reason is None else "-" for reason in reasons) == GUARANTEES[name_of(method)][unit.value]
    for reason, noise in zip(reasons, NoiseSite, strict=True):
        assert reason is None or (unit.value in reason and noise.value in reason)


def test_the_table_of_guarantees_has_every_method() -> None:
    assert set(GUARANTEES) == {name_of(method) for method in METHODS}
    assert {type(method) for method in METHODS} == set(get_args(Method))


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_what_may_leave_can_not_see_what_may_not(method: FederatedMethod) -> None:
    """Private state is no argument of `contribute`, and parts of a split cover every record once."""
    assert list(inspect.signature(method.contribute).parameters) == ["broadcast", "shared", "door"]
    assert not method.parts or sum(method.parts.values()) == 1.0
    assert (method.queries() == ()) == (not method.sends)


@pytest.mark.parametrize("method", SENDING, ids=repr)
def test_personalisation_changes_no_state_but_its_own(method: FederatedMethod) -> None:
    """Nothing exact gets into what the next update is made of, in place either."""
    broadcast = method.init_server(torch.tensor([2.0]))
    shared, private = method.init_site(torch.tensor([2.0]), LAYOUT)
    _, shared = method.contribute(broadcast, shared, ToyDoor(all=1.0, support=1.0, query=1.0))
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in (broadcast, shared)]
    for _ in range(2):
        private = method.personalize(broadcast, shared, private, ToyDoor(all=10.0))
    assert private["theta"].shape == (1,)
    for state, kept in zip((broadcast, shared), before, strict=True):
        assert state.keys() == kept.keys() and all(torch.equal(state[name], kept[name]) for name in kept)


@pytest.mark.parametrize("method", SENDING, ids=repr)
def test_a_contribution_is_the_same_when_it_is_made_again(method: FederatedMethod) -> None:
    """Its arguments are not changed: a round that is done again after a crash gives the same vector."""
    broadcast = method.init_server(torch.tensor([2.0]))
    shared, _ = method.init_site(torch.tensor([2.0]), LAYOUT)
    for target in (1.0, 5.0):
        doors = [ToyDoor(all=target, support=target, query=3.0) for _ in range(2)]
        (one, shared_one), (other, shared_other) = (method.contribute(broadcast, shared, door) for door in doors)
        assert torch.equal(one, other) and shared_one.keys() == shared_other.keys()
        shared = shared_one
