"""The audit report of a large ledger, the verification of a very large one, and how soon the command line answers.

By the clock, and in processor time, which other work on the machine does not lengthen; the bars are about the second.

    python benchmarks/audit_report.py [--quick] [--json FILE] [--check]
"""

import hashlib
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from common import Bar, Report, Timing, parse, peak_memory_bytes

from privfed import audit_report, seals, verification
from privfed.crypto import keys
from privfed.privacy.accountant import Accountant, Epsilon
from privfed.privacy.events import Charge, Event, NoiseSite, PoissonGaussian, PrivacyUnit, Skellam, to_canonical_json
from privfed.privacy.ledger import Entry, Ledger, Recorded, body_of
from privfed.seals import COORDINATOR

DELTA = 1e-5
START = datetime(2026, 1, 1, tzinfo=UTC)
BARS = (
    Bar("report of 50 sites × 200 rounds, local noise, processor", at_most=5.0),
    Bar("report of 50 sites × 200 rounds, every site another history, processor", at_most=5.0),
    Bar("report of 50 sites × 200 rounds, noise in shares, processor", at_most=5.0),
    Bar("verify 1e5 events, local noise, processor", at_most=10.0),
    Bar("verify 1e5 events, noise in shares, processor", at_most=10.0),
    Bar("privfed --help, processor", at_most=0.3),
    Bar("accountant epsilon, 1e6 steps, after its imports, processor", at_most=2.0),
)
EPSILON = "accountant epsilon --noise-multiplier 1.1 --sample-rate 0.01 --steps 1000000"
IMPORTS = "import privfed.cli.app, privfed.privacy.accountant, privfed.privacy.opinions, dp_accounting.pld"


def main() -> None:
    options = parse(__doc__)
    report = Report("audit report", packages=("cryptography", "dp-accounting", "jinja2", "matplotlib", "msgspec"))
    sites, rounds, many = (5, 20, 40) if options.quick else (50, 200, 2000)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        books = {
            "local noise": synthetic(root / "local.db", sites=sites, rounds=rounds, every=20),
            "every site another history": synthetic(
                root / "uneven.db", sites=sites, rounds=rounds, every=20, uneven=True
            ),
            "noise in shares": synthetic(root / "shares.db", sites=sites, rounds=rounds, every=20, shares=True),
        }
        report.section("privfed accountant report, after import: verified, composed, drawn and written")
        audit_report.html(audit_report.build([books["local noise"].path], delta=DELTA))  # fonts and templates load once
        for name, book in books.items():
            measured(
                report,
                f"report of 50 sites × 200 rounds, {name}",
                lambda book=book: audit_report.html(audit_report.build([book.path], delta=DELTA)),
                repeats=1 if options.quick else 3,
            )
        report.section("privfed accountant verify, signed words every 20 rounds")
        for name, in_shares in (("local noise", False), ("noise in shares", True)):
            rounds_here = many // 2 if in_shares else many  # a reserve and a settlement each round
            book = synthetic(root / f"many-{in_shares}.db", sites=sites, rounds=rounds_here, every=20, shares=in_shares)
            report.add(f"entries, {name}", float(len(entries(book.path))))
            measured(
                report,
                f"verify 1e5 events, {name}",
                lambda book=book: verification.verify(book, delta=DELTA, accountant=Accountant()),
            )
    commands(report, repeats=1 if options.quick else 5)
    report.add("peak memory", peak_memory_bytes() / 2**20, "MiB")
    report.finish(options, BARS)


def measured(report: Report, name: str, task: Callable[[], object], *, repeats: int = 1) -> None:
    """Two rows, by the clock and in this process's own time."""
    clock, processor = [], []
    for _ in range(repeats):
        began, own = time.perf_counter(), time.process_time()
        task()
        clock.append(time.perf_counter() - began)
        processor.append(time.process_time() - own)
    report.add(f"{name}, clock", Timing(tuple(clock)))
    report.add(f"{name}, processor", Timing(tuple(processor)))


def commands(report: Report, *, repeats: int) -> None:
    """Processes of their own; what is imported is timed alone, and taken off where the bar is about the rest."""
    report.section("the command line")
    module = [sys.executable, "-m", "privfed"]
    asked = {
        "privfed --help": [*module, "--help"],
        "accountant epsilon, 1e6 steps": [*module, *EPSILON.split()],
        "what it imports": [sys.executable, "-c", IMPORTS],
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in asked}
    for _ in range(repeats + 1):  # the first reads from disk
        for name, command in asked.items():
            taken[name].append(child(command))
    for name, times in taken.items():
        for place, kind in enumerate(("clock", "processor")):
            report.add(f"{name}, {kind}", Timing(tuple(one[place] for one in times[1:])))
    rest = [whole[1] - imports[1] for whole, imports in zip(*(taken[n] for n in list(asked)[1:]), strict=True)][1:]
    report.add("accountant epsilon, 1e6 steps, after its imports, processor", statistics.median(rest), "s")


