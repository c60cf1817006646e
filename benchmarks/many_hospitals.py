"""Many hospitals over NVIDIA FLARE on one machine: a block of masked rounds on stroke patients, its memory and time.

The largest hospitals of the International Stroke Trial, each with its own records, keys, certificate and ledger, one
service and one job process; mTLS on loopback; logistic regression, record unit, ε = 8. Nothing is shared but the
machine: so a round's clock is that of all hospitals' work on its cores, one after another.

    python benchmarks/many_hospitals.py [--sites 50] [--rounds 5] [--forked] [--json FILE] [--check]

Memory is counted by PSS, where a page that n processes share counts 1/n for each: the sum over processes is what the
machine gives. (RSS counts the libraries' code once a process.) Ordinary processes take 0.42 GiB a site. With --forked
the sites' processes are forked from one template that has imported the libraries, and share its pages: for more sites
than one machine has memory for, which no hospital needs. Needs PRIVFED_DATA with ist/.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import template
from common import Bar, Options, Report, Timing, quiet

sys.path.insert(0, str(Path(__file__).parents[1]))

from privfed import config_io
from privfed.config import Config
from privfed.deployment import runs
from privfed.deployment.blocks import Block, do_block
from privfed.deployment.consortium import SERVER
from privfed.deployment.hospital import Hospital
from privfed.deployment.signed import SignedHandler, reminding
from privfed.engines.contract import Engine
from privfed.engines.local import LocalEngine
from privfed.folder import METRICS
from tests.privfed.deployment import house

POLICY = msgspec.structs.replace(house.OPEN, max_epsilon=8.0)
EXAMPLE = Path(__file__).parents[1] / "examples" / "ist.toml"
BARS = (
    Bar("masked rounds done", at_least=5),
    Bar("sites in the smallest round", at_least=50),
    Bar("memory of all processes", at_most=22.0),
)
SPARE_GIB = 1.0
"""What the rest of the machine keeps: with less the benchmark ends itself, before the system ends something else."""

PER_SECOND = os.sysconf("SC_CLK_TCK")
SAMPLE_SECONDS = 5.0


def hospitals(folder: Path, many: int, rounds: int) -> Config:
    """The experiment over the tables of the largest hospitals, one file each."""
    given = config_io.load_config(EXAMPLE)
    table: Any = given.data
    columns = [*table.needed(given.task), table.site]
    source = Path(os.environ["PRIVFED_DATA"]) / table.file
    frame = pd.read_csv(source, usecols=columns, dtype=str, encoding="latin-1", keep_default_na=False)
    frame = frame[[code.strip() in "1234" for code in frame[table.label]]]
    folder.mkdir(parents=True)
    files = {}
    for number in frame[table.site].value_counts().index[:many]:
        name = f"hospital-{number.strip()}"
        files[name] = str(folder / f"{name}.csv")
        frame[frame[table.site] == number].drop(columns=table.site).to_csv(files[name], index=False)
    own = msgspec.structs.replace(table, file=None, site=None, files=files, minimum_records=1)
    return msgspec.structs.replace(given, data=own, rounds=rounds)


@dataclass
class Used:
    """What the processes of one party took at their most, in GiB, and their processor seconds."""

    service: float = 0.0
    job: float = 0.0
    private: float = 0.0
    processor: dict[int, float] = field(default_factory=dict)


class Meter:
    """Looks at all processes every few seconds, from a thread of its own."""

    def __init__(self, loopback: Any) -> None:
        self._loopback = loopback
        self._over = threading.Event()
        self.parties: dict[str, Used] = {}
        self.most, self.least_available = 0.0, available()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        self.look()

    def _look_on(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.look()

    def look(self) -> None:
        services = {party.process.pid for party in list(self._loopback.parties.values())}
        together = 0.0
        for pid, name in template.of_parties(self._loopback.home).items():
            try:
                pss, private = memory(pid)
                seconds = processor(pid)
            except OSError:  # it has ended
                continue
            together += pss
            used = self.parties.setdefault(name, Used())
            used.processor[pid] = seconds
            if pid in services:
                used.service = max(used.service, pss)
            else:
                used.job, used.private = max(used.job, pss), max(used.private, private)
        self.most = max(self.most, together)
        self.least_available = min(self.least_available, available())
        if available() < SPARE_GIB:
            print(f"{available():.1f} GiB are left: the benchmark ends itself", file=sys.stderr, flush=True)
            template.end(self._loopback.home)
            os._exit(1)


def processor(pid: int) -> float:
    """Seconds."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / PER_SECOND


