"""Forged messages for every decoder and machine of crypto/, under a memory limit.

    python tests/fuzz/fuzz_crypto.py --runs 2000         # pseudo-random, anywhere: what the tests run
    python tests/fuzz/fuzz_crypto.py --seconds 600       # coverage-guided by atheris: `make fuzz`

Messages are mutated at random, and forged in structure: lengths, counts, lists and sizes altered, then signed with the
client's own valid key, as a malicious client or server would. A target may accept or raise `RemoteProtocolError`. Any
other exception, or more memory than the limit, is a finding.
"""

import argparse
import importlib
import random
import resource
import sys
from collections.abc import Callable
from hashlib import sha256
from typing import Any, Protocol

import msgspec
import numpy as np

from privfed.crypto import keys, merkle, packing
from privfed.crypto.aggregation import Session, session_id
from privfed.crypto.errors import AggregationError, RemoteProtocolError
from privfed.crypto.journal import MemoryJournal
from privfed.crypto.masking import messages as m
from privfed.crypto.masking.client import MaskedClient
from privfed.crypto.masking.server import MaskedServer
from privfed.crypto.plain import Invitation, PlainServer, Submission
from privfed.crypto.roster import FIRST_PREVIOUS, Identity, Roster, load_roster, sign_roster
from privfed.crypto.wire import decode, decode_indices, encode


class Choices(Protocol):
    """Where a run's decisions come from: a seed, or a coverage-guided fuzzer's bytes."""

    def below(self, limit: int) -> int: ...
    def take(self, size: int) -> bytes: ...


class Seeded:
    """Pseudo-random choices."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, limit: int) -> int:
        return self._random.randrange(limit)

    def take(self, size: int) -> bytes:
        return self._random.randbytes(size)


class Guided:
    """Choices read from the bytes that atheris evolves."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider

    def below(self, limit: int) -> int:
        chosen: int = self._provider.ConsumeIntInRange(0, limit - 1)
        return chosen

    def take(self, size: int) -> bytes:
        taken: bytes = self._provider.ConsumeBytes(size)
        return taken


def _entropy(label: str) -> Callable[[int], bytes]:
    generator = random.Random(label)
    return generator.randbytes


N = 4
IDENTITIES = [Identity.generate(f"site-{i}", _entropy(f"identity {i}")) for i in range(N)]
ROSTER = Roster(version=1, previous=FIRST_PREVIOUS, members=tuple(i.member for i in IDENTITIES))
SESSION = Session(
    run="fuzz", round=0, attempt=0, cohort=tuple(range(N)), dim=5, bound=100, threshold=3, minimum_cohort=3,
    colluders=1, context=bytes(32),
)  # fmt: skip
SID = session_id(SESSION, ROSTER.hash)
OFFLINE = b"\5" * 32
PHASES = list(m.FOLLOWS)
REQUESTS: dict[str, type[msgspec.Struct]] = {
    m.ADVERTISE: m.Start,
    m.SHARE: m.Members,
    m.MASK: m.Delivery,
    m.CONSISTENCY: m.Survivors,
    m.UNMASK: m.Reveal,
}
REPLIES: dict[str, type[msgspec.Struct]] = {
    m.ADVERTISE: m.Advertise,
    m.SHARE: m.Deal,
    m.MASK: m.MaskedInput,
    m.CONSISTENCY: m.Consent,
    m.UNMASK: m.Shares,
}
HEADERS = [b"\xdc", b"\xdd", b"\xde", b"\xdf", b"\xc4", b"\xc5", b"\xc6", b"\xd9", b"\xda", b"\xdb", b"\xc8", b"\xc9"]


def _client(index: int) -> MaskedClient:
    return MaskedClient(
        session=SESSION,
        identity=IDENTITIES[index],
        roster=ROSTER,
        vector=lambda: np.arange(5, dtype=np.int64),
        journal=MemoryJournal(_entropy(f"seed {index}")),
    )


def _server() -> MaskedServer:
    return MaskedServer(session=SESSION, roster=ROSTER, entropy=_entropy("server"))


