"""What privacy costs: records hidden by each site's own noise or by noise shared in the secure sum, and sites hidden.

Two tables, everything through `privfed.run`, the sum masked wherever noise is shared:

- The International Stroke Trial, 49 hospitals (`examples/ist.toml`): AUROC, mean over hospitals and worst decile.
- Handwritten digits (scikit-learn's, 8 × 8) at 50 and 10 sites, labels skewed by Dirichlet(0.5): accuracy over all test
  records. Inputs are pixels, or strokes: how much edge of eight directions lies in each of 4 × 4 cells, a function of
  the one record (handcrafted as in Tramèr and Boneh 2021, "Differentially Private Learning Needs Better Features").
  The typical value of each input is that of other people's digits (QMNIST at 8 × 8).

Seeds change the split, the noise and, for the digits, the sites. "±" is half of a 95 % interval over them (Student t),
for a difference the paired one. Shared noise has the default cohort: a third of the sites may drop out, and ε holds
against the server with as many colluding sites as the masks tolerate. "complete" promises the same without room for
dropouts; "against the server alone" has neither room for dropouts nor for colluding sites.

Learning rates, clips and rounds were searched on other people than those measured, once for all seeds: for the trial on
the 415 hospitals with fewer than 100 patients, merged into 49; for the digits on QMNIST at 8 × 8. That is not a blind
trial: the measured hospitals had been looked at before the last choice among settings that tie, and strokes were tried
on the digits first. On QMNIST, as noisy, they reach .875 where pixels reach .778. Shared noise has one setting, for
ε = 1, and for digits the schedule "spend"; local and client noise have one for each ε. No ε counts the search.
Local-only models choose their strength on validation records of the measured hospitals; "in hindsight" even on the test
records, which favours them.

Finds the records through PRIVFED_DATA (`privfed data describe ist` and `mnist-by-writer`, whose means are the typical
values).

    PRIVFED_DATA=… python benchmarks/privacy_utility.py [--quick] [--json FILE] [--check]

Two runs at a time. Each leaves its figures in `runs/privacy_utility`, named by what was asked and by the code: a
benchmark that was stopped goes on where it was, and any change of the code starts anew.
"""

import hashlib
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import pandas as pd
from common import Bar, Report, parse
from numpy.typing import NDArray
from scipy.stats import t as student
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import privfed
from privfed.config import Config
from privfed.data.columns import Numeric
from privfed.data.files import find_file
from privfed.data.records import SiteData, keyed_fraction, public_split_key
from privfed.data.tables import Table
from privfed.doors import split
from privfed.evaluation import spread

BARS = (
    Bar("ε = 1, shared noise − no privacy, same method: AUROC", at_least=-0.003),
    Bar("ε = 1, shared noise − local only: AUROC", at_least=0.02),
    Bar("ε = 1, shared noise − local only: worst decile", at_least=0.0),
    Bar("pixels, 50 sites, record, shared noise, ε = 1, against the server alone", at_least=0.90),
    Bar("strokes, 50 sites, record, shared noise, ε = 1", at_least=0.90),
)
HERE = Path(__file__).parent.parent
EXAMPLES = HERE / "examples"
KEPT = HERE / "runs" / "privacy_utility"
DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None  # this measures no disk

Values = list[float]
R = TypeVar("R")


def main() -> None:
    options = parse(__doc__)
    report = Report("privacy and utility", packages=("torch", "opacus", "scikit-learn", "pandas", "numpy"))
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        cells = Cells(pool)
        show_trial = stroke_trial(cells, seeds=1 if options.quick else 5, epsilons=(1,) if options.quick else (1, 4, 8))
        show_digits = digits(cells, quick=options.quick)
        show_trial(report)
        show_digits(report)
    report.finish(options, BARS)


