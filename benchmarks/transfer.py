"""Transfer: the handwriting of one population (hsf 0, census takers) to another (hsf 4, pupils), by target records.

The source is a network trained on 1,000 or 8,000 digits of hsf 0, in one place and without privacy: public. It is
trained to its end (the epochs were chosen on other records of hsf 0), so that what more of the source's records would
give does not pass for transfer. The target is ten sites of pupils with 50 or 200 training records in all. Every way is
`privfed.run`: without privacy, and at ε = 4 for a record, with noise in shares (the weighted objective takes its steps
at the site, so its noise is local). On 3,000 other records of the same sites: accuracy; each seed draws other writers.
"±" is half of a 95 % interval over the seeds (Student t), for differences the paired one.

Rates and rounds were searched on half of the pupils; the other half is measured, with ten seeds: that number was fixed
before. "best transfer" is the way with the best mean, named: with five ways to choose from that is a small advantage,
so all stand beside it.

Finds the records through PRIVFED_DATA (`privfed data describe mnist-by-writer`). Each run's result is kept in
`runs/transfer`: a benchmark that was stopped goes on where it was, and any change of the code starts anew.

    PRIVFED_DATA=… python benchmarks/transfer.py [--quick] [--json FILE] [--check]
"""

import hashlib
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import HERE, Cells
from common import Bar, Report, parse
from safetensors.torch import save_file

import privfed
from privfed.config_io import decode
from privfed.data.files import find_file
from privfed.evaluation import paired
from privfed.models import MLP, Inputs

SOURCES, SITES, TESTS = (1000, 8000), 10, 300  # the last: of each site
HIDDEN = (64, 32)
EPOCHS = 100  # of a source
WAYS: dict[str, dict[str, Any]] = {
    "target alone": {},
    "all parameters, from the base on": {"train": "all"},
    "frozen base, new steps of the head": {"train": "last"},
    "partial unfreezing, two layers": {"train": "last", "layers": 2},
    "low rank, 4": {"train": "low-rank", "rank": 4},
    "weighted objective": {"train": "all"},
}
SETTINGS = {  # rate and rounds
    "no privacy": {
        "target alone": (0.1, 40),
        "all parameters, from the base on": (0.03, 40),
        "frozen base, new steps of the head": (0.03, 40),
        "partial unfreezing, two layers": (0.03, 40),
        "low rank, 4": (0.03, 40),
        "weighted objective": (0.03, 100),
    },
    # The noise of a mean over a quarter of the records is four times as large: rates of a transfer fall with them
    "ε = 4": {
        "target alone": (0.4, 20),
        "all parameters, from the base on": (0.08, 5),
        "frozen base, new steps of the head": (0.08, 5),
        "partial unfreezing, two layers": (0.08, 5),
        "low rank, 4": (0.2, 5),
        "weighted objective": (0.05, 20),
    },
}
TRANSFER = tuple(way for way in WAYS if way != "target alone")
BARS = tuple(
    Bar(
        f"source {size}, {records} records, {privacy}: best transfer − {other}, less half of its interval", at_least=0.0
    )
    for size in SOURCES
    for records in (50, 200)
    for privacy in ("no privacy", "ε = 4")
    for other in ("target alone", "source alone")
)


def main() -> None:
    options = parse(__doc__)
    report = Report("transfer", packages=("torch", "opacus", "numpy"))
    cells, seeds = Cells(__file__), 2 if options.quick else 10
    torch.set_num_threads(1)
    for size in SOURCES:
        for records in (200,) if options.quick else (200, 50):
            for privacy in ("no privacy", "ε = 4"):
                compare(report, cells, size, records, privacy, seeds)
    report.finish(options, BARS)


def compare(report: Report, cells: Cells, size: int, records: int, privacy: str, seeds: int) -> None:
    head = f"source {size}, {records} records, {privacy}"
    report.section(f"{head}, at {SITES} sites: accuracy over {seeds} seeds")
    # The target alone knows no source: its runs are the same for both
    found = {
        way: [
            cells(accuracy, way, size if way in TRANSFER else SOURCES[0], records, privacy, seed)
            for seed in range(seeds)
        ]
        for way in WAYS
    }
    source = [cells(source_accuracy, size, records, seed) for seed in range(seeds)]
    for name, values in {"source alone": source, **found}.items():
        report.add(f"{head}: {name}", statistics.fmean(values), half(values, [0.0] * seeds))
    best = max(TRANSFER, key=lambda way: statistics.fmean(found[way]))
    report.note(f"the best transfer is: {best}")
    for other, theirs in (("target alone", found["target alone"]), ("source alone", source)):
        for way in TRANSFER:
            gap = paired(found[way], theirs)
            report.add(f"{head}: {way} − {other}", gap.mean, half(found[way], theirs))
            if way == best:
                name = f"{head}: best transfer − {other}, less half of its interval"
                report.add(name, gap.mean - gap.half_width)


def half(ours: list[float], theirs: list[float]) -> str:
    return f"± {paired(ours, theirs).half_width:.2g}"


def source_file(size: int) -> tuple[Path, str]:
    """The network of a source of ``size`` records, made once; and its SHA-256."""
    file = HERE / "runs" / "transfer" / f"source-{size}-{EPOCHS}-{'-'.join(map(str, HIDDEN))}.safetensors"
    if not file.exists():
        x, y, _ = written_by(0)
        chosen = np.random.default_rng(0).permutation(len(x))[:size]
        inputs, targets = torch.from_numpy(scaled(x[chosen])), torch.from_numpy(y[chosen])
        network = MLP(hidden=HIDDEN).build(Inputs(784), 10, seed=0)
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-4)
        draws = torch.Generator().manual_seed(0)
        for epoch in range(EPOCHS):
            for group in optimiser.param_groups:
                group["lr"] = 1e-3 * (1 - epoch / EPOCHS)
            for rows in torch.randperm(len(inputs), generator=draws).split(64):
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(network(inputs[rows]), targets[rows]).backward()
                optimiser.step()
        save_file({name: parameter.detach() for name, parameter in network.named_parameters()}, file)
    return file, hashlib.sha256(file.read_bytes()).hexdigest()


