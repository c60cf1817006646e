"""Real vectors as integers that carry their share of the noise, and the sum of many as reals again.

A site's vector is rotated, scaled, rounded, held to a range, and gets its share of Skellam noise, in this order; after
the noise nothing is cut. All constants follow from public numbers, so that every site and the server derive the same
ones. Kairouz, Liu and Steinke 2021, Algorithm 1, with the noise of Agarwal, Kairouz and Liu 2021.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import NoGuarantee
from .events import Skellam
from .noise import derive_key, generator
from .rotation import ConditionalRounding, Floats, Rotation, record_l2_bound, round_at_random
from .skellam import SharedNoise, add_share, coordinate_bound, share, share_variance

# Integer steps in C, in units of √d. What rounding adds to ε falls with them, what a site uploads grows by their
# logarithm: at 100 a record's sensitivity grows by 1 %, at 10 a client's by 0.4 %.
_RECORD_STEPS = (100.0, 50.0, 25.0, 12.5)
_CLIENT_STEPS = (10.0,)
# What a plan may ask a site to draw from: five seconds and a gigabyte for the table, once for each variance
MOST_SHARE_VARIANCE = 2**36
_FLAT = 8.0  # a rotated vector's coordinates are Gaussian in all but name: beyond 8 of their deviations is nothing


@dataclass(frozen=True, kw_only=True)
class SharedSum:
    """What all sites' vectors have in common.

    Args:
        rotation: applied before rounding; its seed is public.
        scale: s, integer steps per unit.
        noise: the plan of the shares, or of the server's noise.
        limit: L; integers are held to ±L before the noise.
        divisor: what a site's vector is divided by in the mean: a public number of records, or 1.
        at_server: the server adds all of the noise to the sum, and is trusted to. Sites then add none.

    Guarantees:
        Every |coordinate| that `encode` of a subclass returns is at most `bound`, always. One release of the sum of at
        least ``noise.minimum_cohort`` such vectors is `event`, against whoever knows the shares of ``noise.colluders``
        of them. With `at_server`, against whoever does not see the sum before the noise.
    """

    rotation: Rotation
    scale: float
    noise: SharedNoise
    limit: int
    divisor: float = 1.0
    at_server: bool = False

    @property
    def dim(self) -> int:
        """Coordinates that are sent, padding included."""
        return self.rotation.padded_dim

    @property
    def bound(self) -> int:
        """The largest magnitude of a coordinate that a site sends."""
        return self.limit if self.at_server else coordinate_bound(self.limit, self.noise.share_variance)

    def event(self, shares: int | None = None) -> Skellam:
        """What one release is, with the shares that its sum carries; None: the fewest that it may carry."""
        return self.noise.event(None if self.at_server else shares)

    def encode_nothing(self, key: bytes) -> NDArray[np.int64]:
        """int64[dim]: what a site adds to the sum beside its vector, its share of noise and nothing else; for tests."""
        return self.encode(np.zeros(self.rotation.dim), key)

    def encode(self, vector: Floats, key: bytes) -> NDArray[np.int64]:
        """int64[dim] from float[parameters]."""
        raise NotImplementedError

    def add_noise(self, total: NDArray[np.int64], key: bytes) -> NDArray[np.int64]:
        """int64[dim]: the sum with the server's noise; unchanged where the sites have added theirs."""
        return total + share(key, self.dim, self.noise.share_variance) if self.at_server else total

    def decode(self, total: NDArray[np.int64], *, summands: int) -> NDArray[np.float64]:
        """float64[parameters]: the mean over ``summands`` sites from the noised sum int64[dim]."""
        if summands < 1:
            raise ValueError(f"summands must be at least 1, got {summands}")
        return self.rotation.restore(total.astype(np.float64)) / (self.scale * summands * self.divisor)

    def _noised(self, integers: NDArray[np.int64], key: bytes) -> NDArray[np.int64]:
        if self.at_server:
            return np.clip(integers, -self.limit, self.limit)
        return add_share(
            integers, limit=self.limit, variance=self.noise.share_variance, key=derive_key(key, b"noise share")
        )