class Cells:
    """Work done by other processes, each piece once: its result is kept on disk under what was asked of which code."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool
        files = [*sorted((HERE / "privfed").rglob("*.py")), EXAMPLES / "ist.toml", Path(__file__)]
        for linked in ("privacy", "crypto"):
            files += sorted((HERE / linked).rglob("*.py"))
        self._code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        KEPT.mkdir(parents=True, exist_ok=True)

    def __call__(self, work: Callable[..., R], *arguments: object) -> "Future[R]":
        """The future of `work(*arguments)`; what it returns is plain data."""
        asked = json.dumps([self._code, work.__name__, arguments])
        file = KEPT / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"
        return self._pool.submit(kept, file, work, arguments)


def kept(file: Path, work: Callable[..., R], arguments: Sequence[object]) -> R:
    if not file.exists():
        done = file.with_suffix(f".{os.getpid()}")
        done.write_text(json.dumps(work(*arguments)))
        done.replace(file)
    result: R = json.loads(file.read_text())
    return result


def run(config: Config) -> privfed.Run:
    with tempfile.TemporaryDirectory(dir=DISK) as folder:
        done = privfed.run(config, out=Path(folder) / "run")
    if not done.summary.complete or done.summary.refusals:
        raise RuntimeError(f"the run did not complete: {done.summary.refusals}")
    return done


def add(report: Report, name: str, values: Values) -> None:
    """The mean over the seeds, with half of its 95 % interval."""
    half = ""
    if len(values) > 1:
        half = f"± {student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)):.2g}"
    report.add(name, statistics.fmean(values), half)


def differences(ours: Values, theirs: Values) -> Values:
    return [a - b for a, b in zip(ours, theirs, strict=True)]


# The stroke trial

SHARED = (
    "method.name=fedsgd",
    "method.lr=1.0",
    "method.momentum=0.5",
    "method.personal_steps=5",
    "method.personal_lr=0.1",
    "privacy.noise=distributed",
    "privacy.max_grad_norm=2.0",
    "privacy.expected_batch_size=125.0",
)
CLEAR = (*SHARED, "privacy.unit=none", "aggregation.kind=plain", "method.lr=0.5", "method.momentum=0.8")


def stroke_trial(cells: Cells, *, seeds: int, epsilons: Sequence[float]) -> Callable[[Report], None]:
    settings: dict[str, tuple[str, ...]] = {
        f"ε = {epsilon:g}, shared noise": (*SHARED, f"privacy.target_epsilon={epsilon}") for epsilon in epsilons
    }
    settings["no privacy, same method"] = CLEAR
    runs = {label: [cells(trial, seed, overrides) for seed in range(seeds)] for label, overrides in settings.items()}
    baselines = [cells(without_federation, seed) for seed in range(seeds)]
    return lambda report: show_trial(report, runs, baselines)


def trial(seed: int, overrides: Sequence[str]) -> dict[str, float]:
    """One run on the trial's hospitals."""
    summary = run(
        privfed.load_config(EXAMPLES / "ist.toml", [*overrides, f"seed={seed}", "evaluation.every=20"])
    ).summary
    utility = summary.utility
    return {
        "AUROC": utility.global_.mean or 0.0,
        "worst decile": utility.global_.worst_decile or 0.0,
        "personalized": utility.personalized.mean or 0.0,
        "spent": summary.privacy.epsilon.max or math.inf,
    }


def show_trial(
    report: Report,
    runs: dict[str, list[Future[dict[str, float]]]],
    baselines: list[Future[dict[str, tuple[float, float]]]],
) -> None:
    report.section(
        f"49 hospitals, dead or dependent at six months: AUROC, mean over hospitals, δ = 1e-5, records, "
        f"{len(baselines)} seeds"
    )
    rows: dict[str, dict[str, Values]] = {}
    spent = max(future.result()["spent"] for future in runs["ε = 1, shared noise"])
    for label, futures in runs.items():
        for figure in ("AUROC", "worst decile", "personalized"):
            rows.setdefault(label, {})[figure] = [future.result()[figure] for future in futures]
    for baseline in baselines:
        for label, (mean, worst) in baseline.result().items():
            for figure, value in (("AUROC", mean), ("worst decile", worst)):
                rows.setdefault(label, {}).setdefault(figure, []).append(value)
    for label, figures in rows.items():
        for figure, values in figures.items():
            add(report, f"{label}: {figure}", values)
    report.add("ε = 1: spent by the ledger, all 49 having contributed", spent)
    report.note("ε = 1 is reserved for a sum of 33 hospitals of which 16 collude; one of all 49 carries more noise")

    private, clear = rows["ε = 1, shared noise"], rows["no privacy, same method"]
    alone = [label for label in rows if label.startswith("local only") and "hindsight" not in label]
    add(report, "ε = 1, shared noise − no privacy, same method: AUROC", differences(private["AUROC"], clear["AUROC"]))
    for figure in ("AUROC", "worst decile"):
        best = max(alone, key=lambda label: statistics.fmean(rows[label][figure]))
        add(report, f"ε = 1, shared noise − local only: {figure}", differences(private[figure], rows[best][figure]))
    report.note("local only is the better of the two ways to choose the strength without the test records")


STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def without_federation(seed: int) -> dict[str, tuple[float, float]]:
    """(mean, worst decile) of the hospitals' AUROC without privacy: pooled, and every hospital alone."""
    config = privfed.load_config(EXAMPLES / "ist.toml", [*CLEAR, f"seed={seed}"])
    key = public_split_key(seed)
    parts = {name: split(config, data, key) for name, data in config.data.load(seed=seed).sites.items()}

    def fit(data: SiteData, strength: float) -> LogisticRegression | None:
        if len(np.unique(data.targets.numpy())) < 2:
            return None
        return LogisticRegression(C=strength, max_iter=500).fit(data.inputs.numpy(), data.targets.numpy())

    def score(model: LogisticRegression | None, data: SiteData) -> float:
        if model is None or len(np.unique(data.targets.numpy())) < 2:
            return float("nan")
        return float(roc_auc_score(data.targets.numpy(), model.decision_function(data.inputs.numpy())))

    def summary(scores: Sequence[float]) -> tuple[float, float]:
        over = spread(scores)
        assert over is not None
        return over.mean, over.worst_decile

    tested: dict[float, Values] = {}  # strength → by hospital
    checked: dict[float, Values] = {}
    for strength in STRENGTHS:
        for part in parts.values():
            held = keyed_fraction(part.train.ids, key=key, label="validation") < 0.25
            tested.setdefault(strength, []).append(score(fit(part.train, strength), part.test))
            checked.setdefault(strength, []).append(score(fit(part.train.rows(~held), strength), part.train.rows(held)))
    own = [max(STRENGTHS, key=lambda c: np.nan_to_num(checked[c][k], nan=-1.0)) for k in range(len(parts))]
    common = max(STRENGTHS, key=lambda c: float(np.nanmean(checked[c])))
    hindsight = max(STRENGTHS, key=lambda c: float(np.nanmean(tested[c])))
    everything = np.concatenate([part.train.inputs.numpy() for part in parts.values()])
    labels = np.concatenate([part.train.targets.numpy() for part in parts.values()])
    pooled = LogisticRegression(C=0.1, max_iter=500).fit(everything, labels)
    return {
        "pooled, no privacy": summary([score(pooled, part.test) for part in parts.values()]),
        "local only, no privacy, each its own strength": summary([tested[c][k] for k, c in enumerate(own)]),
        "local only, no privacy, one strength for all": summary(tested[common]),
        "local only, no privacy, one strength in hindsight": summary(tested[hindsight]),
    }


# Digits

ROUNDS = 20
SPEND = "privacy.schedule=spend"
DIGITS_ALL = 1400.0  # public: roughly how many training records there are; sets the scale of a step