def written_by(population: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, labels and writers of the official training records of one population."""
    with np.load(find_file("mnist_by_writer/mnist_by_writer.npz")) as found:
        mine = (found["hsf"] == population) & ~found["official_test"].astype(bool)
        return found["x"][mine], found["y"][mine].astype(np.int64), found["writer"][mine]


def scaled(x: np.ndarray) -> np.ndarray:
    """As the arrays of a run are, with range [0, 255] and typical value 0."""
    return (x.reshape(len(x), -1).astype(np.float32) * (4 / 255)).astype(np.float32)


def target_file(folder: Path, records: int, seed: int, *, searching: bool = False) -> Path:
    """Ten sites of pupils, several writers each: a few training records, three hundred test records."""
    x, y, writer = written_by(4)
    mine = (np.random.default_rng(7).random(10_000) < 0.5)[writer] == searching
    x, y, writer = x[mine], y[mine], writer[mine]
    randomness = np.random.default_rng([seed, 1])
    site_of = dict(zip(randomness.permutation(np.unique(writer)).tolist(), range(10**6), strict=False))
    site = np.array([site_of[one] % SITES for one in writer.tolist()])
    rows, test, sites = [], [], []
    for number in range(SITES):
        mine = randomness.permutation(np.flatnonzero(site == number))[: records // SITES + TESTS]
        rows.append(mine)
        test.append(np.arange(len(mine)) < TESTS)
        sites.append(np.full(len(mine), number))
    chosen = np.concatenate(rows)
    file = folder / "target.npz"
    np.savez(file, x=x[chosen], y=y[chosen], site=np.concatenate(sites), test=np.concatenate(test).astype(np.uint8))
    return file


def public_file(size: int) -> tuple[Path, str]:
    """The weighted objective's source: the base's own records, 2,000 at most, at hand in every site."""
    file = HERE / "runs" / "transfer" / f"public-{size}.npz"
    if not file.exists():
        x, y, _ = written_by(0)
        chosen = np.random.default_rng(0).permutation(len(x))[:size][:2000]
        none = np.zeros(len(chosen), np.uint8)
        np.savez(file, x=x[chosen], y=y[chosen], site=none, test=none)
    return file, hashlib.sha256(file.read_bytes()).hexdigest()


def data(file: Path) -> dict[str, Any]:
    settings = {"labels": [str(digit) for digit in range(10)], "range": [0, 255], "typical": 0, "test": "test"}
    return {"source": "arrays", "file": str(file), "site": "site", **settings}


def accuracy(
    way: str,
    source: int,
    records: int,
    privacy: str,
    seed: int,
    settings: tuple[float, int] | None = None,
    searching: bool = False,
) -> float:
    """Over all test records of the sites, as many at each.

    Args:
        settings: rate and rounds, instead of those that the search gave.
    """
    lr, rounds = settings or SETTINGS[privacy][way]
    if settings is None and privacy != "no privacy" and way in TRANSFER:
        lr *= records / 200
    with tempfile.TemporaryDirectory() as scratch:
        table: dict[str, Any] = {
            "seed": seed,
            "rounds": rounds,
            "data": data(target_file(Path(scratch), records, seed, searching=searching)),
            "model": {"hidden": list(HIDDEN)},
            "method": {"name": "fedsgd", "lr": lr, "momentum": 0.5, "personal_steps": 1},
            "privacy": {"unit": "none", "sample_rate": 1.0},
            "aggregation": {"kind": "plain"},
            "evaluation": {"every": rounds, "local_steps": 1, "metric": "accuracy"},
        }
        if way != "target alone":
            base, sha256 = source_file(source)
            table["transfer"] = {**WAYS[way], "base": str(base), "sha256": sha256}
        if privacy != "no privacy":
            table["privacy"] = {
                "noise": "distributed",
                "target_epsilon": 4.0,
                "delta": 1e-4,
                "max_grad_norm": 1.0,
                "expected_batch_size": records / SITES,
                "colluders": 0,
            }
            table["aggregation"] = {"kind": "masked", "minimum_cohort": SITES}
        if way == "weighted objective":
            public, sha256 = public_file(source)
            table["transfer"] |= {"public_source": data(public), "source_sha256": sha256}
            table["method"] = {
                "name": "weighted",
                "local_steps": 1,
                "lr": lr,
                "source_rounds": rounds,
                "source_weight": 1.0,
            }
            if privacy != "no privacy":
                table["privacy"] |= {"noise": "local", "sample_rate": 1.0}
                table["privacy"].pop("colluders")
        run = privfed.run(decode(table), out=Path(scratch) / "run")
        if not run.summary.complete or run.summary.refusals:
            raise RuntimeError(f"the run did not complete: {run.summary.refusals}")
        mean = run.summary.utility.global_.mean
        assert mean is not None  # every site has test records
        return mean


def source_accuracy(size: int, records: int, seed: int) -> float:
    """The source's network as it is, on the same test records."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch, np.load(target_file(Path(scratch), records, seed)) as found:
        network = MLP(hidden=HIDDEN).build(Inputs(784), 10, seed=0)
        network.load_state_dict(load_file(source_file(size)[0]))
        tests = found["test"] == 1
        with torch.no_grad():
            said = network(torch.from_numpy(scaled(found["x"][tests]))).argmax(1).numpy()
        return float((said == found["y"][tests]).mean())


if __name__ == "__main__":
    main()
