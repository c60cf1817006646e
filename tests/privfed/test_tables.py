"""A user's own table: what is read, what is refused, and that no message ever holds a cell."""

import gzip
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from privfed.data import files
from privfed.data.columns import Categorical, Numeric, canonical, encode, input_names
from privfed.data.records import SiteData, Sites, keyed_fraction, public_split_key
from privfed.data.tables import Table
from privfed.errors import DataError

SECRET = "Xk7Plantedcell"
GOOD = "hospital,age,sex,out\n" + "".join(f"{'ABC'[i % 3]},{20 + i},{'MF'[i % 2]},{i // 2 % 2}\n" for i in range(24))


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "site": "hospital",
        "label": "out",
        "classes": {"no": ("0",), "yes": ("1",)},
        "numeric": (Numeric(name="age", range=(20.0, 60.0)),),
        "categorical": (Categorical(name="sex", values=("M", "F")),),
    } | changes


def load(folder: Path, text: str | bytes, *, name: str = "t.csv", **changes: Any) -> Sites:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return Table(file=str(path), **settings(**changes)).load(seed=0)


def told(folder: Path, text: str | bytes, *, name: str = "t.csv", **changes: Any) -> str:
    """The message of the refusal, which must not hold a cell."""
    with pytest.raises(DataError) as refusal:
        load(folder, text, name=name, **changes)
    assert refusal.value.__cause__ is None  # a chained library error would quote the text
    assert SECRET not in str(refusal.value) and "t." in str(refusal.value)
    return str(refusal.value)


def places(sites: Sites, name: str) -> list[tuple[float, tuple[float, ...], int]]:
    """Each record of a site with its place in the split, sorted by content."""
    data = sites.sites[name]
    where = keyed_fraction(data.ids, key=public_split_key(0), label="test")
    rows = zip(where.tolist(), map(tuple, data.inputs.tolist()), data.targets.tolist(), strict=True)
    return sorted(rows, key=lambda row: (row[1], row[2], row[0]))


def split(sites: Sites) -> dict[str, list[tuple[float, tuple[float, ...], int]]]:
    return {name: places(sites, name) for name in sites.sites}


