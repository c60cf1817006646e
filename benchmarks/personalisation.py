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

import hashlib
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pandas as pd
import torch
from common import Bar, Report, parse
from many_sites import Figures, Outcome, simulate
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

import privfed
from privfed.api import prepare
from privfed.config import Config
from privfed.data.columns import Numeric
from privfed.data.files import find_file
from privfed.data.records import SiteData, keyed_fraction, public_split_key
from privfed.data.tables import Table
from privfed.doors import Split, few, split
from privfed.evaluation import fraction_hurt, paired, spread

BARS = (
    Bar("heart: FedAvg as published, distance of the intervals", at_most=0.0),
    Bar("heart: best personalised, chosen on validation", at_least=0.735),
    Bar("heart: ε = 5, δ = 1e-3, shared noise, common model", at_least=0.700),
    Bar("ist-hospitals: best personalised, chosen on validation − pooled", at_least=-0.002),
    Bar("ist-hospitals: ε = 1, shared noise, personal", at_least=0.770),
    Bar("largest difference from privfed.run", at_most=0.02),
)
EXAMPLES = Path(__file__).parent.parent / "examples"
DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None  # this measures no disk

Splits = dict[str, Split]
Values = list[float]

# What is searched

PERSONAL = {"personal_steps": (1, 5, 20), "personal_lr": (0.003, 0.01, 0.03, 0.1, 0.3)}
STEPS = {"local_steps": (1, 2, 5), "lr": (0.1, 0.3, 1.0, 3.0)}
META = {"inner_lr": (0.03, 0.1, 0.3, 1.0), "outer_lr": (0.3, 1.0, 3.0)}
HEADED = {"local_steps": (2, 5), "lr": (0.1, 0.3, 1.0)}
SPACES: dict[str, dict[str, tuple[int | float, ...]]] = {
    "fedavg": STEPS | PERSONAL,
    "fedprox": STEPS | PERSONAL | {"regularization": (0.01, 0.1, 1.0), "lr": (0.1, 0.3, 1.0)},
    "scaffold": STEPS | PERSONAL | {"lr": (0.1, 0.3, 1.0)},
    "fedsgd": {"lr": (0.3, 1.0, 3.0), "momentum": (0.0, 0.5, 0.9)} | PERSONAL,
    "mr-mtl": STEPS | PERSONAL | {"regularization": (0.1, 0.3, 1.0, 3.0), "lr": (0.1, 0.3)},
    "ditto": STEPS | PERSONAL | {"regularization": (0.1, 0.3, 1.0, 3.0)},
    "pfedme": PERSONAL | {"regularization": (1.0, 3.0), "lr": (0.1, 0.3), "inner_lr": (0.1, 0.3)},
    "reptile": {"inner_steps": (1, 2, 5), "inner_lr": (0.1, 0.3, 1.0, 3.0)} | PERSONAL,
    "fomaml": {"inner_steps": (1, 2)} | META | PERSONAL,
    "maml": {"inner_steps": (1, 2)} | META | PERSONAL,
    "per-fedavg": {"local_steps": (1, 2)} | META | PERSONAL,
    "meta-sgd": META | {"personal_steps": (1, 5, 20)},
    "anil": {"inner_steps": (1, 2)} | META | PERSONAL,
    "fedrep": {"head_steps": (2, 5), "head_lr": (0.1, 0.3, 1.0), "body_lr": (0.1, 0.3, 1.0)} | PERSONAL,
    "fedper": HEADED | PERSONAL,
    "fedbabu": HEADED | PERSONAL,
    "local-norm": HEADED | PERSONAL,
    "local": {"steps": (20, 50, 100, 200), "lr": (0.03, 0.1, 0.3, 1.0)},
}
NEEDS = {name: ("model.hidden=[{width}]",) for name in ("anil", "fedrep", "fedper", "fedbabu")}
NEEDS["local-norm"] = ("model.hidden=[{width}]", "model.norm=group")
FEW = ("fedavg", "scaffold", "mr-mtl", "ditto", "pfedme", "maml", "fedrep", "local")
BEFORE = "fedavg, not adapted"
POOLED = "pooled"


