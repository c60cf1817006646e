"""Masked aggregation beside the bare keystream, pycryptodome's Shamir and Flower's SecAgg+.

Peers come from the [bench] extra; without them their rows are missing and --check says so. All runs in one thread and
is given in CPU seconds, so that other work on the machine does not count; rows that say "wall" are the exception.
"""

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from common import Bar, Ratio, Report, Timing, interleaved, parse, peak_memory_bytes
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from privfed.crypto import shamir
from privfed.crypto.aggregation import AggregationResult, Session, default_parameters
from privfed.crypto.journal import MemoryJournal
from privfed.crypto.keys import MemoisedVerify, Verify, verify
from privfed.crypto.masking.client import MaskedClient
from privfed.crypto.masking.server import MaskedServer
from privfed.crypto.packing import IntVector, add_packed, pack
from privfed.crypto.packing import decode as to_signed
from privfed.crypto.packing import encode as to_residues
from privfed.crypto.prg import add_masks, word_dtype
from privfed.crypto.roster import FIRST_PREVIOUS, Identity, Roster

BOUND = 1 << 21  # 22-bit values, as fine as Flower's default quantization

BARS = (
    Bar("masks / keystream, d=1e6 k=20", at_most=1.35),
    Bar("masks / keystream, d=1e6 k=100", at_most=1.25),
    Bar("doubling d", at_most=2.2),
    Bar("doubling k", at_most=2.2),
    Bar("Shamir, pycryptodome / ours, n=100 t=67", at_least=1000),
    Bar("client, Flower / ours, n=20 d=1e6", at_least=5),
    Bar("client, Flower / ours, n=20 d=1e5", at_least=10),
    Bar("client, Flower / ours, n=100 d=1e5", at_least=20),
    Bar("server, Flower / ours, n=20 d=1e6", at_least=20),
    Bar("server, Flower / ours, n=100 d=1e6", at_least=30),
    Bar("server, Flower / ours, n=100 d=1e6 10 % out", at_least=25),
    Bar("upload beyond w/8, n=100 d=1e6", at_most=0.1),
    Bar("n=1000 d=1e5 5 % out, exact sum", at_least=1),
    Bar("n=1000 d=1e5 5 % out, peak memory", at_most=2),
)


def main() -> None:
    options = parse(__doc__)
    report = Report("masking", packages=("cryptography", "numpy", "msgspec", "flwr", "pycryptodome"))
    quick = options.quick
    masks(report, dim=10**4 if quick else 10**6, repeats=3 if quick else 15)
    packing(report, dim=10**4 if quick else 10**6, repeats=3 if quick else 9)
    secret_sharing(report, repeats=1 if quick else 3)
    cases = [(5, 10**4, 0)] if quick else [(20, 10**6, 0), (20, 10**6, 2), (20, 10**5, 0), (100, 10**5, 0)]
    cases += [] if quick else [(100, 10**6, 0), (100, 10**6, 10)]
    for n, dim, dropped in cases:
        beside_flower(report, n=n, dim=dim, dropped=dropped, repeats=7 if n == 20 else 1)
    many_clients(report, n=150 if quick else 1000, dim=10**3 if quick else 10**5)
    report.finish(options, BARS)


def masks(report: Report, *, dim: int, repeats: int) -> None:
    """Mask expansion and addition against the keystream of the same bytes alone, both in one thread."""
    report.section("Masks: k keystreams added to d words of 32 bits, against making the keystreams alone")
    size = _power(dim)
    for k in (20, 100):
        words = np.zeros(dim, dtype="<u4")
        keys = [i.to_bytes(32, "big") for i in range(k)]
        times = interleaved(
            {
                "keystream": partial(BareKeystream(), keys, words.nbytes),
                "masks": partial(add_masks, words, plus=keys[::2], minus=keys[1::2]),
            },
            repeats=repeats,
            clock=time.process_time,
        )
        for name, timing in times.items():
            report.add(f"{name}, d={size} k={k}", timing)
        report.add(f"masks / keystream, d={size} k={k}", times["masks"].over(times["keystream"]))
        walls = interleaved(
            {
                threads: partial(add_masks, words, plus=keys[::2], minus=keys[1::2], threads=int(threads))
                for threads in ("1", "2")
            },
            repeats=repeats,
        )
        report.add(f"masks, 2 threads / 1 (wall), d={size} k={k}", walls["2"].over(walls["1"]))
    short = np.zeros(dim, dtype="<u2")
    keys = [i.to_bytes(32, "big") for i in range(20)]
    wide, twice = np.zeros(dim, dtype="<u4"), np.zeros(2 * dim, dtype="<u4")
    times = interleaved(
        {
            "16 bits": partial(add_masks, short, plus=keys),
            "32 bits": partial(add_masks, wide, plus=keys),
            "2d": partial(add_masks, twice, plus=keys),
            "2k": partial(add_masks, wide, plus=[*keys, *(key[::-1] for key in keys[1:]), b"\xff" * 32]),
        },
        repeats=repeats,
        clock=time.process_time,
    )
    report.add("words of 16 bits / 32 bits", times["16 bits"].over(times["32 bits"]))
    report.add("doubling d", times["2d"].over(times["32 bits"]))
    report.add("doubling k", times["2k"].over(times["32 bits"]))


