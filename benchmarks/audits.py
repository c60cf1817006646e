"""Audits: how near their bounds come to ε, how often they raise a false alarm, what they catch, how long it takes.

    python benchmarks/audits.py [--quick] [--json FILE] [--check]

The last section, whole runs, is kept audit by audit in `runs/audits`: a benchmark that was stopped goes on from there.
"""

import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from cells import Cells
from common import Bar, Report, parse, timed
from numpy.typing import NDArray

from privfed import api, auditing
from privfed.config import Config, Privacy
from privfed.data.sources import BreastCancer
from privfed.methods import FedAvg, FedSGD, Fomaml
from privfed.privacy import noise
from privfed.privacy.audit import mechanism, one_run
from privfed.privacy.audit.bounds import gaussian_mu
from privfed.privacy.audit.result import Audit
from privfed.privacy.events import NoiseSite
from privfed.privacy.oracle import door

DELTA = 1e-5
TRIALS, CANARIES, DIM, ROUNDS = 10_000, 1000, 2000, 20
FEW_ROUNDS = 4  # of most whole runs: the noise is calibrated to the ε of all rounds together, so the bounds stay

KINDS: dict[str, tuple[FedAvg | FedSGD | Fomaml, dict[str, Any]]] = {
    "local noise": (FedAvg(local_steps=1, lr=0.5), {}),
    "noise in shares": (FedSGD(), {"noise": NoiseSite.DISTRIBUTED, "colluders": 1}),
    "support and query": (Fomaml(outer_lr=1.0), {}),
}
RUNS = (  # kind, target ε, what the noise is divided by; most wanted first
    ("local noise", 8.0, 1.0),
    ("local noise", 2.0, 3.0),
    ("noise in shares", 12.0, 1.0),  # 12 with one site that colludes is about 8 without
    ("support and query", 8.0, 1.0),
    ("local noise", 2.0, 2.0),
)

BARS = (
    Bar("L1: bound where ε = 1", at_least=0.6),
    Bar("L1: bound where ε = 2", at_least=1.5),
    Bar("L1: bound where ε = 4", at_least=3.4),
    Bar("L1: bound where ε = 8", at_least=7.2),
    Bar("L1: one audit of 10,000 scores, its power included", at_most=1.0),
    Bar("L1: false alarms, worst", at_most=0.05),
    Bar("L3: false alarms, worst", at_most=0.05),
    Bar("L3: bound where ε = 8, median", at_least=3.0),
    Bar("L3: bound where ε = 8, least", at_least=3.0),
    Bar("L3: 20 releases and the audit", at_most=60.0),
    Bar("L3 through a run: bound where ε = 8, local noise, median", at_least=3.0),
    Bar("L3 through a run: bound where ε = 8, least of all", at_least=3.0),
    Bar("L3 through a run: 20 rounds of 4 sites and the audit, processor time", at_most=60.0),
    Bar("L3 through a run: noise ÷ 3 under ε = 2, called a violation", at_least=1.0),
    Bar("L3 through a run: false alarms", at_most=0.05),
    Bar("L1: noise ÷ 3 under ε = 2, called a violation", at_least=1.0),
    Bar("L3: noise ÷ 3 under ε = 2, called a violation", at_least=1.0),
)


def main() -> None:
    options = parse(__doc__)
    report = Report("audits", packages=("numpy", "scipy", "dp-accounting"))
    bounds(report, runs=5 if options.quick else 100)
    false_alarms(report, runs=20 if options.quick else 400)
    one_federated_run(report, runs=3 if options.quick else 20)
    less_noise(report, runs=3 if options.quick else 50)
    through_a_run(report, runs=1 if options.quick else 20, rounds=2 if options.quick else FEW_ROUNDS)
    report.finish(options, BARS)


def gaussian(mu: float) -> mechanism.Scores:
    """Scores of a Gaussian mechanism, all at once."""
    return lambda with_canary, trials, key: noise.generator(key).standard_normal(trials) + mu * with_canary


def level_1(true: float, claimed: float, *, seed: int, scale: float = 1.0, trials: int = TRIALS) -> Audit:
    scores = gaussian(scale * gaussian_mu(true, DELTA))
    return mechanism.audit(scores, name="Gaussian", trials=trials, claimed_epsilon=claimed, delta=DELTA, seed=seed)