def candidates(method: str, number: int, fixed: Mapping[str, int | float]) -> list[dict[str, int | float]]:
    """``number`` different settings of a method, the same whenever it is asked for."""
    space = {key: (fixed[key],) if key in fixed else values for key, values in SPACES[method].items()}
    number = min(number, math.prod(len(values) for values in space.values()))
    chance = np.random.default_rng(list(method.encode()))
    found: list[dict[str, int | float]] = []
    while len(found) < number:
        one = {key: values[chance.integers(len(values))] for key, values in space.items()}
        if one not in found:
            found.append(one)
    return found


# The federations


@dataclass(frozen=True)
class Federation:
    """Sites, and how they are measured.

    Attributes:
        settings: overrides on the defaults.
        width: of the hidden layer, where a method needs one.
        rounds: of every method.
        tested: (config, seed) → what is trained on and what measured in the end.
        checked: the same for each fold of the search, test records left out.
        methods: those that run here.
        fixed: settings that are not searched.
        hidden: every method runs on the hidden layer.
        pooled: logistic regression on all records is a row too.
        one_search: with the first seed, for all of them: no record that it sees is measured with any seed.
        data: what is public about the records, where there are more than two classes.
    """

    name: str
    settings: tuple[str, ...]
    width: int
    rounds: int
    tested: Callable[[Config, int], tuple[Splits, Splits | None]]
    checked: Callable[[Config, int], list[tuple[Splits, Splits | None]]]
    methods: tuple[str, ...]
    fixed: Mapping[str, int | float] = field(default_factory=dict)
    hidden: bool = False
    pooled: bool = True
    one_search: bool = False
    data: Table | None = None

    def config(self, method: str, seed: int, settings: Mapping[str, int | float]) -> Config:
        needs = (f"model.hidden=[{self.width}]",) if self.hidden else ()
        needs += tuple(text.format(width=self.width) for text in NEEDS.get(method, ()))
        own = [f"method.{key}={value}" for key, value in settings.items()]
        common = [f"rounds={self.rounds}", f"seed={seed}", "privacy.unit=none", "privacy.sample_rate=1.0"]
        config = privfed.load_config(None, [*self.settings, *common, f"method.name={method}", *needs, *own])
        return config if self.data is None else msgspec.structs.replace(config, data=self.data)


def with_parts(config: Config, train: SiteData, test: SiteData, seed: int) -> Split:
    return few(config, Split(train, test, {}), len(train), public_split_key(seed))  # it deals out the parts


def folds_of(splits: Splits, config: Config, seed: int, folds: Sequence[int]) -> list[tuple[Splits, Splits | None]]:
    """Quarters of each site's training records, by a keyed hash, in the place of its test records."""
    found = []
    for fold in folds:
        part: Splits = {}
        for name, whole in splits.items():
            place = keyed_fraction(whole.train.units, key=public_split_key(seed), label="validation")
            held = np.floor(4 * place) == fold
            part[name] = with_parts(config, whole.train.rows(~held), whole.train.rows(held), seed)
        found.append((part, None))
    return found


def stroke_trial(column: str) -> Federation:
    text = (EXAMPLES / "ist.toml").read_text().replace('"HOSPNUM"', f'"{column}"')

    @cache
    def sites() -> dict[str, SiteData]:
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(text)
            file.flush()
            return privfed.load_config(file.name).data.load(seed=0).sites

    def whole(config: Config, seed: int) -> Splits:
        return {name: split(config, data, public_split_key(seed)) for name, data in sites().items()}

    return Federation(
        name="ist-hospitals" if column == "HOSPNUM" else "ist-countries",
        settings=("evaluation.metric=auroc",),
        width=16,
        rounds=20,
        tested=lambda config, seed: (whole(config, seed), None),
        checked=lambda config, seed: folds_of(whole(config, seed), config, seed, [0]),
        methods=tuple(SPACES) if column == "HOSPNUM" else FEW,
    )


@cache
def hearts() -> tuple[dict[str, SiteData], dict[str, np.ndarray]]:
    """The records by public ranges, in the files' order; and which of each hospital's are FLamby's test records."""
    sites = privfed.load_config(EXAMPLES / "heart.toml").data.load(seed=0).sites
    testing = {}
    for name, data in sites.items():
        # flamby/datasets/fed_heart_disease/dataset.py at edacf54d
        rows, many = np.arange(len(data)), int(data.targets.bincount(minlength=2).min()) > 2
        labels = data.targets if many else None
        held = train_test_split(rows, test_size=1.0 - 0.66, train_size=0.66, random_state=43, stratify=labels)[1]
        testing[name] = np.isin(rows, held)
    return sites, testing


