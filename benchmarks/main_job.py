"""Does the main job hold what the README shows? Time of `privfed run`, accuracy over seeds, masked against plain.

The peer is the simplest thing that could be right: one DP-SGD step a site and round with Opacus's own `DPOptimizer`,
averaged in the clear, at the same ε, on the same split.

    python benchmarks/main_job.py [--quick] [--json FILE] [--check]
"""

import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from common import Bar, Report, parse
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

import privfed
from privfed.api import Preparation, prepare
from privfed.data.records import keyed_fraction, public_split_key
from privfed.privacy.accountant import Accountant
from privfed.privacy.calibration import noise_multiplier_for
from privfed.privacy.oracle.door import charge

BARS = (
    Bar("privfed run, whole command", at_most=60.0),
    Bar("global accuracy, mean over seeds", at_least=0.93),
    Bar("personalized accuracy, mean over seeds", at_least=0.93),
    Bar("ε, largest over seeds", at_most=4.0),
    Bar("masked − plain model, largest difference / step", at_most=1.0),
)
STEP = 2.0**-16  # the default grid


def main() -> None:
    options = parse(__doc__)
    report = Report("main job", packages=("torch", "opacus", "dp-accounting", "cryptography", "numpy"))
    seeds = 2 if options.quick else 10

    report.section(
        "the command: ε = 4, δ = 1e-5, record unit, local noise, masked, five simulated hospitals, 20 rounds"
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "privfed", "run", "--json", "--out", f"{folder}/run"]
        subprocess.run(command, check=True, capture_output=True)
    report.add("privfed run, whole command", time.perf_counter() - started, "s")

    report.section(f"utility over {seeds} seeds (partition, split and noise differ)")
    ours: dict[str, list[float]] = {"global": [], "personalized": [], "local_only": [], "hurt": [], "epsilon": []}
    peer: list[float] = []
    for seed in range(seeds):
        config = privfed.load_config(overrides=[f"seed={seed}", "evaluation.every=20"])
        prepared = prepare(config)
        with tempfile.TemporaryDirectory() as folder:
            summary = privfed.run(config, out=Path(folder) / "run", prepared=prepared).summary
        figures = (summary.utility.global_, summary.utility.personalized, summary.utility.local_only)
        for name, figure in zip(("global", "personalized", "local_only"), figures, strict=True):
            ours[name].append(figure.mean or 0.0)
        ours["hurt"].append(summary.utility.fraction_hurt or 0.0)
        ours["epsilon"].append(summary.privacy.epsilon.max or 0.0)
        peer.append(one_step_average(prepared))
    for name, label in (
        ("global", "global accuracy, mean over seeds"),
        ("personalized", "personalized accuracy, mean over seeds"),
        ("local_only", "local-only accuracy (no privacy), mean over seeds"),
        ("hurt", "fraction of sites hurt, mean over seeds"),
    ):
        report.add(label, statistics.fmean(ours[name]))
    report.add("personalized accuracy, worst seed", min(ours["personalized"]))
    report.add("ε, largest over seeds", max(ours["epsilon"]))
    report.add("peer: Opacus step and clear average, same ε", statistics.fmean(peer))

    report.section("the same noise, masked and plain")
    models = []
    for kind in ("masked", "plain"):
        sets = [f"aggregation.kind={kind}", "privacy.insecure_seed=1", "rounds=5"]
        with tempfile.TemporaryDirectory() as folder:
            models.append(privfed.run(privfed.load_config(overrides=sets), out=Path(folder) / "run").theta)
    report.add("masked − plain model, largest difference / step", float((models[0] - models[1]).abs().max()) / STEP)
    report.finish(options, BARS)


def one_step_average(prepared: Preparation) -> float:
    """Accuracy, mean over sites, of 20 rounds of one full-batch Opacus step a site, averaged without secure sums."""
    config, rounds, batch = prepared.config, 20, 80.0
    sigma = noise_multiplier_for(4.0, 1e-5, lambda s: [charge("all", 1.0, s, rounds)], Accountant())
    theta: dict[str, torch.Tensor] | None = None
    splits = []
    for data in prepared.data.sites.values():
        test = (
            keyed_fraction(data.ids, key=public_split_key(config.seed), label="test") < config.evaluation.test_fraction
        )
        splits.append((data.rows(~test), data.rows(test)))
    model = nn.Linear(prepared.schema.features, prepared.schema.classes)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    theta = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(rounds):
        local = []
        for train, _ in splits:
            model.load_state_dict(theta)
            module = GradSampleModule(model)
            optimizer = DPOptimizer(
                torch.optim.SGD(module.parameters(), lr=5.0),
                noise_multiplier=sigma,
                max_grad_norm=1.0,
                expected_batch_size=int(batch),
            )
            with warnings.catch_warnings():  # torch says that inputs need no gradient; Opacus's hooks do not either
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                nn.functional.cross_entropy(module(train.inputs), train.targets, reduction="mean").backward()
            optimizer.step()
            local.append({name: value.clone() for name, value in model.state_dict().items()})
            module.to_standard_module()
        theta = {name: torch.stack([state[name] for state in local]).mean(0) for name in theta}
    model.load_state_dict(theta)
    with torch.no_grad():
        scores = [float((model(test.inputs).argmax(1) == test.targets).double().mean()) for _, test in splits]
    return statistics.fmean(scores)


if __name__ == "__main__":
    main()
