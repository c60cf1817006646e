"""Records in arrays: what is read, what is refused, and a run on images from its configuration to its predictions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import privfed
from privfed.config import Config
from privfed.config_io import decode
from privfed.data.arrays import Arrays
from privfed.doors import split
from privfed.errors import DataError
from privfed.prediction import predict
from privfed.tasks import Cox, Regression

SECRET = 13


def images(folder: Path, *, n: int = 60, name: str = "images.npz", **changes: Any) -> Path:
    """Bright images are of class 1."""
    randomness = np.random.default_rng(0)
    y = randomness.integers(0, 2, n)
    arrays = {
        "x": (randomness.integers(0, 100, (n, 4, 4)) + 120 * y[:, None, None]).astype(np.uint8),
        "y": y,
        "writer": np.arange(n) % 3 + 7,
        "hsf": np.arange(n) % 2,
        **changes,
    }
    path = folder / name
    if path.suffix == ".npz":
        np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    else:
        save_file({key: value for key, value in arrays.items() if value is not None}, path)
    return path


def source(path: Path, **changes: Any) -> Arrays:
    fields: dict[str, Any] = {"site": "writer", "labels": ("dark", "bright"), "range": (0.0, 255.0)}
    return Arrays(file=str(path), **{**fields, **changes})


@pytest.mark.parametrize("name", ["images.npz", "images.safetensors"])
def test_arrays_by_hand(tmp_path: Path, name: str) -> None:
    x = np.array([[[0, 255]], [[51, 300]], [[255, 0]]], dtype=np.float32)
    path = images(tmp_path, name=name, x=x, y=np.array([0, 1, 1]), writer=np.array([5, 5, 6]), hsf=None)
    sites = source(path).load(seed=0)
    assert list(sites.sites) == ["5", "6"] and sites.classes == ("dark", "bright") and not sites.simulated
    # 4 (x − 127.5) / 255: 0 → −2, 51 → −1.2, 255 and beyond → 2
    assert np.allclose(sites.sites["5"].inputs, [[-2.0, 2.0], [-1.2, 2.0]], atol=1e-6)
    assert sites.sites["5"].targets.tolist() == [0, 1]
    assert sites.inputs == ("x[0]", "x[1]") and sites.ranges == ((-2.0, 2.0),) * 2


def test_a_record_keeps_its_id_whatever_the_others_are(tmp_path: Path) -> None:
    whole = source(images(tmp_path)).load(seed=0).sites["7"]
    few = source(images(tmp_path, name="few.npz"), only={"hsf": (0,)}).load(seed=0).sites["7"]
    assert 0 < len(few) < len(whole) and set(few.ids) < set(whole.ids)
    # The same record twice is two records
    twice = {"x": np.zeros((6, 2, 2), np.uint8), "y": np.array([0, 0, 0, 1, 1, 1]), "writer": np.ones(6), "hsf": None}
    assert len(np.unique(source(images(tmp_path, name="2.npz", **twice)).load(seed=0).sites["1.0"].ids)) == 6


def test_marked_test_records_are_the_test_records(tmp_path: Path) -> None:
    marks = np.arange(60) % 5 == 0
    data = source(images(tmp_path, held=marks.astype(np.int64)), test="held")
    config = Config(data=data)
    sites = data.load(seed=0).sites
    tests = sum(len(split(config, records, bytes(32)).test) for records in sites.values())
    assert tests == int(marks.sum())


def test_numbers_and_times_are_labels_too(tmp_path: Path) -> None:
    path = images(tmp_path, y=np.linspace(0.0, 10.0, 60), event=np.arange(60) % 2)
    number = source(path, labels=()).load(seed=0, task=Regression(range=(0.0, 10.0)))
    assert number.sites["7"].targets[0] == -2.0 and number.classes == ()
    times = source(path, labels=()).load(seed=0, task=Cox(event="event"))
    assert bool((times.sites["8"].targets[::2] > 0).all()) and bool((times.sites["8"].targets[1::2] < 0).all())


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"y": None}, {}, "has no array 'y'"),
        ({"y": np.zeros(3)}, {}, "must have one entry for each record"),
        ({"y": np.zeros((60, 2))}, {}, "must have one number a record"),
        ({"y": np.full(60, "13")}, {}, "array 'y' must hold numbers"),
        ({"y": np.zeros(60, np.int64)}, {}, "every record is of one class"),
        ({}, {"only": {"hsf": (9,)}}, "leaves no record"),
        ({"x": np.array([{"a": SECRET}] * 60, dtype=object)}, {}, "can not read"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as refusal:
        source(images(tmp_path, **changes), **settings).load(seed=0)
    assert str(SECRET) not in str(refusal.value).replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"site": None}, "data.site"),
        ({"range": (1.0, 1.0)}, "low < high"),
        ({"typical": 300.0}, "must lie in data.range"),
        ({"labels": ("one",)}, "at least two classes"),
    ],
)
def test_contradictory_declarations_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(tmp_path / "x.npz", **settings)


def test_a_run_on_images_from_its_toml_to_its_predictions(tmp_path: Path) -> None:
    path = images(tmp_path, n=120)
    config = decode(
        {
            "rounds": 3,
            "data": {
                "source": "arrays",
                "file": str(path),
                "labels": ["dark", "bright"],
                "range": [0, 255],
                "partition": {"kind": "iid", "sites": 3},
            },
            "model": {"name": "cnn", "shape": [1, 4, 4], "channels": [4], "groups": 2},
            "method": {"name": "fedavg", "lr": 0.5, "personal_steps": 2},
            "privacy": {"target_epsilon": 20.0, "expected_batch_size": 15.0},
            "evaluation": {"local_steps": 5, "metric": "accuracy"},
        }
    )
    run = privfed.run(config, out=tmp_path / "run")
    assert run.summary.complete and run.summary.simulated
    spent = run.summary.privacy.epsilon.max
    assert spent is not None and 0 < spent <= 20.0
    assert "convolutional network" in (tmp_path / "run" / "report.html").read_text()
    new = np.stack([np.full((4, 4), 20), np.full((4, 4), 210)]).astype(np.uint8)
    np.savez(tmp_path / "new.npz", x=new)
    said = predict(run.folder, tmp_path / "new.npz")
    assert list(said.table.columns) == ["row", "prediction", "p(dark)", "p(bright)"] and len(said.table) == 2
    np.savez(tmp_path / "other.npz", x=new[:, :2])
    with pytest.raises(DataError, match="has 8 numbers, and the run's have 16"):
        predict(run.folder, tmp_path / "other.npz")