class BareKeystream:
    """AES-256-CTR alone, into a buffer made once and of the size that is fastest."""

    def __init__(self, chunk_bytes: int = 256 * 1024) -> None:
        self._zeros, self._buffer = memoryview(bytes(chunk_bytes)), memoryview(bytearray(chunk_bytes))

    def __call__(self, keys: list[bytes], size: int) -> None:
        for key in keys:
            stream = Cipher(AES256(key), CTR(bytes(16))).encryptor()
            for start in range(0, size, len(self._zeros)):
                count = min(len(self._zeros), size - start)
                stream.update_into(self._zeros[:count], self._buffer[:count])


def packing(report: Report, *, dim: int, repeats: int) -> None:
    """From int64 to the wire and back."""
    for bits in (14, 20, 27):
        bound = (1 << (bits - 1)) - 1
        values = np.random.default_rng(0).integers(-bound, bound, dim)
        words = to_residues(values, dim=dim, bound=bound, bits=bits)
        data = pack(words, bits)
        total = np.zeros(dim, dtype=word_dtype(bits))
        times = interleaved(
            {
                "encode": partial(to_residues, values, dim=dim, bound=bound, bits=bits),
                "pack": partial(pack, words, bits),
                "unpack and add": partial(add_packed, total, data, bits),
                "decode": partial(to_signed, words, bits),
            },
            repeats=repeats,
            clock=time.process_time,
        )
        report.section(f"Packing {_power(dim)} coefficients of {bits} bits")
        for name, timing in times.items():
            report.add(f"{name}, w={bits}", timing)


def secret_sharing(report: Report, *, repeats: int) -> None:
    """A 32-byte secret split among 100 and rebuilt from 67."""
    n, t, secret = 100, 67, bytes(range(32))
    report.section(f"Shamir: split and recover 32 bytes, n={n} t={t}")

    def ours() -> None:
        shares = shamir.encode_shares(
            shamir.split(shamir.to_limbs([secret]), points=range(1, n + 1), threshold=t, entropy=np.random.bytes)
        )
        weights = shamir.weights_at_zero(range(1, t + 1))
        rebuilt = shamir.from_limbs(shamir.combine(shamir.decode_shares(shares[:t]), weights=weights))
        if rebuilt != secret:
            raise AssertionError("recovered another secret")

    mine = interleaved({"ours": ours}, repeats=21, clock=time.process_time)["ours"]
    report.add(f"ours, n={n} t={t}", mine)
    try:
        from Crypto.Protocol.SecretSharing import Shamir
    except ImportError:
        report.note("pycryptodome is missing: pip install -e '.[bench]'")
        return

    def theirs() -> None:  # 16 bytes at a time is all it takes
        halves = [Shamir.split(t, n, secret[:16]), Shamir.split(t, n, secret[16:])]
        if b"".join(Shamir.combine(half[:t]) for half in halves) != secret:
            raise AssertionError("recovered another secret")

    peer = interleaved({"pycryptodome": theirs}, repeats=repeats, warmup=0, clock=time.process_time)["pycryptodome"]
    report.add(f"pycryptodome, n={n} t={t}", peer)
    report.add(f"Shamir, pycryptodome / ours, n={n} t={t}", Ratio(tuple(s / mine.median for s in peer.seconds)))


def beside_flower(report: Report, *, n: int, dim: int, dropped: int, repeats: int) -> None:
    """A whole round of ours, signatures, journal and wire included, and the cryptography of Flower's SecAgg+."""
    case = f"n={n} d={_power(dim)}" + (f" {100 * dropped // n} % out" if dropped else "")
    rounds, peers = [], []
    flower = _flower(report)
    for _ in range(repeats):
        rounds.append(our_round(n=n, dim=dim, dropped=dropped))
        if flower is not None:
            threshold = rounds[0].session.threshold
            peers.append(flower.measure(neighbours=n, threshold=threshold, dim=dim, dropped=dropped))
    client = Timing(tuple(each.client_seconds for each in rounds))
    server = Timing(tuple(each.server_seconds for each in rounds))
    session = rounds[0].session
    report.section(f"One round, {case}, t={session.threshold}, w={session.bits}: a client, and the server")
    report.add(f"client, ours, {case}", client)
    report.add(f"server, ours, {case}", server)
    if not dropped:
        extra = rounds[0].upload_bytes / dim - session.bits / 8
        report.add(f"upload beyond w/8, {case}", extra, "bytes/coefficient")
    if not peers:
        return
    their_client = Timing(tuple(peer.client for peer in peers))
    their_server = Timing(tuple(peer.server(n - dropped, dropped) for peer in peers))
    if not dropped:
        report.add(f"client, Flower, {case}", their_client)
        report.add(f"client, Flower / ours, {case}", their_client.over(client))
    report.add(f"server, Flower, {case}", their_server)
    report.add(f"server, Flower / ours, {case}", their_server.over(server))


