"""Encoded records of a file, and how they become sites."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from privfed.errors import DataError

from .records import SiteData


@dataclass(frozen=True)
class Part:
    """One file's records, row by row.

    Args:
        ids, patients, inputs, targets, test: as of `SiteData`, of all rows.
        sites: the name of each row's site.
        keep: bool[n]: the rows that are used.
    """

    ids: NDArray[np.uint64] = field(repr=False)
    patients: NDArray[np.uint64] | None = field(repr=False)
    sites: NDArray[np.object_] = field(repr=False)
    inputs: NDArray[np.float32] = field(repr=False)
    targets: NDArray[Any] = field(repr=False)
    keep: NDArray[np.bool_] = field(repr=False)
    test: NDArray[np.bool_] | None = field(default=None, repr=False)

    @property
    def rows(self) -> int:
        return len(self.keep)

    @property
    def left_out(self) -> int:
        return int((~self.keep).sum())

    def by_site(self) -> Iterator[tuple[str, SiteData]]:
        """Each site's records that are kept, in the file's order; a site that keeps none is there, empty."""
        number, names = pd.factorize(self.sites)
        order = np.argsort(number, kind="stable")
        ends = np.cumsum(np.bincount(number, minlength=len(names)))
        for at, name in zip(np.split(order, ends[:-1]), names, strict=True):
            kept = at[self.keep[at]]
            yield (
                str(name),
                SiteData(
                    self.ids[kept],
                    torch.from_numpy(self.inputs[kept]),
                    torch.from_numpy(self.targets[kept]),
                    None if self.patients is None else self.patients[kept],
                    None if self.test is None else self.test[kept],
                ),
            )


def gathered(
    parts: Sequence[Part], *, classes: Sequence[str], label: str, minimum_records: int
) -> tuple[dict[str, SiteData], list[str]]:
    """The sites' records by name, and what a user should know about them.

    Raises:
        DataError: nothing usable is left, or nothing to learn.
    """
    notes: list[str] = []
    sites: dict[str, SiteData] = {}
    left_out, small = sum(part.left_out for part in parts), 0
    if left_out:
        notes.append(f"{left_out} of {sum(part.rows for part in parts)} records left out (label or missing value)")
    found = (pair for part in parts for pair in part.by_site())
    for site, records in sorted(found, key=lambda pair: _natural(pair[0])):
        if len(records) < minimum_records:
            small += 1
            continue
        sites[site] = records
        if len(records) == 1:
            notes.append(f"site {site!r} has one record: nothing can be measured there")
        elif classes and len(np.unique(records.targets.numpy())) == 1:
            notes.append(f"site {site!r} has one class only: AUROC is undefined there")
    if small:
        notes.append(f"{small} sites with fewer than {minimum_records} usable records left out")
    if not sites:
        raise DataError(f"no site has {minimum_records} usable records: lower data.minimum_records")
    if classes:
        _look_at_classes(sites, classes, label, notes)
    return sites, notes


def _look_at_classes(sites: dict[str, SiteData], classes: Sequence[str], label: str, notes: list[str]) -> None:
    seen = {int(number) for records in sites.values() for number in np.unique(records.targets.numpy())}
    unseen = [name for number, name in enumerate(classes) if number not in seen]
    if len(seen) == 1:
        raise DataError(
            f"label column {label!r}: every record is of one class, none of {', '.join(map(repr, unseen))}: "
            "there is nothing to learn; check data.classes"
        )
    notes.extend(f"class {name!r} has no record: the model can not learn it" for name in unseen)


def _natural(name: str) -> tuple[int, int | str]:
    """Site "2" before site "10", numbers before names."""
    return (0, int(name)) if name.isdecimal() else (1, name)
