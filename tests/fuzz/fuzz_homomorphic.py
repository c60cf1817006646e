"""Forged messages for every decoder and machine of crypto/homomorphic/, under a memory limit.

    python tests/fuzz/fuzz_homomorphic.py --runs 2000

Messages are mutated at random and forged in structure, then signed with the sender's own valid key, as a malicious
client, key holder or aggregator would. Among the forgings are what TenSEAL 0.3.18 itself cannot stand: its serialized
vectors with sizes beyond the slots, tensors, contexts, other parameters. A target may accept or raise
`RemoteProtocolError`; any other exception, a crash, or more memory than the limit is a finding. A sum that comes out in
spite of a forging is that of honest inputs: memory past the slots would show in it.
"""

import argparse
import random
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tenseal as ts

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_crypto import Choices, Seeded, forge, limit_memory, mutate

from privfed.crypto import keys
from privfed.crypto.aggregation import Session
from privfed.crypto.errors import AggregationError, RemoteProtocolError
from privfed.crypto.homomorphic import messages as m
from privfed.crypto.homomorphic.bfv import PublicKey, RoundKey
from privfed.crypto.homomorphic.client import HomomorphicClient
from privfed.crypto.homomorphic.coefficients import CHUNK_BYTES, check_chunks, check_public_key
from privfed.crypto.homomorphic.fields import PLAIN_MODULUS, SLOTS
from privfed.crypto.homomorphic.key_holder import HomomorphicKeyHolder
from privfed.crypto.homomorphic.server import HomomorphicServer
from privfed.crypto.journal import MemoryJournal
from privfed.crypto.roster import FIRST_PREVIOUS, Identity, Roster
from privfed.crypto.wire import decode, encode

N, K, DIM = 4, 4, 5
IDENTITIES = [Identity.generate(f"site-{i}", random.Random(f"identity {i}").randbytes) for i in range(N + 1)]
ROSTER = Roster(version=1, previous=FIRST_PREVIOUS, members=tuple(i.member for i in IDENTITIES))
SESSION = Session(
    run="fuzz", round=0, attempt=0, cohort=tuple(range(N)), dim=DIM, bound=100, threshold=1, minimum_cohort=3,
    colluders=0, context=bytes(32),
)  # fmt: skip
REQUESTS = {
    m.KEY: m.KeyRequest,
    m.COMMIT: m.CommitRequest,
    m.CLOSE: m.CloseRequest,
    m.SEND: m.SendRequest,
    m.DELIVER: m.Delivery,
    m.RELEASE: m.ReleaseRequest,
}
REPLIES = {
    m.KEY: m.Key,
    m.COMMIT: m.Commitment,
    m.CLOSE: m.Closed,
    m.SEND: m.Ciphertexts,
    m.DELIVER: m.Checked,
    m.RELEASE: m.Release,
}
PHASES = list(REQUESTS)


def _input(index: int) -> np.ndarray:
    return np.full(DIM, index + 1, dtype=np.int64)


class Round:
    """One round with one forged message."""

    def __init__(self) -> None:
        self.server = HomomorphicServer(session=SESSION, key_holder=K, roster=ROSTER)
        self.clients = [
            HomomorphicClient(
                session=SESSION,
                key_holder=K,
                identity=IDENTITIES[i],
                roster=ROSTER,
                vector=lambda i=i: _input(i),  # type: ignore[misc]
                journal=MemoryJournal(),
            )
            for i in range(N)
        ]
        self.key_holder = HomomorphicKeyHolder(
            session=SESSION, identity=IDENTITIES[K], roster=ROSTER, journal=MemoryJournal()
        )

    def run(self, phase: str, forge_request: bool, forging: Callable[[Any, str, "Round"], bytes]) -> None:
        requests = self.server.start()
        while not self.server.done:
            at = self.server.phase
            for party, request in requests.items():
                machine = self.key_holder if at in m.KEY_HOLDER_STEPS else self.clients[party]
                forged = at == phase and party in (1, K)
                try:
                    if forged and forge_request:
                        request = forging(decode(request, REQUESTS[at], most=10**7), at, self)
                    reply = machine.receive(request)
                    if forged and not forge_request:
                        reply = forging(decode(reply, REPLIES[at], most=10**7), at, self)
                    self.server.receive(party, reply)
                except AggregationError:
                    continue
            requests = self.server.close_phase()
        result = self.server.result
        expected = sum(_input(i) for i in result.contributors)
        if not np.array_equal(result.total, expected):
            raise AssertionError(f"a forged {phase} message changed the sum")