@dataclass(frozen=True, kw_only=True)
class ClientSum(SharedSum):
    """Sums whose unit is a whole site: each site's vector is clipped as one."""

    rounding: ConditionalRounding = field(repr=False)

    def encode(self, vector: Floats, key: bytes) -> NDArray[np.int64]:
        """int64[dim] from float[parameters].

        Args:
            vector: everything that the site sends, not only its model.
            key: bytes[32], secret, for this release alone; equal keys and updates give equal vectors. An update that is
                not finite counts as zero: refusing it would tell that much of the site, without noise.
        """
        wide = np.asarray(vector, dtype=np.float64)
        if not np.isfinite(wide).all():
            wide = np.zeros_like(wide)
        return self._noised(self.rounding.encode(wide, generator(derive_key(key, b"rounding"))), key)


@dataclass(frozen=True, kw_only=True)
class RecordSum(SharedSum):
    """Sums whose unit is a record or a patient: a summand of a site's vector, clipped before it was added up."""

    def encode(self, vector: Floats, key: bytes) -> NDArray[np.int64]:
        """int64[dim] from the sum of clipped gradients float[parameters]; ``key`` as of `ClientSum.encode`."""
        scaled = self.rotation.rotate(vector) * self.scale
        return self._noised(round_at_random(scaled, generator(derive_key(key, b"rounding"))), key)


def client_sum(
    parameters: int,
    *,
    noise_multiplier: float,
    max_update_norm: float,
    minimum_cohort: int,
    colluders: int,
    sites: int,
    most_bits: int,
    seed: bytes,
    at_server: bool = False,
) -> ClientSum:
    """The finest sum of whole sites' vectors that fits.

    Args:
        parameters: coordinates of an update.
        noise_multiplier: z, in units of ``max_update_norm``.
        max_update_norm: C.
        minimum_cohort, colluders: as of `SharedNoise`; of no account with ``at_server``.
        sites: the most that are summed.
        most_bits: of a coordinate of the sum.
        seed: public, of the rotation.

    Raises:
        NoGuarantee: no scale that is fine enough fits.
    """
    rotation = Rotation(parameters, seed)

    def at(steps: float) -> ClientSum:
        scale = steps * math.sqrt(rotation.padded_dim) / max_update_norm
        rounding = ConditionalRounding(rotation, max_update_norm, scale)
        noise = SharedNoise(
            noise_multiplier=noise_multiplier,
            steps=max_update_norm * scale,
            dim=rotation.padded_dim,
            l2_bound=rounding.l2_bound,
            l1_bound=rounding.l1_bound,
            minimum_cohort=1 if at_server else minimum_cohort,
            colluders=0 if at_server else colluders,
        )
        return ClientSum(
            rotation=rotation, scale=scale, noise=noise, limit=rounding.bound, at_server=at_server, rounding=rounding
        )

    return _finest(map(at, _CLIENT_STEPS), sites, most_bits)


def record_sum(
    parameters: int,
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    expected_batch_size: float,
    sample_rate: float,
    minimum_cohort: int,
    colluders: int,
    sites: int,
    most_bits: int,
    seed: bytes,
) -> RecordSum:
    """The finest sum of clipped gradients that fits. Arguments and errors as of `client_sum`, and:

    Args:
        max_grad_norm: C, of one record's or patient's gradient.
        expected_batch_size: public; the divisor, and what a site's vector is expected to be the sum of. A much longer
            one is held to the range, which costs accuracy and no privacy.
        sample_rate: q of each record or patient.
    """
    rotation = Rotation(parameters, seed)
    root = math.sqrt(rotation.padded_dim)

    def at(steps: float) -> RecordSum:
        scale = steps * root / max_grad_norm
        noise = SharedNoise(
            noise_multiplier=noise_multiplier,
            steps=steps * root,
            dim=rotation.padded_dim,
            l2_bound=record_l2_bound(max_grad_norm, scale, rotation.padded_dim),
            minimum_cohort=minimum_cohort,
            colluders=colluders,
            sample_rate=sample_rate,
        )
        limit = math.ceil(steps * root * max(1.0, _FLAT * expected_batch_size / root))
        return RecordSum(rotation=rotation, scale=scale, noise=noise, limit=limit, divisor=expected_batch_size)

    return _finest(map(at, _RECORD_STEPS), sites, most_bits)


