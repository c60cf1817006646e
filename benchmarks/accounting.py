"""Samplers, shares, accountant and calibration: how long, and how much Skellam noise costs beside Gaussian noise.

python benchmarks/accounting.py [--quick] [--json FILE] [--check]
"""

import math

import numpy as np
from common import Bar, Report, interleaved, parse, timed

from privfed.privacy import noise, rdp, skellam
from privfed.privacy.accountant import Accountant
from privfed.privacy.calibration import noise_multiplier_for
from privfed.privacy.events import Charge, PoissonGaussian
from privfed.privacy.rotation import ConditionalRounding, Rotation, record_l2_bound

DELTA = 1e-5

BARS = (
    Bar("Skellam samples per second, standard deviation 1e4", at_least=5e6),
    Bar("share of 1e6 coordinates", at_most=0.5),
    Bar("share of 1e6 coordinates, table not yet built", at_most=2.0),
    Bar("client level, s = 10√d: Skellam / Gaussian ε, worst", at_most=1.03),
    Bar("record level, s = 100√d: Skellam / Gaussian ε, worst", at_most=1.03),
    Bar("ε of 100 sites × 1000 distinct rates, cold", at_most=10.0),
    Bar("ε of 100 sites × 1000 distinct rates, warm", at_most=0.1),
    Bar("ε of 100 sites × 1000 distinct rates, low ε, cold", at_most=10.0),
    Bar("ε of 100 sites × 1000 distinct rates, low ε, warm", at_most=0.1),
    Bar("calibrating 100 sites × 5 targets, cold", at_most=10.0),
)


def main() -> None:
    options = parse(__doc__)
    report = Report("accounting", packages=("numpy", "scipy", "dp-accounting", "cryptography", "randomgen"))
    sampling(report, quick=options.quick)
    skellam_beside_gaussian(report)
    accountant(report, sites=4 if options.quick else 100, rounds=100 if options.quick else 1000)
    calibration(report, sites=4 if options.quick else 100)
    report.finish(options, BARS)


def sampling(report: Report, *, quick: bool) -> None:
    """A share per site and round, from a key; numpy's Poisson over the same cipher beside it."""
    report.section("sampling integer noise")
    dim, key = 100_000 if quick else 1_000_000, bytes(range(32))
    variance = 10**8
    cold = timed(lambda: skellam.share(key, dim, variance))
    generator = noise.generator(key)
    times = interleaved(
        {
            "ours": lambda: skellam.share(key, dim, variance),
            "poisson": lambda: generator.poisson(variance / 2, dim),
        },
        repeats=3 if quick else 7,
    )
    report.add("Skellam samples per second, standard deviation 1e4", dim / times["ours"].median)
    report.add("Poisson counts per second, mean 1e8, numpy over ChaCha20", dim / times["poisson"].median)
    report.add("share of 1e6 coordinates", times["ours"].median * 1e6 / dim, "s")
    report.add("share of 1e6 coordinates, table not yet built", cold.median, "s")
    for deviation in (1, 100, 1_000_000 if not quick else 1000):
        built = timed(lambda deviation=deviation: skellam.table(deviation**2))
        report.add(f"building the table, standard deviation {deviation:g}", built)
    skellam.table.cache_clear()


def skellam_beside_gaussian(report: Report) -> None:
    """ε of Skellam noise z·C over ε of Gaussian noise z·C, both by RDP, rounding counted; worst over d and rounds."""
    report.section("Skellam beside Gaussian, same noise in real units")
    worst = {"client": 0.0, "record": 0.0}
    whole = rdp.ORDERS == np.round(rdp.ORDERS)
    for dim in (1000, 10_000, 100_000, 1_000_000):
        rotation = Rotation(dim, b"")
        d = rotation.padded_dim
        for z, rounds in ((5.0, 20), (1.0, 1), (20.0, 100), (2.0, 50)):
            gaussian = rdp.epsilon(np.where(whole, rounds * rdp.ORDERS / (2 * z**2), np.inf), DELTA)
            for level, factor in (("client", 10), ("record", 100)):
                scale = factor * math.sqrt(d)
                if level == "client":
                    bound = ConditionalRounding(rotation, 1.0, scale).l2_bound
                else:
                    bound = record_l2_bound(1.0, scale, d)
                shared = skellam.SharedNoise(
                    noise_multiplier=z, steps=scale, dim=d, l2_bound=bound, minimum_cohort=10, colluders=2
                )
                event = shared.event()
                epsilon = Accountant().epsilon([Charge(event, rounds)], DELTA).value
                worst[level] = max(worst[level], epsilon / gaussian)
                if z == 5.0:
                    limit = math.ceil(6 * scale / math.sqrt(d)) if level == "client" else math.ceil(scale)
                    report.add(f"{level}, d = {dim}, z = 5, T = 20: ε Skellam", epsilon)
                    report.add(f"{level}, d = {dim}: bits for 50 sites", shared.bits(limit, 50), "bits")
                    skellam.table.cache_clear()
    report.add("client level, s = 10√d: Skellam / Gaussian ε, worst", worst["client"])
    report.add("record level, s = 100√d: Skellam / Gaussian ε, worst", worst["record"])


def accountant(report: Report, *, sites: int, rounds: int) -> None:
    """Every site, every round at a rate of its own: the hardest ledger there is."""
    report.section("ε of many ledgers")
    for sigma, name in ((4.0, ""), (20.0, ", low ε")):
        random = np.random.default_rng(0)
        ledgers = [
            tuple(Charge(PoissonGaussian(float(rate), sigma)) for rate in random.uniform(0.01, 0.5, rounds))
            for _ in range(sites)
        ]
        ours = Accountant()

        def price(ours: Accountant = ours, ledgers: list[tuple[Charge, ...]] = ledgers) -> None:
            for ledger in ledgers:
                ours.epsilon(ledger, DELTA)

        report.add(f"ε of 100 sites × 1000 distinct rates{name}, cold", timed(price))
        report.add(f"ε of 100 sites × 1000 distinct rates{name}, warm", timed(price))
        last = ours.epsilon(ledgers[-1], DELTA)
        report.add(f"ε by {last.accountant} of the last ledger{name}", last.value)
        report.add(f"RDP's ε beside it{name}", ours.rdp_epsilon(ledgers[-1], DELTA))


def calibration(report: Report, *, sites: int) -> None:
    report.section("calibration")
    rates = np.random.default_rng(1).uniform(0.01, 0.5, sites)
    ours = Accountant()

    def calibrate() -> None:
        for rate in rates:
            for target in (0.5, 1.0, 2.0, 4.0, 8.0):
                noise_multiplier_for(
                    target,
                    DELTA,
                    lambda sigma, rate=rate: [Charge(PoissonGaussian(float(rate), sigma), 200)],
                    ours,
                )

    report.add("calibrating 100 sites × 5 targets, cold", timed(calibrate))
    report.add("calibrating 100 sites × 5 targets, again", timed(calibrate))


if __name__ == "__main__":
    main()
