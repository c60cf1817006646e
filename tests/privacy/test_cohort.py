"""The oracle for K sites at once: what each site would answer alone, and nothing that another site's records move."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from privfed.privacy import noise
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.oracle.cohort import CohortDoor, clipped_sums
from privfed.privacy.oracle.door import ALL, DoorSettings, Loss, Records
from privfed.privacy.oracle.opacus import OpacusDoor
from privfed.privacy.oracle.plain import PlainDoor
from privfed.privacy.oracle.stacked import StackedNetwork

SIZES = (0, 5, 40, 13, 1)
CLASSES = 3
C = 0.7


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


# Tanh, not ReLU: float32 rounding may carry an output across a kink, whose other side is another gradient
LEAVES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(4, CLASSES), (4,)),
    "Linear without bias": (
        lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, CLASSES)),
        (4,),
    ),
    "Linear of a sequence, by products": (
        lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, CLASSES)),
        (8, 3),
    ),
    "Linear of a sequence, by inner products": (
        lambda: nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Flatten(), nn.Linear(16, CLASSES)),
        (2, 9),
    ),
    "Conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(3, 4, 2, bias=False),
            nn.Flatten(),
            nn.Linear(8, CLASSES),
        ),
        (2, 7, 8),
    ),
    "Conv2d of one channel": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, (3, 4), stride=2, padding=(2, 1)), nn.Tanh(), nn.Flatten()),
        (1, 1, 4),
    ),
    "Conv2d between channels": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 5, 1),
            nn.Tanh(),
            nn.Conv2d(5, 1, (1, 3), padding=(0, 1)),
            nn.Tanh(),
            nn.Conv2d(1, 3, (2, 3)),
            nn.Flatten(),
        ),
        (2, 2, 3),
    ),
    "Conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 3, padding=2, dilation=2), nn.Tanh(), nn.Conv1d(3, CLASSES, 2, stride=2), nn.Flatten()
        ),
        (2, 3),
    ),
    "GroupNorm": (
        lambda: nn.Sequential(nn.Conv1d(2, 6, 2), nn.GroupNorm(3, 6), nn.Tanh(), nn.Flatten(), nn.Linear(18, CLASSES)),
        (2, 4),
    ),
    "LayerNorm": (
        lambda: nn.Sequential(nn.LayerNorm((3, 4)), nn.Linear(4, 6), nn.LayerNorm(6), nn.Flatten(), nn.Linear(18, 3)),
        (3, 4),
    ),
    "Embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)),
        (3,),
    ),
}


def built(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(1)
    make, shape = LEAVES[name]
    return make(), shape


def site(size: int, shape: tuple[int, ...], *, seed: int, tokens: bool = False) -> Records:
    generator = torch.Generator().manual_seed(seed)
    if tokens:
        inputs = torch.randint(0, 5, (size, *shape), generator=generator)
    else:  # magnitudes from 0.01 to 10: some gradients are clipped, some are not
        scale = torch.logspace(-2, 1, size).view(-1, *[1] * len(shape))
        inputs = torch.randn(size, *shape, generator=generator) * scale
    targets = torch.randint(0, CLASSES, (size,), generator=generator)
    return Records(inputs, targets, {ALL: torch.arange(size), "nobody": torch.arange(0)}, "hash-0")


def sites(shape: tuple[int, ...], sizes: Sequence[int] = SIZES, *, tokens: bool = False) -> list[Records]:
    return [site(size, shape, seed=number, tokens=tokens) for number, size in enumerate(sizes)]


def points(parameters: int, count: int = len(SIZES)) -> Tensor:
    return 0.3 * torch.randn(count, parameters, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def settings(sample_rate: float = 1.0, noise_multiplier: float = 0.0) -> DoorSettings:
    return DoorSettings(
        sample_rate=sample_rate,
        expected_batch_size=7.0,
        max_grad_norm=C,
        noise_multiplier=noise_multiplier,
        part_fractions={},
    )


def keys(count: int = len(SIZES)) -> list[bytes]:
    return [bytes([number]) * 32 for number in range(count)]


def network_of(model: nn.Module, data: Sequence[Records], dtype: torch.dtype = torch.float64) -> StackedNetwork:
    return StackedNetwork(model, cross_entropy, data[0].inputs, data[0].targets, dtype=dtype)


def cohort(model: nn.Module, data: Sequence[Records], given: DoorSettings, *, memory_bytes: int = 2**27) -> CohortDoor:
    return CohortDoor(
        network=network_of(model, data),
        sites=data,
        settings=given,
        randomness=[noise.generator(key) for key in keys(len(data))],
        memory_bytes=memory_bytes,
    )


def sums_of(network: StackedNetwork, theta: Tensor, data: Sequence[Records], *, memory_bytes: int = 2**27) -> Tensor:
    """[K, P]: the clipped sum over all records of every site."""
    counts = torch.tensor([len(records) for records in data])
    inputs, targets = (torch.cat([getattr(records, name) for records in data]) for name in ("inputs", "targets"))
    out = torch.full_like(theta, math.nan, dtype=network.dtype)
    rows = torch.arange(len(targets))
    blocks = clipped_sums(network, theta, inputs, targets, rows, counts, max_grad_norm=C, memory_bytes=memory_bytes)
    for members, sums in blocks:
        out[members] = sums
    return out


def opacus_sum(model: nn.Module, theta: Tensor, records: Records) -> Tensor:
    """float64[P]: the same by Opacus's own per-record gradients and optimiser."""
    if len(records) == 0:
        return torch.zeros_like(theta)
    model = model.double()
    vector_to_parameters(theta, model.parameters())
    module = GradSampleModule(model, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=C * (1 - 1e-6),
        expected_batch_size=None,
        loss_reduction="sum",
    )
    inputs = records.inputs
    if inputs.is_floating_point():
        inputs = inputs.double().requires_grad_()
    cross_entropy(module(inputs), records.targets).sum().backward()
    optimizer.clip_and_accumulate()
    return torch.cat([parameter.summed_grad.flatten() for parameter in module.parameters()])


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # Opacus, where inputs are token ids
@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_clipped_sums_are_those_of_opacus_for_every_leaf_on_ragged_and_empty_sites(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    model, shape = built(name)
    data = sites(shape, tokens=name == "Embedding")
    network = network_of(model, data, dtype)
    assert network.closed_form
    # Parameters and records that float32 holds exactly: the difference is then that of the arithmetic
    theta = points(network.parameters).float().double()
    theirs = torch.stack([opacus_sum(built(name)[0], t, records) for t, records in zip(theta, data, strict=True)])
    assert theirs[2].norm() > C
    ours = sums_of(network, theta, data).double()
    # in units of the largest coordinate, a sum of up to 40 records of norm C
    assert float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("name", [name for name in LEAVES if name != "Embedding"])
def test_answers_draws_and_charges_are_those_of_the_sites_own_doors(name: str) -> None:
    model, shape = built(name)
    data, given = sites(shape), settings(0.5, 1.3)
    together = cohort(model, data, given)
    alone = [
        OpacusDoor(
            model=built(name)[0],
            loss=cross_entropy,
            records=records,
            settings=given,
            randomness=noise.generator(key),
        )
        for records, key in zip(data, keys(), strict=True)
    ]
    theta = points(sum(parameter.numel() for parameter in model.parameters()))
    for part in (ALL, ALL, "nobody", ALL):
        batch, batches = together.draw(part), [door.draw(part) for door in alone]
        start = torch.cumsum(batch._counts, 0) - batch._counts
        before = torch.tensor([0, *torch.tensor([len(r) for r in data]).cumsum(0)[:-1]])
        for number, own in enumerate(batches):
            mine = batch._rows[start[number] : start[number] + batch._counts[number]]
            assert torch.equal(mine - before[number], own._rows)
        got = together.gradient(theta, batch)
        due = torch.cat([door.gradient(t[None], own) for door, t, own in zip(alone, theta, batches, strict=True)])
        torch.testing.assert_close(got, due, rtol=1e-12, atol=1e-12)
        if part == "nobody":
            assert torch.equal(got, due)  # noise alone: the same bits
        theta = theta - 0.1 * due
    assert together.charges == alone[0].charges
    assert {charge.count for charge in together.charges} == {1, 3}


def test_a_cohort_of_one_is_the_door_of_that_site() -> None:
    model, shape = built("Linear")
    data, given = [site(12, shape, seed=3)], settings(0.5, 1.0)
    one = cohort(model, data, given)
    own = OpacusDoor(
        model=built("Linear")[0],
        loss=cross_entropy,
        records=data[0],
        settings=given,
        randomness=noise.generator(keys(1)[0]),
    )
    theta = points(one._network.parameters, 1).float()
    for _ in range(5):
        ours, theirs = one.gradient(theta, one.draw()), own.gradient(theta, own.draw())
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2**-23, atol=0.0)  # one unit in float32's last place
        theta = theta - theirs
    assert one.charges == own.charges


