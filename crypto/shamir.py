"""Shamir's secret sharing over a prime field, vectorised: many limbs, one matrix product.

A secret s is the constant term of a random polynomial f of degree t − 1; the share of point x is f(x). Any t shares
give s by Lagrange interpolation at 0; any t − 1 are uniform and independent of s. Shamir 1979.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .prg import Entropy

Limbs = npt.NDArray[np.int64]

# The largest prime below 2^27: t·p² < 2^63 lets a whole matrix product run in int64 before one reduction.
PRIME = 2**27 - 39
LIMB_BITS = 26
LIMBS = 10  # 10 × 26 = 260 ≥ 256 bits
SECRET_BYTES = 32
SHARE_BYTES = 4 * LIMBS
MAX_THRESHOLD = 511


def to_limbs(secrets: Sequence[bytes]) -> Limbs:
    """int64[10·m]: m secrets of 32 bytes, each as ten little-endian limbs of 26 bits."""
    if any(len(secret) != SECRET_BYTES for secret in secrets):
        raise ValueError(f"a secret must have {SECRET_BYTES} bytes, got {[len(secret) for secret in secrets]}")
    numbers = [int.from_bytes(secret, "little") for secret in secrets]
    limb = (1 << LIMB_BITS) - 1
    return np.array([n >> (LIMB_BITS * i) & limb for n in numbers for i in range(LIMBS)], dtype=np.int64)


def from_limbs(limbs: Limbs) -> bytes:
    """The 32-byte secret of ten limbs.

    Raises:
        ValueError: the limbs are not those of any 32-byte secret: the shares were not of one polynomial.
    """
    numbers: list[int] = limbs.tolist()
    if any(limb >> LIMB_BITS for limb in numbers) or numbers[-1] >> (256 - LIMB_BITS * (LIMBS - 1)):
        raise ValueError("the shares do not combine to a 32-byte secret")
    return sum(limb << (LIMB_BITS * i) for i, limb in enumerate(numbers)).to_bytes(SECRET_BYTES, "little")


def encode_shares(shares: Limbs) -> list[bytes]:
    """Each row as little-endian uint32: 40 bytes for every secret in it."""
    data, size = shares.astype("<u4").tobytes(), 4 * shares.shape[1]
    return [data[start : start + size] for start in range(0, len(data), size)]


def decode_shares(data: Sequence[bytes]) -> Limbs:
    """int64[len(data), 10]: one secret's shares, a row each.

    Raises:
        ValueError: a wrong length or a limb outside the field.
    """
    if any(len(share) != SHARE_BYTES for share in data):
        raise ValueError(f"a share must have {SHARE_BYTES} bytes, got {[len(share) for share in data]}")
    limbs = np.frombuffer(b"".join(data), dtype="<u4").astype(np.int64).reshape(-1, LIMBS)
    if int(limbs.max()) >= PRIME:
        raise ValueError("a share holds a limb outside the field")
    return limbs


def split(secret: Limbs, *, points: Sequence[int], threshold: int, entropy: Entropy, prime: int = PRIME) -> Limbs:
    """One share of `secret` for every point.

    Args:
        secret: int64[m], every limb in [0, prime).
        points: distinct evaluation points in [1, prime).
        threshold: t, shares needed to reconstruct.
        entropy: source of the t − 1 random coefficients of each limb.
        prime: the field; threshold·prime² must stay below 2^63.

    Returns:
        int64[len(points), m], row i for points[i].

    Raises:
        ValueError: points that repeat or vanish, a threshold outside [2, len(points)], or one too large for the prime.

    **Guarantees**: t − 1 rows are uniform whatever the secret, if `entropy` is (drawn by rejection, so without
    modulo bias). Says nothing about a dealer who lies: bind shares with signed hashes.
    """
    _check_points(points, prime)
    if not 2 <= threshold <= len(points):
        raise ValueError(f"threshold must be in [2, {len(points)}] for {len(points)} shares, got {threshold}")
    if threshold * prime**2 >= 2**63:
        raise ValueError(f"threshold must keep threshold·prime² below 2^63, got {threshold} with prime {prime}")
    if int(secret.min()) < 0 or int(secret.max()) >= prime:
        raise ValueError("secret must have limbs in [0, prime)")
    coefficients = np.empty((threshold, len(secret)), dtype=np.int64)
    coefficients[0] = secret
    coefficients[1:] = uniform(entropy, (threshold - 1) * len(secret), prime).reshape(threshold - 1, -1)
    return _powers(points, threshold, prime).T @ coefficients % prime


def combine(shares: Limbs, *, weights: Limbs, prime: int = PRIME) -> Limbs:
    """The secrets at 0 from exactly the shares given: pass t of them.

    Args:
        shares: int64[t, m], row i for the i-th point. Several secrets shared to the same points stand side by side.
        weights: int64[t], what `weights_at_zero` gives for those points.
        prime: the field, prime² < 2^63.

    Returns:
        int64[m].
    """
    # Each product is reduced before summing: a prime above 2^27 leaves no room for more than one.
    combined: Limbs = (weights[:, None] * shares % prime).sum(axis=0) % prime
    return combined


def weights_at_zero(points: Sequence[int], prime: int = PRIME) -> Limbs:
    """int64[t]: Lagrange's coefficients at 0, Π z / (x · Π (z − x)) over all points z and over those other than x.

    Raises:
        ValueError: points that repeat or vanish.
    """
    _check_points(points, prime)
    x = np.array(points, dtype=np.int64)
    factors = (x[None, :] - x[:, None]) % prime
    np.fill_diagonal(factors, x)
    # Products of columns in pairs: log₂ t passes, every value below prime² < 2^63.
    while factors.shape[1] > 1:
        half = factors.shape[1] // 2
        rest = factors[:, 2 * half :]
        factors = np.concatenate([factors[:, :half] * factors[:, half : 2 * half] % prime, rest], axis=1)
    everything = math.prod(points) % prime
    return np.array([everything * pow(below, -1, prime) % prime for below in factors[:, 0].tolist()], dtype=np.int64)


def uniform(entropy: Entropy, count: int, prime: int) -> Limbs:
    """int64[count] uniform in [0, prime): draws of the prime's width, those too large thrown away."""
    mask = (1 << prime.bit_length()) - 1
    accepted = np.empty(0, dtype=np.int64)
    while len(accepted) < count:
        draws = np.frombuffer(entropy(4 * (count - len(accepted))), dtype="<u4").astype(np.int64) & mask
        accepted = np.concatenate([accepted, draws[draws < prime]])
    return accepted


def _powers(points: Sequence[int], count: int, prime: int) -> Limbs:
    """int64[count, len(points)]: row i is x^i; each pass doubles the rows there are."""
    x = np.array(points, dtype=np.int64)
    powers = np.ones((count, len(x)), dtype=np.int64)
    have = 1
    while have < count:
        more = min(have, count - have)
        powers[have : have + more] = powers[:more] * (powers[have - 1] * x % prime) % prime
        have += more
    return powers


def _check_points(points: Sequence[int], prime: int) -> None:
    # The share at 0 is the secret itself.
    if len(set(points)) != len(points) or not all(0 < x < prime for x in points):
        raise ValueError("points must be distinct and in [1, prime)")
