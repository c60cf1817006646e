"""Second-order MAML of 100 simulated sites: in one pass, beside one site after the other by double backward, and beside
what leaving the second order out would save.

100 sites × 100 records (half support, half query), an MLP 64-64-10, one inner step, float32, full batches. "Ours" is
the toolkit's own `Maml` on the door of many_sites.py, whose gradients and products are those of the cohort engine; the
door is there before the clock starts, as are the other's tensors. Times are of the process's processor clock, medians
of interleaved repetitions.

    python benchmarks/second_order.py [--quick] [--json FILE] [--check]
"""

import time

import numpy as np
import torch
from common import Bar, Report, interleaved, parse
from many_sites import AllSites
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from privfed.methods import Anil, FederatedMethod, Fomaml, Maml, MetaSGD, PerFedAvg
from privfed.models import layout, mlp, pieces
from privfed.parameters import to_vector
from privfed.privacy.oracle.door import ALL, Records
from privfed.privacy.oracle.stacked import StackedNetwork

SITES, RECORDS, INPUTS, HIDDEN, CLASSES, ALPHA = 100, 100, 64, 64, 10, 0.4

BARS = (
    Bar("one site after the other / ours", at_least=5.0),
    Bar("second order / first order", at_most=3.5),
    Bar("largest difference from double backward", at_most=1e-5),
)


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def main() -> None:
    options = parse(__doc__)
    torch.set_num_threads(1)
    report = Report("second order", packages=("torch",))
    repeats, count = (3, 20) if options.quick else (9, SITES)
    generator = torch.Generator().manual_seed(1)
    half = {"support": torch.arange(RECORDS // 2), "query": torch.arange(RECORDS // 2, RECORDS)}
    sites = [
        Records(
            torch.randn(RECORDS, INPUTS, generator=generator),
            torch.randint(0, CLASSES, (RECORDS,), generator=generator),
            {ALL: torch.arange(RECORDS), **half},
        )
        for _ in range(count)
    ]
    model = mlp(INPUTS, (HIDDEN,), CLASSES, seed=0)
    start = to_vector(model)
    network = StackedNetwork(model, losses, sites[0].inputs[:1], sites[0].targets[:1], dtype=torch.float32)

    door = AllSites(network, sites, [1.0] * count, np.random.default_rng(0))

    def ours(method: FederatedMethod) -> Tensor:
        shared, _ = method.init_site(start, layout(pieces(model)))
        return method.contribute(method.init_server(start), shared, door)[0]

    def naive() -> Tensor:
        return torch.stack([-double_backward(model, records) for records in sites])

    second, first = Maml(inner_lr=ALPHA, outer_lr=1.0), Fomaml(inner_lr=ALPHA, outer_lr=1.0)
    apart = float((ours(second) - naive()).abs().max())
    tasks = {"ours": lambda: ours(second), "naive": naive, "first": lambda: ours(first)}
    tasks |= {
        "meta-sgd": lambda: ours(MetaSGD(inner_lr=ALPHA)),
        "anil": lambda: ours(Anil(inner_lr=ALPHA)),
        "per-fedavg (HF)": lambda: ours(PerFedAvg(inner_lr=ALPHA)),
    }
    times = interleaved(tasks, repeats=repeats, warmup=2, clock=time.process_time)
    report.section(f"a meta-gradient of each of {count} sites")
    report.add("ours, second order", times["ours"])
    report.add("ours, first order", times["first"])
    for name in ("meta-sgd", "anil", "per-fedavg (HF)"):
        report.add(name, times[name])
    report.add("double backward, one site after the other", times["naive"])
    report.add("one site after the other / ours", times["naive"].over(times["ours"]))
    report.add("second order / first order", times["ours"].over(times["first"]))
    report.add("largest difference from double backward", apart)
    report.finish(options, BARS)


def double_backward(model: nn.Module, records: Records) -> Tensor:
    """float32[P]: the gradient of the query loss through one step on the support records, as textbooks write it."""
    parameters = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
    support, query = records.parts["support"], records.parts["query"]

    def loss(at: dict[str, Tensor], rows: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(model, at, (records.inputs[rows],)), records.targets[rows])

    steps = torch.autograd.grad(loss(parameters, support), list(parameters.values()), create_graph=True)
    adapted = {name: value - ALPHA * g for (name, value), g in zip(parameters.items(), steps, strict=True)}
    gradient = torch.autograd.grad(loss(adapted, query), list(parameters.values()))
    return torch.cat([g.flatten() for g in gradient])


if __name__ == "__main__":
    main()
