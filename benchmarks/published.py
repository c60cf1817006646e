"""Published results beside ours: breast cancer survival (FLamby), few-shot characters, Parkinson's disease, ratings.

- Fed-TCGA-BRCA: six regions, FLamby's own training and test patients, C-index, mean over regions; their figures are
  from their five seeds. Ours are `privfed.run` without privacy; seeds draw the batches (q = 0.5). Rates and rounds had
  the best mean C-index in three-fold cross-validation on the training patients, of a few rates for each optimiser and
  25 to 200 rounds. Test sets have 11 to 63 patients: differences of a few hundredths are no differences.
- Omniglot, 5-way 1-shot: 600 sites, each five characters of one alphabet with labels of its own; sites share drawings.
  Three alphabets are never trained on. There each class has one labelled image, all by one drawer, and the others are
  tested. Each way takes four gradients a round, and had the best of a few settings of rates for two alphabets that are
  never the unseen ones; see benchmarks/README.md.
- Parkinson's telemonitoring: 42 patients, each one a site; mean absolute error of the motor score.
- Ratings of 120 users, each one a site (made up from a public seed, by `examples/phones.py`: no licensed table comes
  with the toolkit): root mean squared error.

"±" is half of a 95 % interval over the seeds (Student t), of a difference the paired one.

Finds the records through PRIVFED_DATA (`privfed data list`). Each run's result is kept in `runs/published`: a benchmark
that was stopped goes on where it was, and any change of the code starts anew.

    PRIVFED_DATA=… python benchmarks/published.py [--quick] [--json FILE] [--check]
"""

import io
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from cells import HERE, Cells
from common import Bar, Report, parse
from torch import nn

import privfed
from privfed.config_io import decode
from privfed.data.files import find_file
from privfed.evaluation import paired

BARS = (
    Bar("TCGA-BRCA, ours: FedAdam, Cox: C-index", at_least=0.80),
    Bar("TCGA-BRCA, ours: FedAdam, Cox − FedAdam, hazards", at_most=0.02),
    Bar("Omniglot: meta-learned − FedAvg, both adapted, less half of its interval", at_least=0.0),
    Bar("Parkinson: personalised − global, plus half of its interval", at_most=0.0),
    Bar("Parkinson: personalised − local only, plus half of its interval", at_most=0.0),
)
Figures = dict[str, float]


def main() -> None:
    options = parse(__doc__)
    report = Report("published", packages=("torch", "pandas", "numpy"))
    cells, seeds = Cells(__file__), 2 if options.quick else 5
    torch.set_num_threads(1)
    survival(report, cells, seeds)
    parkinson(report, cells, seeds)
    ratings(report, cells, seeds)
    characters(report, cells, seeds, rounds=20 if options.quick else 50)
    report.finish(options, BARS)


def add(report: Report, name: str, values: list[float]) -> None:
    report.add(name, statistics.fmean(values), f"± {paired(values, [0.0] * len(values)).half_width:.2g}")


def difference(report: Report, name: str, ours: list[float], theirs: list[float], *, bound: str = "") -> None:
    gap = paired(ours, theirs)
    report.add(name, gap.mean, f"± {gap.half_width:.2g}")
    if bound:
        end = gap.mean - gap.half_width if bound == "less" else gap.mean + gap.half_width
        report.add(f"{name}, {bound} half of its interval", end)


def run(table: dict[str, Any]) -> Figures:
    """A run's figures, mean over its sites, and over those that were held out."""
    with tempfile.TemporaryDirectory() as scratch:
        done = privfed.run(decode(table), out=Path(scratch) / "run")
    if not done.summary.complete or done.summary.refusals:
        raise RuntimeError(f"the run did not complete: {done.summary.refusals}")
    utility = done.summary.utility
    found = {"global": utility.global_.mean, "personalised": utility.personalized.mean}
    found["local only"] = utility.local_only.mean
    if utility.unseen is not None:
        found |= {"unseen, global": utility.unseen.global_.mean, "unseen": utility.unseen.personalized.mean}
        found["unseen, local only"] = utility.unseen.local_only.mean
    return {name: value for name, value in found.items() if value is not None}