def test_one_theta_for_all_sites_is_theirs_each() -> None:
    model, shape = built("Linear")
    theta = points(15, 1)
    once, repeated = (cohort(model, sites(shape), settings(0.5, 1.0)) for _ in range(2))
    assert torch.equal(
        once.gradient(theta, once.draw()), repeated.gradient(theta.repeat(len(SIZES), 1), repeated.draw())
    )


class Scaled(nn.Module):
    """A layer that norms.py does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(4))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.factor


class Twice(nn.Module):
    """Calls one Linear two times: the norm of a sum is not the sum of the norms."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(torch.tanh(self.inner(torch.tanh(self.inner(inputs)))))
        return outputs


class Folded(nn.Module):
    """Shows its Linear a batch of 2·B rows: which rows are one record's is not to be seen from there."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(2, 2), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        halves = torch.tanh(self.inner(inputs.reshape(-1, 2)))
        outputs: Tensor = self.last(halves.reshape(-1, 4))
        return outputs


class Turned(nn.Module):
    """Shows its Linear the batch as its second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(1, 2), nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        turned = torch.tanh(self.inner(inputs.T.unsqueeze(2)))
        outputs: Tensor = self.last(turned.transpose(0, 1).flatten(1))
        return outputs


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(torch.tanh(self.first(inputs)))
        return outputs


