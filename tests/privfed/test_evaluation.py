"""Figures of merit, by hand."""

import math

import pytest
import torch
from torch import nn

from privfed.architecture import Schema, model_layout, parameter_count
from privfed.config import Config
from privfed.evaluation import fraction_hurt, outputs_of, spread
from privfed.models import MLP, layout, mlp, pieces


def test_every_site_counts_once() -> None:
    got = spread([0.5, 1.0, 0.75, None, math.nan])
    assert got is not None
    # √(((−.25)² + .25² + 0) / 3)
    assert (got.mean, got.worst_decile, got.sd) == (0.75, 0.5, pytest.approx(math.sqrt(0.125 / 3)))
    assert spread([]) is None and spread([None, math.inf]) is None


def test_the_worst_decile_is_the_mean_of_the_lowest_tenth() -> None:
    got = spread([value / 100 for value in range(30, 0, -1)])
    assert got is not None and got.worst_decile == pytest.approx(0.02)  # (.01 + .02 + .03) / 3


def test_where_less_is_better_the_worst_decile_is_the_highest_and_more_is_hurt() -> None:
    got = spread([value / 100 for value in range(1, 31)], lower_is_better=True)
    assert got is not None and got.worst_decile == pytest.approx(0.29)  # (.28 + .29 + .30) / 3
    assert fraction_hurt({"a": 0.5, "b": 0.7}, {"a": 0.6, "b": 0.6}, lower_is_better=True) == 0.5


def test_hurt_is_strictly_worse_among_sites_that_have_both() -> None:
    ours = {"a": 0.5, "b": 0.7, "c": 0.9, "d": None, "e": 0.1}
    theirs = {"a": 0.6, "b": 0.7, "c": 0.8, "d": 0.9, "e": None}
    assert fraction_hurt(ours, theirs) == pytest.approx(1 / 3)
    assert fraction_hurt({"a": None}, {"a": 1.0}) is None
    assert fraction_hurt({"a": 0.5}, {}) is None


def test_outputs_are_those_of_the_given_parameters_without_a_graph() -> None:
    model = mlp(2, (), 2, seed=0)
    theta = torch.tensor([1.0, 0.0, 0.0, 2.0, 10.0, 20.0])  # W = [[1, 0], [0, 2]], b = [10, 20]
    outputs = outputs_of(model, theta, torch.tensor([[3.0, 4.0]]))
    assert outputs.tolist() == [[13.0, 28.0]]
    assert not outputs.requires_grad


def test_a_model_is_the_same_for_the_same_public_seed_and_logistic_regression_starts_at_zero() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (mlp(4, (8,), 2, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert not any(parameter.any() for parameter in mlp(4, (), 2, seed=1).parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("hidden", [(), (5,), (5, 3)])
def test_the_parts_of_a_model_are_those_of_its_layers(hidden: tuple[int, ...], norm: bool) -> None:
    """By index, and the same as the kinds of the built network's layers say."""
    model = mlp(4, hidden, 2, seed=0, norm=norm)
    kinds: list[str] = []
    linear = [module for module in model if isinstance(module, nn.Linear)]
    for module in model:
        kind = "norm" if isinstance(module, nn.GroupNorm) else "head" if module is linear[-1] else "body"
        kinds += [kind] * sum(parameter.numel() for parameter in module.parameters())
    parts = layout(pieces(model))
    assert [next(part for part, mask in parts.items() if mask[at]) for at in range(len(kinds))] == kinds
    assert sum(int(mask.sum()) for mask in parts.values()) == len(kinds)


def test_a_network_is_counted_before_it_is_built() -> None:
    """A plan may name any widths: nothing of their size is allocated."""
    config, schema = Config(model=MLP(hidden=(65536,) * 30)), Schema(features=65536, classes=2)
    assert parameter_count(config, schema) == 30 * 65536 * 65537 + 2 * 65537
    with pytest.raises(ValueError, match="parameters, not 10"):
        model_layout(config, 65536, 10)


def test_a_record_is_normalised_by_itself() -> None:
    model = mlp(3, (4,), 2, seed=0, norm=True)
    rows = torch.randn(5, 3)
    torch.testing.assert_close(model(rows)[2:3], model(rows[2:3]))
    assert len(list(model.parameters())) == 6
