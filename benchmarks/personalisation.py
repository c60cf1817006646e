"""Which method gives each site the best model: every method of the toolkit, tuned alike, on three federations.

- Stroke trial (IST), dead or dependent at six months, by hospital (49) and by country (24): AUROC, logistic regression.
- Heart disease (UCI), four hospitals: accuracy, FLamby's own split and inputs, beside the numbers FLamby published.
- Digits by their writers (QMNIST at 8 × 8): the 297 writers whom training never saw, 10 records each to adapt with.

Every method gets the same number of settings, drawn at random from its own list by a public seed, the same rounds, and
is judged on validation records (the trial: a quarter of each training set; heart disease: four folds of it) or on 100
training writers whom the search does not train on; the best is trained again on all training records and meets the test
records once. Seeds change the split (heart disease: the folds; digits: start model, and which 10 records). Without
privacy the runs are those of many_sites.py, of which some are compared with `privfed.run`; what is private goes through
`privfed.run`. The search is not private, and no ε counts it: the private rows therefore have settings that were written
down, not searched.

± is half of a 95 % interval over seeds (Student t); of a difference, the paired one. Methods that need a head run on
one hidden layer, the others on logistic regression (digits: all on the hidden layer). Finds the records through
PRIVFED_DATA. With --rows a killed benchmark goes on where it was.

    PRIVFED_DATA=… python benchmarks/personalisation.py [--rows DIR] [--quick] [--json FILE] [--check]
"""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import Bar, Report, parse
from many_sites import simulate
from personalisation_search import Row, Rows, add, best_row, compare, half_width, means, measure, others
from personalisation_sites import (
    BEFORE,
    EXAMPLES,
    NEEDS,
    POOLED,
    digits,
    flamby_hearts,
    heart_disease,
    hearts,
    stroke_trial,
    with_parts,
)

import privfed
from privfed.api import prepare
from privfed.data.files import find_file
from privfed.data.records import SiteData, keyed_fraction, public_split_key
from privfed.doors import split
from privfed.evaluation import spread

BARS = (
    Bar("heart: FedAvg as published, distance of the intervals", at_most=0.0),
    Bar("heart: best personalised, chosen on validation", at_least=0.735),
    Bar("heart: ε = 5, δ = 1e-3, shared noise, common model", at_least=0.700),
    Bar("ist-hospitals: best personalised, chosen on validation − pooled", at_least=-0.002),
    Bar("ist-hospitals: ε = 1, shared noise, personal", at_least=0.770),
    Bar("largest difference from privfed.run", at_most=0.02),
)
DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None  # this measures no disk

# As published


def as_published(report: Report, kept: Rows, *, seeds: int) -> None:
    """FLamby's own FedAvg: random start, draws of about 4, 15 rounds of 100 steps; then 100 steps at each hospital.

    Its network has one output. Ours has two, the first one starting at zero: with half the learning rate the
    difference of the two makes the same steps.
    """
    report.section("heart, as FLamby runs it, beside what it published (each ± over 5 seeds)")

    def mine(rate: float, seed: int) -> Row:
        method = ("method.name=fedavg", "method.local_steps=100", "method.personal_steps=100")
        rates = (f"method.lr={rate / 2}", f"method.personal_lr={rate / 2}")
        common = ("evaluation.metric=accuracy", "rounds=15", f"seed={seed}")
        config = privfed.load_config(overrides=[*common, *method, *rates])
        splits = {name: with_parts(config, one.train, one.test, seed) for name, one in flamby_hearts().items()}
        torch.manual_seed(42 + seed)
        linear = torch.nn.Linear(13, 1)
        weight, bias = linear.weight.detach()[0], linear.bias.detach()
        start = torch.cat([torch.zeros(13), weight, torch.zeros(1), bias])
        drawn = [4 / len(one.train) for one in splits.values()]
        outcome = simulate(config, splits, rates=drawn, start=start)
        return Row({"lr": rate}, 0.0, outcome.global_, outcome.personalized, outcome.weights)

    folder = find_file("flamby_baselines/perso_results.csv").parent
    tables = pd.concat([pd.read_csv(path) for path in sorted(folder.glob("heart_seed*.csv"))])
    sites = tables[tables["Test"].str.startswith("client_test")]
    published = {
        method: [float(value) for value in of["Metric"].groupby(of["seed"]).mean()]
        for method, of in sites.groupby("Method")
    }
    tuned = pd.read_csv(folder / "perso_results.csv").query("dataset == 'Fed-Heart-Disease'")
    for label, rate in (("FedAvg", 0.001), ("FedAvg with the learning rate of its personalisation", 0.00316227)):
        rows = [
            kept.get(f"flamby-{rate}-{seed}", [rate, seed], lambda r=rate, s=seed: mine(r, s), Row)
            for seed in range(seeds)
        ]
        ours = [spread(list(row.before.values())).mean for row in rows]  # type: ignore[union-attr]
        theirs = published["FedAvg100"] if rate == 0.001 else list(tuned[~tuned["finetune"]]["perf"])
        add(report, f"heart: {label}, ours", ours)
        add(report, f"heart: {label}, published", theirs)
        if rate == 0.001:
            apart = abs(statistics.fmean(ours) - statistics.fmean(theirs))
            apart -= (half_width(ours) if seeds > 1 else 0.0) + half_width(theirs)
            report.add("heart: FedAvg as published, distance of the intervals", max(0.0, apart))
        else:
            add(report, "heart: the same, fine-tuned, ours", means(rows))
            add(report, "heart: the same, fine-tuned, published", list(tuned[tuned["finetune"]]["perf"]))
    for label in ("Pooled Training", "Scaffold100", "Cyclic100", "FedAdam100", "FedYogi100"):
        add(report, f"heart: {label}, published", published[label])
    alone = [sites[(sites["Method"] == f"Local {k}") & (sites["Test"] == f"client_test_{k}")] for k in range(4)]
    add(report, "heart: every hospital alone, published", list(sum(of.set_index("seed")["Metric"] for of in alone) / 4))