def level_3(true: float, claimed: float, *, seed: int, scale: float = 1.0) -> Audit:
    """Twenty noised sums of up to a thousand orthogonal canaries in two thousand dimensions."""
    sigma = ROUNDS**0.5 / (scale * gaussian_mu(true, DELTA))
    randomness = np.random.default_rng(seed)
    vectors = one_run.canaries(CANARIES, DIM, norm=1.0, randomness=randomness)

    def run(included: NDArray[np.bool_]) -> NDArray[np.float64]:
        total = vectors[included].sum(axis=0)
        releases = total + sigma * noise.generator(noise.insecure_key(seed)).standard_normal((ROUNDS, DIM))
        return one_run.white_box(releases, vectors)

    return one_run.audit(run, name="sum", number=CANARIES, claimed_epsilon=claimed, delta=DELTA, seed=seed)


def bounds(report: Report, *, runs: int) -> None:
    report.section("level 1: 10,000 releases with the canary and as many without, δ = 1e-5; medians over runs")
    for epsilon in (1, 2, 4, 8):
        found = [level_1(epsilon, epsilon, seed=seed).figures["strength"] for seed in range(runs)]
        mu = gaussian_mu(epsilon, DELTA)
        values = [float(mechanism.GaussianCurve(mu).epsilon(strength, DELTA)) for strength in found]
        report.add(f"L1: bound where ε = {epsilon}", statistics.median(values))
        report.add(f"L1: bound where ε = {epsilon}, least", min(values))
    mechanism._power.cache_clear()
    report.add("L1: one audit of 10,000 scores, its power included", timed(lambda: level_1(4, 4, seed=0)))


def false_alarms(report: Report, *, runs: int) -> None:
    report.section(f"mechanisms that keep their claim exactly, {runs} runs each, at 95 % confidence")
    worst = 0.0
    for epsilon in (1, 4, 8):
        alarms = [level_1(epsilon, epsilon, seed=seed).verdict == "violation" for seed in range(runs)]
        report.add(f"L1: false alarms, ε = {epsilon}", float(np.mean(alarms)))
        worst = max(worst, float(np.mean(alarms)))
    report.add("L1: false alarms, worst", worst)
    worst = 0.0
    for epsilon in (2, 8):
        mu = gaussian_mu(epsilon, DELTA)
        alarms = [
            one_run.audit(
                lambda included, seed=seed, mu=mu: (
                    noise.generator(noise.insecure_key(seed)).standard_normal(CANARIES) + mu * included
                ),
                name="ideal",
                number=CANARIES,
                claimed_epsilon=epsilon,
                delta=DELTA,
                seed=seed,
            ).verdict
            == "violation"
            for seed in range(runs)
        ]
        report.add(f"L3: false alarms, ε = {epsilon}", float(np.mean(alarms)))
        worst = max(worst, float(np.mean(alarms)))
    report.add("L3: false alarms, worst", worst)


def one_federated_run(report: Report, *, runs: int) -> None:
    report.section("level 3: 1000 canaries, 20 releases of 2000 coordinates")
    for epsilon in (2, 4, 8):
        found = [level_3(epsilon, epsilon, seed=seed) for seed in range(runs)]
        report.add(f"L3: bound where ε = {epsilon}, median", statistics.median(one.epsilon_lower for one in found))
        report.add(f"L3: bound where ε = {epsilon}, least", min(one.epsilon_lower for one in found))
        report.add(
            f"L3: the same for any (ε, δ) mechanism, ε = {epsilon}",
            statistics.median(one.figures["epsilon_lower_any_mechanism"] for one in found),
        )
        report.add(f"L3: power against noise ÷ 2, ε = {epsilon}", found[0].power or 0.0)
    one_run._ideal.cache_clear()
    one_run._ideal_correct.cache_clear()
    one_run._guesses.cache_clear()
    report.add("L3: 20 releases and the audit", timed(lambda: level_3(8, 8, seed=0)))


