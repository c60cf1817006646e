"""Where every random number of a mechanism comes from, and the one place where noise is added.

Noise that an adversary can predict protects nobody. torch's CPU generator keeps 32 bits of its seed, so whoever knows a
gradient can try every seed; two sites that share a seed cancel each other's noise. Here a generator is ChaCha20 under a
256-bit key: from the system source, or derived from a site's secret key so that a process killed halfway makes the very
same release again, instead of a second one on the same records.
"""

import hashlib
import hmac
import secrets
from collections.abc import Sequence

import numpy as np
import torch
from randomgen import ChaCha
from torch import Tensor

KEY_BYTES = 32
_IN_CACHE = 2**15  # numbers that are drawn, scaled and added before the next: they stay near the processor


def new_key() -> bytes:
    """A fresh 256-bit secret from the system source."""
    return secrets.token_bytes(KEY_BYTES)


def derive_key(key: bytes, *labels: bytes) -> bytes:
    """The sub-key of ``key`` for ``labels`` (HMAC-SHA256 over length-prefixed labels).

    Distinct label sequences give independent keys; the same sequence gives the same key again.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"key must have {KEY_BYTES} bytes, got {len(key)}")
    message = b"".join(len(label).to_bytes(8, "big") + label for label in labels)
    return hmac.new(key, message, hashlib.sha256).digest()


def generator(key: bytes) -> np.random.Generator:
    """A numpy generator over the ChaCha20 keystream of a 256-bit ``key``. One key, one generator."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"key must have {KEY_BYTES} bytes, got {len(key)}")
    return np.random.Generator(ChaCha(key=int.from_bytes(key, "big")))


def insecure_key(seed: int, *labels: bytes) -> bytes:
    """A key that anyone can recompute from ``seed``: for reproducing a study, never for real records."""
    root = hashlib.sha256(b"privfed insecure seed" + seed.to_bytes(16, "big", signed=True)).digest()
    return derive_key(root, *labels)


def poisson_sample(size: int, sample_rate: float, randomness: np.random.Generator) -> Tensor:
    """Row numbers int64[m] of one Poisson draw: each of ``size`` rows alone, with probability ``sample_rate``."""
    return torch.from_numpy(np.flatnonzero(randomness.random(size) < sample_rate))


def release(
    clipped_sum: Tensor,
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    expected_batch_size: float,
    randomness: np.random.Generator,
) -> Tensor:
    """A sum of clipped gradients, noised and divided by a public number: the only way out of a private oracle.

    Args:
        clipped_sum: float32[...]; the sum over the drawn records, each record's part of L2 norm at most
            ``max_grad_norm``. An empty draw is a sum of zeros, and is released like any other.
        noise_multiplier: σ / C, unitless.
        max_grad_norm: C, the sensitivity of the sum to one record added or removed.
        expected_batch_size: the public denominator. Never the number of records drawn or held.
        randomness: the site's own generator.

    Guarantees:
        The Gaussian mechanism of noise multiplier σ/C (Dwork and Roth 2014, Theorem A.1) over real numbers, on the
        Poisson draw behind the sum. Sampled and added in float64, given as float32; what leaves a site is afterwards
        rounded to the fixed-point grid of the aggregation, coarser than float32's at the magnitudes that occur.
    """
    noise = randomness.standard_normal(tuple(clipped_sum.shape)) * (noise_multiplier * max_grad_norm)
    return (clipped_sum.double() + torch.from_numpy(noise)).div_(expected_batch_size).to(clipped_sum.dtype)


def release_each(
    clipped_sums: Tensor,
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    expected_batch_size: float,
    randomness: Sequence[np.random.Generator],
    dtype: torch.dtype,
) -> Tensor:
    """``dtype`` [K, P]: `release` of row k of ``clipped_sums`` with generator k.

    Sums in float64 get its bits, before they are rounded to ``dtype``. Sums in float32, which only simulations have,
    get normals sampled and added in float32, as other simulators do: another stream of the same generator.
    """
    sums, answers = clipped_sums.numpy(), torch.empty_like(clipped_sums, dtype=dtype)
    rows = answers.numpy()
    at_once = max(1, _IN_CACHE // max(1, sums.shape[1]))
    room = np.empty((min(at_once, len(sums)), sums.shape[1]), dtype=sums.dtype)
    for low in range(0, len(sums), at_once):
        sources, noise = randomness[low : low + at_once], room[: len(sums) - low]
        for row, source in zip(noise, sources, strict=True):
            source.standard_normal(out=row, dtype=room.dtype)
        noise *= noise_multiplier * max_grad_norm
        noise += sums[low : low + at_once]
        np.divide(noise, expected_batch_size, out=rows[low : low + at_once], casting="unsafe")
    return answers


def correlation(streams: Sequence[np.ndarray]) -> float:
    """The largest absolute correlation between any two noise streams, float64[d] each: near 0 when keys differ."""
    matrix = np.corrcoef(np.stack(streams))
    np.fill_diagonal(matrix, 0.0)
    return float(np.abs(matrix).max())
