"""Cutting one table into simulated sites, by a public seed."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from privfed.errors import ConfigError, DataError

_LEVELS = 10  # of a label that is a number


@dataclass(frozen=True)
class Uncut:
    """Records before they have sites.

    Args:
        units: uint64[n]: what stays together, a record or all of a patient's.
        labels: [n]: class numbers, or numbers.
        inputs: float[n, F].
        names: of the inputs.
    """

    units: NDArray[np.uint64] = field(repr=False)
    labels: NDArray[Any] = field(repr=False)
    inputs: NDArray[Any] = field(repr=False)
    names: tuple[str, ...] = ()


class _Cut(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind"):
    """Units in the order of their ids, so that the order of a file's rows changes nothing."""

    sites: Annotated[int, Meta(ge=1, le=100_000, description="simulated sites; one that gets no record is none")]

    @property
    def planned(self) -> int:
        """How many sites there will be, if each gets a record."""
        return self.sites

    def assign(self, records: Uncut, seed: int) -> list[str]:
        """The name of each record's site.

        Raises:
            ConfigError: the cut does not fit these records.
        """
        _, first, member = np.unique(records.units, return_index=True, return_inverse=True)
        number = self._sites_of(records, first, np.random.default_rng(seed))
        return [f"site-{site + 1}" for site in number[member]]

    def _sites_of(self, records: Uncut, first: NDArray[np.int64], randomness: np.random.Generator) -> NDArray[np.int64]:
        """int64[units]: a site for each unit, which stands at row ``first`` of the records."""
        raise NotImplementedError


Alpha = Annotated[float, Meta(gt=0, le=1e6)]


class Alike(_Cut, frozen=True, kw_only=True, tag="iid"):
    """Sites of equal size that differ by chance alone."""

    def _sites_of(self, records: Uncut, first: NDArray[np.int64], randomness: np.random.Generator) -> NDArray[np.int64]:
        return randomness.permutation(len(first)) % self.sites


class LabelSkew(_Cut, frozen=True, kw_only=True, tag="dirichlet"):
    """Each class over the sites by shares from Dirichlet(α) (Li et al. 2022, ICDE, Section IV-B: p_k ~ Dir_N(β)).

    A label that is a number counts by its decile.
    """

    alpha: Annotated[Alpha, Meta(description="concentration: .1 gives sites of one or two classes, 100 nearly alike")]

    def _sites_of(self, records: Uncut, first: NDArray[np.int64], randomness: np.random.Generator) -> NDArray[np.int64]:
        labels = records.labels[first]
        if labels.dtype.kind == "f":
            labels = np.searchsorted(np.quantile(labels, np.arange(1, _LEVELS) / _LEVELS), labels)
        number = np.empty(len(first), dtype=np.int64)
        for label in np.unique(labels):
            rows = randomness.permutation(np.flatnonzero(labels == label))
            number[rows] = _by_shares(len(rows), randomness.dirichlet(np.full(self.sites, self.alpha)))
        return number


class QuantitySkew(_Cut, frozen=True, kw_only=True, tag="quantity"):
    """Sites of different size: shares from Dirichlet(α) (Li et al. 2022, ICDE, Section IV-D)."""

    alpha: Annotated[Alpha, Meta(description="concentration: .5 gives a few large sites, 100 nearly equal ones")]

    def _sites_of(self, records: Uncut, first: NDArray[np.int64], randomness: np.random.Generator) -> NDArray[np.int64]:
        order = randomness.permutation(len(first))
        number = np.empty(len(first), dtype=np.int64)
        number[order] = _by_shares(len(first), randomness.dirichlet(np.full(self.sites, self.alpha)))
        return number


class FeatureShift(_Cut, frozen=True, kw_only=True, tag="feature"):
    """Sites of equal size along an input: the first has its lowest values, the last its highest."""

    column: Annotated[
        str | None, Meta(description="name of the input; default the mean of all inputs, of images their brightness")
    ] = None
    strength: Annotated[float, Meta(ge=0, le=1, description="1 sorts the records, 0 is chance")] = 0.8

    def _sites_of(self, records: Uncut, first: NDArray[np.int64], randomness: np.random.Generator) -> NDArray[np.int64]:
        if self.column is None:
            values = records.inputs[first].mean(1)
        elif self.column in records.names:
            values = records.inputs[first, records.names.index(self.column)]
        else:
            raise ConfigError(f"data.partition.column: no input {self.column!r}; inputs are {', '.join(records.names)}")
        place = _ranks(values + 1e-12 * randomness.random(len(values)))
        mixed = self.strength * place + (1 - self.strength) * randomness.random(len(place))
        return (_ranks(mixed) * self.sites).astype(np.int64)


class Assigned(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="file"):
    """What ``privfed data split`` wrote: a CSV file of row numbers, from 1, and sites."""

    file: Annotated[str, Meta(min_length=1, description="the assignment; a path, or a name under PRIVFED_DATA")]

    @property
    def planned(self) -> None:
        """How many sites there will be: the file tells."""
        return None

    def assign(self, records: Uncut, seed: int) -> list[str]:
        from .files import read_frame

        frame = read_frame(self.file, ["row", "site"], maximum_rows=len(records.units))
        number = {text: row for row, text in enumerate(map(str, range(1, len(records.units) + 1)))}
        if len(frame) != len(number) or set(frame["row"]) != set(number):
            raise DataError(
                f"{self.file} must name each of the table's {len(number)} rows once, by its number from 1: it was made "
                "for another table"
            )
        sites = [""] * len(frame)
        for row, site in zip(frame["row"], frame["site"], strict=True):
            sites[number[row]] = site
        _, member = np.unique(records.units, return_inverse=True)
        if len({*zip(member.tolist(), sites, strict=True)}) != len({*member.tolist()}):
            raise DataError(f"{self.file} gives the records of one patient to several sites: keep them together")
        return sites


Partition = Alike | LabelSkew | QuantitySkew | FeatureShift | Assigned


def _by_shares(count: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """int64[count], ascending: as many of each number as its share of ``count`` is, rounded on the running sum."""
    ends = np.round(np.cumsum(shares)[:-1] * count)
    return np.searchsorted(ends, np.arange(count), side="right").astype(np.int64)


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """float64[n] in [0, 1): how many are smaller, as a share."""
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values)) / len(values)
    return ranks


def skewed_sites(labels: NDArray[np.int64], sites: int, *, skew: float, seed: int) -> NDArray[np.int64]:
    """int64[n]: a site for each record, with unequal sizes and shifted label rates.

    Site sizes fall linearly (the first is three times the last); the odds of label 1 rise from the first to the last
    site by a factor ``skew``. Real hospitals differ in both.

    Args:
        labels: int64[n] in {0, 1}.
        sites: number of sites.
        skew: ≥ 1; 1 is none.
        seed: public.
    """
    randomness = np.random.default_rng(seed)
    size = np.linspace(3.0, 1.0, sites)
    tilt = skew ** np.linspace(-0.5, 0.5, sites)
    site = np.empty(len(labels), dtype=np.int64)
    for label, odds in ((0, 1 / np.sqrt(tilt)), (1, np.sqrt(tilt))):
        rows = np.flatnonzero(labels == label)
        share = size * odds
        site[rows] = randomness.choice(sites, size=len(rows), p=share / share.sum())
    return site