S = TypeVar("S", bound=SharedSum)


def _finest(candidates: Iterable[S], sites: int, most_bits: int) -> S:
    """The first of the candidates whose noise can be drawn and whose sum fits."""
    for candidate in candidates:
        drawable = candidate.noise.share_variance <= MOST_SHARE_VARIANCE
        if drawable and (2 * sites * candidate.bound).bit_length() <= most_bits:
            return candidate
    raise NoGuarantee(
        f"noise in shares does not fit: the sum of {sites} sites needs more than {most_bits} bits a coordinate, or a "
        f"share's variance is beyond 2^{MOST_SHARE_VARIANCE.bit_length() - 1}. Lower the noise (a larger "
        "target_epsilon, fewer rounds, more sites) or use noise = 'local'"
    )


class Release(Protocol):
    """What is known of a sum of small integer vectors: `Counts`, `Standardisation`."""

    @property
    def dim(self) -> int: ...
    def variance(self, noise_multiplier: float) -> int: ...
    def event(self, *, share_variance: int, shares: int, colluders: int) -> Skellam: ...


@dataclass(frozen=True, kw_only=True)
class CountSum:
    """Sums of vectors that are integers as they are, with the sites' shares of noise.

    Args:
        release: what one unit moves.
        noise_multiplier: z, in units of what one unit moves.
        minimum_cohort, colluders: as of `SharedNoise`.
        sites: the most that are summed.
        most_bits: of a coordinate of the sum.

    Guarantees:
        As of `SharedSum`: |coordinate| ≤ `bound`, and one release is `event`.
    """

    release: Release
    noise_multiplier: float
    minimum_cohort: int
    colluders: int
    sites: int
    most_bits: int

    @property
    def dim(self) -> int:
        return self.release.dim

    @property
    def bound(self) -> int:
        return coordinate_bound(self.limit, self.share_variance)

    @property
    def limit(self) -> int:
        """What a site's own count is held to: half of what the sum has room for."""
        return 1 << (self.most_bits - 3 - self.sites.bit_length())

    @property
    def share_variance(self) -> int:
        """What each site adds, per coordinate."""
        return share_variance(
            self.release.variance(self.noise_multiplier),
            minimum_cohort=self.minimum_cohort,
            colluders=self.colluders,
        )

    def event(self, shares: int | None = None) -> Skellam:
        """As `SharedSum.event`.

        Raises:
            ValueError: fewer shares than minimum_cohort: such a sum must not be released.
        """
        shares = self.minimum_cohort if shares is None else shares
        if shares < self.minimum_cohort:
            raise ValueError(f"shares must be at least minimum_cohort = {self.minimum_cohort}, got {shares}")
        return self.release.event(share_variance=self.share_variance, shares=shares, colluders=self.colluders)

    def add_noise(self, total: NDArray[np.int64], key: bytes) -> NDArray[np.int64]:
        """``total``: the sites have added their shares."""
        return total

    def encode_nothing(self, key: bytes) -> NDArray[np.int64]:
        """As `SharedSum.encode_nothing`."""
        return self.encode(np.zeros(self.dim, dtype=np.int64), key)

    def encode(self, vector: NDArray[np.int64], key: bytes) -> NDArray[np.int64]:
        """int64[dim] with this site's share; ``key`` as of `ClientSum.encode`."""
        return add_share(vector, limit=self.limit, variance=self.share_variance, key=derive_key(key, b"noise share"))
