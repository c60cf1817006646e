"""The data door: what it clips, what it noises, what it books, what it refuses."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn import functional

from privfed.privacy import noise
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import Charge, PoissonGaussian
from privfed.privacy.oracle import door as door_module
from privfed.privacy.oracle.door import ALL, Batch, DoorSettings, Loss, Meter, Records
from privfed.privacy.oracle.opacus import OpacusDoor
from privfed.privacy.oracle.plain import PlainDoor

KEY = bytes(range(32))
FEATURES, N = 4, 12


def network(hidden: int = 5, features: int = FEATURES) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, 2))


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def records(n: int = N, features: int = FEATURES) -> Records:
    generator = torch.Generator().manual_seed(2)
    # Magnitudes from 0.01 to 1000: some gradients are clipped, some are not.
    inputs = torch.randn(n, features, generator=generator) * torch.logspace(-2, 3, n).unsqueeze(1)
    half = torch.arange(n // 2)
    parts = {ALL: torch.arange(n), "support": half, "query": half + n // 2, "nobody": torch.arange(0)}
    return Records(inputs, torch.arange(n) % 2, parts, "hash-0")


def without(data: Records, row: int) -> Records:
    keep = torch.arange(len(data)) != row
    return Records(data.inputs[keep], data.targets[keep], {ALL: torch.arange(len(data) - 1)}, data.split)


def door(
    data: Records | None = None,
    *,
    model: nn.Module | None = None,
    loss: Loss = cross_entropy,
    sample_rate: float = 1.0,
    noise_multiplier: float = 0.0,
    max_grad_norm: float = 0.7,
    expected_batch_size: float = 1.0,
) -> OpacusDoor:
    return OpacusDoor(
        model=model or network(),
        loss=loss,
        records=data or records(),
        settings=DoorSettings(
            sample_rate=sample_rate,
            expected_batch_size=expected_batch_size,
            max_grad_norm=max_grad_norm,
            noise_multiplier=noise_multiplier,
            part_fractions={"support": 0.5, "query": 0.5},
        ),
        randomness=noise.generator(KEY),
    )


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone().unsqueeze(0)


THETA = vector(network())


def opacus_gradient(data: Records, *, noise_multiplier: float, max_grad_norm: float, model: nn.Module) -> Tensor:
    """The same mean gradient by Opacus's own optimiser, clipping, noise and scaling included."""
    module = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=1.0),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=8,
        generator=torch.Generator().manual_seed(3),
    )
    cross_entropy(module(data.inputs.requires_grad_()), data.targets).mean().backward()
    optimizer.pre_step()
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("max_grad_norm", [0.01, 0.7, 50.0, 1e5])
def test_clipped_sums_are_those_of_opacus_on_the_same_batch(max_grad_norm: float) -> None:
    theirs = opacus_gradient(records(), noise_multiplier=0.0, max_grad_norm=max_grad_norm, model=network())
    ours = door(max_grad_norm=max_grad_norm, expected_batch_size=8.0)
    assert theirs.norm() > 0
    # 1e-6 of float32 rounding, and of the hair by which the door clips below C
    torch.testing.assert_close(ours.gradient(THETA, ours.draw())[0], theirs, rtol=2e-6, atol=1e-6)


def test_the_noise_is_as_wide_as_that_of_opacus() -> None:
    def residuals(take: Callable[[float], Tensor]) -> Tensor:
        return take(1.3) - take(0.0)

    wide = records(features=200)  # 60 · 201 + 2 · 61 = 12,182 coordinates
    model = network(60, 200)

    def mine(noise_multiplier: float) -> Tensor:
        private = door(wide, model=network(60, 200), noise_multiplier=noise_multiplier, expected_batch_size=8.0)
        return private.gradient(vector(model), private.draw())[0]

    def theirs(noise_multiplier: float) -> Tensor:
        return opacus_gradient(wide, noise_multiplier=noise_multiplier, max_grad_norm=0.7, model=network(60, 200))

    ours, reference = residuals(mine), residuals(theirs)
    # σC/B = 1.3 · 0.7 / 8; a standard deviation of 12,182 normals is good to 1/√(2·12182) = 0.64 %; 4 of these
    assert ours.std().item() == pytest.approx(1.3 * 0.7 / 8, rel=0.026)
    assert reference.std().item() == pytest.approx(1.3 * 0.7 / 8, rel=0.026)
    assert abs(ours.mean().item()) < 4 * 1.3 * 0.7 / 8 / math.sqrt(len(ours))