@cache
def flamby_hearts() -> Splits:
    """FLamby's 13 inputs, each standardised by the hospital's own training records as FLamby does: not private.

    An input that is constant there is divided by 1e-9, so that a test record with another value is far outside: this is
    why Switzerland's published accuracy is what it is.
    """
    sites, testing = hearts()
    config = privfed.load_config(EXAMPLES / "heart.toml")
    frames = {}
    for name, file in config.data.files.items():  # type: ignore[union-attr]  # it is a table
        frame = pd.read_csv(find_file(file), header=None, na_values="?").drop(columns=[10, 11, 12]).dropna()
        assert np.array_equal(frame[13] > 0, sites[name].targets.numpy() > 0)  # the same records in the same order
        frames[name] = frame.drop(columns=13)
    encoded = pd.get_dummies(pd.concat(frames), columns=[2, 6], drop_first=True).astype(np.float32)
    found: Splits = {}
    for name, data in sites.items():
        inputs = torch.from_numpy(encoded.loc[name].to_numpy())
        train = inputs[torch.from_numpy(~testing[name])]
        own = SiteData(data.ids, (inputs - train.mean(0)) / (train.std(0) + 1e-9), data.targets)
        found[name] = Split(own.rows(~testing[name]), own.rows(testing[name]), {})
    return found


def heart_disease() -> Federation:
    def whole(config: Config, seed: int) -> Splits:
        return {name: with_parts(config, one.train, one.test, seed) for name, one in flamby_hearts().items()}

    return Federation(
        name="heart",
        settings=("evaluation.metric=accuracy",),
        width=8,
        rounds=20,
        tested=lambda config, seed: (whole(config, seed), None),
        checked=lambda config, seed: folds_of(whole(config, seed), config, seed, range(4)),
        methods=tuple(SPACES),
    )


ADAPT, VALIDATION_WRITERS, SEARCH_WRITERS = 10, 100, 120


@cache
def writers() -> tuple[dict[str, SiteData], dict[str, SiteData]]:
    """Those of the official training and test images. 20 × 20 pixels, each block averaged to 8 × 8, within [−1, 1]."""
    with np.load(find_file("mnist_by_writer/mnist_by_writer.npz")) as stored:
        images, digits, writer, late = (stored[key] for key in ("x", "y", "writer", "official_test"))
    edges = np.arange(9) * 2.5
    overlap = np.minimum(edges[1:, None], np.arange(1, 21)) - np.maximum(edges[:-1, None], np.arange(20))
    pool = (np.maximum(0.0, overlap) / 2.5).astype(np.float32)
    small = np.einsum("ar,nrc,bc->nab", pool, images[:, 4:24, 4:24].astype(np.float32) / 127.5 - 1, pool, optimize=True)
    inputs, targets = torch.from_numpy(small.reshape(-1, 64)), torch.from_numpy(digits.astype(np.int64))
    everyone = SiteData(np.arange(len(digits), dtype=np.uint64), inputs, targets)
    names = [np.unique(writer[late == test]) for test in (False, True)]
    seen, unseen = ({f"writer-{name}": everyone.rows(writer == name) for name in some} for some in names)
    return seen, {name: data for name, data in unseen.items() if len(data) > ADAPT}


