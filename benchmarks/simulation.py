"""A round of 100 simulated sites with 100 records each, 7 Poisson DP-SGD steps a site: all in one pass, beside peers.

The peers' noise is torch's (float32, Mersenne Twister, 32 bits of seed), which nobody should trust and which is fast; a
run's own is ChaCha20 in float64 (`noise.generator`), which takes several times as long. So "ours" stands here three
times: as `privfed run` computes it, with a fast generator, and with the peers' arithmetic and noise. The bars hold
the last one, which does what the peers do; the floor has that noise too.

    python benchmarks/simulation.py [--quick] [--json FILE] [--check]

pfl: pip install --no-deps --target DIR pfl==0.6.0 multiprocess dill, and DIR on PYTHONPATH. Flower with Ray:
FLOWER_PYTHON names the python of an environment that has 'flwr[simulation]==1.41' and torch. Times are of the process's
processor clock.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import Bar, Report, Timing, interleaved, parse, peak_memory_bytes
from simulation_peers import (
    CLASSES,
    LR,
    RATE,
    RECORDS,
    SITES,
    STEPS,
    Study,
    floor,
    lean_loop,
    losses,
    naive_opacus,
    pfl,
    reused_opacus,
)
from torch import Tensor

from privfed.privacy import noise
from privfed.privacy.oracle.cohort import CohortDoor
from privfed.privacy.oracle.opacus import OpacusDoor
from privfed.privacy.oracle.stacked import StackedNetwork


class TorchNoise(np.random.Generator):
    """The peers' normals: torch's own, float32."""

    def standard_normal(self, *, out: np.ndarray, dtype: np.dtype[np.float32]) -> None:  # type: ignore[override]
        torch.from_numpy(out).normal_()  # all that a door asks for


OURS = {
    "float64, ChaCha20": (torch.float64, noise.generator),
    "float64, fast noise": (torch.float64, lambda key: np.random.Generator(np.random.SFC64(list(key)))),
    "float32, torch's noise": (torch.float32, lambda key: TorchNoise(np.random.SFC64(list(key)))),
}
LIKE_PEERS = "float32, torch's noise"
AS_RUN = "float64, ChaCha20"

BARS = (
    Bar("mlp: Opacus, naive / ours", at_least=25.0),
    Bar("logistic: Opacus, naive / ours", at_least=40.0),
    Bar("cnn: Opacus, naive / ours", at_least=3.0),
    Bar("mlp: lean loop without privacy / ours", at_least=1.0),
    Bar("logistic: lean loop without privacy / ours", at_least=1.0),
    Bar("mlp: ours / floor", at_most=2.5),
    Bar("cnn: ours / floor", at_most=4.0),
    Bar("3 sites: Opacus door / cohort door, as run", at_least=1.0),
    Bar("twice the sites", at_most=2.2),
    Bar("twice the records", at_most=2.2),
    Bar("twice the parameters", at_most=2.2),
    Bar("ragged / equal sizes", at_most=1.6),
    Bar("10,000 sites × 100 records, MLP, one round: memory", at_most=4.0),
    Bar("10,000 sites through privfed.run: memory", at_most=4.0),
    Bar("10,000 sites through privfed.run", at_most=180.0),
    Bar("1,000 → 2,000 sites through privfed.run", at_most=2.2),
    Bar("2,000 → 4,000 sites through privfed.run", at_most=2.2),
    Bar("mlp: pfl 0.6 without privacy / ours without privacy", at_least=10.0),
    Bar("mlp: pfl 0.6 without privacy / ours", at_least=6.0),
    Bar("mlp: Flower with Ray, without privacy / ours", at_least=20.0),
)


def ours(study: Study, variant: str, device: str = "cpu") -> Callable[[], Tensor]:
    """A round of all sites together: the mean of their models."""
    dtype, make = OURS[variant]
    example = study.sites[0]
    together = StackedNetwork(study.model, losses, example.inputs, example.targets, dtype=dtype, device=device)
    assert together.closed_form  # else it is not what the figures are about
    sources, start = study.sources(make), study.start.unsqueeze(0)

    def round_() -> Tensor:
        door = CohortDoor(network=together, sites=study.sites, settings=study.settings(), randomness=sources)
        theta = start.expand(len(study.sites), -1).contiguous()
        for _ in range(STEPS):
            theta.sub_(door.gradient(theta, door.draw()), alpha=LR)
        return theta.mean(0)

    return round_


def ours_without_privacy(study: Study) -> Callable[[], Tensor]:
    """The same sites in one pass, batches of fixed size, plain means."""
    example = study.sites[0]
    together = StackedNetwork(study.model, losses, example.inputs, example.targets, dtype=torch.float32)
    x, y = (torch.stack([getattr(r, name) for r in study.sites]) for name in ("inputs", "targets"))
    batch = round(study.expected)
    mask = torch.ones(len(study.sites), batch, dtype=torch.bool)

    def round_() -> Tensor:
        theta = study.start.expand(len(study.sites), -1).contiguous()
        order = torch.randperm(x.shape[1])
        for step in range(STEPS):
            rows = order[step * batch : (step + 1) * batch]
            live = mask[:, : len(rows)]
            theta -= LR * together.mean_gradients(theta, x[:, rows], y[:, rows], live)
        return theta.mean(0)

    return round_


def doors_of_their_own(study: Study) -> Callable[[], Tensor]:
    """A round through each site's own `OpacusDoor`, built once."""
    doors = [
        OpacusDoor(model=study.model, loss=losses, records=r, settings=study.settings(), randomness=source)
        for r, source in zip(study.sites, study.sources(noise.generator), strict=True)
    ]

    def round_() -> Tensor:
        ends = []
        for door in doors:
            theta = study.start.unsqueeze(0)
            for _ in range(STEPS):
                theta = theta - LR * door.gradient(theta, door.draw())
            ends.append(theta)
        return torch.cat(ends).mean(0)

    return round_