class Peeking(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(torch.tanh(self.inner(inputs)) + inputs @ self.inner.weight)
        return outputs


class WritesOver(nn.Module):
    """Changes a layer's output in place, out of sight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.inner(inputs).mul(1.0).tanh_())
        return outputs


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "an unknown layer": lambda: nn.Sequential(Scaled(), nn.Linear(4, CLASSES)),
    "a layer called twice": Twice,
    "a layer that sees records in pieces": Folded,
    "a layer that sees records as columns": Turned,
    "layers that share a weight": Tied,
    "a weight used behind its layer's back": Peeking,
    "a grouped convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(4, CLASSES)
    ),
    "a convolution that wraps around": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 3, 2, padding=1, padding_mode="circular"), nn.Flatten()
    ),
}


def one_by_one(model: nn.Module, theta: Tensor, records: Records) -> Tensor:
    """float64[P]: the clipped sum by one backward pass a record."""
    model = model.double()
    vector_to_parameters(theta, model.parameters())
    total = torch.zeros_like(theta)
    for row in range(len(records)):
        inputs = records.inputs[row : row + 1]
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        loss = cross_entropy(model(inputs), records.targets[row : row + 1]).sum()
        gradient = parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))
        total += gradient * min(1.0, C * (1 - 1e-6) / (float(gradient.norm()) + 1e-6))
    return total


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_known_closed_form_is_taken_record_by_record(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback is taken, and it is right; Opacus refuses some of these, so its check stands aside."""
    monkeypatch.setattr("privfed.privacy.oracle.stacked.refuse_coupling_layers", lambda model: None)
    torch.manual_seed(2)
    model = UNKNOWN[name]()
    data = sites((4,))
    network = network_of(model, data)
    assert not network.closed_form
    theta = points(network.parameters)
    due = torch.stack([one_by_one(model, t, records) for t, records in zip(theta, data, strict=True)])
    torch.testing.assert_close(sums_of(network, theta, data), due, rtol=1e-12, atol=1e-12)


def test_a_layer_whose_output_is_written_over_gives_right_sums() -> None:
    for model in (WritesOver(), nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))):
        data = sites((4,))
        network = network_of(model, data)
        theta = points(network.parameters)
        due = torch.stack([one_by_one(model, t, records) for t, records in zip(theta, data, strict=True)])
        torch.testing.assert_close(sums_of(network, theta, data), due, rtol=1e-12, atol=1e-12)


