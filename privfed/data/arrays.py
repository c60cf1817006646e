"""Arrays of numbers in one file: images, signals, anything whose records are not columns."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray
from safetensors.numpy import load_file

from privfed.errors import DataError
from privfed.tasks import Classification, Task
from privfed.tasks.task import usable

from .files import find_file
from .partition import Partition, Uncut
from .parts import Part, gathered
from .records import Sites

Name = Annotated[str, Meta(min_length=1)]


class Arrays(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="source", tag="arrays"):
    """Named arrays in an ``.npz`` or ``.safetensors`` file, all with one entry a record along their first axis."""

    file: Annotated[str, Meta(min_length=1, description="the file; a path, or a name under PRIVFED_DATA")]
    x: Annotated[Name, Meta(description="array of the inputs, [n, …]; a record's numbers become one row")] = "x"
    y: Annotated[Name, Meta(description="array of the label, [n]; for survival the time")] = "y"
    site: Annotated[Name | None, Meta(description="array that names the site of a record")] = None
    partition: Annotated[Partition | None, Meta(description="cut the file into simulated sites")] = None
    patient: Annotated[Name | None, Meta(description="array with the id of the patient, or user, of a record")] = None
    test: Annotated[Name | None, Meta(description="array that is 1 for test records, instead of test_fraction")] = None
    labels: Annotated[tuple[str, ...], Meta(description="task classification: names of the classes 0, 1, …")] = ()
    only: Annotated[
        dict[str, tuple[int, ...]], Meta(description="array = values: records with another one are left out")
    ] = {}
    range: Annotated[
        tuple[float, float], Meta(description="public [low, high] of an input; values outside are clipped")
    ]
    typical: Annotated[float | None, Meta(description="public typical value; default the middle of the range")] = None
    minimum_records: Annotated[
        int, Meta(ge=1, description="leave out sites with fewer records (this cohort is not private)")
    ] = 1

    def __post_init__(self) -> None:
        low, high = self.range
        if not (np.isfinite(low) and np.isfinite(high) and low < high):
            raise ValueError(f"data.range must be [low, high] with low < high, got {[low, high]}")
        if self.typical is not None and not low <= self.typical <= high:
            raise ValueError(f"data.typical must lie in data.range, got {self.typical}")
        if (self.site is None) == (self.partition is None):
            raise ValueError(
                "data needs data.site, the array that names the site of a record, or data.partition, which cuts the "
                "file into simulated sites: one of them"
            )
        if len(self.labels) == 1 or len(set(self.labels)) != len(self.labels):
            raise ValueError("data.labels must name at least two classes, none twice")

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        return {name: (str(number),) for number, name in enumerate(self.labels)}

    @property
    def columns(self) -> tuple[()]:
        """No input has a name: a table of new records can not be read."""
        return ()

    @property
    def planned_sites(self) -> int | None:
        """How many sites there will be, where that is known before a record is read."""
        return None if self.partition is None else self.partition.planned

    @property
    def items_at(self) -> tuple[tuple[int, int], ...]:
        return ()

    def load(self, *, seed: int, task: Task | None = None) -> Sites:
        """The sites' records.

        Args:
            seed: public, of ``partition``.
            task: what is read from the label; default the classes.

        Raises:
            DataError: names the file and the array, never a value, and what to do.
        """
        task = task or Classification()
        named = [self.x, self.y, self.site, self.patient, self.test, *self.only, *task.columns]
        names = list(dict.fromkeys(name for name in named if name is not None))
        found = _read(self.file, names, texts=(self.site, self.patient))
        keep = np.ones(len(found[self.x]), dtype=bool)
        for name, values in self.only.items():
            keep &= np.isin(found[name], values)
        if not keep.any():
            raise DataError(f"{self.file}: data.only leaves no record")
        found = {name: array[keep] for name, array in found.items()}
        part = self._part(found, task, seed)
        sites, notes = gathered([part], classes=self.labels, label=self.y, minimum_records=self.minimum_records)
        low, high = self._scaled(np.array(self.range))
        kind = "simulated sites" if self.partition is not None else "sites"
        return Sites(
            sites=sites,
            inputs=tuple(f"{self.x}[{number}]" for number in range(part.inputs.shape[1])),
            ranges=((float(low), float(high)),) * part.inputs.shape[1],
            classes=self.labels,
            simulated=self.partition is not None,
            description=f"{sum(map(len, sites.values()))} records of {len(sites)} {kind}",
            notes=tuple(notes),
        )

    def read_inputs(self, file: str, *, features: int) -> NDArray[np.float32]:
        """float32[n, features]: the inputs in another file, scaled alike.

        Raises:
            DataError: it can not be read, or its records have another size.
        """
        values = _read(file, [self.x])[self.x]
        flat = values.reshape(len(values), -1)
        if flat.shape[1] != features:
            raise DataError(
                f"{file}: a record of {self.x!r} has {flat.shape[1]} numbers, and the run's have {features}"
            )
        return self._scaled(flat)

    def _part(self, found: dict[str, NDArray[Any]], task: Task, seed: int) -> Part:
        count = len(found[self.x])
        flat = found[self.x].reshape(count, -1)
        targets = task.targets(ArrayLabels(found, self.y, len(self.labels)))
        ids = self._ids(found, flat)
        patients = None if self.patient is None else _hashed(found[self.patient])
        inputs = self._scaled(flat)
        if self.partition is None:
            assert self.site is not None  # one of the two
            names = [str(site) for site in found[self.site].tolist()]
        else:
            labels = np.nan_to_num(targets) if targets.dtype.kind == "f" else targets
            names = self.partition.assign(Uncut(ids if patients is None else patients, labels, inputs), seed)
        return Part(
            ids,
            patients,
            np.array(names, dtype=object),
            inputs,
            targets,
            usable(targets),
            None if self.test is None else found[self.test].astype(bool),
        )

    def _scaled(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """4 (x − typical) / (high − low), x clipped to the range, as columns of a table are."""
        low, high = self.range
        typical = (low + high) / 2 if self.typical is None else self.typical
        known = np.nan_to_num(values.astype(np.float32), nan=typical)
        scaled: NDArray[np.float32] = (4 * (np.clip(known, low, high) - typical) / (high - low)).astype(np.float32)
        return scaled

    def _ids(self, found: dict[str, NDArray[Any]], flat: NDArray[Any]) -> NDArray[np.uint64]:
        """uint64[n]: a hash of each record, unmoved by the others and their order; a copy's says that it is one."""
        apart = {self.x, self.test, *self.only} - {self.y, self.site, self.patient}  # a selection makes no other record
        others = [np.ascontiguousarray(array) for name, array in sorted(found.items()) if name not in apart]
        ids = np.empty(len(flat), dtype=np.uint64)
        seen: dict[bytes, int] = {}
        for row, values in enumerate(np.ascontiguousarray(flat)):
            content = hashlib.sha256(values.tobytes())
            for array in others:
                content.update(array[row].tobytes())
            digest = content.digest()
            copy = seen[digest] = seen.get(digest, -1) + 1
            ids[row] = int.from_bytes(hashlib.sha256(digest + copy.to_bytes(8, "big")).digest()[:8], "big")
        return ids


