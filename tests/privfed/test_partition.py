"""Cutting a table into simulated sites: what each kind promises, in a run and from the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from privfed.cli.app import app
from privfed.config_io import decode
from privfed.data.partition import Alike, Assigned, FeatureShift, LabelSkew, Partition, QuantitySkew, Uncut
from privfed.errors import ConfigError, DataError

N = 600
COMMAND = CliRunner()


def uncut(seed: int = 0, patients: int | None = None) -> Uncut:
    randomness = np.random.default_rng(seed)
    ids = randomness.permutation(N).astype(np.uint64)
    inputs = np.column_stack([np.arange(N) / N, randomness.normal(size=N)])
    return Uncut(ids if patients is None else ids % patients, np.arange(N) % 3, inputs, ("age", "noise"))


def shares(labels: Any, sites: list[str]) -> pd.DataFrame:
    return pd.crosstab(np.array(sites), labels, normalize="index")


CUTS: dict[str, Partition] = {
    "iid": Alike(sites=6),
    "dirichlet": LabelSkew(sites=6, alpha=0.3),
    "quantity": QuantitySkew(sites=6, alpha=0.5),
    "feature": FeatureShift(sites=6, column="age"),
}


@pytest.mark.parametrize("kind", CUTS)
def test_a_cut_gives_each_record_a_site_whatever_the_order_of_rows(kind: str) -> None:
    records, order = uncut(), np.random.default_rng(1).permutation(N)
    shuffled = Uncut(records.units[order], records.labels[order], records.inputs[order], records.names)
    sites = CUTS[kind].assign(records, 3)
    assert len(sites) == N and set(sites) <= {f"site-{number}" for number in range(1, 7)}
    if kind != "feature":  # its ties are broken by chance, in the order of ids
        assert [sites[row] for row in order] == CUTS[kind].assign(shuffled, 3)
    assert sites == CUTS[kind].assign(records, 3) != CUTS[kind].assign(records, 4)


@pytest.mark.parametrize("kind", CUTS)
def test_a_patient_is_not_divided(kind: str) -> None:
    records = uncut(patients=50)
    sites = CUTS[kind].assign(records, 0)
    assert len({*zip(records.units.tolist(), sites, strict=True)}) == 50


def test_each_kind_skews_what_its_name_says() -> None:
    records = uncut()
    iid = CUTS["iid"].assign(records, 0)
    assert {iid.count(site) for site in set(iid)} == {100}
    few, many = (shares(records.labels, LabelSkew(sites=6, alpha=a).assign(records, 0)) for a in (0.1, 1000.0))
    assert float(few.max(axis=1).mean()) > 0.7 and float(many.max(axis=1).max()) < 0.45
    sizes = [QuantitySkew(sites=6, alpha=a).assign(records, 0) for a in (0.3, 1000.0)]
    uneven, even = (np.bincount([int(site[5:]) for site in sites]) for sites in sizes)
    assert uneven.max() > 2.5 * N / 6 and even.max() < 1.2 * N / 6
    ages = {
        s: pd.Series(records.inputs[:, 0])
        .groupby(FeatureShift(sites=3, column="age", strength=s).assign(records, 0))
        .mean()
        for s in (0.0, 1.0)
    }
    # Sorted: thirds of [0, 1) have the means 1/6, 1/2, 5/6
    assert np.allclose(ages[1.0], [1 / 6, 1 / 2, 5 / 6], atol=0.01) and np.allclose(ages[0.0], 0.5, atol=0.06)
    with pytest.raises(ConfigError, match="no input 'sex'; inputs are age, noise"):
        FeatureShift(sites=3, column="sex").assign(records, 0)


def table(folder: Path, n: int = 60) -> Path:
    path = folder / "t.csv"
    rows = [f"{20 + i % 40},{'yes' if i % 3 else 'no'},p{i // 2},{'AB'[i % 2]}" for i in range(n)]
    path.write_text("age,out,who,town\n" + "\n".join(rows) + "\n")
    return path


def run_of(path: Path, **partition: Any) -> Any:
    data = {
        "source": "csv",
        "file": str(path),
        "label": "out",
        "classes": {"no": ["no"], "yes": ["yes"]},
        "numeric": [{"name": "age", "range": [0, 100]}],
        "partition": partition,
    }
    return decode({"data": data}).data


def test_any_table_runs_in_simulated_sites(tmp_path: Path) -> None:
    sites = run_of(table(tmp_path), kind="dirichlet", sites=4, alpha=1.0).load(seed=1)
    assert sites.simulated and 1 < len(sites.sites) <= 4 and sum(map(len, sites.sites.values())) == 60
    assert "simulated sites" in sites.description
    with pytest.raises(ConfigError, match="one of them"):
        decode(
            {"data": {"source": "csv", "file": "t.csv", "label": "out", "numeric": [{"name": "a", "range": [0, 1]}]}}
        )


def test_split_writes_an_assignment_that_a_run_reads(tmp_path: Path) -> None:
    path, out = table(tmp_path), tmp_path / "sites.csv"
    before = sorted(tmp_path.iterdir())
    said = COMMAND.invoke(
        app,
        [
            "data",
            "split",
            str(path),
            "--kind",
            "dirichlet",
            "--sites",
            "4",
            "--alpha",
            ".5",
            "--label",
            "out",
            "--patient",
            "who",
            "--out",
            str(out),
            "--plot",
            str(tmp_path / "split.svg"),
            "--json",
        ],
    )
    assert said.exit_code == 0, said.output
    summary = json.loads(said.stdout)
    assert summary["records"] == 60 and sum(site["records"] for site in summary["sites"]) == 60
    assert {name for site in summary["sites"] for name in site["labels"]} == {"no", "yes"}
    assert (tmp_path / "split.svg").read_text().lstrip().startswith("<?xml")
    assert sorted(tmp_path.iterdir()) == sorted([*before, out, tmp_path / "split.svg"])  # and no copy of a record
    frame = pd.read_csv(out)
    assert list(frame.columns) == ["row", "site"] and frame["row"].tolist() == list(range(1, 61))
    assert (frame["site"][::2].to_numpy() == frame["site"][1::2].to_numpy()).all()  # a patient has two rows
    sites = run_of(path, kind="file", file=str(out)).load(seed=0)
    assert {name: len(records) for name, records in sites.sites.items()} == dict(frame["site"].value_counts())


def test_split_by_column_and_copies_when_asked(tmp_path: Path) -> None:
    path, out = table(tmp_path), tmp_path / "sites.csv"
    said = COMMAND.invoke(
        app,
        [
            "data",
            "split",
            str(path),
            "--kind",
            "column",
            "--by",
            "town",
            "--out",
            str(out),
            "--copy",
            str(tmp_path / "c"),
        ],
    )
    assert said.exit_code == 0, said.output
    assert set(pd.read_csv(out)["site"]) == {"A", "B"}
    copies = [pd.read_csv(tmp_path / "c" / f"{name}.csv") for name in "AB"]
    assert [len(copy) for copy in copies] == [30, 30] and list(copies[0].columns) == ["age", "out", "who", "town"]
    again = COMMAND.invoke(app, ["data", "split", str(path), "--kind", "column", "--by", "town", "--out", str(out)])
    assert again.exit_code == 1 and "exists" in str(again.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "dirichlet", "--sites", "3", "--label", "out"], "--alpha"),
        (["--kind", "dirichlet", "--sites", "3", "--alpha", "1"], "--label"),
        (["--kind", "iid"], "--sites"),
        (["--kind", "column"], "--by"),
        (["--kind", "column", "--by", "nope"], "nope"),
        (["--kind", "fancy"], "fancy"),
        (["--kind", "iid", "--sites", "3", "--alpha", "1"], "does not read --alpha"),
        (["--kind", "column", "--by", "town", "--sites", "3"], "does not read --sites"),
        (["--kind", "iid", "--sites", "3", "--plot", "cut.gif"], "end its name in .svg"),
    ],
)
def test_split_says_what_is_missing(tmp_path: Path, arguments: list[str], message: str) -> None:
    said = COMMAND.invoke(app, ["data", "split", str(table(tmp_path)), *arguments, "--out", str(tmp_path / "o.csv")])
    assert said.exit_code != 0 and message in said.output + str(said.exception)
    assert not (tmp_path / "o.csv").exists()  # the corrected command may write it


def test_split_tells_of_sites_without_records_and_does_not_flood(tmp_path: Path) -> None:
    plot = tmp_path / "cut.png"
    arguments = ["--kind", "iid", "--sites", "300", "--out", str(tmp_path / "o.csv"), "--plot", str(plot)]
    said = COMMAND.invoke(app, ["data", "split", str(table(tmp_path)), *arguments])
    assert said.exit_code == 0, said.output
    lines = said.stdout.splitlines()
    assert "60 records in 60 sites" in lines[0]
    assert "  … and 10 more (--json tells of all)" in lines and len(lines) == 1 + 50 + 3
    assert "240 of the 300 sites got no record" in said.stdout and plot.stat().st_size > 0


def test_an_assignment_of_another_table_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "sites.csv"
    out.write_text("row,site\n1,a\n2,b\n")
    records = uncut(patients=50)
    with pytest.raises(DataError, match="made for another table"):
        Assigned(file=str(out)).assign(records, 0)
    out.write_text("row,site\n" + "".join(f"{row + 1},{'ab'[row % 2]}\n" for row in range(N)))
    with pytest.raises(DataError, match="one patient to several sites"):
        Assigned(file=str(out)).assign(records, 0)