def test_a_padding_token_has_no_gradient() -> None:
    """Nor does torch give it one; Opacus does."""
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=2), nn.Flatten(), nn.Linear(12, CLASSES))
    data = sites((3,), tokens=True)
    network = network_of(model, data)
    assert network.closed_form
    theta = points(network.parameters)
    due = torch.stack([one_by_one(model, t, records) for t, records in zip(theta, data, strict=True)])
    torch.testing.assert_close(sums_of(network, theta, data), due, rtol=1e-12, atol=1e-12)
    assert not due[:, 8:12].any()


@pytest.mark.parametrize("memory_bytes", [1, 5_000, 50_000])
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "GroupNorm"])
def test_sums_do_not_depend_on_the_memory_allowed(name: str, memory_bytes: int) -> None:
    model, shape = built(name)
    data = sites(shape, (*SIZES, *[7] * 30))
    network = network_of(model, data)
    theta = points(network.parameters, len(data))
    tight, wide = (sums_of(network, theta, data, memory_bytes=allowed) for allowed in (memory_bytes, 2**30))
    torch.testing.assert_close(tight, wide, rtol=1e-12, atol=1e-12)


def test_the_closed_form_of_linear_layers_holds_no_gradients_of_single_records() -> None:
    model = nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 3))
    network = StackedNetwork(model, cross_entropy, torch.zeros(1, 300), torch.zeros(1, dtype=torch.int64))
    # A record holds its 300 + 200 + 3 activations a few times over, not its 60,803 gradients
    assert network.bytes_per_record < 8 * 60_803 / 20


