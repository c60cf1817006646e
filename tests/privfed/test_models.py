"""Kinds of networks: their shapes, their parts, per-record gradients by both engines, and what a site refuses."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from privfed.config import Config, Policy, Privacy
from privfed.config_io import decode, to_toml
from privfed.errors import ConfigError
from privfed.models import CNN, MLP, Embedding, Factory, Inputs, Network, Signal, layout, pieces
from privfed.policy import PolicyRefusal, check_policy
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.noise import generator
from privfed.privacy.oracle.door import DoorSettings, Records
from privfed.privacy.oracle.opacus import OpacusDoor
from privfed.privacy.oracle.stacked import StackedNetwork
from privfed.tasks import Classification
from privfed.wire import RoundPlan

from .house import round_plan

OWN = Factory(factory="own_network:make")
KINDS: dict[str, tuple[Network, Inputs]] = {
    "mlp": (MLP(hidden=(5,), norm="group"), Inputs(6)),
    "cnn": (CNN(shape=(1, 6, 6), channels=(4, 8), groups=2), Inputs(36)),
    "cnn, dense": (CNN(shape=(2, 4, 4), channels=(4,), groups=2, hidden=(5,)), Inputs(32)),
    "signal": (Signal(shape=(3, 8), channels=(4, 4), groups=2), Inputs(24)),
    "embedding": (Embedding(width=3), Inputs(1, ((0, 7),))),
    "two items": (Embedding(width=2, hidden=(4,)), Inputs(4, ((1, 5), (3, 2)))),
    "own": (OWN, Inputs(6)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def build(kind: str, seed: int = 0) -> nn.Module:
    settings, inputs = KINDS[kind]
    return settings.build(inputs, 3, seed=seed)


def inputs_of(kind: str, n: int) -> Tensor:
    inputs = KINDS[kind][1]
    randomness = np.random.default_rng(1)
    table = randomness.normal(size=(n, inputs.features))
    for position, count in inputs.items:
        table[:, position] = randomness.integers(0, count + 1, n)
    return torch.from_numpy(table).float()


@each_kind
def test_a_network_has_its_outputs_its_parts_and_its_public_start(kind: str) -> None:
    network = build(kind)
    assert network(inputs_of(kind, 4)).shape == (4, 3)
    state = torch.random.get_rng_state()
    again, other = parameters_to_vector(build(kind).parameters()), parameters_to_vector(build(kind, 1).parameters())
    assert torch.equal(parameters_to_vector(network.parameters()), again) and not torch.equal(again, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    parts = layout(pieces(network))
    assert torch.equal(torch.stack(list(parts.values())).sum(0), torch.ones(len(again), dtype=torch.int64))
    last = list(network.modules())[-1]
    assert isinstance(last, nn.Linear) and bool(parts["head"][-last.bias.numel() - last.weight.numel() :].all())
    assert int(parts["head"].sum()) == last.bias.numel() + last.weight.numel()


@each_kind
def test_both_engines_clip_the_gradient_of_each_record_alone(kind: str) -> None:
    """Against gradients taken by hand, one record at a time."""
    network, loss = build(kind), Classification().loss
    inputs, targets = inputs_of(kind, 5), torch.tensor([0, 2, 1, 1, 0])
    theta = parameters_to_vector(network.parameters()).detach() + 0.1
    limit, total = 0.05, torch.zeros(len(theta), dtype=torch.float64)
    by_hand = build(kind).double()
    torch.nn.utils.vector_to_parameters(theta.double(), by_hand.parameters())
    for row in range(5):
        one = loss(by_hand(inputs[row : row + 1].double()), targets[row : row + 1]).sum()
        g = parameters_to_vector(
            torch.autograd.grad(one, list(by_hand.parameters()), allow_unused=True, materialize_grads=True)
        )
        total += g * min(1.0, limit / float(g.norm()))
    records = Records(inputs, targets, {"all": torch.arange(5)})
    settings = DoorSettings(
        sample_rate=1.0, expected_batch_size=1.0, max_grad_norm=limit, noise_multiplier=1e-9, part_fractions={}
    )
    door = OpacusDoor(model=build(kind), loss=loss, records=records, settings=settings, randomness=generator(bytes(32)))
    assert torch.allclose(door.gradient(theta.unsqueeze(0), door.draw())[0].double(), total, atol=1e-6)
    stacked = StackedNetwork(build(kind), loss, inputs[:1], targets[:1])
    assert stacked.closed_form == (kind != "own")
    sums = stacked.clipped_sums(
        theta.double().unsqueeze(0),
        inputs.double().unsqueeze(0),
        targets.unsqueeze(0),
        torch.ones(1, 5, dtype=torch.bool),
        max_grad_norm=limit,
    )
    assert torch.allclose(sums[0], total, atol=1e-6)


def test_a_record_s_gradient_is_the_same_to_the_last_bit_whoever_else_is_drawn() -> None:
    """A matrix kernel rounds by how many rows there are; a network with convolutions is asked one record at a time."""
    inputs, targets = inputs_of("cnn", 7), torch.tensor([0, 2, 1, 1, 0, 2, 2])

    def first(n: int) -> list[Tensor]:
        records = Records(inputs, targets, {"all": torch.arange(7)})
        settings = DoorSettings(
            sample_rate=1.0, expected_batch_size=1.0, max_grad_norm=1.0, noise_multiplier=1.0, part_fractions={}
        )
        door = OpacusDoor(
            model=build("cnn"),
            loss=Classification().loss,
            records=records,
            settings=settings,
            randomness=generator(bytes(32)),
        )
        door._backward(inputs[:n], targets[:n])
        return [parameter.grad_sample[0] for parameter in door._parameters]

    assert all(torch.equal(alone, among) for alone, among in zip(first(1), first(7), strict=True))


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (MLP(), Inputs(2, ((0, 5),)), "use name = 'embedding'"),
        (Embedding(), Inputs(2), "name their columns under data.items"),
        (CNN(shape=(1, 5, 5)), Inputs(24), "holds 25 numbers, and a record has 24 inputs"),
        (CNN(shape=(1, 8, 8), kernel=4), Inputs(64), "must be odd, got 4"),
        (CNN(shape=(1, 8, 8), channels=(6,)), Inputs(64), "groups = 4 must divide"),
        (CNN(shape=(1, 3, 8), channels=(4, 8)), Inputs(24), "nothing is left"),
        (Signal(shape=(2, 3), channels=(4, 8)), Inputs(6), "nothing is left"),
        (Factory(factory="no_such_module:make"), Inputs(2), "PYTHONPATH"),
        (Factory(factory="own_network:absent"), Inputs(2), "no function 'absent'"),
        (Factory(factory="own_network:nothing"), Inputs(2), "gave a str"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(model: Network, inputs: Inputs, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model.build(inputs, 2, seed=0)


def test_batch_normalisation_of_a_user_s_own_is_refused_with_the_reason() -> None:
    network = Factory(factory="own_network:mixing").build(Inputs(3), 2, seed=0)
    with pytest.raises(NoGuarantee, match=r"mixes records: use nn\.GroupNorm"):
        StackedNetwork(network, Classification().loss, torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))


def plan(model: Network) -> RoundPlan:
    return round_plan(Config(model=model, privacy=Privacy(noise_multiplier=1.0)))


def test_a_site_imports_nothing_that_its_own_policy_does_not_trust() -> None:
    """Only a name travels; without the site's word it is not imported, nor is the module loaded to look at it."""
    sys.modules.pop("own_network", None)
    with pytest.raises(PolicyRefusal, match=r"'own_network:make', which policy\.trusted of this site does not list"):
        check_policy(plan(OWN), Policy(), insecure=False)
    assert "own_network" not in sys.modules
    check_policy(plan(OWN), Policy(trusted=("own_network:make",)), insecure=False)


@pytest.mark.parametrize(
    "table",
    [
        {"name": "cnn", "shape": [1, 8, 8], "channels": [4]},
        {"name": "signal", "shape": [3, 16], "channels": [4], "kernel": 7},
        {"name": "embedding", "width": 4},
        {"name": "factory", "factory": "own_network:make"},
        {"hidden": [8]},
    ],
)
def test_a_model_in_toml_comes_back_the_same(table: dict[str, Any]) -> None:
    import tomllib

    config = decode({"model": table})
    assert decode(tomllib.loads(to_toml(config))) == config


def test_standardised_inputs_are_for_networks_whose_first_layer_can_take_them_in() -> None:
    with pytest.raises(ConfigError, match=r"standardise_epsilon goes into the first layer of model\.name = 'mlp'"):
        decode({"model": {"name": "cnn", "shape": [1, 5, 6]}, "privacy": {"standardise_epsilon": 0.5}})