def less_noise(report: Report, *, runs: int) -> None:
    report.section("noise divided, the claim as before: share of runs that are called a violation")
    for divisor in (2, 3):
        for epsilon in (1, 2, 4, 8):
            caught = [level_1(epsilon, epsilon, seed=s, scale=divisor).verdict == "violation" for s in range(runs)]
            report.add(f"L1: noise ÷ {divisor} under ε = {epsilon}, called a violation", float(np.mean(caught)))
        for epsilon in (2, 4, 8):
            caught = [level_3(epsilon, epsilon, seed=s, scale=divisor).verdict == "violation" for s in range(runs)]
            report.add(f"L3: noise ÷ {divisor} under ε = {epsilon}, called a violation", float(np.mean(caught)))


def through_a_run(report: Report, *, runs: int, rounds: int) -> None:
    """The same through the code of sites and server: `privfed audit --level 3 --trials 1000`."""
    cell = Cells(__file__)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        asked = {
            (name, epsilon, divisor): [
                pool.submit(kept, cell, name, epsilon, divisor, rounds, seed) for seed in range(runs)
            ]
            for name, epsilon, divisor in RUNS
        }
        timings = pool.submit(kept, cell, "local noise", 8.0, 1.0, ROUNDS if runs > 1 else rounds, 0)
        report.section(f"level 3 through simulated runs: 1000 canaries, {rounds} rounds, 4 sites, {runs} seeds each")
        alarms, least = [], []
        for (name, epsilon, divisor), futures in asked.items():
            found = [future.result() for future in futures]
            claimed = found[0]["claimed"]
            shown = "8" if 7.9 < claimed <= 8 else f"{epsilon:g}" if divisor > 1 else f"{claimed:.2f}"
            violations = [one["verdict"] == "violation" for one in found]
            if divisor > 1:
                caught = float(np.mean(violations))
                report.add(f"L3 through a run: noise ÷ {divisor:g} under ε = {shown}, called a violation", caught)
                continue
            for figure in ("bound", "power"):
                label = "bound where" if figure == "bound" else "power against noise ÷ 2,"
                middle = statistics.median(one[figure] for one in found)
                report.add(f"L3 through a run: {label} ε = {shown}, {name}, median", middle)
            supported = float(np.mean([one["verdict"] == "supported" for one in found]))
            report.add(f"L3 through a run: called supported, ε = {shown}, {name}", supported)
            alarms += violations
            least += [one["bound"] for one in found if shown == "8"]
        report.add("L3 through a run: bound where ε = 8, least of all", min(least))
        report.add("L3 through a run: false alarms", float(np.mean(alarms)))
        once = timings.result()
        report.add(
            "L3 through a run: 20 rounds of 4 sites and the audit, processor time", once["processor_seconds"], "s"
        )
        report.add("L3 through a run: the same by the clock", once["seconds"], "s")


def kept(cell: Cells, name: str, epsilon: float, divisor: float, rounds: int, seed: int) -> dict[str, Any]:
    """`audited`, or what is left of it on disk."""
    return cell(audited, name, epsilon, divisor, rounds, seed)


def audited(name: str, epsilon: float, divisor: float, rounds: int, seed: int) -> dict[str, Any]:
    """One run's audit, and how long it took; the sites' noise is divided by ``divisor``."""
    attacked = _target(name, epsilon, rounds)
    clock, processor = time.perf_counter(), time.process_time()
    with patch.object(door, "release", partial(_release, divisor=divisor)):
        (found,) = auditing.audit(attacked, levels=[3], trials=CANARIES, seed=seed).audits
    return {
        "claimed": found.claimed_epsilon,
        "bound": found.epsilon_lower,
        "power": found.power,
        "verdict": found.verdict,
        "processor_seconds": time.process_time() - processor,
        "seconds": time.perf_counter() - clock,
    }


@cache
def _target(name: str, epsilon: float, rounds: int) -> auditing.Target:
    tempfile.tempdir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # this measures no disk
    method, privacy = KINDS[name]
    settings = Privacy(target_epsilon=epsilon, expected_batch_size=10.0, sample_rate=1.0, **privacy)
    data = BreastCancer(sites=4)
    return auditing.Target(
        api.prepare(Config(name="audited", rounds=rounds, data=data, method=method, privacy=settings))
    )


def _release(*arguments: object, noise_multiplier: float, divisor: float, **others: object) -> object:
    return noise.release(*arguments, noise_multiplier=noise_multiplier / divisor, **others)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