class Fuzzer:
    """The honest log, machines before every phase, and one forging at a time."""

    def __init__(self) -> None:
        self.log: dict[tuple[str, int], tuple[bytes, bytes]] = {}
        server, clients = _server(), [_client(i) for i in range(N)]
        requests = server.start()
        self.th = self.dealers = self.input_secret = b""
        while not server.done:
            phase = server.phase
            self.th, self.dealers = server._th or self.th, server._dealers_bytes or self.dealers
            self.input_secret = server._input_secrets.get(1, self.input_secret)
            for index, request in requests.items():
                reply = clients[index].receive(request)
                self.log[phase, index] = (request, reply)
                server.receive(index, reply)
            requests = server.close_phase()
        self.servers: dict[str, MaskedServer] = {}
        self.clients: dict[str, MaskedClient] = {}
        self.roster = sign_roster(ROSTER, OFFLINE)

    def server(self, phase: str) -> MaskedServer:
        if phase not in self.servers:
            server = _server()
            server.start()
            for earlier in PHASES[: PHASES.index(phase)]:
                for index in range(N):
                    server.receive(index, self.log[earlier, index][1])
                server.close_phase()
            self.servers[phase] = server
        return self.servers[phase]

    def client(self, phase: str) -> MaskedClient:
        if phase not in self.clients:
            client = _client(0)
            for earlier in PHASES[: PHASES.index(phase)]:
                client.receive(self.log[earlier, 0][0])
            self.clients[phase] = client
        return self.clients[phase]

    def run(self, choices: Choices) -> None:
        """One forged message to one target."""
        target = choices.below(4)
        phase = PHASES[choices.below(len(PHASES))]
        if target == 0:
            self._to_server(phase, choices)
        elif target == 1:
            self._to_client(phase, choices)
        elif target == 2:
            self._to_decoders(choices)
        else:
            self._to_plain(choices)

    def _to_server(self, phase: str, choices: Choices) -> None:
        server = self.server(phase)
        reply = decode(self.log[phase, 1][1], REPLIES[phase], most=10**6)
        message = forge(reply, choices, sign=lambda forged: self._sign(phase, forged))
        try:
            server.receive(1, message)
        except RemoteProtocolError:
            return
        # Accepted: the others answer, and the round goes on to a sum or to an abort with a reason.
        del self.servers[phase]
        try:
            while not server.done:
                for index in set(server.waiting):
                    server.receive(index, self.log[server.phase, index][1])
                server.close_phase()
        except AggregationError:
            pass

    def _to_client(self, phase: str, choices: Choices) -> None:
        request = decode(self.log[phase, 0][0], REQUESTS[phase], most=10**6)
        client = self.client(phase)
        try:
            client.receive(forge(request, choices))
        except RemoteProtocolError:
            pass
        if client.phase != phase:
            del self.clients[phase]

    def _to_decoders(self, choices: Choices) -> None:
        data = choices.take(choices.below(400))
        bits, dim = 1 + choices.below(32), 1 + choices.below(100)
        roster = mutate(self.roster, choices)
        most = 10 ** choices.below(9)
        kinds: list[type[msgspec.Struct]] = [*REQUESTS.values(), *REPLIES.values(), Invitation, Submission]
        kind = kinds[choices.below(len(kinds))]
        for attempt in (
            lambda: decode_indices(data),
            lambda: packing.unpack(data, dim=dim, bits=bits),
            lambda: packing.unpack(data.ljust(packing.packed_bytes(dim, bits), b"\0"), dim=dim, bits=bits),
            lambda: load_roster(roster, keys.verification_key(OFFLINE)),
            lambda: load_roster(sign_body(data), keys.verification_key(OFFLINE)),
            lambda: decode(data, kind, most=most),
        ):
            try:
                attempt()
            except RemoteProtocolError:
                pass

    def _to_plain(self, choices: Choices) -> None:
        server = PlainServer(session=SESSION)
        server.start()
        vector = bytes(packing.pack(np.arange(5, dtype="<u2"), SESSION.bits))
        try:
            server.receive(0, forge(Submission(sid=session_id(SESSION, b""), vector=vector), choices))
        except RemoteProtocolError:
            pass

    def _sign(self, phase: str, reply: Any) -> Any:
        """The forged reply under the client's valid signature, where it has one to give."""
        statement: bytes
        if phase == m.ADVERTISE:
            statement = m.advertise_statement(SID, 1, reply.mask_key, reply.box_key)
        elif phase == m.SHARE:
            hashes = [reply.hashes[i : i + 64] for i in range(0, len(reply.hashes), 64)] or [b""]
            boxes = [reply.boxes[i : i + m.BOX_BYTES] for i in range(0, len(reply.boxes), m.BOX_BYTES)]
            boxes.insert(1, b"")
            boxes += [b""] * (len(hashes) - len(boxes))
            root = merkle.tree([m.leaf(pair, box) for pair, box in zip(hashes, boxes, strict=False)])[-1][0]
            statement = m.deal_statement(SID, self.th, 1, reply.commitment, root)
        elif phase == m.MASK:
            if not reply.complaints:
                key = m.input_key(self.input_secret, self.th, 1, self.dealers)
                return msgspec.structs.replace(reply, proof=keys.one_time_tag(key, reply.masked))
            proof = m.complaint_statement(SID, self.th, 1, self.dealers, reply.complaints)
            return msgspec.structs.replace(reply, proof=keys.sign(IDENTITIES[1].secagg_private, proof))
        else:
            return reply
        return msgspec.structs.replace(reply, signature=keys.sign(IDENTITIES[1].secagg_private, statement))


