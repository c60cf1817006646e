"""Flower's SecAgg+ from its own functions, in the order of its client mod and server workflow (flwr 1.41).

Only what is cryptography: no quantization, messages or strategy, which would count against it. One client's part and
the server's part for one client are measured, in CPU seconds; the server's whole part is linear in them.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from flwr.common import bytes_to_ndarray, ndarray_to_bytes
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

MODULUS = 1 << 32  # Flower's default
SURVIVORS = 7


@dataclass(frozen=True)
class FlowerSeconds:
    """What one client costs itself, and the server if it survives or drops out after sharing."""

    client: float
    server_survivor: float
    server_dropped: float

    def server(self, survivors: int, dropped: int) -> float:
        """The server's whole part."""
        return survivors * self.server_survivor + dropped * self.server_dropped


def measure(*, neighbours: int, threshold: int, dim: int, dropped: bool) -> FlowerSeconds:
    """One client among `neighbours`, itself included.

    Args:
        dropped: measure what its dropping out costs the server too, which takes long.
    """
    peers = {i: [public_key_to_bytes(generate_key_pairs()[1]) for _ in range(2)] for i in range(1, neighbours)}
    vector = [np.random.default_rng(0).integers(0, 1 << 22, dim)]

    started = time.process_time()
    # _setup
    mask_private, mask_public = generate_key_pairs()
    box_private, box_public = generate_key_pairs()
    sk1, pk1 = private_key_to_bytes(mask_private), public_key_to_bytes(mask_public)
    sk2, pk2 = private_key_to_bytes(box_private), public_key_to_bytes(box_public)
    # _share_keys
    seed = os.urandom(32)
    b_shares = create_shares(seed, threshold, neighbours)
    sk_shares = create_shares(sk1, threshold, neighbours)
    shared, boxes = {}, []
    for i, (_, peer_pk2) in peers.items():
        shared[i] = generate_shared_key(bytes_to_private_key(sk2), bytes_to_public_key(peer_pk2))
        boxes.append(encrypt(shared[i], share_keys_plaintext_concat(0, i, b_shares[i], sk_shares[i])))
    # _collect_masked_vectors; a pair's one key opens its own boxes too
    for i, box in zip(peers, boxes, strict=True):
        share_keys_plaintext_separate(decrypt(shared[i], box))
    masked = parameters_addition(vector, pseudo_rand_gen(seed, MODULUS, get_parameters_shape(vector)))
    for i, (peer_pk1, _) in peers.items():
        key = generate_shared_key(bytes_to_private_key(sk1), bytes_to_public_key(peer_pk1))
        mask = pseudo_rand_gen(key, MODULUS, get_parameters_shape(vector))
        masked = parameters_subtraction(masked, mask) if i % 2 else parameters_addition(masked, mask)
    masked = parameters_mod(masked, MODULUS)
    upload = [ndarray_to_bytes(array) for array in masked]
    client = time.process_time() - started
    del pk1, pk2

    # collect_masked_vectors_stage and unmask_stage
    total: Any = [np.zeros(dim, dtype=np.int64)]

    def survivor() -> None:
        nonlocal total
        total = parameters_addition(total, [bytes_to_ndarray(data) for data in upload])
        mask = pseudo_rand_gen(combine_shares(b_shares[:threshold]), MODULUS, get_parameters_shape(total))
        total = parameters_subtraction(total, mask)

    def gone() -> None:
        nonlocal total
        secret = combine_shares(sk_shares[:threshold])
        for peer_pk1, _ in peers.values():
            key = generate_shared_key(bytes_to_private_key(secret), bytes_to_public_key(peer_pk1))
            total = parameters_addition(total, pseudo_rand_gen(key, MODULUS, get_parameters_shape(total)))

    # A first call grows the heap and takes up to 1.8 times as long as the others: times n, it would count n times.
    usual = median(_seconds(survivor) for _ in range(SURVIVORS))
    return FlowerSeconds(client, usual, _seconds(gone) if dropped else 0.0)


def _seconds(task: Callable[[], None]) -> float:
    started = time.process_time()
    task()
    return time.process_time() - started
