"""Flower's SecAgg+ as it runs: its client mod's functions in their order, its server's own workflow (flwr 1.41).

Only what is cryptography: no quantization, network, parsing or strategy, which would count against it. One client's
part and the server's part for one client are measured, in CPU seconds; the server's whole part is linear in them.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.common import Code, FitRes, Parameters, Status, ndarray_to_bytes
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)
from flwr.compat.common import recorddict_compat
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation import secaggplus_workflow
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import SecAggPlusWorkflow, WorkflowState
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)
from flwr.supercore.task_identity import TaskIdentity

MODULUS = 1 << 32  # Flower's default
FACTOR = np.array([1], dtype=np.int64)  # the weight that Flower sends before the parameters
SURVIVORS = 10  # whose part of the server's work is measured


@dataclass(frozen=True)
class FlowerSeconds:
    """What one client costs itself, and the server if it survives or drops out after sharing."""

    client: float
    server_survivor: float
    server_dropped: float

    def server(self, survivors: int, dropped: int) -> float:
        """The server's whole part."""
        return survivors * self.server_survivor + dropped * self.server_dropped


def measure(*, neighbours: int, threshold: int, dim: int, dropped: int) -> FlowerSeconds:
    """One client among `neighbours`, itself included, and what it costs the server.

    Args:
        dropped: how many of them drop out after sharing. What one of them costs the server is measured too then, which
            takes long.
    """
    peers = {i: [public_key_to_bytes(generate_key_pairs()[1]) for _ in range(2)] for i in range(1, neighbours)}
    vector = [FACTOR, np.random.default_rng(0).integers(0, 1 << 22, dim)]

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

    # All survivors' shares reach the server, and it combines all that it has, not just `threshold` of them.
    of_survivor, of_dropped = (shares[: neighbours - dropped] for shares in (b_shares, sk_shares))
    server = _Server(upload, of_survivor, of_dropped, {0: [pk1, pk2], **peers}, min(SURVIVORS, neighbours - dropped))
    survivors = server.seconds(gone=False)
    one_gone = server.seconds(gone=True) - survivors if dropped else 0.0
    return FlowerSeconds(client, survivors / server.survivors, one_gone)


@dataclass
class _Server:
    """The two stages of Flower's own workflow that see vectors, for some of the clients.

    Attributes:
        upload: what every client sends.
        of_survivor, of_dropped: the shares that reach the server, of a mask seed and of a mask key.
        public_keys: of everyone, by node.
        survivors: how many clients are played.
    """

    upload: list[bytes]
    of_survivor: Sequence[bytes]
    of_dropped: Sequence[bytes]
    public_keys: dict[int, list[bytes]]
    survivors: int

    def seconds(self, *, gone: bool) -> float:
        """CPU time of both stages, with one more client that dropped out if `gone`."""
        active, everyone = set(range(self.survivors)), set(self.public_keys)
        left = max(everyone) if gone else None
        state = WorkflowState(
            sampled_node_ids=active if left is None else active | {left},
            active_node_ids=set(active),
            threshold=1,
            quantization_range=1 << 22,
            mod_range=MODULUS,
            nid_to_neighbours={node: set(everyone) for node in self.public_keys},
            nid_to_publickeys=self.public_keys,
            forward_srcs={node: [] for node in active},
            forward_ciphertexts={node: [] for node in active},
            nid_to_fitins={node: self._fit() for node in active},
            nid_to_proxies={node: None for node in active},
        )
        context: Any = SimpleNamespace(
            state=SimpleNamespace(config_records={MAIN_CONFIGS_RECORD: {WorkflowKey.CURRENT_ROUND: 1}}),
            strategy=SimpleNamespace(aggregate_fit=lambda *_: (None, {})),
        )
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # which its messages name as their sender
        workflow = SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=1.0)
        with mock.patch.object(secaggplus_workflow, "dequantize", lambda *_: []):
            grid = _Grid([self._masked(), self._shares(active, left)])
            started = time.process_time()
            done = workflow.collect_masked_vectors_stage(grid, context, state)
            done = done and workflow.unmask_stage(grid, context, state)
            elapsed = time.process_time() - started - grid.seconds
        if not done:
            raise AssertionError("Flower's workflow halted")
        return elapsed

    def _fit(self) -> Any:
        return recorddict_compat.fitres_to_recorddict(
            FitRes(Status(Code.OK, ""), Parameters([], ""), num_examples=1, metrics={}), keep_input=False
        )

    def _masked(self) -> dict[str, Any]:
        return {Key.MASKED_PARAMETERS: self.upload}

    def _shares(self, active: set[int], left: int | None) -> dict[int, dict[str, Any]]:
        """Node → its answer; the played clients together bring all shares that all survivors would."""
        owners = dict.fromkeys(active, self.of_survivor)
        if left is not None:
            owners[left] = self.of_dropped
        replies: dict[int, dict[str, Any]] = {node: {Key.NODE_ID_LIST: [], Key.SHARE_LIST: []} for node in active}
        for owner, shares in owners.items():
            for holder, share in enumerate(shares):
                reply = replies[holder % len(active)]
                reply[Key.NODE_ID_LIST].append(owner)
                reply[Key.SHARE_LIST].append(share)
        return replies


class _Grid:
    """Answers the stages' messages in this process; what that takes is no work of the server's and kept apart."""

    def __init__(self, stages: list[Any]) -> None:
        self._stages = iter(stages)
        self.seconds = 0.0

    def send_and_receive(self, requests: list[Message], *, timeout: float | None) -> list[Message]:
        started = time.process_time()
        replies, stage = [], next(self._stages)
        for request in requests:
            content = request.content
            node = request.metadata.dst_node_id
            content.config_records[RECORD_KEY_CONFIGS] = ConfigRecord(stage.get(node, stage))
            replies.append(Message(content=content, reply_to=request))
        self.seconds += time.process_time() - started
        return replies