def memory(pid: int) -> tuple[float, float]:
    """GiB of one process: its own and its part of what it shares; and its own."""
    lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]]
    kib = {words[0]: int(words[1]) for words in lines}
    return kib["Pss:"] / 2**20, (kib["Private_Clean:"] + kib["Private_Dirty:"]) / 2**20


class Weighing:
    """An engine that counts the bytes of requests and replies."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.to, self.back = 0, 0

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        taken = {site: requests[site] for site in requests}
        replies = self._engine.exchange(taken, deadline_seconds)
        self.to += sum(map(len, taken.values()))
        self.back += sum(map(len, replies.values()))
        return replies


def carried(home: Path, config: Config) -> tuple[float, float]:
    """Bytes to one site and back in a round, as they are handed to FLARE: two rounds in one process, without it."""
    with house.without_flare(), ExitStack() as stack:
        consortium = house.found(home, config, policy=POLICY, study=False)
        run = runs.begin(consortium, config)
        sites = {
            site: SignedHandler(stack.enter_context(Hospital.open(home / site).opened()), consortium.terms, site)
            for site in config.data.files  # type: ignore[union-attr]
        }
        line = Weighing(LocalEngine(sites))
        do_block(consortium, Block(run.path.name, 2), stack.enter_context(reminding(line, consortium)), set)
    return line.to / len(sites) / 2, line.back / len(sites) / 2


def available() -> float:
    """GiB of memory that nobody uses."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) / 2**20


def measure(report: Report, home: Path, many: int, rounds: int, *, forked: bool) -> None:
    from tests.privfed.deployment.loopback import Loopback
    from tests.privfed.engines.flare_rig import until

    config = hospitals(home / "tables", many, rounds)
    path = home / "experiment.toml"
    path.write_text(config_io.to_toml(config))
    before, began = available(), time.perf_counter()
    kind = template.templated() if forked else Loopback
    with quiet(), kind(home, config, policy=POLICY, study=False) as loopback:
        founded = time.perf_counter() - began
        meter = Meter(loopback)
        began = time.perf_counter()
        loopback.start(SERVER, *loopback.sites)
        until(lambda: set(loopback.clients()) >= set(loopback.sites), 60 + 20 * many)
        connected = time.perf_counter() - began
        meter.look()
        services = meter.most
        began = time.perf_counter()
        command = loopback.submit(path, block=rounds, join_seconds=60 + 20 * many)
        _, errors = command.communicate()
        whole = time.perf_counter() - began
        meter.stop()
        if command.returncode:
            raise SystemExit(errors.decode())
        lines = [json.loads(line) for line in (loopback.run().path / METRICS).read_text().splitlines()]
    sites = [meter.parties[name] for name in loopback.sites]
    server, seconds = meter.parties[SERVER], [line["seconds"] for line in lines]
    report.section(f"{many} hospitals, " + ("forked from one template" if forked else "ordinary processes"))
    report.add("masked rounds done", sum(line["aborted"] is None for line in lines))
    report.add("sites in the smallest round", min(len(line["contributed"]) for line in lines))
    report.add("founding: keys, certificates and kits", Timing((founded,)))
    report.add("from the first service to the last connection", Timing((connected,)))
    report.add("the command, jobs' start and all rounds", Timing((whole,)))
    report.add("before the first round", Timing((whole - sum(seconds),)))
    report.add("first round, with the test of the noise", Timing((seconds[0],)))
    report.add("a later round", Timing(tuple(seconds[1:])))
    there, back = carried(home / "one process", config)
    report.add("to a site, a round", there / 1e3, "kB")
    report.add("from a site, a round", back / 1e3, "kB")
    report.add("memory of all processes", meter.most, "GiB")
    report.add("of it the services, before a job", services, "GiB")
    report.add("less memory available than before", before - meter.least_available, "GiB")
    report.add("a site's service", statistics.median(used.service for used in sites), "GiB")
    report.add("a site's job", statistics.median(used.job for used in sites), "GiB")
    report.add("a site's job, not shared", statistics.median(used.private for used in sites), "GiB")
    report.add("the server's service", server.service, "GiB")
    report.add("the server's job", server.job, "GiB")
    report.add("processor time of a site", statistics.median(sum(used.processor.values()) for used in sites), "s")
    report.add("processor time of the server", sum(server.processor.values()), "s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sites", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forked", action="store_true", help="fork the sites' processes from one template")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--check", action="store_true", help="compare with the bars")
    given = parser.parse_args()
    report = Report("many_hospitals", packages=("nvflare", "torch", "opacus"))
    with tempfile.TemporaryDirectory() as name:
        measure(report, Path(name).resolve(), given.sites, given.rounds, forked=given.forked)
    report.finish(Options(quick=False, json=given.json, check=given.check), BARS)


if __name__ == "__main__":
    main()
