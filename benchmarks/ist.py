"""Real hospitals: the stroke trial at ε = 8 against what pooling, no privacy and no federation reach; heart disease.

Hyper-parameters of the local-only baseline are chosen on a validation part of each hospital's own training records.
Finds the records through PRIVFED_DATA (`privfed data describe ist`).

    PRIVFED_DATA=… python benchmarks/ist.py [--quick] [--json FILE] [--check]
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import Bar, Report, parse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import privfed
from privfed.api import prepare
from privfed.data.records import SiteData, keyed_fraction, public_split_key

BARS = (
    Bar("privfed run examples/ist.toml, whole command", at_most=180.0),
    Bar("its memory", at_most=2.0),
    Bar("ε = 8, masked: AUROC, mean over hospitals and seeds", at_least=0.755),
    Bar("privfed run examples/heart.toml, whole command", at_most=60.0),
)
EXAMPLES = Path(__file__).parent.parent / "examples"


def main() -> None:
    options = parse(__doc__)
    report = Report("ist", packages=("torch", "opacus", "scikit-learn", "pandas"))
    seeds = 1 if options.quick else 5

    report.section("the commands")
    for name in ("ist", "heart"):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "privfed", "run", str(EXAMPLES / f"{name}.toml"), "--out", f"{folder}/run"]
            subprocess.run(command, check=True, capture_output=True)
        report.add(f"privfed run examples/{name}.toml, whole command", time.perf_counter() - started, "s")
        if name == "ist":
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
            report.add("its memory", peak / 2**30, "GiB")

    report.section(
        f"49 hospitals, dead or dependent at six months: AUROC, mean over hospitals, {seeds} seeds (test split)"
    )
    rows: dict[str, list[float]] = {}
    for seed in range(seeds):
        common = [f"seed={seed}", "evaluation.every=20"]
        private = privfed.load_config(EXAMPLES / "ist.toml", common)
        clear = privfed.load_config(EXAMPLES / "ist.toml", [*common, "privacy.unit=none"])
        for label, config in (("ε = 8, masked", private), ("no privacy, federated", clear)):
            with tempfile.TemporaryDirectory() as folder:
                utility = privfed.run(config, out=Path(folder) / "run").summary.utility
            rows.setdefault(f"{label}: AUROC, mean over hospitals and seeds", []).append(utility.global_.mean or 0.0)
            rows.setdefault(f"{label}: worst decile", []).append(utility.global_.worst_decile or 0.0)
            rows.setdefault(f"{label}: personalized", []).append(utility.personalized.mean or 0.0)
        for label, score in baselines(prepare(clear).data.sites, seed).items():
            rows.setdefault(label, []).append(score)
    for label, values in rows.items():
        report.add(label, statistics.fmean(values))
    report.note("pooled and local-only: scikit-learn's logistic regression, C chosen on validation records only")
    report.finish(options, BARS)


def baselines(sites: dict[str, SiteData], seed: int) -> dict[str, float]:
    """AUROC, mean over hospitals: all records in one place, and every hospital alone, both without privacy."""
    train, validation, test = {}, {}, {}
    for name, data in sites.items():
        held = keyed_fraction(data.ids, key=public_split_key(seed), label="test") < 0.25
        checked = keyed_fraction(data.ids, key=public_split_key(seed), label="validation") < 0.25
        test[name], validation[name] = data.rows(held), data.rows(~held & checked)
        train[name] = data.rows(~held & ~checked)
    both = {
        name: (
            np.concatenate([train[name].inputs.numpy(), validation[name].inputs.numpy()]),
            np.concatenate([train[name].targets.numpy(), validation[name].targets.numpy()]),
        )
        for name in sites
    }
    strengths = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

    def fit(inputs: np.ndarray, targets: np.ndarray, strength: float) -> LogisticRegression | None:
        return LogisticRegression(C=strength, max_iter=500).fit(inputs, targets) if len(set(targets)) > 1 else None

    def score(model: LogisticRegression | None, data: SiteData) -> float:
        targets = data.targets.numpy()
        if model is None or len(set(targets)) < 2:
            return float("nan")
        return float(roc_auc_score(targets, model.decision_function(data.inputs.numpy())))

    alone = []
    for name in sites:
        scores = {
            c: score(fit(train[name].inputs.numpy(), train[name].targets.numpy(), c), validation[name])
            for c in strengths
        }
        best = max(strengths, key=lambda c: -1.0 if np.isnan(scores[c]) else scores[c])
        alone.append(score(fit(*both[name], best), test[name]))
    pooled = fit(np.concatenate([x for x, _ in both.values()]), np.concatenate([y for _, y in both.values()]), 1.0)
    return {
        "pooled, no privacy: AUROC": float(np.nanmean([score(pooled, test[name]) for name in sites])),
        "local only, no privacy, tuned on validation: AUROC": float(np.nanmean(alone)),
    }


if __name__ == "__main__":
    main()
