"""Tuning alike: every method the same number of settings, judged on validation, then measured; and the tables of it."""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import torch
from common import Report
from many_sites import Figures, Outcome, simulate
from personalisation_sites import BEFORE, POOLED, Federation, Splits, candidates
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression

from privfed.evaluation import fraction_hurt, paired, spread

Values = list[float]

# Searching and measuring


@dataclass(frozen=True)
class Row:
    """One method with one seed: what was chosen, how it did in the search, and each site's figures."""

    settings: dict[str, int | float]
    validation: float
    before: Figures
    after: Figures
    weights: dict[str, float]


def figure_of(outcome: Outcome, label: str) -> float:
    over = spread(list((outcome.global_ if label == BEFORE else outcome.personalized).values()))
    assert over is not None
    return over.mean


@dataclass(frozen=True)
class Choice:
    """The settings that did best on validation, and how well."""

    settings: dict[str, int | float]
    validation: float


def searched(federation: Federation, label: str, seed: int, number: int) -> Choice:
    method = "fedavg" if label == BEFORE else label

    def score(settings: Mapping[str, int | float]) -> float:
        config = federation.config(method, seed, settings)
        scores = []
        for train, unseen in federation.checked(config, seed):
            outcome = simulate(config, train, unseen=unseen)
            scores.append(figure_of(outcome, label) if outcome.finite else -1.0)
        return statistics.fmean(scores)

    tried = [(score(settings), settings) for settings in candidates(method, number, federation.fixed)]
    validation, best = max(tried, key=lambda pair: pair[0])
    return Choice(best, validation)


def measured(federation: Federation, label: str, seed: int, chosen: Choice) -> Row:
    config = federation.config("fedavg" if label == BEFORE else label, seed, chosen.settings)
    train, unseen = federation.tested(config, seed)
    outcome = simulate(config, train, unseen=unseen)
    after = outcome.global_ if label == BEFORE else outcome.personalized
    return Row(chosen.settings, chosen.validation, outcome.global_, after, outcome.weights)


def pooled(federation: Federation, seed: int) -> Row:
    """One logistic regression on all sites' records, its strength chosen as the methods' settings are."""
    config = federation.config("fedavg", seed, {})

    def scores(parts: Splits, strength: float) -> Figures:
        inputs = np.concatenate([part.train.inputs.numpy() for part in parts.values()])
        targets = np.concatenate([part.train.targets.numpy() for part in parts.values()])
        model = LogisticRegression(C=strength, max_iter=1000).fit(inputs, targets)
        found = Figures()
        for name, part in parts.items():
            odds = torch.from_numpy(model.decision_function(part.test.inputs.numpy()))
            outputs = torch.stack([torch.zeros_like(odds), odds], 1)
            found[name] = config.task.score(outputs, part.test.targets, config.metric)
        return found

    def checked(strength: float) -> float:
        folds = [spread(list(scores(parts, strength).values())) for parts, _ in federation.checked(config, seed)]
        return statistics.fmean(fold.mean for fold in folds if fold is not None)

    tried = [(checked(strength), strength) for strength in (0.01, 0.03, 0.1, 0.3, 1.0)]
    validation, best = max(tried)
    whole, _ = federation.tested(config, seed)
    found = scores(whole, best)
    weights = {name: float(len(part.test)) for name, part in whole.items()}
    return Row({"strength": best}, validation, found, found, weights)


