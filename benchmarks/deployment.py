"""A deployment over NVIDIA FLARE and mTLS on loopback, beside the same run in one process: rounds, exchanges, memory.

Real processes: the server and its job, each site and its job. Wall clock, all on one machine: with ten sites on two
cores the sites wait for each other, as they would not in their own hospitals.

    python benchmarks/deployment.py [--quick] [--json FILE] [--check]
"""

import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import Bar, Report, Timing, parse

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


@contextmanager
def _quiet() -> Any:
    """What FLARE prints goes elsewhere."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)


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


def deployed(report: Report, sites: int, size: str, repeats: int) -> None:
    from tests.privfed.deployment.loopback import Loopback

    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        names = [f"site-{number}" for number in range(sites)]
        tables = house.tables(home / "tables", names)
        config = house.experiment(tables, rounds=repeats + 1, privacy=INSECURE, model={"hidden": HIDDEN[size]})
        path = home / "experiment.toml"
        path.write_text(config_io.to_toml(config))
        peak = {"server": 0.0, "site": 0.0}
        with _quiet(), Loopback(home, config) as loopback:
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
        report.add(f"{label}: a round, over mTLS", Timing(over))
        report.add(f"{label}: a round, in one process", Timing(inside))
        report.add(
            f"{label}: a round more than in one process", statistics.median(over) - statistics.median(inside), "seconds"
        )
        report.add(f"{label}: memory of the server's job", peak["server"], "GiB")
        report.add(f"{label}: memory of a site's job", peak["site"], "GiB")


def exchanges(report: Report, repeats: int) -> None:
    from tests.privfed.engines import flare_rig

    sites, found = ("a", "b", "c"), {}
    sizes = {"empty exchange, 3 sites": 0, "exchange of 4 MB each way, 3 sites": 4_000_000}
    with tempfile.TemporaryDirectory() as name, _quiet():
        with flare_rig.quick_certificates():
            rig = flare_rig.Rig(Path(name), sites)
        with rig:
            for label, size in sizes.items():
                seconds = []
                for _ in range(repeats + 1):
                    began = time.perf_counter()
                    assert len(rig.exchange(dict.fromkeys(sites, b"echo " + bytes(size)), 60.0)) == 3
                    seconds.append(time.perf_counter() - began)
                found[label] = Timing(tuple(seconds[1:]))
    for label, timing in found.items():
        report.add(label, timing)


def main() -> None:
    options = parse(__doc__)
    report = Report("deployment", packages=("nvflare", "torch", "cryptography"))
    exchanges(report, 5 if options.quick else 50)
    cases = [(3, "1e5")] if options.quick else [(3, "1e5"), (3, "1e6"), (10, "1e5"), (10, "1e6")]
    for sites, size in cases:
        deployed(report, sites, size, 2 if options.quick else 9)
    report.finish(options, BARS)


if __name__ == "__main__":
    main()