@pytest.mark.parametrize("max_grad_norm", [0.01, 0.1, 0.7])
def test_removing_any_record_moves_the_sum_by_at_most_c(max_grad_norm: float) -> None:
    whole = door(max_grad_norm=max_grad_norm)
    total = whole.gradient(THETA, whole.draw())
    moved = []
    for row in range(N):
        less = door(without(records(), row), max_grad_norm=max_grad_norm)
        moved.append((total - less.gradient(THETA, less.draw())).double().norm().item())
    # float32 sums of N vectors of norm ≤ C: rounding of N · C · 2⁻²⁴
    assert max(moved) <= max_grad_norm * (1 + N * 2**-24)
    assert max(moved) > 0.99 * max_grad_norm  # the bound is reached: clipping does happen


def test_one_record_alone_never_exceeds_c_in_float32() -> None:
    for row in range(N):
        data = records()
        alone = Records(data.inputs[row : row + 1], data.targets[row : row + 1], {ALL: torch.arange(1)})
        for max_grad_norm in (1e-3, 0.1, 0.7, 1.0, 7.3):
            private = door(alone, max_grad_norm=max_grad_norm)
            assert private.gradient(THETA, private.draw()).double().norm().item() <= max_grad_norm


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_a_record_whose_gradient_is_not_finite_counts_as_zero(bad: float) -> None:
    data, row = records(), 3
    data.inputs[row] = bad
    broken, less = door(data), door(without(records(), row))
    got, expected = broken.gradient(THETA, broken.draw()), less.gradient(THETA, less.draw())
    assert torch.isfinite(got).all()
    if not math.isfinite(bad):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_an_empty_draw_is_noise_and_is_booked() -> None:
    private = door(noise_multiplier=1.0)
    answer = private.gradient(THETA, private.draw("nobody"))
    assert answer.shape == THETA.shape
    assert (answer != 0).all()
    assert private.charges == (Charge(PoissonGaussian(1.0, 1.0), group="hash-0/nobody"),)
    silent = door()
    assert not silent.gradient(THETA, silent.draw("nobody")).any()


def test_the_denominator_is_public_and_scaled_by_the_public_fraction_of_a_part() -> None:
    small, large = door(expected_batch_size=1.0), door(expected_batch_size=10.0)
    for part, fraction in ((ALL, 1.0), ("support", 0.5)):
        one, ten = (d.gradient(THETA, d.draw(part)) for d in (small, large))
        torch.testing.assert_close(one, ten * 10)
        assert large._settings.denominator(part) == 10 * fraction


def test_queries_on_one_batch_are_one_event_with_less_noise_and_fresh_draws_are_their_own() -> None:
    private = door(sample_rate=0.5, noise_multiplier=2.0)
    first = private.draw()
    for _ in range(4):
        private.gradient(THETA, first)
    for _ in range(3):
        private.gradient(THETA, private.draw())
    private.draw()  # never asked about: nothing was told
    # four queries at σ = 2 tell as much as one at 2/√4 = 1
    assert set(private.charges) == {
        Charge(PoissonGaussian(0.5, 1.0), count=1),
        Charge(PoissonGaussian(0.5, 2.0), count=3),
    }


def test_parts_are_booked_under_their_split() -> None:
    private = door(sample_rate=0.5, noise_multiplier=2.0)
    for part in ("support", "support", "query"):
        private.gradient(THETA, private.draw(part))
    event = PoissonGaussian(0.5, 2.0)
    assert set(private.charges) == {Charge(event, 2, "hash-0/support"), Charge(event, 1, "hash-0/query")}