@dataclass(frozen=True)
class ArrayLabels:
    """The label arrays, as a task reads them; see `Labels`."""

    arrays: dict[str, NDArray[Any]] = field(repr=False)
    label: str
    count: int

    def classes(self) -> NDArray[np.int64]:
        labels = self.arrays[self.label]
        known = (labels >= 0) & (labels < self.count) & (labels == np.round(labels))
        return np.where(known, labels, -1).astype(np.int64)

    def numbers(self) -> NDArray[np.float64]:
        return self.arrays[self.label].astype(np.float64)

    def among(self, column: str, texts: Sequence[str]) -> NDArray[np.float64]:
        values = self.arrays[column].astype(np.float64)
        found = np.isin(values, np.array([float(text) for text in texts]))
        return np.where(np.isfinite(values), found, np.nan)


def _read(file: str, names: Sequence[str], texts: Sequence[str | None] = ()) -> dict[str, NDArray[Any]]:
    """The named arrays; those of ``texts`` may hold texts. Pickled objects, which are code, are refused.

    Raises:
        DataError: the file is no such file, lacks an array, or their lengths differ.
    """
    path = find_file(file)
    try:
        if path.suffix == ".safetensors":
            everything = load_file(path)
        else:
            with np.load(path, allow_pickle=False) as opened:
                everything = {name: opened[name] for name in names if name in opened}
    except Exception as error:  # zipfile, numpy and safetensors each have their own
        raise DataError(f"can not read {path} as .npz or .safetensors arrays ({type(error).__name__})") from None
    if absent := [name for name in names if name not in everything]:
        raise DataError(f"{path} has no array {', '.join(map(repr, absent))}")
    found = {name: everything[name] for name in names}
    first = next(iter(found))
    for name, array in found.items():
        if array.ndim < 1 or len(array) != len(found[first]) or not len(array):
            raise DataError(f"{path}: array {name!r} must have one entry for each record of {first!r}")
        if name != first and array.ndim != 1:
            raise DataError(f"{path}: array {name!r} must have one number a record")
        if array.dtype.kind not in "fiub" and name not in texts:
            raise DataError(f"{path}: array {name!r} must hold numbers")
    return found


def _hashed(values: NDArray[Any]) -> NDArray[np.uint64]:
    """uint64[n]: what stands for each value."""
    distinct, number = np.unique(values, return_inverse=True)
    hashes = [hashlib.sha256(str(value).encode()).digest()[:8] for value in distinct.tolist()]
    return np.array([int.from_bytes(value, "big") for value in hashes], dtype=np.uint64)[number]