class Rows:
    """Rows by name, in a folder: what is there is not computed again."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, about: Any, make: Callable[[], Any], kind: Any) -> Any:
        """The row of this name, if it was made by the same settings; else a new one."""
        if self._folder is None:
            return make()
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        path = self._folder / f"{name}-{digest}.json"
        if path.exists():
            return msgspec.json.decode(path.read_bytes(), type=kind)
        row = make()
        half = path.with_suffix(".half")
        half.write_bytes(msgspec.json.encode(row))
        half.replace(path)
        return row


# The tables


def mean_of(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{statistics.fmean(values):.3f}"
    return f"{statistics.fmean(values):.3f} ± {half_width(values):.3f}"


def half_width(values: Sequence[float]) -> float:
    return float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def add(report: Report, name: str, values: Sequence[float]) -> None:
    report.add(name, statistics.fmean(values), f"± {half_width(values):.2g}" if len(values) > 1 else "")


def table(federation: Federation, rows: Mapping[str, Sequence[Row]]) -> str:
    """Markdown, as it stands in docs/methods.md: a line a method, the best first; means over seeds, ± over seeds."""
    plain, tuned, alone = rows[BEFORE], rows["fedavg"], rows.get("local")
    columns = ("mean", "worst", "weighted", "below common", "below alone", "− `fedavg`, fine-tuned")
    lines = [
        f"**{federation.name}**, {federation.rounds} rounds, {len(plain)} seeds",
        "",
        f"| | {' | '.join(columns)} |",
        "|" + "---|" * (1 + len(columns)),
    ]
    for label, seeds in sorted(rows.items(), key=lambda item: -statistics.fmean(means(item[1]))):
        over = [spread(list(row.after.values()), [row.weights[site] for site in row.after]) for row in seeds]
        found = [one for one in over if one is not None]
        hurt = [fraction_hurt(row.after, other.before) for row, other in zip(seeds, plain, strict=True)]
        worse = (
            [fraction_hurt(row.after, other.after) for row, other in zip(seeds, alone, strict=True)] if alone else []
        )
        gap = paired(means(seeds), means(tuned))
        cells = [
            mean_of([one.mean for one in found]),
            *(
                f"{statistics.fmean(getattr(one, key) for one in found):.3f}"
                for key in ("worst_decile", "weighted_mean")
            ),
            *(f"{statistics.fmean(h or 0.0 for h in some):.0%}" if some else "–" for some in (hurt, worse)),
            "" if label == "fedavg" else f"{gap.mean:+.3f} ± {gap.half_width:.3f}".replace("-", "−"),
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def means(rows: Sequence[Row]) -> Values:
    return [spread(list(row.after.values())).mean for row in rows]  # type: ignore[union-attr]


def worst(rows: Sequence[Row]) -> Values:
    return [spread(list(row.after.values())).worst_decile for row in rows]  # type: ignore[union-attr]


def compare(report: Report, name: str, ours: Values, theirs: Values) -> None:
    over = paired(ours, theirs)
    report.add(name, over.mean, f"± {over.half_width:.2g}, paired")


def measure(
    report: Report, federation: Federation, kept: Rows, *, seeds: int, most: int | None
) -> dict[str, list[Row]]:
    number = min(federation.tried, most or federation.tried)
    report.section(
        f"{federation.name}: mean over sites, {seeds} seeds, {number} settings a method, {federation.rounds} rounds"
    )
    rows: dict[str, list[Row]] = {}
    labels = (BEFORE, *federation.methods)
    if federation.pooled:
        about = [federation.name, federation.settings]
        rows[POOLED] = [
            kept.get(f"{federation.name}-{POOLED}-{seed}", [*about, seed], lambda s=seed: pooled(federation, s), Row)
            for seed in range(seeds)
        ]
    for label in labels:
        file = f"{federation.name}-{label.replace(', ', '-').replace(' ', '-')}"
        about = [federation.name, federation.settings, federation.rounds, federation.width, federation.hidden]
        about += [candidates("fedavg" if label == BEFORE else label, number, federation.fixed)]

        def choice(seed: int, which: str = label, file: str = file, about: Sequence[Any] = about) -> Choice:
            seed = 0 if federation.one_search else seed
            searching = partial(searched, federation, which, seed, number)
            return cast(Choice, kept.get(f"{file}-chosen-{seed}", [*about, seed], searching, Choice))

        rows[label] = [
            kept.get(
                f"{file}-{seed}",
                [*about, seed],
                lambda seed=seed, which=label, choice=choice: measured(federation, which, seed, choice(seed)),
                Row,
            )
            for seed in range(seeds)
        ]
        add(report, f"{federation.name}: {label}", means(rows[label]))
    print("\n" + table(federation, rows), flush=True)
    return rows


def best_of(rows: Mapping[str, Sequence[Row]], among: Sequence[str]) -> str:
    """The method with the best validation figure over the seeds: no test record has a say."""
    return max(among, key=lambda label: statistics.fmean(row.validation for row in rows[label]))


def best_row(report: Report, name: str, rows: Mapping[str, Sequence[Row]], among: Sequence[str]) -> str:
    best = best_of(rows, among)
    report.note(f"chosen on validation: {best}")
    add(report, f"{name}: best personalised, chosen on validation", means(rows[best]))
    return best


def others(report: Report, name: str, rows: Mapping[str, Sequence[Row]], among: Sequence[str]) -> None:
    """The best of the methods that are more than averaging and fine-tuning, against these two."""
    best = best_of(rows, [label for label in among if label != "fedavg"])
    report.note(f"chosen on validation without fedavg: {best}")
    compare(report, f"{name}: {best} − FedAvg + fine-tuning", means(rows[best]), means(rows["fedavg"]))
    compare(report, f"{name}: {best} − FedAvg + fine-tuning, worst decile", worst(rows[best]), worst(rows["fedavg"]))