OPEN: dict[str, Any] = {"privacy": {"unit": "none", "sample_rate": 1.0}, "aggregation": {"kind": "plain"}}

# Survival

COX, HAZARDS = {"name": "cox", "event": "E"}, {"name": "survival", "event": "E", "bins": [730, 1460, 2555, 3650]}
SURVIVAL: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {  # task, server, rounds
    "FedAvg, Cox": (COX, {"name": "plain"}, 200),
    "FedAdam, Cox": (COX, {"name": "adam", "lr": 0.1}, 200),
    "FedAdam, hazards": (HAZARDS, {"name": "adam", "lr": 0.3}, 100),
}
THEIRS = {
    "Pooled Training": "pooled",
    "FedAvg": "FedAvg",
    "FedAdagrad": "FedAdagrad",
    "FedYogi": "FedYogi",
    "FedAdam": "FedAdam",
}


def survival(report: Report, cells: Cells, seeds: int) -> None:
    report.section(f"Fed-TCGA-BRCA: C-index, mean over six regions, {seeds} seeds")
    theirs = pd.concat([pd.read_csv(find_file(f"flamby_baselines/tcga_seed{seed}.csv")) for seed in range(42, 47)])
    theirs = theirs[theirs["Test"].str.startswith("client_test_")]
    for method, shown in THEIRS.items():
        mine = theirs[theirs["Method"].str.replace("100", "").str.strip() == method]
        if len(mine):
            by_seed = mine.groupby("seed")["Metric"].mean().tolist()
            add(report, f"TCGA-BRCA, FLamby: {shown}: C-index", by_seed)
    found = {way: [cells(regions, way, seed) for seed in range(seeds)] for way in SURVIVAL}
    for way, figures in found.items():
        add(report, f"TCGA-BRCA, ours: {way}: C-index", [one["global"] for one in figures])
    add(report, "TCGA-BRCA, ours: local only, Cox: C-index", [one["local only"] for one in found["FedAdam, Cox"]])
    ours, other = ([one["global"] for one in found[way]] for way in ("FedAdam, Cox", "FedAdam, hazards"))
    difference(report, "TCGA-BRCA, ours: FedAdam, Cox − FedAdam, hazards", ours, other)


def regions(way: str, seed: int) -> Figures:
    task, server, rounds = SURVIVAL[way]
    patients = pd.read_csv(find_file("tcga_brca/brca.csv"), dtype=str).merge(
        pd.read_csv(find_file("tcga_brca/train_test_split.csv"), dtype=str), on="pid"
    )
    patients["region"] = patients["fold2"].str.split("_").str[1]
    patients["test"] = patients["fold2"].str.startswith("test").astype(int).astype(str)
    patients["E"] = patients["E"].astype(float).astype(int).astype(str)
    inputs = [name for name in patients.columns if name not in ("pid", "E", "T", "fold", "fold2", "region", "test")]
    ranges: dict[str, dict[str, Any]] = {name: {"range": [-2, 2]} for name in inputs}  # 0 or 1, as they stand
    ranges["age_at_index"] = {"range": [26, 90]}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "patients.csv"
        patients.to_csv(file, index=False)
        return run(
            {
                "seed": seed,
                "rounds": rounds,
                "task": task,
                "data": {
                    "source": "csv",
                    "file": str(file),
                    "site": "region",
                    "label": "T",
                    "test": "test",
                    "id": "pid",
                    "numeric": [{"name": name, **settings} for name, settings in ranges.items()],
                },
                "method": {
                    "name": "fedavg",
                    "local_steps": 5,
                    "lr": 0.5 if server["name"] == "plain" else 0.1,
                    "personal_steps": 1,
                },
                "server": server,
                "evaluation": {"every": rounds, "local_steps": 200, "local_lr": 0.1},
                **OPEN,
                "privacy": {"unit": "none", "sample_rate": 0.5},
            }
        )