def test_a_good_table_by_hand(tmp_path: Path) -> None:
    sites = load(tmp_path, "hospital,age,sex,out\nB,20,M,0\nA,40,F,1\nA,90,x,0\nB,,F,1\n")
    assert list(sites.sites) == ["A", "B"] and sites.inputs == ("age", "sex=M", "sex=F") and not sites.simulated
    # 4 (x − 40) / (60 − 20): 40 → 0; 90 is clipped to 60 → 2; 20 → −2; missing counts as typical → 0
    assert sites.sites["A"].inputs.tolist() == [[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]]
    assert sites.sites["B"].inputs.tolist() == [[-2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert sites.sites["A"].targets.tolist() == [1, 0]


def test_typical_value_and_missing_indicator_by_hand() -> None:
    column = Numeric(name="chol", range=(0.0, 600.0), typical=240.0, missing=True)
    frame = pd.DataFrame({"chol": ["390", "?", "-5", "1e9", " 240 "]}, dtype=str)
    # 4 (390 − 240) / 600 = 1; missing → (0, 1); clipped to 0: 4 (0 − 240) / 600 = −1.6; clipped to 600: 2.4
    expected = np.array([[1, 0], [0, 1], [-1.6, 0], [2.4, 0], [0, 0]], dtype=np.float32)
    np.testing.assert_allclose(encode(frame, [column], missing=frozenset({"?"})), expected, rtol=1e-6)
    assert input_names([column]) == ("chol", "chol missing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\ufeff \r\n", "is empty"),
        ("hospital,age,sex,out\n", "has no records"),
        (f"hospital,age,sex\nA,1,{SECRET}\n", "no column 'out'; it has 'hospital', 'age', 'sex'"),
        (f"hospital,age,sex,out\nA,{SECRET},M,1\n", "column 'age' is numeric, but row 1 hold"),
        ("hospital,age,sex,out\nA,1,M,1\nA,inf,M,1\nB,-inf,M,0\n", "rows 2, 3 hold no finite number"),
        (f"hospital,age,sex,out\nA,1,M,1\nA,1,M,{SECRET}\n", "row 2 are in none of data.classes"),
        (f"hospital,age,sex,out\nA,1,M,1\n ,1,{SECRET},1\n?,1,M,1\n", "rows 2, 3 name no site"),
        (f"hospital,age,sex,out\nA,1,M,1\nA,1,M,1,{SECRET}\n", "row 2 has 5 cells, the header has 4"),
        (f"hospital,age,sex,out\nA,1,M,1,{SECRET}\nA,1,M,1,{SECRET}\n", "row 1 has 5 cells, the header has 4"),
        (f"hospital,age,sex,out\nA,1,M,1\n{SECRET},1\n", "row 2 has 2 cells"),
        (f'hospital,age,sex,out\nA,1,M,1\nA,1,M,"0\nA,1,{SECRET},0\n', "quotation mark is never closed"),
        (f"hospital;age;sex;out\nA;1;{SECRET};1\n", 'data.separator = ";"'),
        ("hospital,age,age,sex,out\nA,1,2,M,1\n", "more than once (column 2)"),
        (f"<!DOCTYPE html>\n<p>{SECRET}</p>", "HTML or XML"),
        (f"A,44,{SECRET},1\nB,45,M,0\n", "looks like a record"),
        (f"A;44;{SECRET};1\nB;45;M;0\n", "data.separator"),
        (b"PK\x03\x04" + SECRET.encode(), "Excel workbook"),
        (b"\x89PNG\r\n\x1a\n\0\0" + SECRET.encode(), "binary"),
        (b"PAR1" + SECRET.encode(), "can not read"),
        (f"hospital,age,sex,out\nM\u00fcnchen,1,{SECRET},1\n".encode("latin-1"), "UTF-8"),
        (f"h\u00f6spital,age,sex,out\nA,1,{SECRET},1\n".encode("latin-1"), "UTF-8"),
        ("hospital,age,sex,out\nA,1,M,1\n".encode("utf-16"), "UTF-8"),
    ],
)
def test_bad_tables_are_refused_with_the_reason_and_without_a_cell(
    tmp_path: Path, text: str | bytes, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert message in told(tmp_path, text)
    assert SECRET not in caplog.text


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not gzip"])
def test_a_damaged_archive_is_refused(tmp_path: Path, damage: str) -> None:
    whole = gzip.compress((GOOD * 500).encode())
    data = {"truncated": whole[: len(whole) // 2], "flipped": whole[:40] + bytes(8) + whole[48:], "not gzip": b"a,b\n"}
    assert "damaged or cut short" in told(tmp_path, data[damage], name="t.csv.gz")


def test_a_whole_archive_gives_what_the_text_gives(tmp_path: Path) -> None:
    assert split(load(tmp_path, gzip.compress(GOOD.encode()), name="t.csv.gz")) == split(load(tmp_path, GOOD))


def test_text_in_a_numeric_column_names_the_first_rows_and_counts_the_others(tmp_path: Path) -> None:
    text = GOOD + "".join(f"A,{SECRET},M,1\n" for _ in range(9))
    assert "rows 25, 26, 27, 28, 29 and 4 more hold no finite number" in told(tmp_path, text)


def test_nan_counts_as_missing_when_it_is_listed_and_is_refused_otherwise(tmp_path: Path) -> None:
    text = GOOD + "A,NaN,M,1\n"
    assert load(tmp_path, text).sites["A"].inputs[-1, 0] == 0.0
    assert "row 25 hold no finite number" in told(tmp_path, text, missing_values=("",))


def test_a_missing_code_is_missing_however_it_is_spelled(tmp_path: Path) -> None:
    sites = load(tmp_path, GOOD + "A,-9,M,1\nA,-9.0,M,1\nA, -9 ,M,1\n", missing_values=("", "-9"))
    assert sites.sites["A"].inputs[-3:, 0].tolist() == [0.0, 0.0, 0.0]


def test_a_column_without_any_value_is_told(tmp_path: Path) -> None:
    text = GOOD.replace(",M,", ",,").replace(",F,", ",?,")
    assert "column 'sex' has no value in any record: it tells nothing, remove it" in load(tmp_path, text).notes


def test_other_labels_can_be_dropped_and_are_counted(tmp_path: Path) -> None:
    sites = load(tmp_path, GOOD + "A,30,M,9\nA,30,M,\n", other_labels="drop")
    assert sum(map(len, sites.sites.values())) == 24
    assert "2 of 26 records left out (label or missing value)" in sites.notes


def test_a_class_never_seen_is_told_and_a_table_of_one_class_refused(tmp_path: Path) -> None:
    three = {"no": ("0",), "yes": ("1",), "unsure": ("2",)}
    assert "class 'unsure' has no record: the model can not learn it" in load(tmp_path, GOOD, classes=three).notes
    wrong = {"no": ("0",), "yes": ("yes",)}
    message = told_unnamed(tmp_path, GOOD, classes=wrong, other_labels="drop")
    assert "every record is of one class, none of 'yes'" in message and "data.classes" in message


def told_unnamed(folder: Path, text: str, **changes: Any) -> str:
    with pytest.raises(DataError) as refusal:
        load(folder, text, **changes)
    return str(refusal.value)


def test_small_and_one_class_sites_are_told_and_kept_unless_a_minimum_says_otherwise(tmp_path: Path) -> None:
    text = GOOD + "lonely,30,M,1\nuniform,30,M,1\nuniform,31,F,1\n"
    notes = " | ".join(load(tmp_path, text).notes)
    assert "site 'lonely' has one record" in notes and "site 'uniform' has one class only" in notes
    sites = load(tmp_path, text, minimum_records=3)
    assert list(sites.sites) == ["A", "B", "C"] and "2 sites with fewer than 3 usable records left out" in sites.notes
    assert "no site has 100 usable records" in told_unnamed(tmp_path, text, minimum_records=100)


def test_incomplete_records_can_be_left_out(tmp_path: Path) -> None:
    text = GOOD + "A,,M,1\nA,30,?,1\nD,30,,1\n"
    sites = load(tmp_path, text, drop_incomplete=True)
    assert list(sites.sites) == ["A", "B", "C"] and len(sites.sites["A"]) == 8


# Ids: where a record falls in the split


def test_split_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    head, *rows = (GOOD + GOOD.split("\n", 1)[1]).splitlines()  # every row twice: copies are interchangeable
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    assert split(load(tmp_path, "\n".join([head, *rows]))) == split(load(tmp_path, "\n".join([head, *shuffled])))


def test_an_added_row_moves_no_other(tmp_path: Path) -> None:
    before = split(load(tmp_path, GOOD))
    twin = GOOD.splitlines()[1]  # a record of site A once more, before the others
    head, body = GOOD.split("\n", 1)
    after = split(load(tmp_path, f"{head}\n{twin}\nB,59,F,0\n{body}"))
    assert after["C"] == before["C"]
    for site in ("A", "B"):
        assert set(before[site]) < set(after[site]) and len(after[site]) == len(before[site]) + 1


def test_the_same_row_twice_is_two_records_in_two_places(tmp_path: Path) -> None:
    sites = load(tmp_path, GOOD + "A,33,M,1\n" * 40)
    where = keyed_fraction(sites.sites["A"].ids[-40:], key=public_split_key(0), label="test")
    assert len(set(where.tolist())) == 40 and where.min() < 0.25 < where.max()


def test_the_same_row_at_two_sites_is_two_records(tmp_path: Path) -> None:
    sites = load(tmp_path, GOOD + "A,33,M,1\nB,33,M,1\n")
    assert sites.sites["A"].ids[-1] != sites.sites["B"].ids[-1]


def test_one_number_in_two_spellings_is_one_category_one_label_one_site_one_place(tmp_path: Path) -> None:
    plain = "hospital,age,sex,out\n" + "".join(f"{i % 2 + 1},{20 + i},{i % 3},{i // 2 % 2}\n" for i in range(20))
    odd = "hospital,age,sex,out\n" + "".join(
        f"0{i % 2 + 1},{20 + i}.0, {i % 3}.0 ,{i // 2 % 2}.00\n" for i in range(20)
    )
    codes = (Categorical(name="sex", values=("0", "1", "2")),)
    assert split(load(tmp_path, plain, categorical=codes)) == split(load(tmp_path, odd, categorical=codes))


def test_canonical_keeps_texts_that_are_no_whole_numbers() -> None:
    texts = ["1", "1.0", "01", " 1 ", "-0", "1.5", "1e400", "nan", "", "M", "90071992547409930", "1_0"]
    spelled = ["1", "1", "1", "1", "0", "1.5", "1e400", "nan", "", "M", "90071992547409930", "1_0"]
    assert canonical(pd.Series(texts, dtype=str)).tolist() == spelled


def test_ids_must_be_there_and_unique_within_a_site(tmp_path: Path) -> None:
    def with_ids(first: str, second: str, site: str = "A") -> str:
        return f"id,hospital,age,sex,out\n{first},A,30,M,0\n{second},{site},30,M,1\n"

    assert "rows 1, 2 share an id" in told(tmp_path, with_ids(SECRET, SECRET), id="id")
    assert "row 2 have no id" in told(tmp_path, with_ids(SECRET, ""), id="id")
    sites = load(tmp_path, with_ids("7", "7", "B"), id="id")  # each hospital counts its own patients
    assert sites.sites["A"].ids[0] != sites.sites["B"].ids[0]


def test_a_records_place_depends_on_its_id_alone(tmp_path: Path) -> None:
    text = "id,hospital,age,sex,out\n" + "".join(f"p{i},A,{20 + i},M,{i % 2}\n" for i in range(9))
    other = text.replace(",M,", ",F,").replace("p3,A,23", "p3,A,59")
    before, after = load(tmp_path, text, id="id"), load(tmp_path, other, id="id")
    assert before.sites["A"].ids.tolist() == after.sites["A"].ids.tolist()


# Files


def test_one_file_a_site_without_header_names_the_bad_file(tmp_path: Path) -> None:
    rows = [line.split(",", 1)[1] for line in GOOD.splitlines()[1:]]
    for name, part in (("one", rows[:12]), ("two", rows[12:])):
        (tmp_path / f"{name}.data").write_text("\n".join(part) + "\n")
    options = settings(site=None, header=("age", "sex", "out"))
    each = {name: str(tmp_path / f"{name}.data") for name in ("two", "one")}
    sites = Table(files=each, **options).load(seed=0)
    assert {name: len(data) for name, data in sites.sites.items()} == {"one": 12, "two": 12}
    (tmp_path / "two.data").write_text(f"30,M,1\n{SECRET},M,1\n")
    with pytest.raises(DataError, match=r"two\.data: column 'age' is numeric, but row 2") as refusal:
        Table(files=each, **options).load(seed=0)
    assert SECRET not in str(refusal.value)
    (tmp_path / "two.data").write_text(f"30,M,1\n30,{SECRET}\n")
    with pytest.raises(DataError, match=r"two\.data as a table: row 2 has 2 cells, data\.header has 3"):
        Table(files=each, **options).load(seed=0)


def test_byte_order_mark_quoted_commas_and_line_ends_are_read(tmp_path: Path) -> None:
    text = GOOD.replace("A,", '"Charité, Berlin",').replace("\n", "\r\n")
    sites = load(tmp_path, b"\xef\xbb\xbf" + text.encode())
    assert list(sites.sites) == ["B", "C", "Charité, Berlin"] and len(sites.sites["Charité, Berlin"]) == 8


def test_semicolons_and_decimal_commas_are_read_when_declared(tmp_path: Path) -> None:
    text = "hospital;age;sex;out\n" + "".join(f"A;{20 + i},5;M;{i % 2}\n" for i in range(6))
    message = told(tmp_path, text, separator=";")
    assert "data.decimal = ','" in message
    sites = load(tmp_path, text, separator=";", decimal=",")
    assert sites.sites["A"].inputs[0, 0] == pytest.approx(4 * (20.5 - 40) / 40)


@pytest.mark.parametrize("as_float", [False, True])
def test_parquet_gives_what_the_same_tables_csv_gives(tmp_path: Path, as_float: bool) -> None:
    n = 30
    frame = pd.DataFrame(
        {
            "hospital": np.arange(n) % 3 + 1,
            "age": [None if i % 7 == 0 else 20.25 + i for i in range(n)],
            "sex": [i % 5 == 0 for i in range(n)],
            "seen": [pd.Timestamp("2020-03-01") + pd.Timedelta(days=i % 2) for i in range(n)],
            "code": pd.array([None if i == 4 else i % 3 for i in range(n)], dtype="Int64"),
            "ward": pd.Categorical(["x", "y"] * (n // 2)),
            "out": np.arange(n) // 2 % 2,
        }
    )
    stored = frame.astype({"hospital": float, "code": float, "out": float}) if as_float else frame
    stored.set_index("hospital").to_parquet(tmp_path / "t.parquet")  # an index is a column like the others
    columns = (
        Categorical(name="sex", values=("True", "False")),
        Categorical(name="seen", values=("2020-03-01", "2020-03-02")),
        Categorical(name="code", values=("0", "1", "2")),
        Categorical(name="ward", values=("x", "y")),
    )
    csv = load(tmp_path, frame.to_csv(index=False), categorical=columns)
    parquet = Table(file=str(tmp_path / "t.parquet"), **settings(categorical=columns)).load(seed=0)
    assert list(csv.sites) == ["1", "2", "3"] and split(csv) == split(parquet)
    assert float(csv.sites["1"].inputs[:, 1:].sum()) == 4 * 10 - (1 if 4 % 3 == 0 else 0)  # one of each column a record


def test_too_many_rows_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BLOCK_BYTES", 1 << 14)
    read = 0

    class Watched(files._Quotes):
        def read(self, size: int = -1) -> bytes:
            nonlocal read
            data = super().read(size)
            read += len(data)
            return data

    monkeypatch.setattr(files, "_Quotes", Watched)
    text = GOOD + "A,30,M,1\n" * 200_000
    assert "more than 1,000 rows: raise data.maximum_rows" in told(tmp_path, text, maximum_rows=1000)
    assert read < len(text) / 2  # one block and what the reader takes ahead
    pd.DataFrame({"hospital": ["A"] * 50, "age": 1, "sex": "M", "out": 1}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="more than 49 rows"):
        Table(file=str(tmp_path / "t.parquet"), **settings(maximum_rows=49)).load(seed=0)
    assert load(tmp_path, GOOD, maximum_rows=24).sites  # exactly as many are fine


def test_a_missing_file_says_where_it_was_looked_for_and_where_a_known_set_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(files.DATA_FOLDER, str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match="elsewhere") as refusal:
        Table(file="nowhere.csv", **settings()).load(seed=0)
    assert "PRIVFED_DATA" in str(refusal.value)
    with pytest.raises(DataError, match=r"Edinburgh DataShare.*privfed data describe ist"):
        files.find_file("ist/IST.csv.gz")
    with pytest.raises(DataError, match="data describe heart-disease"):
        files.find_file(str(tmp_path / "heart_disease/processed.va.data"))


def test_files_are_found_under_the_data_folder_and_here_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a.csv").write_text(GOOD)
    monkeypatch.setenv(files.DATA_FOLDER, str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    assert files.find_file("a.csv") == tmp_path / "store" / "a.csv"
    (tmp_path / "a.csv").write_text(GOOD)
    assert files.find_file("a.csv") == Path("a.csv")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": {"no": ("0",), "yes": ("00", "1")}}, "no text twice"),
        ({"classes": {"no": ("0",), "yes": ()}}, "each class its texts"),
        ({"classes": {"no": ("0",)}}, "at least two classes"),
        ({"numeric": (Numeric(name="out", range=(0.0, 1.0)),)}, "it is the label"),
        ({"numeric": (Numeric(name="hospital", range=(0.0, 1.0)),)}, "it is the site"),
        ({"numeric": (Numeric(name="sex", range=(0.0, 1.0)),)}, "listed twice"),
        ({"numeric": (), "categorical": ()}, "at least one numeric or categorical"),
        ({"site": None}, "needs data.site"),
    ],
)
def test_contradictory_declarations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Table(file="t.csv", **settings(**changes))


def test_category_values_that_are_one_number_are_refused() -> None:
    with pytest.raises(ValueError, match="must differ"):
        Categorical(name="cp", values=("1", "1.0"))


def test_site_data_shows_no_record_in_its_repr(tmp_path: Path) -> None:
    data: SiteData = load(tmp_path, GOOD.replace("M", SECRET)).sites["A"]
    assert "tensor" not in repr(data) and SECRET not in repr(data)


# Patients


PEOPLE = "person,hospital,age,sex,out\n" + "".join(
    f"p{i // 4},{'AB'[i % 2]},{20 + i},M,{i // 3 % 2}\n" for i in range(40)
)


def test_records_of_one_patient_are_told_by_their_column(tmp_path: Path) -> None:
    sites = load(tmp_path, PEOPLE, patient="person")
    own = sites.sites["A"]
    assert own.patients is not None
    numbers = np.unique(own.patients, return_inverse=True)[1]
    assert len(own) == 20 and len(np.unique(numbers)) == 10
    assert all(numbers[i] == numbers[i + 1] for i in range(0, 20, 2))  # p0 has rows 0 and 2 at A
    # a person at two hospitals is two patients: each site protects its own
    other = sites.sites["B"].patients
    assert other is not None and not set(own.patients.tolist()) & set(other.tolist())
    assert load(tmp_path, PEOPLE).sites["A"].patients is None


def test_a_patients_records_stay_together_in_the_split(tmp_path: Path) -> None:
    own = load(tmp_path, PEOPLE, patient="person").sites["A"]
    where = keyed_fraction(own.units, key=public_split_key(0), label="test")
    assert own.patients is not None
    for patient in np.unique(own.patients):
        assert len(np.unique(where[own.patients == patient])) == 1
    assert len(np.unique(where)) == 10


def test_a_patients_id_has_one_spelling(tmp_path: Path) -> None:
    """Exports write one number as 7, 07 and 7.0; taken for three patients, each third would be protected alone."""
    text = "person,hospital,age,sex,out\n7,A,30,M,0\n07,A,31,M,1\n 7.0 ,A,32,F,0\n8,A,33,F,1\n"
    patients = load(tmp_path, text, patient="person").sites["A"].patients
    assert patients is not None
    assert len(np.unique(patients[:3])) == 1 and patients[3] != patients[0]


def test_a_patients_id_must_be_there(tmp_path: Path) -> None:
    text = f"person,hospital,age,sex,out\n{SECRET},A,30,M,0\n,A,31,M,1\n"
    assert "row 2 have no id: fill them, or leave data.patient away" in told(tmp_path, text, patient="person")
    assert "person" in told(tmp_path, GOOD, patient="person")  # no such column


def test_a_patients_id_is_no_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it is the patient's id"):
        load(tmp_path, PEOPLE, patient="age")


def test_a_patients_id_may_be_the_records_id(tmp_path: Path) -> None:
    text = "key,hospital,age,sex,out\n" + "".join(f"k{i},A,{20 + i},M,{i % 2}\n" for i in range(6))
    patients = load(tmp_path, text, id="key", patient="key").sites["A"].patients
    assert patients is not None and len(np.unique(patients)) == 6