def digits(cells: Cells, *, quick: bool) -> Callable[[Report], None]:
    sites = (10,) if quick else (50, 10)
    epsilons = (1.0,) if quick else (1.0, 4.0, 8.0)
    few, many = (1, 1) if quick else (3, 5)
    tables: dict[int, dict[str, list[Future[float]]]] = {}
    for n in sites:
        tables[n] = {}

        def row(name: str, inputs: str, settings: Sequence[str], *, seeds: int, n: int = n) -> None:
            tables[n][f"{inputs}, {n} sites, {name}"] = [
                cells(accuracy, inputs, n, seed, settings) for seed in range(seeds)
            ]

        for inputs in ("pixels", "strokes"):
            for epsilon in epsilons:
                budget = f"privacy.target_epsilon={epsilon}"
                seeds = many if epsilon == 1 else few
                row(f"record, local noise, ε = {epsilon:g}", inputs, (*local(inputs, n, epsilon), budget), seeds=few)
                row(f"record, shared noise, ε = {epsilon:g}", inputs, (*shared(inputs, n), SPEND, budget), seeds=seeds)
                if inputs == "pixels":
                    row(f"client, shared noise, ε = {epsilon:g}", inputs, (*client(n, epsilon), budget), seeds=few)
            if n == 50:
                complete = (SPEND, "privacy.target_epsilon=1", f"aggregation.minimum_cohort={n}")
                row("record, shared noise, ε = 1, complete", inputs, (*shared(inputs, n), *complete), seeds=many)
                if inputs == "pixels":
                    alone = (*shared(inputs, n), *complete, "privacy.colluders=0")
                    row("record, shared noise, ε = 1, against the server alone", inputs, alone, seeds=many)
            clear = ("privacy.unit=none", "aggregation.kind=plain")
            row("no privacy, same method", inputs, (*shared(inputs, n), *clear), seeds=few)

    def show(report: Report) -> None:
        for n, rows in tables.items():
            report.section(f"digits, {n} sites, Dirichlet(0.5): accuracy over all test records, δ = 1e-5")
            for name, futures in rows.items():
                add(report, name, [future.result() for future in futures])

    return show


def shared(inputs: str, n: int) -> tuple[str, ...]:
    """Noise in shares: one clipped gradient a round."""
    clip, lr, rounds = {"pixels": (1.0, 0.25, 40), "strokes": (0.25, 8.0, ROUNDS)}[inputs]
    return (
        "privacy.noise=distributed",
        f"privacy.max_grad_norm={clip}",
        f"privacy.expected_batch_size={DIGITS_ALL / n}",
        "method.name=fedsgd",
        f"method.lr={lr}",
        "method.momentum=0.8",
        f"rounds={rounds}",
    )


# Chosen with every ε, as the others once: learning rate and momentum; rounds and the clip of a whole update.
LOCAL: dict[tuple[str, int], dict[float, tuple[float, float]]] = {
    ("pixels", 50): {1: (0.25, 0.5), 4: (1.0, 0.8), 8: (2.0, 0.8)},
    ("pixels", 10): {1: (1.0, 0.5), 4: (2.0, 0.8), 8: (4.0, 0.8)},
    ("strokes", 50): {1: (1.0, 0.8), 4: (4.0, 0.5), 8: (8.0, 0.5)},
    ("strokes", 10): {1: (4.0, 0.5), 4: (4.0, 0.8), 8: (8.0, 0.8)},
}
CLIENT: dict[int, dict[float, tuple[int, float]]] = {
    50: {1: (2, 0.1), 4: (2, 0.3), 8: (5, 0.3)},
    10: {1: (2, 0.1), 4: (2, 0.1), 8: (2, 0.3)},
}


def local(inputs: str, n: int, epsilon: float) -> tuple[str, ...]:
    """Each site's own noise: as much for every site as `shared` adds once. Averaged in the clear."""
    lr, momentum = LOCAL[inputs, n][epsilon]
    return (
        "privacy.noise=local",
        "privacy.sample_rate=1.0",
        "privacy.max_grad_norm=0.5",
        f"privacy.expected_batch_size={DIGITS_ALL / n}",
        "aggregation.kind=plain",
        "method.name=fedsgd",
        f"method.lr={lr}",
        f"method.momentum={momentum}",
    )


def client(n: int, epsilon: float) -> tuple[str, ...]:
    """Whole sites hidden: five steps at each, the whole update clipped."""
    rounds, norm = CLIENT[n][epsilon]
    return (
        "privacy.unit=client",
        "privacy.noise=distributed",
        "privacy.sample_rate=1.0",
        f"privacy.max_update_norm={norm}",
        "method.name=fedavg",
        "method.local_steps=5",
        "method.lr=0.2",
        f"rounds={rounds}",
    )