def child(command: list[str]) -> tuple[float, float]:
    """Seconds by the clock, and of the processor, that a process takes."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    clock, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def entries(path: Path) -> Sequence[Recorded]:
    with Ledger(path) as ledger:
        return ledger.entries()


def synthetic(
    path: Path, *, sites: int, rounds: int, every: int, shares: bool = False, uneven: bool = False
) -> verification.Book:
    """A ledger as a federation would have left it, written at once: one durable transaction an entry takes hours.

    Args:
        every: rounds between two rounds of signed words.
        shares: noise in shares, reserved and settled.
        uneven: each site sits out rounds of its own.
    """
    with Ledger(path) as ledger:
        ledger_id = ledger.id
        names = [f"hospital-{number:02d}" for number in range(sites)]
        chains = {name: _Chain(name, bytes.fromhex(ledger.head(name))) for name in [COORDINATOR, *names]}
    private = {name: hashlib.sha256(name.encode()).digest() for name in chains}
    ours, statements = Accountant(), list[tuple[str, bytes]]()
    taken = {name: Counter[Event]() for name in names}
    for number in range(rounds):
        for place, name in enumerate(names):
            if uneven and (number * 7 + place * 13) % 50 < place:
                continue
            booked = _charges(shares, sites, number)
            taken[name][booked[-1][1].event] += 1
            for kind, charge in booked:
                chains[name].add(
                    Entry(
                        kind=kind,  # type: ignore[arg-type]  # one of the kinds
                        site=name,
                        dataset=hashlib.sha256(name.encode()).hexdigest()[:32],
                        run="synthetic",
                        round=number,
                        unit=PrivacyUnit.RECORD,
                        noise=NoiseSite.DISTRIBUTED if shares else NoiseSite.LOCAL,
                        charges=(charge,),
                    )
                )
        if (number + 1) % every == 0:
            words = []
            for name in names:
                spent = ours.epsilon([Charge(event, count) for event, count in taken[name].items()], DELTA)
                words.append((name, chains[name].seal(ledger_id, number, spent, private[name])))
            coordinator = chains[COORDINATOR]
            coordinator.add(
                Entry(
                    kind="witness",
                    site=COORDINATOR,
                    dataset=seals.root([word for _, word in words]),
                    run="synthetic",
                    round=number,
                    unit=PrivacyUnit.NONE,
                    noise=NoiseSite.LOCAL,
                )
            )
            own = coordinator.seal(ledger_id, number, Epsilon(0.0, 1.0, "pld", 0.0, {}), private[COORDINATOR])
            statements += [*words, (COORDINATOR, own)]
    connection = sqlite3.connect(path)
    with connection:
        for chain in chains.values():
            connection.executemany(
                "INSERT INTO entries (site, sequence, kind, run, round, attempt, body, hash) VALUES (?,?,?,?,?,?,?,?)",
                chain.rows,
            )
        connection.executemany("INSERT INTO statements (site, body) VALUES (?, ?)", statements)
    connection.close()
    return verification.Book(path, {name: keys.verification_key(key).hex() for name, key in private.items()})


def _charges(shares: bool, sites: int, number: int) -> list[tuple[str, Charge]]:
    if not shares:
        return [("charge", Charge(PoissonGaussian(sample_rate=0.1, noise_multiplier=2.0)))]
    event = Skellam(share_variance=2_000_000 * 40, shares=35, colluders=10, dim=64, l2_squared=652_864, l1=6464)
    return [
        ("reserve", Charge(event)),
        ("settle", Charge(Skellam(
            share_variance=event.share_variance, shares=sites - number % 5 if sites > 40 else 35, colluders=10,
            dim=event.dim, l2_squared=event.l2_squared, l1=event.l1,
        ))),
    ]  # fmt: skip


class _Chain:
    """One site's entries in the making."""

    def __init__(self, site: str, head: bytes) -> None:
        self.site, self.head, self.last = site, head, None
        self.rows: list[tuple[object, ...]] = []

    def add(self, entry: Entry) -> None:
        sequence = len(self.rows) + 1
        time = (START + timedelta(seconds=sequence)).isoformat()
        line = Recorded(entry=entry, sequence=sequence, time=time, hash="")
        body = to_canonical_json(body_of(line))
        self.head = hashlib.sha256(self.head + body).digest()
        self.last = Recorded(entry=entry, sequence=sequence, time=time, hash=self.head.hex())
        key = (entry.kind, entry.run, entry.round, entry.attempt)
        self.rows.append((self.site, sequence, *key, body, self.head))

    def seal(self, ledger: str, number: int, spent: Epsilon, private: bytes) -> bytes:
        return seals.seal(
            ledger=ledger,
            site=self.site,
            dataset="" if self.site == COORDINATOR else hashlib.sha256(self.site.encode()).hexdigest()[:32],
            last=self.last,
            genesis=self.head.hex(),
            run="synthetic",
            round=number,
            spent=spent,
            time=START + timedelta(seconds=len(self.rows)),
            private=private,
        )


if __name__ == "__main__":
    main()