def test_what_is_booked_is_what_was_drawn_and_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted below the meter: at the sampler and at the one place where noise is added."""
    drawn: list[tuple[int, float]] = []
    noised: list[float] = []

    def spy_sample(size: int, sample_rate: float, randomness: np.random.Generator) -> Tensor:
        drawn.append((size, sample_rate))
        return noise.poisson_sample(size, sample_rate, randomness)

    def spy_release(total: Tensor, **settings: Any) -> Tensor:
        noised.append(settings["noise_multiplier"] * settings["max_grad_norm"])
        return noise.release(total, **settings)

    monkeypatch.setattr(door_module, "poisson_sample", spy_sample)
    monkeypatch.setattr(door_module, "release", spy_release)
    private = door(sample_rate=0.25, noise_multiplier=3.0, max_grad_norm=0.5)
    assert (drawn, noised) == ([], [])  # the probe of the loss touches no record and releases nothing
    for part in (ALL, "support", ALL):
        private.gradient(THETA, private.draw(part))
    assert drawn == [(12, 0.25), (6, 0.25), (12, 0.25)]
    assert noised == [1.5] * 3
    assert sum(charge.count for charge in private.charges) == len(drawn)
    assert {charge.event for charge in private.charges} == {PoissonGaussian(0.25, 3.0)}


def test_a_batch_of_another_door_is_refused_before_anything_is_read() -> None:
    mine, other = door(sample_rate=0.5, noise_multiplier=1.0), door(sample_rate=1.0)
    for foreign in (other.draw(), Batch(ALL, torch.arange(3))):
        with pytest.raises(ValueError, match="draw of this door"):
            mine.gradient(THETA, foreign)
    assert mine.charges == ()


def test_the_meter_alone_books_nothing_for_a_draw() -> None:
    meter = Meter(0.5, 2.0, "hash-0")
    batch = meter.drawn(Batch(ALL, torch.arange(2)))
    assert meter.charges == ()
    meter.query(batch)
    assert meter.charges == (Charge(PoissonGaussian(0.5, 2.0)),)


@pytest.mark.parametrize("kind", ["private", "plain"])
def test_unknown_parts_and_wrong_shapes_are_refused(kind: str) -> None:
    any_door = door() if kind == "private" else plain_door()
    with pytest.raises(ValueError, match=r"part must be one of \['all', .*\], got 'body'"):
        any_door.draw("body")
    for theta in (THETA[0], THETA[:, 1:], THETA.repeat(2, 1)):
        with pytest.raises(ValueError, match="theta must have shape"):
            any_door.gradient(theta, any_door.draw())
    assert any_door.charges == ()


def plain_door(sample_rate: float = 1.0) -> PlainDoor:
    return PlainDoor(
        model=network(),
        loss=cross_entropy,
        records=records(),
        sample_rate=sample_rate,
        randomness=noise.generator(KEY),
    )


def test_the_plain_door_gives_the_exact_mean_and_books_nothing() -> None:
    model, data = network(), records()
    cross_entropy(model(data.inputs), data.targets).mean().backward()
    exact = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    plain = plain_door()
    torch.testing.assert_close(plain.gradient(THETA, plain.draw())[0], exact)
    assert not plain.gradient(THETA, plain.draw("nobody")).any()
    assert plain.charges == ()


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False), nn.SyncBatchNorm(5), nn.BatchNorm1d(5).eval()]
)
def test_batch_norm_is_refused_even_where_opacus_lets_it_pass(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    model = nn.Sequential(nn.Linear(FEATURES, 5), layer, nn.Linear(5, 2))
    with pytest.raises(NoGuarantee, match=r"layer '1' is .*BatchNorm"):
        door(model=model)


def coupled_in_the_gradient_alone(outputs: Tensor, targets: Tensor) -> Tensor:
    """The values are those of a separable loss, the gradients are scaled by the size of the batch."""
    losses = cross_entropy(outputs, targets)
    return losses.detach() + len(losses) * (losses - losses.detach())


COUPLED: dict[str, Loss] = {
    "in the gradient alone": coupled_in_the_gradient_alone,
    "minus the batch mean": lambda o, t: cross_entropy(o, t) - cross_entropy(o, t).mean(),
    "times the batch mean": lambda o, t: cross_entropy(o, t) * cross_entropy(o, t).detach().mean(),
    "divided by the batch size": lambda o, t: cross_entropy(o, t) / len(t),
    "times the batch size": lambda o, t: cross_entropy(o, t) * len(t),
    "reduced to a mean": lambda o, t: cross_entropy(o, t).mean(),
    "Cox partial likelihood": lambda o, t: torch.logsumexp(o[:, 0], 0) - o[:, 0],
    "pairs of one class": lambda o, t: cross_entropy(o, t) + (t[:, None] == t).to(o).fill_diagonal_(0) @ o[:, 0],
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("max_grad_norm", [1e-3, 1.0, 100.0])
def test_a_loss_that_couples_records_is_refused(name: str, max_grad_norm: float) -> None:
    """Also with a C so small that every gradient is cut to one length, which hides a coupling that rescales."""
    with pytest.raises(NoGuarantee, match="lets one record move another"):
        door(loss=COUPLED[name], max_grad_norm=max_grad_norm)


def test_a_model_that_couples_records_is_refused() -> None:
    class Centred(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs - inputs.mean(0)

    with pytest.raises(NoGuarantee, match="lets one record move another"):
        door(model=nn.Sequential(nn.Linear(FEATURES, 5), Centred(), nn.Linear(5, 2)))


def test_the_probe_leaves_the_model_and_the_randomness_alone() -> None:
    model, randomness = network(), noise.generator(KEY)
    private = OpacusDoor(
        model=model,
        loss=cross_entropy,
        records=records(),
        settings=DoorSettings(
            sample_rate=0.5, expected_batch_size=1.0, max_grad_norm=0.7, noise_multiplier=1.0, part_fractions={}
        ),
        randomness=randomness,
    )
    assert torch.equal(vector(model), THETA)
    assert private._optimizer.max_grad_norm == pytest.approx(0.7, rel=2e-6)
    assert private._optimizer.max_grad_norm < 0.7
    assert randomness.random() == noise.generator(KEY).random()


def test_nothing_of_the_records_shows_in_a_repr() -> None:
    data = records()
    private = door(data)
    batch = private.draw()
    shown = [repr(value) for value in (data, batch, private, str(batch), private._meter)]
    assert repr(batch) == "Batch(part='all')"
    for text in shown:
        assert "tensor" not in text
        assert not any(f"{value:.3f}"[:5] in text for value in data.inputs.flatten().tolist() if abs(value) > 1)
    assert not any(name in dir(batch) for name in ("rows", "__len__", "__dict__"))


# Nobody's rounding is another record's business


def _door_on(inputs: torch.Tensor, targets: torch.Tensor, model: torch.nn.Module) -> OpacusDoor:
    constants = DoorSettings(
        sample_rate=1.0, expected_batch_size=1.0, max_grad_norm=1.0, noise_multiplier=1.0, part_fractions={}
    )
    records = Records(inputs, targets, {ALL: torch.arange(len(targets))})
    return OpacusDoor(
        model=model,
        loss=lambda outputs, labels: torch.nn.functional.cross_entropy(outputs, labels, reduction="none"),
        records=records,
        settings=constants,
        randomness=np.random.default_rng(0),
    )


def _network(*widths: int) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths):
        layers += [torch.nn.Linear(width_in, width_out), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def test_a_model_whose_sums_cancel_does_not_let_one_record_move_the_others() -> None:
    """Columns that are the same for everybody, weights that cancel on them but for 2⁻⁴⁵, and a ReLU behind: whether
    its gradient flows was a matter of the order of a sum, and that of how many rows there are. It moved 2.9 C."""
    rows, columns, gates = 40, 24, 32
    randomness = np.random.default_rng(0)
    model, inputs = _network(columns, gates, 2), torch.ones(rows, columns)
    inputs[:, 0] = torch.from_numpy(randomness.normal(size=rows)).float()
    weight = np.zeros((gates, columns))
    for gate in range(gates):
        large = randomness.integers(1, 2**13, size=(columns - 2) // 2)
        cancelling = randomness.permutation(np.concatenate([large, -large]))
        weight[gate, 1 : 1 + len(cancelling)] = cancelling
        weight[gate, -1] = 2.0**-45 * randomness.choice([-1, 1])
    first, last = model[0], model[2]
    assert isinstance(first, torch.nn.Linear) and isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        first.weight.copy_(torch.from_numpy(weight))
        first.bias.copy_(torch.from_numpy(2.0**-45.5 * randomness.choice([-1, 1], gates)))
        last.weight.normal_(0.0, 3.0, generator=torch.Generator().manual_seed(0))
    door = _door_on(inputs, torch.zeros(rows, dtype=torch.int64), model)
    sums = [door._sum_over(torch.arange(number)) for number in range(rows + 1)]
    moved = [float((one - other).norm()) for other, one in itertools.pairwise(sums)]
    assert max(moved) <= 1.0
    assert min(moved) > 0.5  # the gradients are there


@pytest.mark.parametrize("widths", [(3, 2), (13, 3), (30, 7, 2), (101, 33, 10), (7, 5, 5, 5, 3), (64, 64, 32, 2)])
def test_a_records_gradient_has_the_same_bits_in_any_company(widths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(sum(widths))
    inputs = torch.randn(200, widths[0], generator=generator)
    targets = torch.randint(0, widths[-1], (200,), generator=generator)
    door = _door_on(inputs, targets, _network(*widths))
    for parameter in door._parameters:  # of many magnitudes, so that every order of a sum rounds another way
        sizes = torch.exp(3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        parameter.data.copy_(sizes * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def gradients(rows: torch.Tensor) -> list[torch.Tensor]:
        door._backward(inputs[rows], targets[rows])
        return [parameter.grad_sample.clone() for parameter in door._parameters]

    everybody = gradients(torch.arange(200))
    for rows in (torch.arange(200).roll(5), torch.arange(1, 200), torch.arange(3, 4), torch.arange(0, 200, 7)):
        for whole, some in zip(everybody, gradients(rows), strict=True):
            assert torch.equal(whole[rows], some)