def main() -> None:
    options = parse(__doc__)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="opacus")
    warnings.filterwarnings("ignore", message=".*(Full backward hook|Secure RNG|non-private|Optimal order).*")
    report = Report("simulation", packages=("torch", "opacus", "numpy", "randomgen", "pfl", "flwr", "ray"))
    sites, records = (10, 50) if options.quick else (SITES, RECORDS)
    for name in ("logistic", "mlp", "cnn"):
        beside_peers(report, name, sites, records, quick=options.quick)
    few_sites(report, records, quick=options.quick)
    growth(report, sites, records, quick=options.quick)
    memory(report, quick=options.quick)
    if torch.cuda.is_available():
        on_gpu(report, sites, records)
    if python := os.environ.get("FLOWER_PYTHON"):
        beside_flower(report, python, sites, records, quick=options.quick)
    else:
        report.note("Flower with Ray: not measured, FLOWER_PYTHON names no environment that has it")
    report.finish(options, BARS)


def beside_peers(report: Report, name: str, sites: int, records: int, *, quick: bool) -> None:
    study = Study.of(name, [records] * sites)
    parameters = len(study.start)
    report.section(f"{name}, {parameters:,} parameters: {sites} sites × {records} records, {STEPS} steps")
    tasks: dict[str, Callable[[], object]] = {variant: ours(study, variant) for variant in OURS}
    tasks |= {
        "without privacy, all sites in one pass": ours_without_privacy(study),
        "floor": floor(study),
        "lean loop without privacy": lean_loop(study),
        "Opacus, re-used": reused_opacus(study),
        "Opacus, naive": naive_opacus(study),
    }
    other = pfl(study) if name == "mlp" else None
    if other is not None:
        tasks["pfl 0.6 without privacy"] = other
    times = interleaved(tasks, repeats=1 if quick else 3 if name == "cnn" else 5, clock=time.process_time)
    for task, timing in times.items():
        report.add(f"{name}: ours, {task}" if task in OURS else f"{name}: {task}", timing)
    for variant in (LIKE_PEERS, AS_RUN):
        mine, suffix = times[variant], "" if variant == LIKE_PEERS else ", as run"
        for peer in ("Opacus, naive", "Opacus, re-used", "lean loop without privacy", "pfl 0.6 without privacy"):
            if peer in times:
                report.add(f"{name}: {peer} / ours{suffix}", times[peer].over(mine))
        report.add(f"{name}: ours / floor{suffix}", mine.over(times["floor"]))
    plain = times["without privacy, all sites in one pass"]
    if other is not None:
        report.add("mlp: pfl 0.6 without privacy / ours without privacy", times["pfl 0.6 without privacy"].over(plain))


def beside_flower(report: Report, python: str, sites: int, records: int, *, quick: bool) -> None:
    """Its daemons and workers are other processes: processor time of them all beside ours."""
    report.section(f"Flower with Ray, mlp: {sites} sites × {records} records, {STEPS} steps, a round")
    script = Path(__file__).with_name("flower_simulation.py")
    numbers = map(str, (sites, records, STEPS, 1 if quick else 4))
    done = subprocess.run([python, script, *numbers], check=True, capture_output=True, text=True)
    flower = json.loads(done.stdout.splitlines()[-1])
    report.add("mlp: Flower with Ray, clock", flower["clock"], "s")
    report.add("mlp: Flower with Ray, processor time", flower["cpu"], "s")
    study = Study.of("mlp", [records] * sites)
    tasks: dict[str, Callable[[], object]] = {
        " without privacy": ours_without_privacy(study),
        "": ours(study, LIKE_PEERS),
        ", as run": ours(study, AS_RUN),
    }
    for suffix, timing in interleaved(tasks, repeats=1 if quick else 5, clock=time.process_time).items():
        report.add(f"mlp: beside Flower, ours{suffix}", timing)
        report.add(f"mlp: Flower with Ray, without privacy / ours{suffix}", flower["cpu"] / timing.median, "×")


