import math

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import ECB
from hypothesis import given, settings
from hypothesis import strategies as st

from privfed.crypto.errors import RemoteProtocolError
from privfed.crypto.packing import add_packed, decode, encode, pack, packed_bytes, residues_in, unpack
from privfed.crypto.prg import CHUNK_BYTES, add_masks, expand, word_dtype

KEY = bytes(range(32))


def keystream(key: bytes, size: int) -> bytes:
    """CTR by its definition: AES of 0, 1, 2, … as 128-bit big-endian blocks."""
    blocks = b"".join(i.to_bytes(16, "big") for i in range(-(-size // 16)))
    return Cipher(AES256(key), ECB()).encryptor().update(blocks)[:size]


def test_keystream_starts_with_the_published_aes_256_answer() -> None:
    # AES-256 of the zero block under the zero key (NIST KAT, GCM's H for that key).
    words = np.zeros(8, dtype="<u2")
    add_masks(words, plus=[bytes(32)])
    assert words.tobytes().hex() == "dc95c078a2408989ad48a21492842087"


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("extra_words", [-3, 0, 5])
def test_chunked_mask_is_the_whole_keystream(bits: int, extra_words: int) -> None:
    dtype = word_dtype(bits)
    dim = CHUNK_BYTES // dtype.itemsize + extra_words
    words = np.zeros(dim, dtype=dtype)
    add_masks(words, plus=[KEY])
    assert words.tobytes() == keystream(KEY, words.nbytes)
    add_masks(words, minus=[KEY])
    assert not words.any()


@pytest.mark.parametrize("dim", [1, 40_000, 200_001])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_masks_in_many_ranges_are_the_sum_of_the_whole_ones(dim: int, threads: int) -> None:
    keys = [bytes([i]) * 32 for i in range(130)]  # more than are worked on at once
    words = np.arange(dim, dtype="<u4")
    expected = words.copy()
    for i, key in enumerate(keys):
        mask = np.frombuffer(keystream(key, 4 * dim), dtype="<u4")
        expected = expected + mask if i < 70 else expected - mask
    add_masks(words, plus=keys[:70], minus=keys[70:], threads=threads)
    assert np.array_equal(words, expected)


def test_entropy_streams_are_reproducible_and_apart() -> None:
    def take(label: str, sid: bytes = bytes(32)) -> bytes:
        return expand(KEY, session_id=sid, label=label)(64)

    assert take("a") == take("a")
    assert len({take("a"), take("b"), take("a", b"\1" * 32)}) == 3
    stream = expand(KEY, session_id=bytes(32), label="a")
    assert stream(10) + stream(54) == take("a")


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 32), dim=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_packing_round_trips_and_is_tight(bits: int, dim: int, seed: int) -> None:
    words = np.random.default_rng(seed).integers(0, 1 << bits, dim, dtype=np.uint64).astype(word_dtype(bits))
    words[0], words[-1] = (1 << bits) - 1, 0
    data = pack(words, bits)
    # The layout by its definition: column g of the lanes holds the words g, G + g, … from the lowest bit up.
    width = words.itemsize * 8
    period = width // math.gcd(bits, width)
    columns = -(-dim // period)
    lanes = np.frombuffer(data, dtype=words.dtype).reshape(period * bits // width, columns)
    for g in range(columns):
        number = sum(int(lane) << (width * i) for i, lane in enumerate(lanes[:, g]))
        expected = sum(int(word) << (bits * i) for i, word in enumerate(words[g::columns]))
        assert number == expected
    assert len(data) == packed_bytes(dim, bits) < dim * bits / 8 + 128
    assert np.array_equal(unpack(data, dim=dim, bits=bits), words)
    total = words.copy()
    add_packed(total, data, bits)
    assert np.array_equal(decode(total, bits), decode(words + words, bits))


def test_packing_drops_what_stands_above_the_word() -> None:
    words = np.array([0xFFFF_FFFF, 0x8000_0001, 5], dtype="<u4")
    assert pack(words, 21) == pack(words & np.uint32((1 << 21) - 1), 21)


@pytest.mark.parametrize("bits", [3, 8, 16, 21, 24, 32])  # 8 and 24 have rows longer than a block
def test_packing_round_trips_across_blocks(bits: int) -> None:
    words = np.random.default_rng(0).integers(0, 1 << bits, 200_001, dtype=np.uint64).astype(word_dtype(bits))
    assert np.array_equal(unpack(pack(words, bits), dim=len(words), bits=bits), words)


@given(bits=st.integers(2, 32), data=st.data())
def test_signed_values_round_trip_at_the_extremes(bits: int, data: st.DataObject) -> None:
    bound = (1 << (bits - 1)) - 1
    values = np.array([-bound, bound, 0, data.draw(st.integers(-bound, bound))], dtype=np.int64)
    assert np.array_equal(decode(encode(values, dim=4, bound=bound, bits=bits), bits), values)


@pytest.mark.parametrize("bits", [10, 16, 27, 32])
@pytest.mark.parametrize("dim", [1, 2, 32_768, 32_769, 100_001])
def test_residues_are_decoded_where_they_stand(bits: int, dim: int) -> None:
    sums = np.zeros(dim, dtype=np.int64)
    words = residues_in(sums, bits)
    words[:] = np.random.default_rng(0).integers(0, 1 << bits, dim, dtype=np.uint64)
    expected = decode(words.copy(), bits)
    assert decode(words, bits, into=sums) is sums
    assert np.array_equal(sums, expected)


@pytest.mark.parametrize(
    "vector",
    [np.zeros(3), np.zeros(3, np.uint32), np.zeros(3, bool), [1, 2, 3], np.array([None] * 3), np.full(3, np.nan)],
)
def test_encoding_refuses_what_is_not_a_signed_integer_vector(vector: object) -> None:
    with pytest.raises(TypeError, match="signed integer dtype"):
        encode(vector, dim=3, bound=5, bits=8)  # type: ignore[arg-type]


@pytest.mark.parametrize("vector", [[1, 2], [[1, 2, 3]], [0, 6, 0], [0, -6, 0], [-(2**63), 0, 0], [2**63 - 1, 0, 0]])
def test_encoding_refuses_wrong_shapes_and_values_beyond_the_bound(vector: list[int]) -> None:
    with pytest.raises(ValueError):
        encode(np.array(vector, dtype=np.int64), dim=3, bound=5, bits=8)


def test_unpacking_refuses_wrong_lengths_and_dirty_padding() -> None:
    # Three words of 5 bits: 16 positions of one column, in 5 lanes of 16 bits; bit 15 on is padding.
    data = bytes(pack(np.array([1, 2, 3], dtype="<u2"), 5))
    total = np.zeros(3, dtype="<u2")
    for bad in (data[:-1], data + b"\0", data[:1] + bytes([data[1] | 0x80]) + data[2:], data[:-1] + b"\1"):
        with pytest.raises(RemoteProtocolError):
            add_packed(total, bad, 5)
        assert not total.any()