@pytest.mark.parametrize("closed_form", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_a_record_whose_gradient_is_not_finite_counts_as_zero(bad: float, closed_form: bool) -> None:
    model, shape = built("LayerNorm")
    data = sites(shape)
    network = network_of(model, data)
    network.closed_form = closed_form
    theta = points(network.parameters)
    before = sums_of(network, theta, data)
    spoilt = Records(data[2].inputs.clone(), data[2].targets, data[2].parts)
    spoilt.inputs[4] = bad
    after = sums_of(network, theta, [*data[:2], spoilt, *data[3:]])
    assert after.isfinite().all()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(after[others], before[others], rtol=1e-12, atol=1e-12)
    if not math.isfinite(bad):
        keep = torch.arange(len(spoilt)) != 4
        less = Records(spoilt.inputs[keep], spoilt.targets[keep], data[2].parts)
        due = sums_of(network, theta, [*data[:2], less, *data[3:]])
        torch.testing.assert_close(after, due, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["Linear", "Conv1d", "Linear of a sequence, by inner products"])
def test_removing_any_record_moves_its_sites_sum_by_at_most_c_and_no_other(name: str) -> None:
    model, shape = built(name)
    data = sites(shape, (4, 12))
    network = network_of(model, data)
    theta = points(network.parameters, 2)
    whole, moved = sums_of(network, theta, data), []
    for row in range(12):
        keep = torch.arange(12) != row
        less = Records(data[1].inputs[keep], data[1].targets[keep], data[1].parts)
        without = sums_of(network, theta, [data[0], less])
        torch.testing.assert_close(without[0], whole[0], rtol=1e-12, atol=1e-12)
        moved.append(float((whole[1] - without[1]).norm()))
    assert 0.99 * C < max(moved) <= C


def test_a_loss_or_a_model_that_couples_records_is_refused() -> None:
    class Centred(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs - inputs.mean(0)

    losses: list[Loss] = [
        lambda o, t: cross_entropy(o, t) - cross_entropy(o, t).mean(),
        lambda o, t: cross_entropy(o, t) / len(t),
        lambda o, t: cross_entropy(o, t).mean(),
        lambda o, t: torch.logsumexp(o[:, 0], 0) - o[:, 0],
        # the values are those of a separable loss, the gradients are scaled by the size of the batch
        lambda o, t: cross_entropy(o, t).detach() + len(t) * (cross_entropy(o, t) - cross_entropy(o, t).detach()),
    ]
    example = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    for loss in losses:
        with pytest.raises(NoGuarantee, match="lets one record move another"):
            StackedNetwork(nn.Linear(4, CLASSES), loss, *example)
    with pytest.raises(NoGuarantee, match="lets one record move another"):
        StackedNetwork(nn.Sequential(nn.Linear(4, 5), Centred(), nn.Linear(5, 2)), cross_entropy, *example)
    with pytest.raises(NoGuarantee, match=r"layer '1' is .*BatchNorm"):
        StackedNetwork(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), cross_entropy, *example)


def test_exact_means_are_those_of_the_plain_doors() -> None:
    for name in ("Linear", "Conv2d", "LayerNorm"):
        model, shape = built(name)
        data = sites(shape)
        network = network_of(model, data, torch.float32)
        theta = points(network.parameters).float()
        counts = torch.tensor(SIZES)
        inputs, targets = (torch.cat([getattr(r, field) for r in data]) for field in ("inputs", "targets"))
        got = torch.full_like(theta, math.nan)
        for memory in (2**27, 1):
            for members, means in clipped_sums(
                network,
                theta,
                inputs,
                targets,
                torch.arange(len(targets)),
                counts,
                max_grad_norm=None,
                memory_bytes=memory,
            ):
                got[members] = means
            for number, records in enumerate(data):
                door = PlainDoor(
                    model=built(name)[0],
                    loss=cross_entropy,
                    records=records,
                    sample_rate=1.0,
                    randomness=noise.generator(keys()[0]),
                )
                due = door.gradient(theta[number : number + 1], door.draw())[0]
                torch.testing.assert_close(got[number], due, rtol=0.0, atol=1e-5 * max(1.0, float(due.abs().max())))


def test_wrong_shapes_unknown_parts_and_foreign_draws_are_refused_before_anything_is_booked() -> None:
    model, shape = built("Linear")
    mine, other = (cohort(model, sites(shape), settings(0.5, 1.0)) for _ in range(2))
    theta = points(15)
    with pytest.raises(ValueError, match="part must be one of"):
        mine.draw("body")
    for wrong in (theta[:2], theta[:, 1:], theta[0]):
        with pytest.raises(ValueError, match="theta must have shape"):
            mine.gradient(wrong, mine.draw())
    with pytest.raises(ValueError, match="draw of this door"):
        mine.gradient(theta, other.draw())
    assert mine.charges == ()
    data = sites(shape)
    odd = Records(data[0].inputs, data[0].targets, {ALL: torch.arange(0)}, "hash-1")
    with pytest.raises(ValueError, match="same parts"):
        cohort(model, [odd, *data[1:]], settings())
    with pytest.raises(ValueError, match="a generator for each of 5 sites"):
        CohortDoor(network=mine._network, sites=data, settings=settings(), randomness=[])


def test_a_draw_shows_neither_records_nor_how_many_there_are() -> None:
    model, shape = built("Linear")
    door = cohort(model, sites(shape), settings())
    assert repr(door.draw()) == "Batch(part='all')"
    assert "tensor" not in repr(door)
