"""The known data sets: their files' states, whom a path belongs to, and that each entry is complete."""

import hashlib
import re
from pathlib import Path

import pytest

from privfed.data import catalog
from privfed.data.catalog import KNOWN, KnownFile, KnownSet


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_an_entry_says_everything(known: KnownSet) -> None:
    assert all([known.title, known.licence, known.obtain, known.layout, known.traps, known.files])
    assert all(re.fullmatch("[0-9a-f]{64}", file.sha256) and not Path(file.name).is_absolute() for file in known.files)
    if known.example:
        assert (Path(__file__).parents[2] / known.example).is_file()


def test_names_and_files_are_unique() -> None:
    names, files = [k.name for k in KNOWN], [file.name for k in KNOWN for file in k.files]
    assert len(set(names)) == len(names) and len(set(files)) == len(files)


def test_the_state_of_a_file(tmp_path: Path) -> None:
    file = KnownFile("set/t.csv", hashlib.sha256(b"content").hexdigest())
    assert catalog.state_of(file, tmp_path) == "missing"
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "t.csv").write_bytes(b"content")
    assert catalog.state_of(file, tmp_path) == "ok"
    (tmp_path / "set" / "t.csv").write_bytes(b"content?")
    assert catalog.state_of(file, tmp_path) == "another version"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("ist/IST.csv.gz", "ist"),
        ("./ist/IST.csv.gz", "ist"),
        ("/data/heart_disease/processed.va.data", "heart-disease"),
        ("fist/IST.csv.gz", None),
        ("IST.csv.gz", None),
        ("mine.csv", None),
    ],
)
def test_whom_a_path_belongs_to(path: str, name: str | None) -> None:
    known = catalog.owner_of(path)
    assert (known.name if known else None) == name