def accuracy(inputs: str, n: int, seed: int, settings: Sequence[str]) -> float:
    """Of the last round's model over all sites' test records, each counting once."""
    common = [f"seed={seed}", "evaluation.every=1000", "evaluation.local_steps=1", "method.personal_steps=1"]
    config = privfed.load_config(overrides=[f"rounds={ROUNDS}", *settings, *common])
    with tempfile.TemporaryDirectory(dir=DISK) as folder:
        config = msgspec.structs.replace(config, data=digits_table(Path(folder), inputs, n, seed))
        measured = run(config).reports[-1].measurements.values()
    counted = [(m.records, m.global_score) for m in measured if m.global_score is not None]
    return sum(records * score for records, score in counted) / sum(records for records, _ in counted)


def digits_table(folder: Path, inputs: str, n: int, seed: int) -> Table:
    """The digits of `skewed`, as any consortium's table: a CSV file and what is public about its columns."""
    digits = load_digits()
    typical, high = other_digits(), 16.0
    values = digits.data
    if inputs == "strokes":
        typical, high, values = strokes(typical).mean(0), 1.0, strokes(values)
    else:
        typical = typical.mean(0)
    names = [f"x{column}" for column in range(values.shape[1])]
    frame = pd.DataFrame(values, columns=names)
    frame["digit"], frame["record"] = digits.target, np.arange(len(frame))
    frame["site"] = [f"site-{site + 1}" for site in skewed(digits.target, n, seed)]
    path = folder / f"{inputs}-{n}-{seed}.csv"
    frame.to_csv(path, index=False)
    return Table(
        file=str(path),
        site="site",
        label="digit",
        id="record",
        classes={str(digit): (str(digit),) for digit in range(10)},
        numeric=tuple(
            Numeric(name=name, range=(0.0, high), typical=float(usual))
            for name, usual in zip(names, typical, strict=True)
        ),
    )


def skewed(labels: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """int64[records]: the site of each; every digit is spread by its own Dirichlet(0.5). No site is left empty."""
    randomness = np.random.default_rng(seed)
    site = np.empty(len(labels), dtype=np.int64)
    while True:
        for digit in range(10):
            rows = np.flatnonzero(labels == digit)
            site[rows] = randomness.choice(n, size=len(rows), p=randomness.dirichlet(np.full(n, 0.5)))
        if np.bincount(site, minlength=n).min() >= 4:
            return site


@cache
def other_digits() -> NDArray[np.float64]:
    """float64[20000, 64]: QMNIST's first digits, the 20 × 20 pixels of each averaged to 8 × 8, from 0 to 16."""
    with np.load(find_file("mnist_by_writer/mnist_by_writer.npz")) as stored:
        images = stored["x"][:20_000, 4:24, 4:24] / 255.0
    edges = np.arange(9) * 2.5
    overlap = np.minimum(edges[1:, None], np.arange(1, 21)) - np.maximum(edges[:-1, None], np.arange(20))
    pool = np.maximum(0.0, overlap) / 2.5
    small: NDArray[np.float64] = np.round(16 * np.einsum("ar,nrc,bc->nab", pool, images, pool, optimize=True))
    return small.reshape(len(small), 64)


def strokes(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64[n, 128], of length 1: how much edge of eight directions lies in each of 4 × 4 cells of 8 × 8 images.

    Histograms of oriented gradients (Dalal and Triggs 2005) with square roots. Each record's are its own alone.
    """
    padded = np.pad(images.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    across = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    strength, direction = np.hypot(across, down), np.arctan2(down, across) % (2 * np.pi) * 8 / (2 * np.pi)
    apart = np.abs(direction[:, None] - np.arange(8)[None, :, None, None])
    edges = strength[:, None] * np.maximum(0.0, 1.0 - np.minimum(apart, 8 - apart))
    near = np.maximum(0.0, 1.0 - np.abs(np.arange(8) - (2.0 * np.arange(4)[:, None] + 0.5)) / 2.0)
    cells = np.sqrt(np.einsum("gr,nbrc,hc->nbgh", near, edges, near, optimize=True).reshape(len(images), -1))
    scaled: NDArray[np.float64] = cells / np.maximum(1e-9, np.linalg.norm(cells, axis=1, keepdims=True))
    return scaled


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
