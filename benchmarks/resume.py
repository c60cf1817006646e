"""Kill a run at a random instant, resume it, compare ε: does a crash ever forget or double a spend?

Each trial runs in a forked child, which SIGKILL ends between its first and its last write; then the run is resumed (and
killed again, half of the time, before it is resumed for good).

    python benchmarks/resume.py [--quick] [--json FILE] [--check]
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import Bar, Report, parse

import privfed
from privfed.api import prepare
from privfed.privacy.ledger import Ledger

KINDS = ("masked", "homomorphic")
SAME = "{}: resumed runs whose ε, rounds and model equal the uninterrupted run's, share"
VERIFIED = "{}: ledgers that verify, share"
BARS = tuple(Bar(figure.format(kind), at_least=1.0) for kind in KINDS for figure in (SAME, VERIFIED))
SETTINGS = ["rounds=4", "privacy.insecure_seed=7", "method.personal_steps=1", "evaluation.local_steps=1"]


def main() -> None:
    options = parse(__doc__)
    report = Report("resume", packages=("torch", "opacus", "tenseal"))
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as scratch:
            kills(report, kind, Path(scratch), trials=5 if options.quick else 100)
    report.finish(options, BARS)


def kills(report: Report, kind: str, scratch: Path, *, trials: int) -> None:
    config = privfed.load_config(overrides=[*SETTINGS, f"aggregation.kind={kind}"])
    prepared = prepare(config)
    privfed.run(config, out=scratch / "warm-up", prepared=prepared)
    started = time.perf_counter()
    whole = privfed.run(config, out=scratch / "whole", prepared=prepared)
    seconds = time.perf_counter() - started
    randomness = random.Random(0)
    same = verified = 0
    killed = {"before its first round": 0, "between": 0, "after its end": 0}
    for trial in range(trials):
        folder = scratch / f"trial-{trial}"
        child(partial(privfed.run, config, out=folder, prepared=prepared), randomness.uniform(0, 1.1 * seconds))
        if not (folder / "run.json").exists():  # killed before the folder was a run's: nothing was spent
            killed["before its first round"] += 1
            same, verified = same + 1, verified + 1
            continue
        lines = (folder / "metrics.jsonl").read_text().count("\n") if (folder / "metrics.jsonl").exists() else 0
        where = "after its end" if (folder / "summary.json").exists() else "between" if lines else next(iter(killed))
        killed[where] += 1
        if trial % 2:
            child(partial(privfed.resume, folder, prepared=prepared), randomness.uniform(0, seconds))
        again = privfed.resume(folder, prepared=prepared)
        same += (
            again.summary.privacy.epsilon == whole.summary.privacy.epsilon
            and again.summary.rounds == whole.summary.rounds
            and bool((again.theta == whole.theta).all())
        )
        with Ledger(folder / "ledger.db") as ledger:
            ledger.verify()
            spends = [line for line in ledger.entries() if line.entry.kind == "charge"]
            verified += len(spends) == len(prepared.data.sites) * config.rounds
    report.section(f"{kind}: {trials} kills at random instants of a run of {seconds:.2f} s")
    for where, count in killed.items():
        report.add(f"{kind}: killed {where}", float(count))
    report.add(SAME.format(kind), same / trials)
    report.add(VERIFIED.format(kind), verified / trials)


def child(task: Callable[[], object], seconds: float) -> None:
    """Run ``task`` in a forked child and kill it after ``seconds``."""
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
            task()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
