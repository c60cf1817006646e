"""`privfed data check`: what it finds, what it proposes, what it must not say."""

from pathlib import Path

import numpy as np
import pytest

from privfed import config_io
from privfed.data.check import Check, check
from privfed.errors import DataError

SECRET = "Xk7Plantedcell"


def table(n: int = 60, **columns: list[str]) -> dict[str, list[str]]:
    randomness = np.random.default_rng(0)
    return {
        "hospital": [("A", "B", "C")[i % 3] for i in range(n)],
        "age": [str(value) for value in randomness.integers(20, 60, n)],
        "sex": [("M", "F")[i % 2] for i in range(n)],
        "outcome": [str(i // 3 % 2) for i in range(n)],
    } | columns


def look(folder: Path, columns: dict[str, list[str]], *, separator: str = ",", **options: str | None) -> Check:
    path = folder / "t.csv"
    lines = [separator.join(columns), *(separator.join(row) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n")
    return check(str(path), label=options.get("label"), site=options.get("site"))


def told(found: Check) -> str:
    return "\n".join(f"{finding.column}: {finding.text}" for finding in found.findings)


def run_on(proposal: str) -> None:
    """The proposal reads as a configuration once its ranges are filled in, and its table loads."""
    lines = [line.replace("[low, high]", "[0, 100]") for line in proposal.splitlines()]
    import tomllib

    config_io.decode(tomllib.loads("\n".join(lines))).data.load(seed=0)


def test_a_good_table_has_no_problem_and_its_proposal_loads(tmp_path: Path) -> None:
    found = look(tmp_path, table())
    assert found.records == 60 and not found.problems
    assert "3 sites of 20 to 20 records" in told(found)
    assert '"class 1" = ["1"]' in found.proposal and "range = [low, high]" in found.proposal
    run_on(found.proposal)


def test_a_range_is_never_taken_from_the_records(tmp_path: Path) -> None:
    columns = table()
    columns["age"] = [f"{value}.0625" for value in columns["age"]]
    proposal = look(tmp_path, columns).proposal
    assert "0625" not in proposal and "range = [low, high]" in proposal


def test_semicolons_and_decimal_commas_are_proposed(tmp_path: Path) -> None:
    columns = table()
    columns["age"] = [f"{value},5" for value in columns["age"]]
    found = look(tmp_path, columns, separator=";")
    assert 'separator = ";"' in found.proposal and 'decimal = ","' in found.proposal and not found.problems
    run_on(found.proposal)


def test_text_in_a_numeric_column_is_named_by_row(tmp_path: Path) -> None:
    columns = table()
    columns["age"][4] = SECRET
    found = look(tmp_path, columns)
    assert "age: is numeric, but row 5 hold text" in told(found) and len(found.problems) == 1
    assert SECRET not in told(found) + found.proposal


@pytest.mark.parametrize("n", [8, 60])
def test_names_of_people_are_never_listed_even_in_a_small_table(tmp_path: Path, n: int) -> None:
    found = look(tmp_path, table(n, who=[f"{SECRET}-{i}" for i in range(n)]))
    assert SECRET not in told(found) + found.proposal and "who" in told(found)


def test_a_rare_category_or_label_is_counted_and_not_shown(tmp_path: Path) -> None:
    columns = table()
    columns["sex"][0] = columns["outcome"][0] = SECRET
    found = look(tmp_path, columns)
    assert "sex: has 1 values with fewer than 5 records" in told(found) and "outcome: 1 labels" in told(found)
    assert SECRET not in told(found) + found.proposal


def test_problem_columns_are_named(tmp_path: Path) -> None:
    n = 60
    columns = table(n, empty=["NA"] * n, same=["7"] * n, serial=[str(1000 + i) for i in range(n)])
    columns["hospital"][0], columns["outcome"][1], columns["age"][2] = "", "?", "."
    found = look(tmp_path, columns)
    for line in (
        "empty: has no value in any row",
        "same: has the same value in every row",
        "serial: differs in every row and is whole",
        "hospital: no site in row 1",
        "outcome: label missing in row 2",
        "age: missing in 1 of 60 rows",
    ):
        assert line in told(found)
    assert not any(f'name = "{name}"' in found.proposal for name in ("empty", "same", "serial"))
    assert 'missing_values = ["", "NA", "?", "."]' in found.proposal


def test_a_record_s_id_is_proposed_as_such_and_not_as_an_input(tmp_path: Path) -> None:
    found = look(tmp_path, {"stay_id": [f"p{i}" for i in range(60)]} | table())
    assert not found.problems and "stay_id: differs in every row" in told(found)
    assert 'id = "stay_id"' in found.proposal and 'name = "stay_id"' not in found.proposal
    run_on(found.proposal)
    twice = look(tmp_path, {"stay_id": [f"p{i // 2}" for i in range(60)]} | table())
    assert twice.problems and "id = " not in twice.proposal  # a patient with two rows: not a record's id


def test_a_label_or_site_that_is_missing_unnamed_or_odd_is_told(tmp_path: Path) -> None:
    columns = table()
    assert "no site column was named or guessed" in told(
        look(tmp_path, {k: v for k, v in columns.items() if k != "hospital"})
    )
    assert "no label column was named or guessed" in told(
        look(tmp_path, {k: v for k, v in columns.items() if k != "outcome"})
    )
    assert "distinct values: 2 to 12 are classes" in told(look(tmp_path, columns, label="age"))
    with pytest.raises(DataError, match="no column 'nope'; the table has 'hospital', 'age'"):
        look(tmp_path, columns, label="nope")
    lonely = look(tmp_path, table() | {"hospital": ["A"] * 59 + ["B"]})
    assert "1 sites have one record: set data.minimum_records" in told(lonely)
    nobody = look(tmp_path, table() | {"hospital": [""] * 60})
    assert "no site in rows 1, 2, 3, 4, 5 and 55 more" in told(nobody)


def test_a_file_without_header_is_refused_without_showing_its_first_record(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"A,44,{SECRET},1\nB,45,M,0\n")
    with pytest.raises(DataError, match=r"first line of .* looks like a record") as refusal:
        check(str(tmp_path / "t.csv"), label=None, site=None)
    assert SECRET not in str(refusal.value)


def test_a_large_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n" + "x,y\n" * 11)
    with pytest.raises(DataError, match="more than 10 rows"):
        check(str(tmp_path / "t.csv"), label=None, site=None, maximum_rows=10)
