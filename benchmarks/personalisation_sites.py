"""The federations of `personalisation.py`, what each method may be tuned over, and which records are for what."""

import hashlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import train_test_split

import privfed
from privfed.config import Config
from privfed.data.columns import Numeric
from privfed.data.files import find_file
from privfed.data.records import SiteData, keyed_fraction, public_split_key
from privfed.data.tables import Table
from privfed.doors import Split, few, split

EXAMPLES = Path(__file__).parent.parent / "examples"

Splits = dict[str, Split]

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
        tried: how many settings a method is searched over.
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
    tried: int = 6
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
        tried=16,  # of six, some methods' were all bad
        data=Table(
            file="",  # the records come from `writers`
            site="writer",
            label="digit",
            classes={str(digit): (str(digit),) for digit in range(10)},
            numeric=tuple(Numeric(name=f"x{place}", range=(0.0, 255.0)) for place in range(64)),
        ),
    )
