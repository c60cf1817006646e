"""Homomorphic aggregation beside CKKS as NVFlare configures it: 8192, [60, 40, 40], symmetric, scale 2^40.

Both by TenSEAL and in one thread, in CPU seconds, so that other work on the machine does not count; rows that say
"wall" are the exception. The peer gets its best case, all parameters in one vector; NVFlare makes one for each tensor
of the model, which is measured beside it on a ResNet-56. Ours is all that a party does between an integer vector and
the wire: packing, blinds, encryption, checks. "Server add" is from the wire into the sum.
"""

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tenseal as ts
from common import Bar, Report, interleaved, parse, peak_memory_bytes

from privfed.crypto.aggregation import AggregationResult, Session, default_parameters, run_round
from privfed.crypto.homomorphic.bfv import PublicKey, RoundKey, _loaded
from privfed.crypto.homomorphic.client import HomomorphicClient
from privfed.crypto.homomorphic.coefficients import check_chunks
from privfed.crypto.homomorphic.fields import Slots, balanced, blind, layout_of, pack, unpack
from privfed.crypto.homomorphic.key_holder import HomomorphicKeyHolder
from privfed.crypto.homomorphic.messages import RECORD_BYTES
from privfed.crypto.homomorphic.server import HomomorphicServer
from privfed.crypto.journal import MemoryJournal
from privfed.crypto.masking.client import MaskedClient
from privfed.crypto.masking.server import MaskedServer
from privfed.crypto.packing import IntVector
from privfed.crypto.roster import FIRST_PREVIOUS, Identity, Roster

BOUNDS = {2: 2**15 - 1, 3: 2**8 - 1}
"""Fields → B for the ten clients here: 16-bit values (10 · 2^15 ≤ 2^19) and 9-bit ones (10 · 2^8 ≤ 2^12)."""

N = 10

BARS = (
    Bar("parameters per CPU-second, ours / CKKS, 2 fields", at_least=4),
    Bar("parameters per CPU-second, ours / CKKS, 3 fields", at_least=4),
    Bar("bytes, CKKS / ours, 2 fields", at_least=7),
    Bar("bytes, CKKS / ours, 3 fields", at_least=10),
    Bar("server add, CKKS / ours, 2 fields", at_least=10),
    Bar("decrypt, CKKS / ours, 2 fields", at_least=2.5),
    Bar("whole round (wall), seconds", at_most=15),
    Bar("whole round, peak memory", at_most=1.5),
    Bar("whole round, exact", at_least=1),
    Bar("same integers as masked", at_least=1),
)


def main() -> None:
    options = parse(__doc__)
    report = Report("homomorphic", packages=("tenseal", "cryptography", "numpy", "msgspec"))
    dim, repeats = (50_000, 3) if options.quick else (10**6, 9)
    with quiet():
        peer = Ckks(dim)
    for fields in (2, 3):
        beside_ckks(report, peer, dim=dim, fields=fields, repeats=repeats)
    layer_by_layer(report, repeats=1 if options.quick else 5)
    whole_round(report, dim=dim)
    same_integers(report, dim=1000 if options.quick else 10_000)
    report.finish(options, BARS)


@contextmanager
def quiet() -> Iterator[None]:
    """TenSEAL prints a warning for each vector of more than one ciphertext, past Python, to the standard output."""
    saved, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)


class Ckks:
    """The peer: encrypt and serialize at a client, add at the server, decrypt at a client."""

    def __init__(self, dim: int) -> None:
        self.context = ts.context(
            ts.SCHEME_TYPE.CKKS,
            poly_modulus_degree=8192,
            coeff_mod_bit_sizes=[60, 40, 40],
            encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC,
            n_threads=1,
        )
        self.context.global_scale = 2**40
        self.values = np.random.default_rng(0).normal(size=dim)
        self.bytes = self.encrypt()
        self.total = ts.ckks_vector_from(self.context, self.bytes)

    def encrypt(self) -> bytes:
        data: bytes = ts.ckks_vector(self.context, self.values).serialize()
        return data

    def load_and_add(self) -> None:
        self.total.add_(ts.ckks_vector_from(self.context, self.bytes))

    def decrypt(self) -> Any:
        return np.array(self.total.decrypt())