def digits() -> Federation:
    def train(config: Config, data: Mapping[str, SiteData], seed: int) -> Splits:
        return {
            name: with_parts(config, one, one.rows(np.zeros(len(one), dtype=bool)), seed) for name, one in data.items()
        }

    def adapting(config: Config, data: Mapping[str, SiteData], seed: int) -> Splits:
        """Ten records to adapt with, all others of the writer to measure on."""
        found: Splits = {}
        for name, one in data.items():
            place = keyed_fraction(one.ids, key=public_split_key(seed), label="few")
            chosen = place <= np.sort(place)[ADAPT - 1]
            found[name] = with_parts(config, one.rows(chosen), one.rows(~chosen), seed)
        return found

    def tested(config: Config, seed: int) -> tuple[Splits, Splits | None]:
        return train(config, writers()[0], seed), adapting(config, writers()[1], seed)

    def checked(config: Config, seed: int) -> list[tuple[Splits, Splits | None]]:
        seen = sorted(writers()[0].items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())
        held, some = dict(seen[:VALIDATION_WRITERS]), dict(seen[VALIDATION_WRITERS:][:SEARCH_WRITERS])
        return [(train(config, some, seed), adapting(config, held, seed))]

    return Federation(
        name="digits",
        settings=("evaluation.metric=accuracy",),
        width=64,
        rounds=30,
        tested=tested,
        checked=checked,
        methods=("fedavg", "reptile", "fomaml", "maml", "per-fedavg", "meta-sgd", "anil", "fedbabu", "fedrep", "local"),
        fixed={"personal_steps": 5},
        hidden=True,
        pooled=False,
        one_search=True,
        data=Table(
            file="",  # the records come from `writers`
            site="writer",
            label="digit",
            classes={str(digit): (str(digit),) for digit in range(10)},
            numeric=tuple(Numeric(name=f"x{place}", range=(0.0, 255.0)) for place in range(64)),
        ),
    )


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
        return f"{statistics.fmean(values):.4f}"
    return f"{statistics.fmean(values):.4f} ± {half_width(values):.4f}"


def half_width(values: Sequence[float]) -> float:
    return float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def add(report: Report, name: str, values: Sequence[float]) -> None:
    report.add(name, statistics.fmean(values), f"± {half_width(values):.2g}" if len(values) > 1 else "")


def table(federation: Federation, rows: Mapping[str, Sequence[Row]]) -> str:
    """Markdown: a line a method; figures are means over seeds, ± where it is the mean over sites."""
    plain, alone = rows[BEFORE], rows.get("local")
    lines = [
        f"**{federation.name}**, {federation.rounds} rounds, {len(plain)} seeds",
        "",
        "| | mean over sites | weighted | sd | worst decile | worse than FedAvg | worse than local |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, seeds in rows.items():
        over = [spread(list(row.after.values()), [row.weights[site] for site in row.after]) for row in seeds]
        found = [one for one in over if one is not None]
        hurt = [fraction_hurt(row.after, other.before) for row, other in zip(seeds, plain, strict=True)]
        worse = (
            [fraction_hurt(row.after, other.after) for row, other in zip(seeds, alone, strict=True)] if alone else []
        )
        cells = [
            mean_of([one.mean for one in found]),
            *(
                f"{statistics.fmean(getattr(one, key) for one in found):.3f}"
                for key in ("weighted_mean", "sd", "worst_decile")
            ),
            *(f"{statistics.fmean(h or 0.0 for h in some):.0%}" if some else "–" for some in (hurt, worse)),
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


def measure(report: Report, federation: Federation, kept: Rows, *, seeds: int, number: int) -> dict[str, list[Row]]:
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
    seeds, number = (1, 2) if options.quick else (5, 6)
    same_as_run(report, kept, quick=options.quick)

    rows = measure(report, heart_disease(), kept, seeds=seeds, number=number)
    adapted = [label for label in rows if label not in (BEFORE, POOLED, "local")]
    best_row(report, "heart", rows, adapted)
    others(report, "heart", rows, adapted)
    as_published(report, kept, seeds=seeds)
    private_hearts(report, kept, seeds=seeds)

    for column in ("HOSPNUM",) if options.quick else ("HOSPNUM", "COUNTRY"):
        federation = stroke_trial(column)
        rows = measure(report, federation, kept, seeds=seeds, number=number)
        there = [label for label in adapted if label in rows]
        best = best_row(report, federation.name, rows, there)
        label = f"{federation.name}: best personalised, chosen on validation"
        compare(report, f"{label} − pooled", means(rows[best]), means(rows[POOLED]))
        compare(report, f"{label} − local", means(rows[best]), means(rows["local"]))
        others(report, federation.name, rows, there)
    private_strokes(report, kept, seeds=seeds)

    rows = measure(report, digits(), kept, seeds=seeds, number=number)
    others(report, "digits", rows, ("reptile", "fomaml", "maml", "per-fedavg", "meta-sgd", "anil"))
    report.finish(options, BARS)


if __name__ == "__main__":
    main()