# Through the front door


def run(settings: Sequence[str], toml: str, sites: Mapping[str, SiteData] | None = None) -> privfed.Run:
    """`privfed.run`; ``sites`` in the place of those that the configuration reads."""
    config = privfed.load_config(EXAMPLES / toml, settings)
    ready = prepare(config)
    if sites is not None:
        ready = replace(ready, data=replace(ready.data, sites=dict(sites)))
    with tempfile.TemporaryDirectory(dir=DISK) as folder:
        done = privfed.run(config, out=Path(folder) / "run", prepared=ready)
    if not done.summary.complete or done.summary.refusals:
        raise RuntimeError(f"the run did not complete: {done.summary.refusals}")
    return done


def placed(data: SiteData, testing: np.ndarray, key: bytes, fraction: float) -> SiteData:
    """The records with ids whose keyed hash puts them where a published split has them."""
    chance, ids = np.random.default_rng(0), data.ids.copy()
    wrong = np.ones(len(ids), dtype=bool)
    while wrong.any():
        ids[wrong] = chance.integers(0, 2**63, wrong.sum()).astype(np.uint64)
        wrong = (keyed_fraction(ids, key=key, label="test") < fraction) != testing
    return replace(data, ids=ids)


def score_of(done: privfed.Run) -> dict[str, float]:
    utility = done.summary.utility
    assert utility.global_.mean is not None and utility.personalized.mean is not None
    return {
        "common model": utility.global_.mean,
        "personal": utility.personalized.mean,
        "worst decile": utility.personalized.worst_decile or 0.0,
        "spent": done.summary.privacy.epsilon.max or 0.0,
    }


HEART_PRIVATE = {
    "shared noise": ("method.name=fedsgd", "method.lr=1.0", "method.momentum=0.5", "privacy.noise=distributed"),
    "local noise": ("method.name=fedavg", "method.local_steps=1", "privacy.noise=local"),
}
PRIVATE = ("privacy.max_grad_norm=2.0", "method.personal_steps=5", "method.personal_lr=0.1", "evaluation.every=20")


def private_hearts(report: Report, kept: Rows, *, seeds: int) -> None:
    """FLamby's DP rows clip at 1.1 and standardise inputs without counting it; ours come from public ranges."""
    report.section(f"heart, records hidden, δ = 1e-3, inputs by public ranges, 20 rounds, {seeds} seeds")
    published = pd.read_csv(find_file("flamby_baselines/dp_results_fed_heart_disease.csv"))
    records, testing = hearts()

    def mine(seed: int, noise: Sequence[str], budget: Sequence[str]) -> dict[str, float]:
        key = public_split_key(seed)
        sites = {name: placed(data, testing[name], key, 0.34) for name, data in records.items()}
        common = (f"seed={seed}", "evaluation.test_fraction=0.34", "privacy.delta=1e-3", "evaluation.local_steps=1")
        return score_of(
            run([*PRIVATE, *noise, *common, *budget, "privacy.expected_batch_size=120"], "heart.toml", sites)
        )

    claims: dict[str, tuple[str, ...]] = {
        f"ε = {e:g}, δ = 1e-3": (f"privacy.target_epsilon={e}",) for e in (50, 5, 1, 0.1)
    }
    for claim, budget in claims.items():
        for name, noise in HEART_PRIVATE.items():
            about = [*PRIVATE, *noise, *budget]
            got = [
                kept.get(
                    f"heart-{claim}-{name}-{seed}".replace(" ", ""),
                    [*about, seed],
                    lambda s=seed, n=noise, b=budget: mine(s, n, b),
                    dict[str, float],
                )
                for seed in range(seeds)
            ]
            for figure in ("common model", "personal"):
                add(report, f"heart: {claim}, {name}, {figure}", [one[figure] for one in got])
        e = float(budget[0].partition("=")[2])
        theirs = published[(published["e"] == e) & (published["d"] == 1e-3)]["perf"]
        add(report, f"heart: {claim}, DP-FedAvg, published", [float(value) for value in theirs])
    add(
        report, "heart: no DP, published with the DP rows", [float(v) for v in published[published["e"].isna()]["perf"]]
    )