class Bfv:
    """Ours, step by step, under one key that is not destroyed in between."""

    def __init__(self, dim: int, fields: int) -> None:
        self.session = make_session(N, dim=dim, bound=BOUNDS[fields])
        self.layout = layout_of(dim, bound=BOUNDS[fields], n=N)
        if self.layout.fields != fields:
            raise SystemExit(f"{fields} fields were due, got {self.layout.fields}")
        self.key = RoundKey(self.layout.chunks)
        self.public = PublicKey(self.key.public)
        self.vector = np.random.default_rng(1).integers(-BOUNDS[fields], BOUNDS[fields], dim, endpoint=True)
        self.data = self.encrypt()
        self.key.add(self.data)
        self.blinds: Slots = blind(b"k" * 32, b"t" * 32, self.layout)
        self.total = self.key._sum.copy()
        self.taking = RoundKey(self.layout.chunks)
        self.taking._context = self.key._context

    def encrypt(self) -> bytes:
        slots = pack(self.vector, self.layout, self.session)
        slots += blind(b"k" * 32, b"t" * 32, self.layout)
        return self.public.encrypt(balanced(slots))

    def encrypt_bare(self) -> bytes:
        return self.public.encrypt(pack(self.vector, self.layout, self.session))

    def load_and_add(self) -> None:
        self.total.add_(_loaded(self.key._context, check_chunks(self.data, self.layout.chunks)))

    def check_and_add(self) -> None:
        """What the key holder does with one client's ciphertexts: besides, it looks at the noise budget of each."""
        self.taking.add(self.data)

    def decrypt(self) -> IntVector:
        """The sum in the clear, with the blinds taken off and every field's range checked."""
        slots = np.array(self.key._sum.decrypt(self.key._context.secret_key()), dtype=np.int64)
        return unpack(balanced(slots - self.blinds), self.layout, limit=self.session.bound)


def beside_ckks(report: Report, peer: Ckks, *, dim: int, fields: int, repeats: int) -> None:
    ours = Bfv(dim, fields)
    report.section(
        f"{dim:,} parameters, {fields} fields of {ours.layout.width} bits in a slot, |value| ≤ {BOUNDS[fields]}"
    )
    if not np.array_equal(ours.decrypt(), ours.vector):
        raise SystemExit("what was encrypted does not decrypt to itself")
    with quiet():
        times = interleaved(
            {
                "CKKS, encrypt and serialise": peer.encrypt,
                "ours, encrypt and serialise": ours.encrypt,
                "ours without blinds": ours.encrypt_bare,
                "CKKS, load and add": peer.load_and_add,
                "ours, load and add": ours.load_and_add,
                "ours, load, check noise and add": ours.check_and_add,
                "CKKS, decrypt": peer.decrypt,
                "ours, decrypt, unblind and check": ours.decrypt,
            },
            repeats=repeats,
            clock=time.process_time,
        )
    for name, timing in times.items():
        report.add(f"{name}, {fields} fields", timing)
    pace = times["CKKS, encrypt and serialise"].over(times["ours, encrypt and serialise"])
    report.add(f"ours, {fields} fields", dim / times["ours, encrypt and serialise"].median / 1e6, "M parameters/CPU-s")
    report.add(f"parameters per CPU-second, ours / CKKS, {fields} fields", pace)
    size = len(ours.data) + RECORD_BYTES
    report.add(f"ours, bytes a parameter, {fields} fields", size / dim, "bytes")
    report.add(f"CKKS, bytes a parameter, beside {fields} fields", len(peer.bytes) / dim, "bytes")
    report.add(f"bytes, CKKS / ours, {fields} fields", len(peer.bytes) / size, "×")
    for what, theirs, our in (
        ("server add", "CKKS, load and add", "ours, load and add"),
        ("server add with noise check", "CKKS, load and add", "ours, load, check noise and add"),
        ("decrypt", "CKKS, decrypt", "ours, decrypt, unblind and check"),
    ):
        report.add(f"{what}, CKKS / ours, {fields} fields", times[theirs].over(times[our]))


def resnet56() -> list[int]:
    """Sizes of the tensors of a ResNet-56 for CIFAR-10 (He et al. 2016, §4.2), 0.86 M parameters in all."""
    sizes = [3 * 16 * 9, 16, 16]
    before = 16
    for width in (16, 32, 64):
        for _ in range(18):
            sizes += [before * width * 9, width, width]  # a convolution, scale and shift of its normalization
            before = width
    return [*sizes, 64 * 10, 10]


def layer_by_layer(report: Report, *, repeats: int) -> None:
    """What NVFlare does with a model of many small tensors, beside one vector of ours."""
    sizes = resnet56()
    dim = sum(sizes)
    report.section(f"A ResNet-56: {dim:,} parameters in {len(sizes)} tensors, for CKKS one vector each")
    with quiet():
        peer, ours = Ckks(sizes[0]), Bfv(dim, 2)
        layers = [np.random.default_rng(0).normal(size=size) for size in sizes]

        def encrypt() -> list[bytes]:
            return [ts.ckks_vector(peer.context, layer).serialize() for layer in layers]

        size = sum(map(len, encrypt()))
        times = interleaved({"CKKS": encrypt, "ours": ours.encrypt}, repeats=repeats, clock=time.process_time)
    report.add("ResNet-56, CKKS, encrypt and serialise", times["CKKS"])
    report.add("ResNet-56, ours, encrypt and serialise, 2 fields", times["ours"])
    report.add("ResNet-56, parameters per CPU-second, ours / CKKS, 2 fields", times["CKKS"].over(times["ours"]))
    report.add("ResNet-56, bytes, CKKS / ours, 2 fields", size / (len(ours.data) + RECORD_BYTES), "×")


