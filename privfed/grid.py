"""Vectors on a fixed-point grid, and how fine it may be for a sum of so many sites."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privfed.crypto.aggregation import MAX_BITS
from privfed.privacy.discretize import FixedPoint
from privfed.privacy.events import NoiseSite, PrivacyUnit

from .config import Aggregation, Config
from .errors import ConfigError

FINEST = 16
"""Binary digits after the point where nobody asks for others and the sum has room for them."""


@dataclass(frozen=True)
class Grid:
    """Vectors on a fixed-point grid, for updates that carry their noise already or claim none."""

    parameters: int
    grid: FixedPoint

    @property
    def dim(self) -> int:
        return self.parameters

    @property
    def bound(self) -> int:
        return self.grid.bound

    def add_noise(self, total: NDArray[np.int64], key: bytes) -> NDArray[np.int64]:
        return total

    def decode(self, total: NDArray[np.int64], *, summands: int) -> NDArray[np.float64]:
        return self.grid.decode(total, summands=summands)


def uses_grid(config: Config) -> bool:
    """Whether the run's updates go on a `Grid`: the other encodings choose their own scale."""
    privacy = config.privacy
    return privacy.unit is PrivacyUnit.NONE or privacy.noise is NoiseSite.LOCAL or not config.method.sends


def grid_of(settings: Aggregation, sites: int) -> FixedPoint:
    """The grid of a sum of ``sites`` updates: the configured one; without one, the finest up to `FINEST` that fits.

    A site and the coordinator derive the same from the same plan.
    """
    if settings.fraction_bits is not None:
        return FixedPoint(settings.fraction_bits, settings.limit)
    most = finest(settings.limit, sites)
    return FixedPoint(FINEST if most is None else min(FINEST, most), settings.limit)


def finest(limit: float, sites: int) -> int | None:
    """The most binary digits after the point with which the sum of ``sites`` values up to ±limit fits; None if none."""
    return next((bits for bits in range(24, -1, -1) if _bits(limit, sites, bits) <= MAX_BITS), None)


def check_grid(config: Config, sites: int) -> None:
    """Return if the sum of so many sites' updates fits the words that aggregations add up.

    Raises:
        ConfigError: it does not; with what would. Or ``fraction_bits`` is given where no update goes on a grid.
    """
    settings = config.aggregation
    if settings.fraction_bits is not None and not uses_grid(config):
        raise ConfigError(
            "aggregation.fraction_bits does nothing in this run: noise in shares and noise for clients choose a scale "
            "of their own. Leave it out, or set privacy.noise = 'local'"
        )
    if not config.method.sends or not uses_grid(config) or sites < 1:
        return
    most, asked = finest(settings.limit, sites), settings.fraction_bits
    if most is None:
        raise ConfigError(
            f"aggregation.limit = {settings.limit:g}: the sum of {sites} sites' values does not fit {MAX_BITS} bits; "
            f"lower it to {(2 ** (MAX_BITS - 1) - 1) // sites} or less"
        )
    if asked is not None and asked > most:
        raise ConfigError(
            f"aggregation.fraction_bits = {asked}: the sum of {sites} sites' values up to ±{settings.limit:g} takes "
            f"{_bits(settings.limit, sites, asked)} bits, and {MAX_BITS} are there; set aggregation.fraction_bits to "
            f"{most} or less, or leave it out, which takes as many as fit"
        )


def _bits(limit: float, sites: int, fraction_bits: int) -> int:
    """The width of a session's words; see `Session.bits`."""
    return (2 * sites * int(limit * 2**fraction_bits)).bit_length()
