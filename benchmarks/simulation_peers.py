"""The sites of `simulation.py` and what is measured beside ours: the floor, loops by hand, Opacus and pfl."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset

from privfed.privacy.oracle.door import ALL, DoorSettings, Records

SITES, RECORDS, STEPS, RATE, LR, CLASSES = 100, 100, 7, 1 / 7, 0.1, 10


def network(name: str, *, width: int = 64) -> tuple[nn.Module, tuple[int, ...]]:
    """The three networks of the table, at the same start."""
    torch.manual_seed(0)
    if name == "logistic":
        return nn.Sequential(nn.Linear(64, CLASSES)), (64,)
    if name == "mlp":
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, CLASSES)), (64,)
    layers = [nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1)]
    layers += [nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, CLASSES)), (1, 28, 28)


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


@dataclass(frozen=True)
class Study:
    """A network and the records of its sites."""

    name: str
    sites: Sequence[Records]
    width: int = 64

    @classmethod
    def of(cls, name: str, sizes: Sequence[int], *, width: int = 64) -> "Study":
        shape = network(name)[1]
        generator = torch.Generator().manual_seed(1)
        sites = [
            Records(
                torch.randn(size, *shape, generator=generator),
                torch.randint(0, CLASSES, (size,), generator=generator),
                {ALL: torch.arange(size)},
            )
            for size in sizes
        ]
        return cls(name, sites, width)

    @property
    def model(self) -> nn.Module:
        return network(self.name, width=self.width)[0]

    @property
    def start(self) -> Tensor:
        return parameters_to_vector(self.model.parameters()).detach()

    @property
    def expected(self) -> float:
        return RATE * sum(len(records) for records in self.sites) / len(self.sites)

    def settings(self, noise_multiplier: float = 1.0) -> DoorSettings:
        return DoorSettings(
            sample_rate=RATE,
            expected_batch_size=self.expected,
            max_grad_norm=1.0,
            noise_multiplier=noise_multiplier,
            part_fractions={},
        )

    def sources(self, make: Callable[[bytes], np.random.Generator]) -> list[np.random.Generator]:
        return [make(number.to_bytes(32, "big")) for number in range(len(self.sites))]


def naive_opacus(study: Study) -> Callable[[], Tensor]:
    """What its tutorial says, for each site: `make_private`, then an epoch."""

    def round_() -> Tensor:
        ends = []
        for records in study.sites:
            model = study.model
            loader = DataLoader(TensorDataset(records.inputs, records.targets), batch_size=round(study.expected))
            private, optimizer, batches = PrivacyEngine().make_private(
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=LR),
                data_loader=loader,
                noise_multiplier=1.0,
                max_grad_norm=1.0,
            )
            for inputs, targets in batches:
                optimizer.zero_grad()
                functional.cross_entropy(private(inputs), targets).backward()
                optimizer.step()
            ends.append(parameters_to_vector(model.parameters()).detach())
        return torch.stack(ends).mean(0)

    return round_


def reused_opacus(study: Study) -> Callable[[], Tensor]:
    """One wrapped module for all sites, draws by hand."""
    model = study.model
    module = GradSampleModule(model, loss_reduction="sum")
    parameters = list(module.parameters())
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters, lr=LR),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=round(study.expected),
        loss_reduction="mean",
    )
    start = study.start

    def round_() -> Tensor:
        ends = []
        for records in study.sites:
            vector_to_parameters(start, parameters)
            for _ in range(STEPS):
                rows = (torch.rand(len(records)) < RATE).nonzero().flatten()
                optimizer.zero_grad()
                functional.cross_entropy(
                    module(records.inputs[rows]), records.targets[rows], reduction="sum"
                ).backward()
                optimizer.step()
            ends.append(parameters_to_vector(parameters).detach())
        return torch.stack(ends).mean(0)

    return round_


def lean_loop(study: Study) -> Callable[[], Tensor]:
    """No privacy, no framework: one model, SGD by hand, a site after the other."""
    model = study.model
    parameters = list(model.parameters())
    start, batch = study.start, round(study.expected)

    def round_() -> Tensor:
        ends = []
        for records in study.sites:
            vector_to_parameters(start, parameters)
            order = torch.randperm(len(records))
            for rows in order.split(batch)[:STEPS]:
                loss = functional.cross_entropy(model(records.inputs[rows]), records.targets[rows])
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                        parameter -= LR * gradient
            ends.append(parameters_to_vector(parameters).detach())
        return torch.stack(ends).mean(0)

    return round_


def floor(study: Study) -> Callable[[], object]:
    """What a round can not do without, in float32: the products of one forward and backward pass over the records that
    are drawn on average, the normals of the noise, the updates. Batches are rectangular and nothing is clipped."""
    batch, sites = round(study.expected), len(study.sites)
    model, shape = network(study.name, width=study.width)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    theta = torch.zeros(sites, parameters)
    products: list[tuple[Tensor, Tensor, Tensor, bool]] = []
    inputs = torch.zeros(1, *shape)
    first = True
    for layer in model:
        output = layer(inputs)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            places = output.shape[2:].numel()
            out, inner = output.shape[1], layer.weight[0].numel()
            a, w = torch.randn(sites, batch * places, inner), torch.randn(sites, inner, out)
            products.append((a, w, torch.randn(sites, batch * places, out), first))
            first = False
        inputs = output

    def round_() -> None:
        for _ in range(STEPS):
            for a, w, g, is_first in products:
                torch.bmm(a, w)
                torch.bmm(g.mT, a)
                if not is_first:
                    torch.bmm(g, w.mT)
            theta.add_(torch.randn(sites, parameters), alpha=LR)

    return round_


def pfl(study: Study) -> Callable[[], object] | None:
    """pfl 0.6's simulated backend, FedAvg without privacy, one process; None where it is not installed."""
    if importlib.util.find_spec("pfl") is None:
        return None
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByUser
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Weighted
    from pfl.model.pytorch import PyTorchModel

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = study.model

        def forward(self, inputs: Tensor) -> Tensor:
            return self.inner(inputs)

        def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
            self.train()
            return functional.cross_entropy(self(inputs), targets)

        def metrics(self, inputs: Tensor, targets: Tensor) -> dict[str, object]:
            return {
                "loss": Weighted(functional.cross_entropy(self(inputs), targets, reduction="sum").item(), len(targets))
            }

    net = Net()
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), 1.0))
    users = FederatedDataset(
        lambda user: Dataset([study.sites[user].inputs, study.sites[user].targets], user_id=user),
        get_user_sampler("minimize_reuse", list(range(len(study.sites)))),
    )
    backend = SimulatedBackend(users, users, [WeightByUser()])

    def round_() -> None:
        FederatedAveraging().run(
            NNAlgorithmParams(
                central_num_iterations=1,
                evaluation_frequency=10**6,
                train_cohort_size=len(study.sites),
                val_cohort_size=0,
            ),
            backend,
            model,
            NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LR, local_batch_size=round(study.expected)),
            NNEvalHyperParams(local_batch_size=None),
            [],
            send_metrics_to_platform=False,
        )

    return round_
