"""What one site holds, and the keyed hash that decides which record is for what."""

import hashlib
import hmac
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class SiteData:
    """One site's records. Nothing here leaves the site.

    Args:
        ids: uint64[n]: stands for each record in the keyed split, whatever else is in the table.
        inputs: float32[n, F], standardised from public ranges.
        targets: int64[n], class numbers; float32[n], what another task makes of the label.
        patients: uint64[n]: stands for the patient of each record; None where the table names none.
        test: bool[n]: the test records, where the table marks them; None where the keyed split chooses them.
    """

    ids: NDArray[np.uint64] = field(repr=False)
    inputs: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    patients: NDArray[np.uint64] | None = field(default=None, repr=False)
    test: NDArray[np.bool_] | None = field(default=None, repr=False)

    @property
    def units(self) -> NDArray[np.uint64]:
        """uint64[n]: what is kept together in a split: all records of a patient, else each record alone."""
        return self.ids if self.patients is None else self.patients

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, mask: NDArray[np.bool_]) -> "SiteData":
        """The records where ``mask`` bool[n] is true."""
        keep = torch.from_numpy(np.flatnonzero(mask))
        patients = None if self.patients is None else self.patients[mask]
        test = None if self.test is None else self.test[mask]
        return SiteData(self.ids[mask], self.inputs[keep], self.targets[keep], patients, test)

    def scaled(self, mean: Tensor, deviation: Tensor) -> "SiteData":
        """The records with inputs (x − mean) / deviation, float32[F] each."""
        return replace(self, inputs=(self.inputs - mean) / deviation)

    def fingerprint(self, key: bytes) -> str:
        """Hex HMAC-SHA256 of the records: names the data set in a ledger, and tells nothing without the site's key."""
        digest = hmac.new(key, digestmod=hashlib.sha256)
        arrays: list[NDArray[Any]] = [self.ids, self.inputs.numpy(), self.targets.numpy()]
        arrays += [array for array in (self.patients, self.test) if array is not None]
        for array in arrays:
            digest.update(repr((array.dtype.str, array.shape)).encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Sites:
    """The sites of a run, by name, and what is public about their tables.

    Args:
        sites: name → records.
        inputs: names of the model's inputs.
        classes: names of the classes; the second one is the positive one. Empty where the task has none.
        simulated: one table was cut into sites that never existed.
        description: one line for the screen.
        ranges: [low, high] of each input, public; empty where none are known.
        notes: what a user should know about the records; for the site's own eyes.
    """

    sites: dict[str, SiteData]
    inputs: tuple[str, ...]
    classes: tuple[str, ...]
    simulated: bool
    description: str
    notes: tuple[str, ...] = ()
    ranges: tuple[tuple[float, float], ...] = ()


def public_split_key(seed: int) -> bytes:
    """bytes[32]: the split of a simulation, the same for all who know the seed. A real site keeps a secret one."""
    return hashlib.sha256(f"privfed split {seed}".encode()).digest()


def keyed_fraction(ids: NDArray[np.uint64], *, key: bytes, label: str) -> NDArray[np.float64]:
    """float64[n] in [0, 1): where each record falls, by a hash of its own id alone.

    A shuffled split depends on every record: one more patient moves the others between support and query, and parallel
    composition no longer holds. A keyed hash gives each record its place whatever the others are.
    """
    key = hmac.digest(key, label.encode(), "sha256")
    words = (hmac.digest(key, int(record).to_bytes(8, "big"), "sha256")[:8] for record in ids)
    return np.fromiter((int.from_bytes(word, "big") / 2**64 for word in words), dtype=np.float64, count=len(ids))