@dataclass(frozen=True)
class Finished:
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    exact: bool


def whole_round(report: Report, *, dim: int) -> None:
    """All parties of a round in one fresh process; then with two more that share the encryption."""
    report.section(f"A whole round: {dim:,} parameters × {N} clients, aggregator and key holder, one process")
    context = multiprocessing.get_context("spawn")
    for processes in (0, 2):
        with ProcessPoolExecutor(1, mp_context=context) as fresh:
            done = fresh.submit(one_round, dim, processes).result()
        name = "whole round" if processes == 0 else f"whole round with {processes} processes more"
        report.add(f"{name} (wall), seconds", done.seconds, "s")
        report.add(f"{name}, CPU seconds of that process", done.cpu_seconds, "s")
        report.add(f"{name}, peak memory", done.peak_bytes / 1e9, "GB")
        report.add(f"{name}, exact", float(done.exact))


def one_round(dim: int, processes: int) -> Finished:
    session = make_session(N, dim=dim, bound=BOUNDS[2])
    inputs = make_inputs(session)
    expected = sum(inputs.values())
    if not processes:
        started, cpu = time.perf_counter(), time.process_time()
        total = homomorphic(session, inputs).total
        return Finished(
            time.perf_counter() - started,
            time.process_time() - cpu,
            peak_memory_bytes(),
            bool(np.array_equal(total, expected)),
        )
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(warm_up, range(2 * processes)))
        started, cpu = time.perf_counter(), time.process_time()
        total = homomorphic(session, inputs, pool=pool).total
        return Finished(
            time.perf_counter() - started,
            time.process_time() - cpu,
            peak_memory_bytes(),
            bool(np.array_equal(total, expected)),
        )


def warm_up(number: int) -> int:
    """Imports done."""
    time.sleep(0.2)
    return number


def same_integers(report: Report, *, dim: int) -> None:
    """Each layout at the largest values that it takes, beside masks."""
    report.section("The same integers as masked aggregation, at the largest values of every layout")
    same = True
    for n in (3, 10, 64):
        for limit in (2**12, 2**19, 2**30):
            session = make_session(n, dim=dim, bound=limit // n)
            inputs = make_inputs(session)
            same &= np.array_equal(homomorphic(session, inputs).total, masked(session, inputs).total)
    report.add("same integers as masked", float(same))


# Parties

IDENTITIES = [Identity.generate(f"party-{i}") for i in range(65)]
ROSTER = Roster(version=1, previous=FIRST_PREVIOUS, members=tuple(identity.member for identity in IDENTITIES))
KEY_HOLDER = 64


def make_session(n: int, *, dim: int, bound: int) -> Session:
    numbers = default_parameters(n)
    return Session(
        run="benchmark",
        round=0,
        attempt=0,
        cohort=tuple(range(n)),
        dim=dim,
        bound=bound,
        threshold=numbers.threshold,
        minimum_cohort=numbers.minimum_cohort,
        colluders=numbers.colluders,
        context=bytes(32),
    )


def make_inputs(session: Session) -> dict[int, IntVector]:
    rng = np.random.default_rng(2)
    inputs = {i: rng.integers(-session.bound, session.bound, session.dim, endpoint=True) for i in session.cohort}
    for vector in inputs.values():
        vector[0], vector[-1] = session.bound, -session.bound
    return inputs


def homomorphic(
    session: Session, inputs: dict[int, IntVector], pool: ProcessPoolExecutor | None = None
) -> AggregationResult:
    server = HomomorphicServer(session=session, key_holder=KEY_HOLDER, roster=ROSTER)
    parties: dict[int, HomomorphicClient | HomomorphicKeyHolder] = {
        i: HomomorphicClient(
            session=session,
            key_holder=KEY_HOLDER,
            identity=IDENTITIES[i],
            roster=ROSTER,
            vector=partial(inputs.__getitem__, i),
            journal=MemoryJournal(),
            pool=pool,
        )
        for i in session.cohort
    }
    parties[KEY_HOLDER] = HomomorphicKeyHolder(
        session=session, identity=IDENTITIES[KEY_HOLDER], roster=ROSTER, journal=MemoryJournal()
    )
    return run_round(server, lambda requests: {i: parties[i].receive(sent) for i, sent in requests.items()}, _raise)


def masked(session: Session, inputs: dict[int, IntVector]) -> AggregationResult:
    server = MaskedServer(session=session, roster=ROSTER)
    clients = {
        i: MaskedClient(
            session=session,
            identity=IDENTITIES[i],
            roster=ROSTER,
            vector=partial(inputs.__getitem__, i),
            journal=MemoryJournal(),
        )
        for i in session.cohort
    }
    return run_round(server, lambda requests: {i: clients[i].receive(sent) for i, sent in requests.items()}, _raise)


def _raise(party: int, error: Exception) -> None:
    raise error


if __name__ == "__main__":
    main()