def few_sites(report: Report, records: int, *, quick: bool) -> None:
    report.section("three sites, mlp: where there is little to gain")
    study = Study.of("mlp", [records] * 3)
    times = interleaved(
        {"alone": doors_of_their_own(study), "together": ours(study, AS_RUN)},
        repeats=1 if quick else 9,
        clock=time.process_time,
    )
    report.add("3 sites: Opacus door / cohort door, as run", times["alone"].over(times["together"]))


def growth(report: Report, sites: int, records: int, *, quick: bool) -> None:
    report.section("growth, mlp, float64 with ChaCha20 noise")
    equal = [records] * sites
    uneven = np.random.default_rng(2).lognormal(0.0, 1.0, sites)
    sizes = np.maximum(1, np.round(uneven * sites * records / uneven.sum())).astype(int).tolist()
    studies = {
        "once": Study.of("mlp", equal),
        "twice the sites": Study.of("mlp", equal * 2),
        "twice the records": Study.of("mlp", [records * 2] * sites),
        "twice the parameters": Study.of("mlp", equal, width=128),
        "ragged / equal sizes": Study.of("mlp", sizes),
    }
    times: dict[str, Timing] = interleaved(
        {name: ours(study, AS_RUN) for name, study in studies.items()},
        repeats=1 if quick else 7,
        clock=time.process_time,
    )
    for name, timing in times.items():
        if name != "once":
            report.add(name, timing.over(times["once"]))


def memory(report: Report, *, quick: bool) -> None:
    scale = 50 if quick else 1
    report.section("many sites × 100 records, MLP, one round, each in a process of its own")
    seconds, peak = in_a_process(f"one_large_round({10_000 // scale})")
    report.add("10,000 sites × 100 records, MLP, one round: memory", peak, "GiB")
    report.add("10,000 sites × 100 records, MLP, one round", seconds, "s")
    before = 0.0
    for sites in (1_000, 2_000, 4_000, 10_000):
        seconds, peak = in_a_process(f"through_run({sites // scale}, 'plain')")
        report.add(f"{sites:,} sites through privfed.run", seconds, "s")
        report.add(f"{sites:,} sites through privfed.run: memory", peak, "GiB")
        if sites in (2_000, 4_000):
            report.add(f"{sites // 2:,} → {sites:,} sites through privfed.run", seconds / before, "×")
        before = seconds
    for sites in (1_000, 2_000):
        seconds, peak = in_a_process(f"through_run({sites // scale}, 'masked')")
        report.add(f"{sites:,} sites through privfed.run, masked", seconds, "s")
        report.add(f"{sites:,} sites through privfed.run, masked: memory", peak, "GiB")


def in_a_process(call: str) -> tuple[float, float]:
    """The processor seconds and peak GiB that a function of this file prints; in a process of its own."""
    code = f"import simulation; simulation.{call}"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    seconds, peak = map(float, done.stdout.split()[-2:])
    return seconds, peak / 2**30


def one_large_round(sites: int) -> None:
    """The gradients and the noise of one round, alone."""
    torch.set_num_threads(1)
    round_ = ours(Study.of("mlp", [RECORDS] * sites), AS_RUN)
    started = time.process_time()
    round_()
    print(time.process_time() - started, peak_memory_bytes())


def through_run(sites: int, aggregation: str) -> None:
    """A whole run of one round from a file: reading, keys, ledgers, updates, evaluation, models and the page."""
    import privfed
    from privfed.config import Aggregation, Config, Evaluation, Privacy
    from privfed.data.arrays import Arrays
    from privfed.methods import FedAvg
    from privfed.models import MLP

    randomness = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as home:
        np.savez(
            Path(home) / "records.npz",
            x=randomness.standard_normal((sites * RECORDS, 64), dtype=np.float32),
            y=randomness.integers(0, CLASSES, sites * RECORDS),
            site=np.repeat(np.arange(sites), RECORDS),
        )
        config = Config(
            rounds=1,
            data=Arrays(
                file=f"{home}/records.npz", site="site", labels=tuple(map(str, range(CLASSES))), range=(-4.0, 4.0)
            ),
            model=MLP(hidden=(64,)),
            method=FedAvg(),
            privacy=Privacy(sample_rate=RATE, expected_batch_size=RATE * RECORDS),
            aggregation=Aggregation(kind=aggregation),
            evaluation=Evaluation(local_steps=1),  # the baseline of 200 steps is of no account here
        )
        started = time.process_time()
        done = privfed.run(config, out=Path(home) / "run")
        assert done.summary.complete and len(done.reports[0].contributed) == sites
        print(time.process_time() - started, peak_memory_bytes())


def on_gpu(report: Report, sites: int, records: int) -> None:
    report.section(f"{torch.cuda.get_device_name()}: {sites} sites × {records} records, wall clock")
    for name in ("logistic", "mlp", "cnn"):
        study = Study.of(name, [records] * sites)
        tasks = {f"{name} on the GPU, {variant}": ours(study, variant, "cuda") for variant in OURS}
        for task, timing in interleaved(tasks, repeats=5).items():
            report.add(task, timing)


if __name__ == "__main__":
    main()