def _signed(forged: Any, phase: str, current: Round) -> Any:
    """The forged message under its sender's valid signature, where it has one."""
    th, sid = current.server._th, current.server._sid
    signer, statement = IDENTITIES[K], b""
    match forged:
        case m.Key():
            sealing = current.server._sealing
            assert sealing is not None
            statement = m.transcript(sid, sealing.public, forged.public_key)
        case m.Commitment():
            signer = IDENTITIES[1]
            statement = m.commitment_statement(th, 1, forged.commitment, forged.sealed, 1)
        case m.CommitRequest():
            statement = m.transcript(sid, forged.sealing_key, forged.public_key)
        case m.SendRequest():
            statement = m.closed_statement(th, forged.members, forged.commitments)
        case _:
            return forged
    return msgspec.structs.replace(forged, signature=keys.sign(signer.secagg_private, statement))


def library_objects() -> list[bytes]:
    """What TenSEAL writes, with honest and with forged sizes and counts, and of other parameters."""
    objects = []
    for degree, moduli, scheme, plain_modulus in (
        (4096, [60, 20], "bfv", PLAIN_MODULUS),
        (8192, [60, 40, 40], "bfv", 1032193),
        (8192, [60, 40, 40], "ckks", 0),
    ):
        if scheme == "bfv":
            context = ts.context(ts.SCHEME_TYPE.BFV, degree, plain_modulus, moduli, n_threads=1)
            vector = ts.bfv_vector(context, [1, 2, 3]).serialize()
        else:
            context = ts.context(ts.SCHEME_TYPE.CKKS, degree, coeff_mod_bit_sizes=moduli, n_threads=1)
            context.global_scale = 2**40
            vector = ts.ckks_vector(context, [1.0, 2.0]).serialize()
        objects += [context.serialize(save_secret_key=True), context.serialize(save_public_key=True), vector]
        body = vector[vector.index(b"\x12") :]
        for sizes in (b"\x80\x80\x04", b"\xff\xff\xff\xff\x0f", b"\x00", b"\x03" * 50, b""):
            objects.append(b"\x0a" + bytes([len(sizes)]) + sizes + body)
        objects += [body * 3, vector[: len(vector) // 2]]
    return objects


class Fuzzer:
    def __init__(self) -> None:
        self.objects = library_objects()
        key = RoundKey(1)
        self.public, self.key = key.public, key
        self.chunks = PublicKey(key.public).encrypt(np.zeros(SLOTS, dtype=np.int64))

    def run(self, choices: Choices) -> None:
        if choices.below(3):
            self._decoders(choices)
            return
        phase, request = PHASES[choices.below(len(PHASES))], bool(choices.below(2))
        kind = choices.below(3)

        def forging(message: Any, phase: str, current: Round) -> bytes:
            if kind == 0:  # TenSEAL's own bytes in place of a field, in its full and in its due length
                name = message.__struct_fields__[1 + choices.below(len(message.__struct_fields__) - 1)]
                data = self.objects[choices.below(len(self.objects))]
                if choices.below(2):
                    size = len(getattr(message, name))
                    data = data[:size].ljust(size, b"\0")
                message = _signed(msgspec.structs.replace(message, **{name: data}), phase, current)
                return encode(message)
            return forge(message, choices, sign=lambda forged: _signed(forged, phase, current))

        try:
            Round().run(phase, request, forging)
        except AggregationError:
            pass

    def _decoders(self, choices: Choices) -> None:
        data = self.objects[choices.below(len(self.objects))]
        count = 1 + choices.below(4)
        for attempt in (
            lambda: check_chunks(data, count),
            lambda: check_chunks(data[: CHUNK_BYTES * count].ljust(CHUNK_BYTES * count, b"\1"), count),
            lambda: self.key.add(mutate(self.chunks, choices)),
            lambda: self.key.add(data),
            lambda: self.key.add(data[:CHUNK_BYTES].ljust(CHUNK_BYTES, b"\0")),
            lambda: check_public_key(data),
            lambda: PublicKey(mutate(self.public, choices)),
        ):
            try:
                attempt()
            except RemoteProtocolError:
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-mib", type=int, default=128)
    options = parser.parse_args()
    fuzzer = Fuzzer()
    limit_memory(options.memory_mib)
    for number in range(options.runs):
        seed = int.from_bytes(sha256(f"{options.seed}/{number}".encode()).digest()[:8], "big")
        try:
            fuzzer.run(Seeded(seed))
        except BaseException:
            print(f"finding at --seed {options.seed}, run {number}", file=sys.stderr)
            raise


if __name__ == "__main__":
    main()
