"""Flower's simulation engine over Ray (flwr 1.41): FedAvg without privacy, the lean loop's own steps at every client.

    FLOWER_PYTHON benchmarks/flower_simulation.py SITES RECORDS STEPS ROUNDS

In an environment of its own (``pip install 'flwr[simulation]==1.41' torch``). Prints JSON: seconds a round, on the
clock and of the processors, of the rounds after the first, so that nothing of starting Ray and its workers counts.
Records stay in the workers' memory; nothing is evaluated.
"""

import functools
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor, nn
from torch.nn import functional

LR, CLASSES = 0.1, 10


@functools.cache
def network() -> nn.Module:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))


@functools.cache
def records(client: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(client)
    return torch.randn(size, 64, generator=generator), torch.randint(0, CLASSES, (size,), generator=generator)


def processor_seconds() -> float:
    """User and system time of this process and all that descend from it: Ray's daemons and workers too."""
    parents: dict[int, int] = {}
    used: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(entry.name)], used[int(entry.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    family = {os.getpid()}
    while grown := {child for child, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(used[member] for member in family) / os.sysconf("SC_CLK_TCK")


class Everyone(FedAvg):
    """FedAvg that ends if a client fails: a round of errors would be a fast one."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        came = list(replies)
        if len(came) != self.min_train_nodes or any(reply.has_error() for reply in came):
            raise RuntimeError("a client of Flower's failed")
        return super().aggregate_train(server_round, came)


def main(sites: int, size: int, steps: int, rounds: int) -> None:
    client, server = ClientApp(), ServerApp()
    stamps: list[tuple[float, float]] = []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        model = network()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        parameters = list(model.parameters())
        inputs, targets = records(int(context.node_config["partition-id"]), size)
        for rows in torch.randperm(size).split(-(-size // steps))[:steps]:
            loss = functional.cross_entropy(model(inputs[rows]), targets[rows])
            with torch.no_grad():
                for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    parameter -= LR * gradient
        reply = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": size})}
        return Message(content=RecordDict(reply), reply_to=message)

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        def stamp(round_: int, arrays: ArrayRecord) -> None:
            stamps.append((time.perf_counter(), processor_seconds()))

        everyone = Everyone(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
        start = ArrayRecord(network().state_dict())
        everyone.start(grid=grid, initial_arrays=start, num_rounds=1 + rounds, evaluate_fn=stamp)

    run_simulation(server, client, num_supernodes=sites, backend_config={"client_resources": {"num_cpus": 1}})
    assert len(stamps) == 2 + rounds, "Flower's run ended early"
    clock, cpu = ([after - before for before, after in pairwise(times[1:])] for times in zip(*stamps, strict=True))
    print(json.dumps({"clock": statistics.median(clock), "cpu": statistics.fmean(cpu), "clocks": clock}))


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.fspath(Path(__file__).parent)  # Ray's workers import what they run by its name
    importlib.import_module("flower_simulation").main(*map(int, sys.argv[1:]))