# Parkinson's disease


def parkinson(report: Report, cells: Cells, seeds: int) -> None:
    report.section(f"Parkinson's telemonitoring: mean absolute error of the motor score, 42 patients, {seeds} seeds")
    found = [cells(patients, seed) for seed in range(seeds)]
    own, common, alone = ([one[name] for one in found] for name in ("personalised", "global", "local only"))
    for name, values in (("personalised", own), ("global", common), ("local only", alone)):
        add(report, f"Parkinson: {name}: MAE", values)
    difference(report, "Parkinson: personalised − global", own, common, bound="plus")
    difference(report, "Parkinson: personalised − local only", own, alone, bound="plus")


def patients(seed: int) -> Figures:
    """The example, with a hidden layer and Reptile, without privacy.

    Alone, a patient's model takes as many steps as the rounds and the adaptation have together: 40 × 20 + 1600. The
    rates (of .3, .5 and .7, for each), the layer and the rounds were chosen on training records of another split.
    """
    import tomllib

    table = tomllib.loads((HERE / "examples" / "parkinsons.toml").read_text())
    steps = {"inner_steps": 20, "inner_lr": 0.5, "personal_steps": 1600, "personal_lr": 0.7}
    table["rounds"], table["model"], table["method"] = 40, {"hidden": [16]}, {"name": "reptile", **steps}
    table["evaluation"] |= {"every": 40, "local_steps": 2400, "local_lr": 0.5}
    return run({**table, "seed": seed, **OPEN})


# Ratings


def ratings(report: Report, cells: Cells, seeds: int) -> None:
    report.section(f"ratings of 120 users, made up: root mean squared error, {seeds} seeds")
    found = [cells(phones, seed) for seed in range(seeds)]
    for name in ("global", "personalised", "local only"):
        add(report, f"ratings: {name}: RMSE", [one[name] for one in found])


def phones(seed: int) -> Figures:
    """`examples/phones.toml` without privacy."""
    import tomllib

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "ratings.csv"
        subprocess.run([sys.executable, str(HERE / "examples" / "phones.py"), str(file)], check=True)
        table = tomllib.loads((HERE / "examples" / "phones.toml").read_text())
        table["data"]["file"] = str(file)
        table["evaluation"]["every"] = table["rounds"]
        return run({**table, "seed": seed, **OPEN})


# Characters

SIDE, WAYS, DRAWERS = 14, 5, 20
INK = 21.0  # the mean of all pixels, 0 to 255: inputs of mean 0
SEARCHED_ON = 2  # the first alphabets: rates were chosen by what became of them, so that they are never the unseen ones
SITES, NEW = 600, 200  # sites that train, and unseen ones
CHARACTERS: dict[str, dict[str, Any]] = {
    "FedAvg": {"name": "fedavg", "local_steps": 4, "lr": 1.0, "personal_lr": 0.8},
    "FOMAML": {"name": "fomaml", "inner_steps": 3, "inner_lr": 0.3, "outer_lr": 1.0, "personal_lr": 0.3},
    "MAML": {"name": "maml", "inner_steps": 3, "inner_lr": 0.3, "outer_lr": 1.0, "personal_lr": 0.4},
}


def characters(report: Report, cells: Cells, seeds: int, rounds: int) -> None:
    report.section(
        f"Omniglot, 5-way 1-shot on characters of unseen alphabets: accuracy, {seeds} seeds, {rounds} rounds"
    )
    runs = {way: [cells(few_shot, way, seed, rounds) for seed in range(seeds)] for way in CHARACTERS}
    found = {way: [one["unseen"] for one in figures] for way, figures in runs.items()}
    for way, values in found.items():
        add(report, f"Omniglot: {way}, adapted: accuracy", values)
    alone = [one["unseen, local only"] for one in runs["FedAvg"]]
    add(report, "Omniglot: local only, from a start that nobody trained: accuracy", alone)
    difference(report, "Omniglot: FOMAML − FedAvg, both adapted", found["FOMAML"], found["FedAvg"])
    difference(report, "Omniglot: meta-learned − FedAvg, both adapted", found["MAML"], found["FedAvg"], bound="less")


