from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.crypto import shamir

from .consortium import stream


def test_the_field_is_a_prime_field_with_room_for_the_limbs_and_the_sums() -> None:
    p = shamir.PRIME
    assert all(p % d for d in range(2, int(p**0.5) + 1))
    assert p > 1 << shamir.LIMB_BITS
    assert shamir.MAX_THRESHOLD * p * p < 2**63 <= (shamir.MAX_THRESHOLD + 2) * p * p


def test_combining_matches_googles_precomputed_shares() -> None:
    # google-parfait/federated-compute, fcp/secagg/shared/shamir_secret_sharing_test.cc,
    # ReconstructWorksWithPrecomputedShares: p = 2^31 + 11, t = 3, points 1 to 5, two big-endian 4-byte limbs in each
    # share, secret 00 00 00 33.
    raw = [
        [112, 207, 118, 46, 110, 212, 170, 28],
        [48, 160, 197, 172, 38, 235, 145, 204],
        [63, 115, 238, 144, 40, 68, 183, 71],
        [29, 72, 240, 207, 114, 224, 26, 141],
        [74, 31, 204, 116, 6, 189, 187, 136],
    ]
    shares = np.array([np.frombuffer(bytes(row), dtype=">u4") for row in raw], dtype=np.int64)
    for chosen in combinations(range(5), 3):
        weights = shamir.weights_at_zero([i + 1 for i in chosen], 2**31 + 11)
        limbs = shamir.combine(shares[list(chosen)], weights=weights, prime=2**31 + 11)
        assert sorted(limbs.tolist()) == [0, 33]


@settings(max_examples=40, deadline=None)
@given(secret=st.binary(min_size=32, max_size=32), n=st.integers(2, 12), data=st.data())
def test_any_t_shares_reconstruct_each_of_several_secrets(secret: bytes, n: int, data: st.DataObject) -> None:
    t = data.draw(st.integers(2, n))
    points = data.draw(st.lists(st.integers(1, 10_000), min_size=n, max_size=n, unique=True))
    secrets = [secret, bytes(31) + b"\xff", secret[::-1]]
    limbs = shamir.to_limbs(secrets)
    encoded = shamir.encode_shares(shamir.split(limbs, points=points, threshold=t, entropy=stream("s")))
    rows = data.draw(st.permutations(range(n)))[:t]
    weights = shamir.weights_at_zero([points[i] for i in rows])
    for number, expected in enumerate(secrets):
        at = slice(40 * number, 40 * (number + 1))
        chosen = shamir.decode_shares([encoded[i][at] for i in rows])
        assert shamir.from_limbs(shamir.combine(chosen, weights=weights)) == expected


@given(points=st.lists(st.integers(1, shamir.PRIME - 1), min_size=1, max_size=20, unique=True))
def test_weights_are_lagranges(points: list[int]) -> None:
    p = shamir.PRIME
    for x, weight in zip(points, shamir.weights_at_zero(points).tolist(), strict=True):
        top = bottom = 1
        for z in points:
            if z != x:
                top, bottom = top * z % p, bottom * (z - x) % p
        assert weight * bottom % p == top % p


def test_fewer_than_t_shares_fit_every_secret() -> None:
    # In a field of 7 elements with t = 3, all 49 polynomials of one secret give every pair of shares exactly once.
    for secret in range(7):
        seen = set()
        for a in range(7):
            for b in range(7):
                draws = iter([a, b])

                def entropy(size: int, draws: Iterator[int] = draws) -> bytes:
                    return b"".join(next(draws).to_bytes(4, "little") for _ in range(size // 4))

                shares = shamir.split(np.array([secret]), points=[1, 2, 3], threshold=3, entropy=entropy, prime=7)
                seen.add((int(shares[0, 0]), int(shares[1, 0])))
        assert len(seen) == 49


def test_coefficients_too_large_for_the_field_are_drawn_again() -> None:
    draws = b"".join(value.to_bytes(4, "little") for value in (7, 3, 15, 5))  # masked to 3 bits: 7 (refused), 3, 7, 5
    position = 0

    def entropy(size: int) -> bytes:
        nonlocal position
        position += size
        return draws[position - size : position]

    assert shamir.uniform(entropy, 2, 7).tolist() == [3, 5]


def test_largest_threshold_does_not_overflow() -> None:
    n = shamir.MAX_THRESHOLD
    secret = b"\xff" * 32
    shares = shamir.split(shamir.to_limbs([secret]), points=range(1, n + 1), threshold=n, entropy=stream("big"))
    assert shamir.from_limbs(shamir.combine(shares, weights=shamir.weights_at_zero(range(1, n + 1)))) == secret


@pytest.mark.parametrize(("points", "threshold"), [([1, 1, 2], 2), ([0, 1, 2], 2), ([1, 2, 3], 1), ([1, 2, 3], 4)])
def test_splitting_refuses_bad_points_and_thresholds(points: list[int], threshold: int) -> None:
    with pytest.raises(ValueError):
        shamir.split(shamir.to_limbs([bytes(32)]), points=points, threshold=threshold, entropy=stream("x"))


def test_decoding_refuses_shares_outside_the_field() -> None:
    for bad in (bytes(39), b"\xff" * 40):
        with pytest.raises(ValueError):
            shamir.decode_shares([bad])
    with pytest.raises(ValueError):
        shamir.to_limbs([bytes(31)])
    with pytest.raises(ValueError):
        shamir.weights_at_zero([1, 1])
    with pytest.raises(ValueError):
        shamir.from_limbs(np.full(10, 2**26 - 1))
