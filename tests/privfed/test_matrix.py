"""Method × unit × noise × oracle × aggregation: what has a guarantee runs and books it, what has none is refused.

Two rounds of each. By default a few runs in which every two settings that may meet do meet; `pytest --full` (or
`make test-full`) runs all of them.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import privfed
from privfed import api
from privfed.api import prepare
from privfed.architecture import build_model
from privfed.config import Config
from privfed.config_io import load_config
from privfed.errors import ConfigError
from privfed.parameters import to_vector
from privfed.privacy.events import Charge
from privfed.privacy.ledger import Ledger
from privfed.privacy.oracle.door import charge, group
from privfed.terms import split_id, whole_group


class Cell(NamedTuple):
    method: str
    unit: str
    noise: str
    engine: str
    aggregation: str


FIRST_ORDER = ("anil, first order", "meta-sgd, first order")
SECOND_ORDER = ("maml", "anil", "meta-sgd")
STEPS = ("fedavg", "fedprox", "scaffold", "mr-mtl", "ditto", "reptile", "fomaml", "per-fedavg", "pfedme", "fedrep")
STEPS += ("fedper", "fedbabu", "local-norm", *FIRST_ORDER)
METHODS = (*STEPS, *SECOND_ORDER, "fedsgd", "local")
CELLS = tuple(
    Cell(*cell)
    for cell in itertools.product(
        METHODS,
        ("none", "record", "patient", "client"),
        ("local", "distributed", "central"),
        ("opacus", "cohort"),
        ("masked", "homomorphic", "plain"),
    )
)


def runs(cell: Cell) -> bool:
    """Whether the table of the README and SECURITY.md gives a guarantee, written down once more."""
    if cell.method == "local" or cell.unit == "none":
        return True  # nothing leaves; nothing is claimed
    if cell.unit == "client":
        return cell.noise == "central" or (cell.noise == "distributed" and cell.aggregation != "plain")
    if cell.method in SECOND_ORDER or cell.noise == "central":
        return False
    if cell.noise == "distributed":  # noise in shares covers one answer, inside a sum that nobody sees through
        return cell.method == "fedsgd" and cell.aggregation != "plain"
    return True


def pairwise(cells: Sequence[Cell]) -> list[Cell]:
    """Few of the cells in which every pair of values that some cell has stands in one: the greedy choice, in order."""

    def pairs(cell: Cell) -> set[tuple[int, str, int, str]]:
        return {(a, cell[a], b, cell[b]) for a, b in itertools.combinations(range(len(cell)), 2)}

    of = {cell: pairs(cell) for cell in cells}
    missing, chosen = set[tuple[int, str, int, str]]().union(*of.values()), list[Cell]()
    while missing:
        best = max(cells, key=lambda cell: len(of[cell] & missing))  # the first of equals
        chosen.append(best)
        missing -= of[best]
    return chosen


ALLOWED = [cell for cell in CELLS if runs(cell)]
REFUSED = [cell for cell in CELLS if not runs(cell)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    if "cell" in metafunc.fixturenames:
        cells = ALLOWED if full else pairwise(ALLOWED)
        metafunc.parametrize("cell", cells, ids=["-".join(cell).replace(", ", "-").replace(" ", "-") for cell in cells])


SITES, RECORDS, SIGMA, ROUNDS = 5, 24, 2.0, 2


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five sites, 24 records each, two of a patient."""
    lines = ["site,patient,a,b,c,label"]
    for site in range(SITES):
        for row in range(RECORDS):
            label = (row // 2 + site) % 2
            lines.append(f"s{site},p{row // 2},{row % 5 + 3 * label},{(row * 7 + site) % 11},{row},{label}")
    path = tmp_path_factory.mktemp("matrix") / "records.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def config_of(cell: Cell, table: Path) -> Config:
    name, _, first = cell.method.partition(", ")
    columns = [{"name": column, "range": [0, 24]} for column in "abc"]
    settings: dict[str, Any] = {
        "data.source": "csv",
        "data.file": str(table),
        "data.site": "site",
        "data.patient": "patient",
        "data.label": "label",
        "method.name": name,
        "privacy.unit": cell.unit,
        "privacy.noise": cell.noise,
        "simulation.engine": cell.engine,
        "aggregation.kind": cell.aggregation,
        "model.norm": "group",
    }
    overrides = [f"{key}={value!r}" for key, value in settings.items()]
    inputs = ", ".join(f"{{name = '{c['name']}', range = {c['range']}}}" for c in columns)
    overrides += ["data.classes={no = ['0'], yes = ['1']}", f"data.numeric=[{inputs}]", "model.hidden=[4]"]
    overrides += [f"rounds={ROUNDS}", "evaluation.every=2", "evaluation.local_steps=1", "privacy.target_epsilon=1e6"]
    overrides += ["privacy.expected_batch_size=10", f"privacy.noise_multiplier={SIGMA}"]
    overrides += ["method.first_order=true"] if first else []
    overrides += ["method.personal_steps=1"] if name != "local" else ["method.steps=1"]
    return load_config(None, overrides)


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of a run has tests of its own."""
    monkeypatch.setattr(api, "render", lambda path: "")


def booked_a_round(config: Config) -> set[Charge] | None:
    """What one round is booked as where each site's noise is its own, from the method's declaration alone."""
    if config.privacy.unit.value not in ("record", "patient") or config.privacy.noise.value != "local":
        return None
    where, whole, rate = split_id(config), whole_group(config), config.privacy.rate
    per_draw = {query: SIGMA / math.sqrt(query.each) for query in config.method.queries()}
    return {charge(group(where, q.part, whole), rate, sigma, q.count) for q, sigma in per_draw.items()}


def test_a_cell_with_a_guarantee_runs_and_books_what_it_did(cell: Cell, table: Path, tmp_path: Path) -> None:
    config = config_of(cell, table)
    run = privfed.run(config, out=tmp_path / "run")
    summary = run.summary
    assert summary.complete and not summary.refusals and summary.sites == SITES
    assert all(set(report.measurements) == set(run.reports[0].invited) for report in run.reports if report.measurements)
    assert run.theta.isfinite().all()
    start = to_vector(build_model(config, prepare(config).schema))
    with Ledger(tmp_path / "run" / "ledger.db") as book:
        spends = [line.entry for line in book.entries() if line.entry.charges]
    if not config.method.sends:
        assert not spends and run.theta.equal(start)
        return
    assert all(len(report.contributed) == SITES for report in run.reports)
    assert not run.theta.equal(start)
    rounds = {(entry.site, entry.round): entry for entry in spends}  # a settlement takes the place of its reserve
    assert len(rounds) == SITES * ROUNDS
    declared = booked_a_round(config)
    for entry in rounds.values():
        if declared is not None:
            assert set(entry.charges) == declared
        else:  # one vector or one sum, whatever it was made of
            assert [charge.count for charge in entry.charges] == [1]
    claimed = config.privacy.unit.value != "none"
    assert (summary.privacy.epsilon.max is not None and math.isfinite(summary.privacy.epsilon.max)) == claimed


def test_a_cell_without_a_guarantee_is_refused_with_the_reason(table: Path, request: pytest.FixtureRequest) -> None:
    for cell in REFUSED if request.config.getoption("--full") else pairwise(REFUSED):
        with pytest.raises(ConfigError) as refusal:
            prepare(config_of(cell, table))
        told = str(refusal.value)
        assert cell.noise in told and (cell.unit in told or cell.aggregation in told), (cell, told)


def test_the_pairs_are_all_there_and_the_same_every_time() -> None:
    chosen = pairwise(ALLOWED)
    assert chosen == pairwise(ALLOWED) and set(chosen) <= set(ALLOWED)
    for a, b in itertools.combinations(range(5), 2):
        assert {(cell[a], cell[b]) for cell in chosen} == {(cell[a], cell[b]) for cell in ALLOWED}
