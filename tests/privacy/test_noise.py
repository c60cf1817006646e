"""Keys, draws and noise: distributions at a level of 1e-4, on fixed keys: a failure is a change and not bad luck."""

import math

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import stats

from privfed.privacy import noise

KEY = bytes(range(32))
RARE = 1e-4


def test_a_derived_key_depends_on_every_label_and_on_where_it_ends() -> None:
    given = [(), (b"",), (b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"c", b"ab"), (b"ab", b"c", b"")]
    derived = {noise.derive_key(KEY, *labels) for labels in given}
    assert len(derived) == len(given)
    assert noise.derive_key(KEY, b"ab", b"c") == noise.derive_key(KEY, b"ab", b"c")
    assert noise.derive_key(bytes(32), b"ab", b"c") not in derived


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_of_another_size_is_refused(size: int) -> None:
    for function in (noise.derive_key, noise.generator):
        with pytest.raises(ValueError, match=f"32 bytes, got {size}"):
            function(bytes(size))


def test_new_keys_differ_and_insecure_keys_repeat() -> None:
    assert noise.new_key() != noise.new_key()
    assert noise.insecure_key(1, b"a") == noise.insecure_key(1, b"a")
    assert len({noise.insecure_key(seed, site) for seed in (0, 1, 2**63 - 1) for site in (b"a", b"b")}) == 6


def test_the_generator_is_the_keystream_of_chacha20() -> None:
    """RFC 8439's cipher with counter and nonce zero, by another implementation; the key little-endian."""
    words = noise.generator(KEY).bit_generator.random_raw(32)
    cipher = Cipher(algorithms.ChaCha20(KEY[::-1], bytes(16)), mode=None)
    assert words.astype("<u8").tobytes() == cipher.encryptor().update(bytes(256))


def test_one_key_gives_one_stream() -> None:
    first, again, other = (noise.generator(key).random(8) for key in (KEY, KEY, KEY[::-1]))
    assert (first == again).all()
    assert not (first == other).any()


def test_poisson_draws_take_each_row_at_the_rate_and_alone() -> None:
    n, q, draws = 200, 0.3, 2000
    randomness = noise.generator(KEY)
    taken = np.zeros((draws, n))
    for draw in taken:
        rows = noise.poisson_sample(n, q, randomness)
        assert rows.dtype == torch.int64
        draw[rows.numpy()] = 1
    # Each row is Binomial(draws, q): the sum of squared standard scores is χ² with n degrees of freedom.
    scores = (taken.sum(0) - draws * q) / math.sqrt(draws * q * (1 - q))
    assert RARE < stats.chi2.sf((scores**2).sum(), n) < 1 - RARE
    # Rows are independent: batch sizes vary as Binomial(n, q). A shuffle of fixed batches has no variance at all.
    sizes = taken.sum(1)
    spread = ((sizes - n * q) ** 2).sum() / (n * q * (1 - q))
    assert RARE < stats.chi2.sf(spread, draws) < 1 - RARE
    # And so are draws: consecutive ones share n·q² rows, sd √(n·q²(1−q²)/draws) = 0.09; 4 sd are a chance of 6e-5.
    overlap = (taken[1:] * taken[:-1]).sum(1).mean()
    assert abs(overlap - n * q * q) < 4 * math.sqrt(n * q * q * (1 - q * q) / draws) * 1.2  # neighbours correlate a bit


def test_a_rate_of_one_draws_every_row_and_no_rows_give_none() -> None:
    assert noise.poisson_sample(5, 1.0, noise.generator(KEY)).tolist() == [0, 1, 2, 3, 4]
    assert noise.poisson_sample(0, 0.5, noise.generator(KEY)).tolist() == []


def released(clipped_sum: torch.Tensor, key: bytes = KEY, noise_multiplier: float = 1.5) -> torch.Tensor:
    return noise.release(
        clipped_sum,
        noise_multiplier=noise_multiplier,
        max_grad_norm=0.8,
        expected_batch_size=40.0,
        randomness=noise.generator(key),
    )


def test_a_release_is_the_sum_plus_gaussian_noise_of_sigma_c_over_the_denominator() -> None:
    total = torch.linspace(-30, 30, 5000)
    out = released(total)
    assert out.dtype == torch.float32
    residuals = (out.double() * 40 - total.double()) / (1.5 * 0.8)
    assert stats.kstest(residuals.numpy(), "norm").pvalue > RARE
    assert torch.equal(released(total, noise_multiplier=0.0), (total.double() / 40).float())


def test_an_empty_draw_is_released_as_noise() -> None:
    out = released(torch.zeros(5000)).double() * 40 / (1.5 * 0.8)
    assert stats.kstest(out.numpy(), "norm").pvalue > RARE


def test_a_replay_is_the_same_release() -> None:
    total = torch.ones(20)
    assert torch.equal(released(total), released(total))
    assert not torch.equal(released(total), released(total, key=KEY[::-1]))


def test_the_noise_of_sites_is_uncorrelated_and_a_shared_seed_shows() -> None:
    d = 4096
    keys = [noise.derive_key(KEY, b"site", bytes([site])) for site in range(6)]
    streams = [released(torch.zeros(d), key).numpy() for key in keys]
    # 15 pairs, each correlation about N(0, 1/d): 5 sd are a chance of 15 · 6e-7
    assert noise.correlation(streams) < 5 / math.sqrt(d)
    shared = [*streams[:3], released(torch.zeros(d), keys[1]).numpy()]
    assert noise.correlation(shared) > 0.999
    assert noise.correlation([streams[0], -streams[0]]) > 0.999  # noise that cancels is as bad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_simulated_site_has_the_whole_noise_and_its_own(dtype: torch.dtype) -> None:
    sites, size = 5, 20_000
    sources = [noise.generator(bytes([site]) * 32) for site in range(sites)]
    answers = noise.release_each(
        torch.zeros(sites, size, dtype=dtype),
        noise_multiplier=3.0,
        max_grad_norm=0.5,
        expected_batch_size=10.0,
        randomness=sources,
        dtype=torch.float32,
    )
    normals = answers.double().numpy() / (3.0 * 0.5 / 10.0)
    assert stats.kstest(normals.flatten(), "norm").pvalue > RARE
    assert np.abs(np.corrcoef(normals) - np.eye(sites)).max() < 5 / np.sqrt(size)
