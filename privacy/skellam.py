"""Integer noise in shares: every site adds a little, and the sum carries what the claim needs.

The Skellam law of variance μ is that of the difference of two independent Poisson counts of mean μ/2. It is closed
under summation: n shares of variance μ/n add up to exactly the noise of variance μ, which is why it can be shared
inside a secure sum (Agarwal, Kairouz and Liu 2021, "The Skellam Mechanism for Differentially Private Federated
Learning").

A sample is read off a table of the distribution function by comparing integers: no floating-point number decides. The
table comes from the backward recurrence of the Bessel functions, P(k−1) = P(k+1) + (2k/μ)·P(k), in integers of some
200 bits (Olver and Miller; all terms are positive, so no digit is lost).
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from .events import Skellam
from .noise import KEY_BYTES

MAX_VARIANCE = 2**40  # of one share: a table of 14 million entries, built in some twenty seconds
SAMPLING_ERROR = 2.0**-100  # total variation between a sample and the Skellam law, per coordinate; see `SkellamTable`

_HIGH, _LOW = 63, 64  # bits of a threshold in the first word and in the second; the first word's last bit is the sign
_BLOCK = 1 << 16  # samples at a time: the work arrays stay in the cache
_TAIL_NATS = 160 * math.log(2)


def share_variance(variance: int, *, minimum_cohort: int, colluders: int) -> int:
    """What each site adds, so that the smallest sum that may be released still hides everybody.

    Args:
        variance: μ, the variance per coordinate that the claim needs, in integer units.
        minimum_cohort: the fewest sites whose sum may be released. Not the threshold of the secret sharing: a
            threshold says who can reconstruct, not how many contributed.
        colluders: sites whose shares the adversary may know.

    Returns:
        ⌈variance / (minimum_cohort − colluders)⌉.
    """
    if variance < 1:
        raise ValueError(f"variance must be at least 1, got {variance}")
    if not 0 <= colluders < minimum_cohort:
        raise ValueError(f"colluders must be from 0 to minimum_cohort − 1 = {minimum_cohort - 1}, got {colluders}")
    return -(-variance // (minimum_cohort - colluders))


class Keystream:
    """The ChaCha20 keystream of one key as 64-bit words (RFC 8439's cipher, counter and nonce zero). One key, one use.

    The same words as `noise.generator(key).bit_generator`'s, at the speed of OpenSSL.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"key must have {KEY_BYTES} bytes, got {len(key)}")
        # noise.generator reads the key as a big-endian number, and ChaCha as little-endian words
        self._cipher = Cipher(algorithms.ChaCha20(key[::-1], bytes(16)), mode=None).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        return np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8")


@dataclass(frozen=True)
class SkellamTable:
    """The law of |X| for X ~ Skellam(variance), as 127-bit integer thresholds.

    |X| is the number of thresholds ⌊2¹²⁷ · P(|X| ≤ k)⌋ that a uniform 127-bit number u reaches; a further bit is the
    sign. Of u's two words the second decides only if the first equals a threshold's first 63 bits, about once in 10¹⁴
    samples, and is drawn only then.

    **Guarantees.** Given uniform words, a sample's law differs from Skellam(variance) by at most `SAMPLING_ERROR` =
    2⁻¹⁰⁰ in total variation: 2⁻¹²⁷ per threshold for at most 2²⁴ of them, 2⁻¹²⁵ for the tail that is cut off, and the
    roundings of the recurrence, which are smaller. No float is compared anywhere. |sample| ≤ `largest`, always. By
    the hybrid argument a release with n shares in d coordinates adds n · d · 2⁻¹⁰⁰ · (1 + e^ε) to its δ; the accountant
    counts that. The words are uniform as far as ChaCha20 is a pseudo-random function.
    Not guaranteed: constant time. What the timing of a table look-up shows about a sample is not defended against.
    """

    variance: int
    high: NDArray[np.uint64] = field(repr=False)
    low: NDArray[np.uint64] = field(repr=False)
    guide: NDArray[np.int32] = field(repr=False)
    guide_bits: int

    @property
    def largest(self) -> int:
        """No sample is larger in magnitude: what a share can add to the bound of a coordinate."""
        return len(self.high) - 1

    def sample(self, count: int, words: Keystream) -> NDArray[np.int64]:
        """int64[count], independent."""
        samples = np.empty(count, dtype=np.int64)
        for start in range(0, count, _BLOCK):
            block = samples[start : start + _BLOCK]
            self._fill(block, words)
        return samples

    def _fill(self, block: NDArray[np.int64], words: Keystream) -> None:
        drawn = words.words(len(block))
        first = drawn >> np.uint64(1)
        magnitude = self.guide[first >> np.uint64(_HIGH - self.guide_bits)].astype(np.int64)
        threshold = self.high[magnitude]
        magnitude += threshold < first
        threshold = self.high[magnitude]
        behind = np.flatnonzero(threshold < first)  # cells with several thresholds: the tails
        if behind.size:
            magnitude[behind] = np.searchsorted(self.high, first[behind], side="left")
            threshold = self.high[magnitude]
        for tie in np.flatnonzero(threshold == first):
            magnitude[tie] = self._resolve(int(first[tie]), int(words.words(1)[0]))
        sign = (drawn & np.uint64(1)).astype(np.int64)
        np.subtract(magnitude ^ -sign, -sign, out=block)

    def _resolve(self, first: int, second: int) -> int:
        """#{k: threshold k ≤ u}, where u's first word equals that of some threshold."""
        begin, end = (int(np.searchsorted(self.high, np.uint64(first), side=side)) for side in ("left", "right"))
        return begin + bisect_right([int(low) for low in self.low[begin:end]], second)


@lru_cache(maxsize=4)
def table(variance: int) -> SkellamTable:
    """The table for one variance, built once per process: 0.3 s at a standard deviation of 10⁴, linear in it.

    Raises:
        ValueError: a variance below 1 or above 2⁴⁰.
    """
    if not 1 <= variance <= MAX_VARIANCE:
        raise ValueError(
            f"the variance of a share must be from 1 to 2^40 in integer units, got {variance}: choose another scale"
        )
    thresholds = _thresholds(variance)
    high = np.array([t >> _LOW for t in thresholds], dtype=np.uint64)
    low = np.array([t & (2**_LOW - 1) for t in thresholds], dtype=np.uint64)
    bits = min(22, max(8, (4 * len(thresholds)).bit_length()))
    cells = np.arange(1 << bits, dtype=np.uint64) << np.uint64(_HIGH - bits)
    return SkellamTable(variance, high, low, np.searchsorted(high, cells, side="left").astype(np.int32), bits)


def share(key: bytes, dim: int, variance: int) -> NDArray[np.int64]:
    """int64[dim]: a site's noise share.

    Args:
        key: 32 secret bytes, for this share alone: derived from the site's noise key and everything that the release
            is bound to, so that a replay is the same share and nothing else ever is.
        dim: coordinates, padding included.
        variance: of the share in every coordinate, from `share_variance`.
    """
    return table(variance).sample(dim, Keystream(key))


def add_share(vector: NDArray[np.int64], *, limit: int, variance: int, key: bytes) -> NDArray[np.int64]:
    """int64[dim]: `vector` with every coordinate held to ±limit, and then a share of noise on top.

    The order matters. Holding coordinates to a range moves no two vectors further apart, so it keeps Δ₁ and Δ₂. After
    the noise it would not be post-processing of the sum, which is all that the other shares protect.

    **Guarantees.** Every |coordinate| ≤ `coordinate_bound(limit, variance)`, always: nothing is left to saturate.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    return np.clip(vector, -limit, limit) + share(key, len(vector), variance)


def coordinate_bound(limit: int, variance: int) -> int:
    """No coordinate that `add_share` returns is larger: `bound` of the aggregation's session. Needs no table."""
    return limit + tail(variance, _TAIL_NATS) + 1


@dataclass(frozen=True, kw_only=True)
class SharedNoise:
    """The public constants of a sum with noise in shares.

    Args:
        noise_multiplier: z; the noise that counts has a standard deviation of z · C in real units, z · steps here.
        steps: C · s, the clip in integer steps.
        dim: coordinates, padding included.
        l2_bound, l1_bound: what one unit moves in the integer sum, rounding counted: of `ConditionalRounding` for a
            whole client's vector, of `record_l2_bound` for one record or patient inside it.
        minimum_cohort: the fewest sites whose sum may be released.
        colluders: sites whose shares the adversary of the claim knows.
        sample_rate: probability of each unit to be in the sum; below 1, coarse noise has only a loose bound of ε.
    """

    noise_multiplier: float
    steps: float
    dim: int
    l2_bound: float
    l1_bound: float | None = None
    minimum_cohort: int
    colluders: int
    sample_rate: float = 1.0

    @property
    def share_variance(self) -> int:
        """What each site adds, per coordinate."""
        return share_variance(
            math.ceil((self.noise_multiplier * self.steps) ** 2),
            minimum_cohort=self.minimum_cohort,
            colluders=self.colluders,
        )

    def event(self, shares: int | None = None) -> Skellam:
        """What one release is, with the shares that its sum carries; None: the fewest that it may carry (a reserve).

        Raises:
            ValueError: fewer shares than minimum_cohort: such a sum must not be released.
        """
        shares = self.minimum_cohort if shares is None else shares
        if shares < self.minimum_cohort:
            raise ValueError(f"shares must be at least minimum_cohort = {self.minimum_cohort}, got {shares}")
        l2_squared = math.floor(self.l2_bound**2 * (1 + 1e-12))
        l1 = min(math.isqrt(self.dim * l2_squared), l2_squared)
        if self.l1_bound is not None:
            l1 = min(l1, math.floor(self.l1_bound * (1 + 1e-12)))
        return Skellam(
            share_variance=self.share_variance,
            shares=shares,
            colluders=self.colluders,
            dim=self.dim,
            l2_squared=l2_squared,
            l1=l1,
            sample_rate=self.sample_rate,
        )

    def bits(self, limit: int, sites: int) -> int:
        """Bits of a modulus that the sum of `sites` noised vectors never exceeds."""
        return (2 * sites * coordinate_bound(limit, self.share_variance)).bit_length()


def tail(variance: int, probability_nats: float) -> int:
    """The least t with P(|X| > t) ≤ exp(−probability_nats), by Chernoff: log P(X ≥ t) ≤ √(t²+μ²) − μ − t·asinh(t/μ)."""

    def exponent(t: float) -> float:
        return t * math.asinh(t / variance) - (math.hypot(t, variance) - variance) - math.log(2)

    low, high = 0, 2
    while exponent(high) < probability_nats:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if exponent(middle) < probability_nats else (low, middle)
    return high


def _thresholds(variance: int) -> list[int]:
    """⌊2¹²⁷ · P(|X| ≤ k)⌋ for k = 0, 1, …; the last is 2¹²⁷."""
    top = tail(variance, _TAIL_NATS)
    above, here = 0, 1 << 64
    falling = [here]
    for k in range(top, 0, -1):
        above, here = here, above + 2 * k * here // variance
        falling.append(here)
    falling.reverse()
    folded = [falling[0], *(2 * mass for mass in falling[1:])]
    cumulative = list(accumulate(folded))
    precision = cumulative[-1].bit_length() + 32
    reciprocal = (1 << (127 + precision)) // cumulative[-1]  # one long division instead of one per entry
    thresholds = [mass * reciprocal >> precision for mass in cumulative]
    full = bisect_right(thresholds, (1 << 127) - 3)  # what lies beyond has a probability below 2⁻¹²⁵: cut off
    return [*thresholds[:full], 1 << 127]