def _flower(report: Report) -> ModuleType | None:
    """The peer's functions, or a note of how to install it."""
    try:
        return import_module("flower_peer")
    except ImportError:
        report.note("flwr is missing or too old: pip install -e '.[bench]' (flwr 1.41 and pycryptodome)")
        return None


def many_clients(report: Report, *, n: int, dim: int) -> None:
    """A whole k-regular round of all clients in one fresh process."""
    parameters = default_parameters(n)
    report.section(f"All of {n} clients in one process, k={parameters.degree}, t={parameters.threshold}")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        seconds, exact, peak = pool.submit(simulate, n, dim).result()
    case = f"n={n} d={_power(dim)} 5 % out"
    report.add(f"{case}, wall", Timing((seconds,)))
    report.add(f"{case}, exact sum", float(exact))
    report.add(f"{case}, peak memory", peak / 1e9, "GB")


def simulate(n: int, dim: int) -> tuple[float, bool, int]:
    """Seconds, whether the sum is exact, and this process's peak memory."""
    started = time.perf_counter()
    done = our_round(n=n, dim=dim, dropped=n // 20, memoised=True)
    return time.perf_counter() - started, done.exact, peak_memory_bytes()


@dataclass
class _Stopwatch:
    """Stands before a machine and adds up the time spent in it."""

    machine: Any
    seconds: float = 0.0

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.machine, name)
        if not callable(attribute):
            return attribute

        def timed(*arguments: object) -> object:
            started = time.process_time()
            try:
                return attribute(*arguments)
            finally:
                self.seconds += time.process_time() - started

        return timed


@dataclass(frozen=True)
class Round:
    """What one round of ours took; a client's figure is the mean of those that stayed."""

    session: Session
    client_seconds: float
    server_seconds: float
    upload_bytes: int
    exact: bool


@dataclass
class _Replies:
    """Replies made one at a time, so that the masked inputs never stand in memory together."""

    requests: dict[int, bytes]
    clients: dict[int, _Stopwatch]
    largest: int = 0

    def items(self) -> Iterator[tuple[int, bytes]]:
        for client, request in self.requests.items():
            if client in self.clients:
                reply = self.clients[client].receive(request)
                self.largest = max(self.largest, len(reply))
                yield client, reply


@dataclass
class _Source:
    """A client's input, the same whenever asked; the time it takes is no cryptography and is kept apart."""

    client: int
    dim: int
    seconds: float = 0.0

    def __call__(self) -> IntVector:
        started = time.process_time()
        values: IntVector = np.random.default_rng(self.client).integers(-BOUND, BOUND, self.dim, endpoint=True)
        self.seconds += time.process_time() - started
        return values


def our_round(*, n: int, dim: int, dropped: int, memoised: bool = False) -> Round:
    """A round in which the last clients of the cohort drop out after they shared their keys."""
    identities = [Identity.generate(f"site-{i}") for i in range(n)]
    roster = Roster(version=1, previous=FIRST_PREVIOUS, members=tuple(each.member for each in identities))
    session = Session(
        run="benchmark",
        round=0,
        attempt=0,
        cohort=tuple(range(n)),
        dim=dim,
        bound=BOUND,
        context=bytes(32),
        **vars(default_parameters(n)),
    )
    check: Verify = MemoisedVerify() if memoised else verify
    server = _Stopwatch(MaskedServer(session=session, roster=roster, verify=check))
    sources = [_Source(i, dim) for i in range(n)]
    clients = {
        i: _Stopwatch(
            MaskedClient(
                session=session,
                identity=identities[i],
                roster=roster,
                vector=sources[i],
                journal=MemoryJournal(),
                verify=check,
            )
        )
        for i in range(n)
    }
    upload = 0
    waiting = server.start()
    while not server.done:
        if server.phase == "mask":
            for gone in range(n - dropped, n):
                del clients[gone]
        replies = _Replies(waiting, clients)
        for client, reply in replies.items():
            server.receive(client, reply)
        upload = max(upload, replies.largest)
        waiting = server.close_phase()
    result: AggregationResult = server.result
    expected = np.zeros(dim, dtype=np.int64)
    for client in result.contributors:
        expected += sources[client]()
    generating = sum(source.seconds for source in sources) / 2  # asked twice: by the client, and just now
    return Round(
        session=session,
        client_seconds=(sum(each.seconds for each in clients.values()) - generating) / len(clients),
        server_seconds=server.seconds,
        upload_bytes=upload,
        exact=len(result.contributors) == n - dropped and np.array_equal(result.total, expected),
    )


def _power(number: int) -> str:
    """1000000 as 1e6."""
    return f"{number:.0e}".replace("e+0", "e")


if __name__ == "__main__":
    main()
