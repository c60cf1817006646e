"""The shipped examples: the counts that others report for the same files, and no input that knows the outcome."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from privfed import config_io
from privfed.data.files import DATA_FOLDER, find_file
from privfed.data.tables import Table
from privfed.errors import DataError
from privfed.study import cells, load_study

EXAMPLES = Path(__file__).parents[2] / "examples"


def data_of(name: str) -> Table:
    data = config_io.load_config(EXAMPLES / name).data
    assert isinstance(data, Table)
    return data


def needs(data: Table) -> None:
    for file in [data.file] if data.file else data.files.values():
        try:
            find_file(file)
        except DataError:
            folder = os.environ.get(DATA_FOLDER)
            pytest.skip(f"{file} is not in {folder if folder else f'data/, and {DATA_FOLDER} is not set'}")


STUDIES = sorted(EXAMPLES.glob("*_study.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_study_is_of_runs_that_could_be(path: Path) -> None:
    todo = cells(load_study(path), path.parent)
    assert len(todo) == 60
    for cell in todo:
        assert cell.config.method.guarantee(cell.config.privacy.unit, cell.config.privacy.noise) is None


@pytest.mark.parametrize("path", sorted({*EXAMPLES.glob("*.toml")} - {*STUDIES}), ids=lambda path: path.name)
def test_every_example_reads_and_reads_back(path: Path) -> None:
    config = config_io.load_config(path)
    assert config_io.decode(tomllib.loads(config_io.to_toml(config))) == config


def test_heart_has_the_counts_of_flamby() -> None:
    data = data_of("heart.toml")
    needs(data)
    sites = data.load(seed=0)
    # du Terrail et al. 2022 (FLamby), Fed-Heart-Disease: records without a missing value among the inputs
    counts = {"cleveland": 303, "hungary": 261, "switzerland": 46, "veterans": 130}
    assert {name: len(records) for name, records in sites.sites.items()} == counts
    assert len(sites.inputs) == 8 + 4 + 3 and not sites.simulated


def test_ist_has_its_large_hospitals() -> None:
    data = data_of("ist.toml")
    needs(data)
    sites = data.load(seed=0)
    assert len(sites.sites) == 49 and min(map(len, sites.sites.values())) >= 100
    dead_or_dependent = sum(int(records.targets.sum()) for records in sites.sites.values())
    assert 0.5 < dead_or_dependent / sum(map(len, sites.sites.values())) < 0.75


def test_shared_noise_runs_on_the_same_inputs_as_ist() -> None:
    shared = config_io.load_config(EXAMPLES / "ist_shared_noise.toml")
    assert shared.data == data_of("ist.toml")
    assert (shared.privacy.noise.value, shared.privacy.target_epsilon) == ("distributed", 1.0)
    assert shared.method.guarantee(shared.privacy.unit, shared.privacy.noise) is None


def test_ist_uses_baseline_columns_only() -> None:
    # D*, F*, and what is derived from them were recorded after the treatment: they hold the outcome
    names = {column.name for column in data_of("ist.toml").columns}
    assert names and all(name in {"AGE", "SEX", "STYPE"} or name.startswith("R") for name in names)
    assert not names & {"RXASP", "RXHEP", "RDATE"}  # treatment given, and a date


def test_a_missing_example_file_says_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_FOLDER, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"Edinburgh DataShare.*PRIVFED_DATA"):
        data_of("ist.toml").load(seed=0)
    with pytest.raises(DataError, match=r"UCI Machine Learning Repository.*PRIVFED_DATA"):
        data_of("heart.toml").load(seed=0)


def test_the_phone_users_have_their_ratings(tmp_path: Path) -> None:
    """The script writes what the configuration reads: 120 users, each one a site, 40 ratings each."""
    file = tmp_path / "ratings.csv"
    subprocess.run([sys.executable, str(EXAMPLES / "phones.py"), str(file)], check=True)
    config = config_io.load_config(EXAMPLES / "phones.toml", [f'data.file="{file}"'])
    sites = config.data.load(seed=0, task=config.task)
    assert len(sites.sites) == 120 and {len(records) for records in sites.sites.values()} == {40}
    assert sites.inputs == ("app",) and config.data.items_at == ((0, 60),)


def test_the_honest_table_has_its_four_figures(tmp_path: Path) -> None:
    """On the embedded records, small: with privacy and without, global, personalised and local only."""
    config = tmp_path / "small.toml"
    config.write_text(
        "rounds = 2\n[evaluation]\nlocal_steps = 2\n[method]\npersonal_steps = 1\n[privacy]\ninsecure_seed = 1\n"
    )
    said = subprocess.run(
        [sys.executable, str(EXAMPLES / "honest_table.py"), str(config)], check=True, capture_output=True, text=True
    ).stdout
    assert "ε ≤ " in said and "with privacy | without" in said
    rows = [line for line in said.splitlines() if line.startswith(("| global", "| personalised", "| local only"))]
    assert len(rows) == 3 and all(line.count("0.") == 4 for line in rows)