def sign_body(body: bytes) -> bytes:
    """A roster file whose body is arbitrary and whose signature is valid."""
    from privfed.crypto.digest import digest
    from privfed.crypto.roster import _SignedRoster

    signature = keys.sign(OFFLINE, digest("privfed/roster/1", body))
    return msgspec.msgpack.encode(_SignedRoster(body=body, signature=signature))


def forge(message: msgspec.Struct, choices: Choices, sign: Callable[[Any], Any] = lambda forged: forged) -> bytes:
    """An altered message: fields forged and signed again, bytes mutated, or a length that lies."""
    kind = choices.below(4)
    if kind == 0:
        return mutate(encode(message), choices)
    names = message.__struct_fields__
    if kind == 1:  # a field's header announces another length than follows
        data = encode(message)
        field = bytes(getattr(message, names[choices.below(len(names))]))
        at = data.find(field) if field else 1 + choices.below(len(data) - 1)
        header = HEADERS[choices.below(len(HEADERS))] + choices.take(4)
        return data[: max(0, at - choices.below(6))] + header + data[at:]
    changes = {}
    for _ in range(1 + choices.below(2)):
        name = names[choices.below(len(names))]
        changes[name] = resize(bytes(getattr(message, name)), choices)
    forged = msgspec.structs.replace(message, **changes)
    return encode(sign(forged) if kind == 2 else forged)


def resize(field: bytes, choices: Choices) -> bytes:
    """Another field in place of one: cut, extended, repeated, reordered by records, or of other values."""
    kind, record = choices.below(7), (1, 4, 32, 40, 64, m.BOX_BYTES, m.ADVERTISEMENT_BYTES)[choices.below(7)]
    if kind == 0:
        return field[: choices.below(len(field) + 1)]
    if kind == 1:
        return field + choices.take(record)
    if kind == 2:
        return field[:4096] * (1 + choices.below(4))
    if kind == 3:  # one record twice
        at = choices.below(len(field) // record + 1) * record
        return field[: at + record] + field[at:]
    if kind == 4:  # one record less
        at = choices.below(len(field) // record + 1) * record
        return field[:at] + field[at + record :]
    if kind == 5:
        return choices.take(len(field)).ljust(len(field), b"\xff")
    return mutate(field, choices)


def mutate(data: bytes, choices: Choices) -> bytes:
    """Some bytes replaced, and perhaps the end cut off."""
    altered = bytearray(data)
    for _ in range(1 + choices.below(4)):
        if altered:
            altered[choices.below(len(altered))] = choices.below(256)
    return bytes(altered[: choices.below(len(altered) + 1)] if choices.below(8) == 0 else altered)


def limit_memory(mebibytes: int) -> None:
    """Lets this process map no more than that on top of what it has."""
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    limit = pages * resource.getpagesize() + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, help="pseudo-random forgings instead of atheris")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=600, help="how long atheris runs")
    parser.add_argument("--memory-mib", type=int, default=64)
    options = parser.parse_args()
    if options.runs is not None:
        fuzzer = Fuzzer()
        limit_memory(options.memory_mib)
        for number in range(options.runs):
            seed = int.from_bytes(sha256(f"{options.seed}/{number}".encode()).digest()[:8], "big")
            try:
                fuzzer.run(Seeded(seed))
            except BaseException:
                print(f"finding at --seed {options.seed}, run {number}", file=sys.stderr)
                raise
        return
    try:
        import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]  # an extra
    except ImportError:
        raise SystemExit("atheris is missing: pip install -e '.[fuzz]', or give --runs N to do without it") from None
    # This file once more, with coverage of privfed alone: instrumenting numpy too would take longer than the run.
    for name in [name for name in sys.modules if name.partition(".")[0] == "privfed"]:
        del sys.modules[name]
    with atheris.instrument_imports(include=["privfed"]):
        harness = importlib.import_module("fuzz_crypto")
    guided = harness.Fuzzer()
    # libFuzzer's own limit on resident memory: its instrumentation maps too much for RLIMIT_AS.
    flags = [sys.argv[0], f"-max_total_time={options.seconds}", "-rss_limit_mb=1024", "-max_len=4096"]
    atheris.Setup(flags, lambda data: guided.run(Guided(atheris.FuzzedDataProvider(data))))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
