"""Audits: how near their bounds come to ε, how often they raise a false alarm, what they catch, how long it takes.

python benchmarks/audits.py [--quick] [--json FILE] [--check]
"""

import statistics

import numpy as np
from common import Bar, Report, parse, timed
from numpy.typing import NDArray

from privfed.privacy import noise
from privfed.privacy.audit import mechanism, one_run
from privfed.privacy.audit.bounds import gaussian_mu
from privfed.privacy.audit.result import Audit

DELTA = 1e-5
TRIALS, CANARIES, DIM, ROUNDS = 10_000, 1000, 2000, 20

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


if __name__ == "__main__":
    main()