def few_shot_network(inputs: int, outputs: int) -> nn.Module:
    """196-64-64-5 with each layer's values normalised; it begins by preferring no class."""
    layers: list[nn.Module] = []
    for width in (64, 64):
        layers += [nn.Linear(inputs, width), nn.LayerNorm(width, elementwise_affine=False), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-3].weight)  # type: ignore[arg-type]
        nn.init.zeros_(layers[-3].bias)  # type: ignore[arg-type]
        inputs = width
    last = nn.Linear(inputs, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def drawings() -> tuple[list[tuple[str, str]], np.ndarray]:
    """(alphabet, character) in order; uint8[characters, 20 drawers, side, side], ink 255."""
    from PIL import Image

    found: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for part in ("small1", "small2"):
        with zipfile.ZipFile(find_file(f"omniglot/images_background_{part}.zip")) as archive:
            for name in archive.namelist():
                if not name.endswith(".png") or "__MACOSX" in name:
                    continue
                _, alphabet, character, file = name.split("/")
                image = Image.open(io.BytesIO(archive.read(name))).convert("L").resize((SIDE, SIDE), Image.BILINEAR)
                drawer = int(file.split("_")[1].split(".")[0])
                found.setdefault((alphabet, character), {})[drawer] = 255 - np.asarray(image)
    names = sorted(found)
    return names, np.stack([np.stack([found[name][drawer] for drawer in range(1, 21)]) for name in names])


def few_shot(way: str, seed: int, rounds: int) -> Figures:
    """Labels are a site's own: with few sites they would be learned by heart."""
    names, images = drawings()
    randomness = np.random.default_rng(seed)
    alphabets = sorted({alphabet for alphabet, _ in names})
    unseen = randomness.choice(alphabets[SEARCHED_ON:], 3, replace=False).tolist()
    known = [alphabet for alphabet in alphabets if alphabet not in unseen]
    x, y, site, test, held = [], [], [], [], []
    for number in range(SITES + NEW):
        new = number >= SITES
        pool = unseen if new else known
        mine = [at for at, (name, _) in enumerate(names) if name == pool[number % len(pool)]]
        # Unseen: one image a class to adapt with, all of one drawer, who comes first. Else a fifth of them is to test
        drawers = randomness.permutation(DRAWERS)
        shown = np.arange(DRAWERS) == 0
        for label, at in enumerate(randomness.choice(mine, WAYS, replace=False)):
            x.append(images[at][drawers])
            y.append(np.full(DRAWERS, label))
            site.append(np.full(DRAWERS, f"site {number:03d}"))
            test.append(~shown if new else np.arange(DRAWERS) % 5 == 0)
        if new:
            held.append(f"site {number:03d}")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "characters.npz"
        arrays = {"x": x, "y": y, "site": site, "test": test}
        np.savez(file, **{name: np.concatenate(values) for name, values in arrays.items()})
        return run(
            {
                "seed": seed,
                "rounds": rounds,
                "data": {
                    "source": "arrays",
                    "file": str(file),
                    "site": "site",
                    "test": "test",
                    "labels": [f"character {label + 1}" for label in range(WAYS)],
                    "range": [0, 255],
                    "typical": INK,
                },
                "model": {"name": "factory", "factory": "published:few_shot_network"},
                "method": {"personal_steps": 30, **CHARACTERS[way]},
                "server": {"name": "adam", "lr": 0.01, "tau": 1e-4},
                "evaluation": {"every": rounds, "local_steps": 30, "local_lr": 0.8, "unseen_sites": held},
                "simulation": {"engine": "cohort"},
                **OPEN,
                "privacy": {"unit": "none", "sample_rate": 0.4},
            }
        )


if __name__ == "__main__":
    main()
