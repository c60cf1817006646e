"""A deployment over NVIDIA FLARE and mTLS on loopback, beside the same run in one process: rounds, exchanges, memory.

Real processes: the server and its job, each site and its job. Wall clock, all on one machine: with ten sites on two
cores the sites wait for each other, as they would not in their own hospitals.

    python benchmarks/deployment.py [--rows DIR] [--quick] [--json FILE] [--check]

With --rows a killed benchmark goes on where it was: each case in turn, on whatever evening the machine is quiet.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import Bar, Report, Timing, parse, quiet

sys.path.insert(0, str(Path(__file__).parents[1]))

import privfed
from privfed import config_io
from tests.privfed.deployment import house

BARS = (
    Bar("3 sites, 1e5 parameters: a round more than in one process", at_most=1.0),
    Bar("empty exchange, 3 sites", at_most=0.1),
)
HIDDEN = {"1e5": (300, 320), "1e6": (1000, 990)}  # six inputs, two classes: 98,770 and 999,973 parameters
INSECURE = {"delta": 1e-5, "target_epsilon": 3.0, "insecure_seed": house.SEED}


def resident(pid: int) -> float:
    """GiB at its most."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**20
    return 0.0


def rounds(folder: Path) -> tuple[float, ...]:
    """Seconds of each round but the first, which waits for the noise's self-test."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return tuple(json.loads(line)["seconds"] for line in lines)[1:]


Figures = dict[str, float | list[float]]
"""Row → seconds of each repeat, or GiB."""

CASES = {(3, "1e5"): 9, (3, "1e6"): 4, (10, "1e5"): 4, (10, "1e6"): 2}
"""Sites and parameters → rounds that are timed."""

GIB_PER_SITE = {"1e5": 0.9, "1e6": 3.0}
"""What a site's client and its job take at their most, all sites on one machine."""


def available() -> float:
    """GiB of memory that nobody uses."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) / 2**20


def deployed(sites: int, size: str, repeats: int) -> Figures:
    from tests.privfed.deployment.loopback import Loopback

    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        names = [f"site-{number}" for number in range(sites)]
        tables = house.tables(home / "tables", names)
        config = house.experiment(tables, rounds=repeats + 1, privacy=INSECURE, model={"hidden": HIDDEN[size]})
        path = home / "experiment.toml"
        path.write_text(config_io.to_toml(config))
        peak = {"server": 0.0, "site": 0.0}
        with quiet(), Loopback(home, config) as loopback:
            loopback.everybody()
            command = loopback.submit(path, block=repeats + 1)
            while command.poll() is None:
                for kind, party in (("server", "server"), ("site", names[0])):
                    for pid in loopback.job_pids(party):
                        try:
                            peak[kind] = max(peak[kind], resident(pid))
                        except OSError:
                            pass
                time.sleep(0.2)
            _, errors = command.communicate()
            if command.returncode:
                raise SystemExit(errors.decode())
            over = rounds(loopback.run().path)
        inside = rounds(privfed.run(config, out=home / "in-process").folder)
        label = f"{sites} sites, {size} parameters"
        return {
            f"{label}: a round, over mTLS": list(over),
            f"{label}: a round, in one process": list(inside),
            f"{label}: a round more than in one process": statistics.median(over) - statistics.median(inside),
            f"{label}: memory of the server's job": peak["server"],
            f"{label}: memory of a site's job": peak["site"],
        }


def exchanges(repeats: int) -> Figures:
    from tests.privfed.engines import flare_rig

    sites = ("a", "b", "c")
    found: Figures = {}
    sizes = {"empty exchange, 3 sites": 0, "exchange of 4 MB each way, 3 sites": 4_000_000}
    with tempfile.TemporaryDirectory() as name, quiet():
        with flare_rig.quick_certificates():
            rig = flare_rig.Rig(Path(name), sites)
        with rig:
            for label, size in sizes.items():
                seconds = []
                for _ in range(repeats + 1):
                    began = time.perf_counter()
                    assert len(rig.exchange(dict.fromkeys(sites, b"echo " + bytes(size)), 60.0)) == 3
                    seconds.append(time.perf_counter() - began)
                found[label] = seconds[1:]
    return found


def preflight() -> Figures:
    """From the command to its last line: starting a job at each site is most of it."""
    from tests.privfed.deployment.loopback import Loopback

    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        config = house.experiment(house.tables(home / "tables"), privacy=INSECURE, model={"hidden": HIDDEN["1e5"]})
        (home / "experiment.toml").write_text(config_io.to_toml(config))
        with quiet(), Loopback(home, config) as loopback:
            loopback.everybody()
            seconds = []
            for _ in range(3):
                began = time.perf_counter()
                assert all(found["ok"] for found in loopback.preflight(home / "experiment.toml").values())
                seconds.append(time.perf_counter() - began)
        return {"preflight, 3 sites, 1e5 parameters": seconds}


def kept(rows: Path | None, name: str, measure: Callable[[], Figures]) -> Figures:
    """What a case measured, or had measured when it was last here."""
    path = rows / f"{name}.json" if rows else None
    if path is not None and path.exists():
        found: Figures = json.loads(path.read_text())
        return found
    found = measure()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    return found


def main() -> None:
    options = parse(__doc__, resumable=True)
    report = Report("deployment", packages=("nvflare", "torch", "cryptography"))
    figures = kept(options.rows, "exchange", lambda: exchanges(5 if options.quick else 50))
    if not options.quick:
        figures |= kept(options.rows, "preflight", preflight)
    for (sites, size), repeats in list(CASES.items())[: 1 if options.quick else None]:
        repeats = 2 if options.quick else repeats
        if (needed := sites * GIB_PER_SITE[size]) > available():
            report.note(f"{sites} sites, {size} parameters: left out, it needs {needed:.0f} GiB beside what is used")
            continue
        measure = partial(deployed, sites, size, repeats)
        figures |= kept(options.rows, f"{sites} sites, {size}", measure)
    for label, value in figures.items():
        if isinstance(value, list):
            report.add(label, Timing(tuple(value)))
        else:
            report.add(label, value, "GiB" if "memory" in label else "seconds")
    report.finish(options, BARS)


if __name__ == "__main__":
    main()