IST_PRIVATE = (
    "method.name=fedsgd",
    "method.lr=1.0",
    "method.momentum=0.5",
    "privacy.noise=distributed",
    "privacy.target_epsilon=1",
    "privacy.expected_batch_size=125",
)


def private_strokes(report: Report, kept: Rows, *, seeds: int) -> None:
    report.section(f"ist-hospitals, records hidden, ε = 1, δ = 1e-5, noise in shares, {seeds} seeds")
    settings = (*PRIVATE, *IST_PRIVATE, "evaluation.local_steps=1")
    got = [
        kept.get(
            f"ist-private-{seed}",
            [*settings, seed],
            lambda s=seed: score_of(run([*settings, f"seed={s}"], "ist.toml")),
            dict[str, float],
        )
        for seed in range(seeds)
    ]
    for figure in ("common model", "personal", "worst decile", "spent"):
        add(report, f"ist-hospitals: ε = 1, shared noise, {figure}", [one[figure] for one in got])


def same_as_run(report: Report, kept: Rows, *, quick: bool) -> None:
    """How far a site's figure is from what `privfed.run` measures: a record of a hospital counts about .01."""
    report.section("these runs and `privfed.run`, without privacy, one seed")
    common = ["privacy.unit=none", "aggregation.kind=plain", "privacy.sample_rate=1.0", "rounds=5"]
    common += ["evaluation.every=5", "evaluation.local_steps=1"]
    worst_gap = 0.0
    for method in ("fedavg",) if quick else ("fedavg", "scaffold", "ditto", "mr-mtl", "maml", "fedrep"):
        needs = [text.format(width=8) for text in NEEDS.get(method, ())]
        settings = [*common, f"method.name={method}", *needs]

        def gap(settings: Sequence[str] = settings) -> float:
            config = privfed.load_config(EXAMPLES / "ist.toml", settings)
            sites = config.data.load(seed=0).sites
            ours = simulate(config, {name: split(config, data, public_split_key(0)) for name, data in sites.items()})
            theirs = run(settings, "ist.toml").reports[-1].measurements
            gaps = [0.0]
            for name, site in theirs.items():
                for mine, other in (
                    (ours.global_[name], site.global_score),
                    (ours.personalized[name], site.personalized),
                ):
                    gaps += [abs(mine - other)] if mine is not None and other is not None else []
            return max(gaps)

        found = kept.get(f"same-{method}", settings, gap, float)
        report.add(f"{method}: largest difference of a hospital's AUROC", found)
        worst_gap = max(worst_gap, found)
    report.add("largest difference from privfed.run", worst_gap)


def main() -> None:
    options = parse(__doc__, resumable=True)
    torch.set_num_threads(1)
    report = Report("personalisation", packages=("torch", "scikit-learn", "pandas", "numpy"))
    kept = Rows(options.rows)
    seeds, most = (1, 2) if options.quick else (5, None)
    same_as_run(report, kept, quick=options.quick)

    rows = measure(report, heart_disease(), kept, seeds=seeds, most=most)
    adapted = [label for label in rows if label not in (BEFORE, POOLED, "local")]
    best_row(report, "heart", rows, adapted)
    others(report, "heart", rows, adapted)
    as_published(report, kept, seeds=seeds)
    private_hearts(report, kept, seeds=seeds)

    for column in ("HOSPNUM",) if options.quick else ("HOSPNUM", "COUNTRY"):
        federation = stroke_trial(column)
        rows = measure(report, federation, kept, seeds=seeds, most=most)
        there = [label for label in adapted if label in rows]
        best = best_row(report, federation.name, rows, there)
        label = f"{federation.name}: best personalised, chosen on validation"
        compare(report, f"{label} − pooled", means(rows[best]), means(rows[POOLED]))
        compare(report, f"{label} − local", means(rows[best]), means(rows["local"]))
        others(report, federation.name, rows, there)
    private_strokes(report, kept, seeds=seeds)

    rows = measure(report, digits(), kept, seeds=seeds, most=most)
    others(report, "digits", rows, ("reptile", "fomaml", "maml", "per-fedavg", "meta-sgd", "anil"))
    report.finish(options, BARS)


if __name__ == "__main__":
    main()
