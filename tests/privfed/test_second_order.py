"""Meta-gradients through the door, against autograd through the whole adaptation at once."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from privfed.methods import Anil, FederatedMethod, Maml, MetaSGD, PerFedAvg
from privfed.models import layout, mlp, pieces
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.oracle.door import DoorSettings, Records, curvature
from privfed.privacy.oracle.opacus import OpacusDoor
from privfed.privacy.oracle.plain import PlainDoor
from privfed.tasks import Classification

SHAPE = (3, (4,), 2)
SUPPORT, QUERY = torch.arange(12), torch.arange(12, 20)


def records() -> Records:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 2, (20,), generator=generator)
    return Records(inputs, targets, {"all": torch.arange(20), "support": SUPPORT, "query": QUERY})


def network() -> nn.Module:
    """A smooth one: with ReLU, a difference of gradients may cross a kink."""
    model = mlp(*SHAPE, seed=3)
    model[1] = nn.Tanh()
    return model.double()


def plain(rate: float = 1.0) -> PlainDoor:
    return PlainDoor(
        model=network(),
        loss=Classification().loss,
        records=records(),
        sample_rate=rate,
        randomness=np.random.default_rng(0),
    )


def loss(theta: Tensor, rows: Tensor) -> Tensor:
    """Mean loss as a function of the flat parameters, with nothing of the door in it."""
    model, at, parameters = network(), 0, {}
    for name, parameter in model.named_parameters():
        parameters[name] = theta[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    held = records()
    return Classification().loss(functional_call(model, parameters, (held.inputs[rows],)), held.targets[rows]).mean()


def naive(theta: Tensor, rates: Tensor, steps: int) -> Tensor:
    """L_Q after the adaptation, still a function of theta and rates."""
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(theta, SUPPORT), theta, create_graph=True)
        theta = theta - rates * gradient
    return loss(theta, QUERY)


START = parameters_to_vector(network().parameters()).detach()
LAYOUT = layout(pieces(network()))


def sent(method: FederatedMethod, door: Any) -> Tensor:
    shared, _ = method.init_site(START, LAYOUT)
    return method.contribute(method.init_server(START), shared, door)[0]


@pytest.mark.parametrize("steps", [1, 3])
def test_maml_is_the_gradient_through_the_adaptation(steps: int) -> None:
    theta = START.clone().requires_grad_()
    naive(theta, torch.full_like(START, 0.4), steps).backward()  # type: ignore[no-untyped-call]
    update = sent(Maml(inner_steps=steps, inner_lr=0.4, outer_lr=1.0), plain())
    torch.testing.assert_close(update[0], -theta.grad, rtol=1e-9, atol=1e-12)  # type: ignore[operator]


@pytest.mark.parametrize("steps", [1, 3])
def test_anil_is_the_gradient_through_the_adaptation_of_the_head(steps: int) -> None:
    theta = START.clone().requires_grad_()
    naive(theta, 0.4 * LAYOUT["head"], steps).backward()  # type: ignore[no-untyped-call]
    update = sent(Anil(inner_steps=steps, inner_lr=0.4, outer_lr=1.0), plain())
    torch.testing.assert_close(update[0], -theta.grad, rtol=1e-9, atol=1e-12)  # type: ignore[operator]


def test_meta_sgd_is_the_gradient_by_start_and_rates() -> None:
    theta, rates = START.clone().requires_grad_(), torch.full_like(START, 0.4).requires_grad_()
    naive(theta, rates, 1).backward()  # type: ignore[no-untyped-call]
    update = sent(MetaSGD(inner_lr=0.4, outer_lr=1.0), plain())
    assert theta.grad is not None and rates.grad is not None
    torch.testing.assert_close(update[0], -torch.cat([theta.grad, rates.grad]), rtol=1e-9, atol=1e-12)


def test_per_fedavg_is_maml_up_to_its_difference() -> None:
    """(HF) is a central difference: its error is δ² ‖u‖² times a third derivative, here below 1e-5 of the answer."""
    theta = START.clone().requires_grad_()
    naive(theta, torch.full_like(START, 0.4), 1).backward()  # type: ignore[no-untyped-call]
    update = sent(PerFedAvg(inner_lr=0.4, outer_lr=1.0, difference=1e-3), plain())
    torch.testing.assert_close(update[0], -theta.grad, rtol=1e-5, atol=1e-7)  # type: ignore[operator]


def test_single_precision_agrees_to_1e_5() -> None:
    """As a run computes it: float32, where the difference of two gradients has lost some digits."""
    theta = START.clone().requires_grad_()
    naive(theta, torch.full_like(START, 0.4), 1).backward()  # type: ignore[no-untyped-call]
    held = records()
    door = PlainDoor(
        model=network().float(),
        loss=Classification().loss,
        records=Records(held.inputs.float(), held.targets, held.parts),
        sample_rate=1.0,
        randomness=np.random.default_rng(0),
    )
    update, _ = Maml(inner_lr=0.4, outer_lr=1.0).contribute({"theta": START.float()}, {}, door)
    torch.testing.assert_close(update[0].double(), -theta.grad, rtol=0, atol=1e-5)  # type: ignore[operator]


def test_curvature_of_an_empty_draw_is_zero_and_that_of_relu_exists() -> None:
    door, vector = plain(1e-12), torch.ones(1, len(START), dtype=torch.float64)
    assert not door.curvature(START[None], door.draw("support"), vector).any()
    relu = PlainDoor(
        model=mlp(3, (4,), 2, seed=3).double(),
        loss=Classification().loss,
        records=records(),
        sample_rate=1.0,
        randomness=np.random.default_rng(0),
    )
    answer = relu.curvature(START[None], relu.draw("support"), vector)
    assert answer.shape == vector.shape and bool(answer.any()) and not answer.requires_grad


def test_a_private_door_has_no_second_order() -> None:
    settings = DoorSettings(
        sample_rate=0.5, expected_batch_size=5.0, max_grad_norm=1.0, noise_multiplier=1.0, part_fractions={}
    )
    door = OpacusDoor(
        model=mlp(*SHAPE, seed=3),
        loss=Classification().loss,
        records=records(),
        settings=settings,
        randomness=np.random.default_rng(0),
    )
    with pytest.raises(NoGuarantee, match="does not bound what the record does to a Hessian"):
        curvature(door, START[None], door.draw(), START[None])
    with pytest.raises(NoGuarantee):
        sent(Maml(), door)
