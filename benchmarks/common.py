"""What every benchmark shares: a header, medians measured side by side, a table, JSON, and bars to hold.

A benchmark is one file that runs alone, `python benchmarks/NAME.py [--quick] [--json FILE] [--check]`:

    BARS = (Bar("masking / keystream, k=20", at_most=1.35),)

    def main() -> None:
        options = parse(__doc__)
        report = Report("masking", packages=("numpy", "cryptography"))
        times = interleaved({"ours": ours, "peer": peer}, repeats=3 if options.quick else 9)
        report.add("ours", times["ours"])
        report.add("peer / ours", times["peer"].over(times["ours"]), "×")
        report.finish(options, BARS)
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    quick: bool
    json: Path | None
    check: bool
    rows: Path | None = None


def parse(description: str | None, arguments: Sequence[str] | None = None, *, resumable: bool = False) -> Options:
    """The options every benchmark has; `description` is its module docstring. ``resumable`` ones have --rows too."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast it is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures, versions and machine here")
    parser.add_argument(
        "--check", action="store_true", help="compare with the bars; exit 1 naming those that fall short"
    )
    if resumable:
        parser.add_argument("--rows", type=Path, metavar="DIR", help="keep finished rows here, and go on from them")
    given = parser.parse_args(arguments)
    rows = given.rows if resumable else None
    return Options(quick=given.quick, json=given.json, check=given.check, rows=rows)


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of repeated runs of one thing, in the order they were measured."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        return min(self.seconds)

    @property
    def high(self) -> float:
        return max(self.seconds)

    def over(self, other: "Timing") -> "Ratio":
        """This time divided by another's, pair by pair: a slow moment of the machine strikes both halves of a pair."""
        return Ratio(tuple(ours / theirs for ours, theirs in zip(self.seconds, other.seconds, strict=True)))


@dataclass(frozen=True)
class Ratio:
    """How many times as long one thing took as another, for every repetition."""

    pairs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.pairs)

    @property
    def low(self) -> float:
        return min(self.pairs)

    @property
    def high(self) -> float:
        return max(self.pairs)


def interleaved(
    tasks: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    inner: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Seconds of every task, measured in turn (a, b, c, a, b, c, …) so that drift of the machine meets all alike.

    Args:
        tasks: name → what to time.
        repeats: timed rounds.
        warmup: untimed rounds before.
        inner: calls within one timing, for tasks too short for the clock; the result is per call.
        clock: wall clock, or `time.process_time` for what runs in one thread: on a machine that others use as well, it
            counts the work and not the waiting. Say so in the table.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_number in range(warmup + repeats):
        for name, task in tasks.items():
            started = clock()
            for _ in range(inner):
                task()
            elapsed = (clock() - started) / inner
            if round_number >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def timed(task: Callable[[], object]) -> Timing:
    """One run, for what is too long to repeat."""
    started = time.perf_counter()
    task()
    return Timing((time.perf_counter() - started,))


def peak_memory_bytes() -> int:
    """The most memory this process has held at once (resident set)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, object]:
    """Where the figures come from."""
    threads = {name: os.environ.get(name, "unset") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "threads": threads,
        "load_1min": round(os.getloadavg()[0], 2),
        "commit": _commit(),
    }


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Package → installed version, None where it is missing."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


@dataclass(frozen=True)
class Bar:
    """A figure's limit, written beside the code it holds. Give `at_most` or `at_least`."""

    figure: str
    _: KW_ONLY
    at_most: float | None = None
    at_least: float | None = None

    def shortfall(self, value: float | None) -> str | None:
        """What falls short, None if the bar holds. A figure that was not measured does not hold."""
        if value is None:
            return f"{self.figure}: not measured"
        if self.at_most is not None and not value <= self.at_most:
            return f"{self.figure}: {value:.4g}, at most {self.at_most:g} is due"
        if self.at_least is not None and not value >= self.at_least:
            return f"{self.figure}: {value:.4g}, at least {self.at_least:g} is due"
        return None


@dataclass(frozen=True)
class _Row:
    section: str
    name: str
    value: float
    low: float | None
    high: float | None
    unit: str


@dataclass
class Report:
    """The figures of one benchmark: printed as they come, written and checked at the end.

    Args:
        title: the benchmark's name.
        packages: distributions whose versions matter here.
    """

    title: str
    packages: Sequence[str] = ()
    _rows: list[_Row] = field(default_factory=list)
    _notes: list[str] = field(default_factory=list)
    _section: str = ""

    def __post_init__(self) -> None:
        self._machine, self._versions = machine(), versions(self.packages)
        about = self._machine
        print(f"{self.title} — {about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB, {about['system']}")
        found = [f"{name} {number or 'missing'}" for name, number in self._versions.items()]
        print(", ".join([f"Python {about['python']}", *found]))
        print(f"threads {about['threads']}, load {about['load_1min']}, commit {about['commit']}", flush=True)

    @property
    def figures(self) -> dict[str, float]:
        """Name → value (a median where it was repeated), as `--check` reads them."""
        return {row.name: row.value for row in self._rows}

    def section(self, title: str) -> None:
        """A heading for the rows that follow."""
        self._section = title
        print(f"\n{title}", flush=True)

    def add(self, name: str, figure: "Timing | Ratio | float", unit: str = "") -> None:
        """One row. A `Timing` is in seconds and a `Ratio` in ×, both with their spread; a number has the unit given.

        Raises:
            ValueError: the name is taken; bars and JSON find a figure by it.
        """
        if name in self.figures:
            raise ValueError(f"figure {name!r} is reported twice; name it differently")
        if isinstance(figure, float | int):
            row = _Row(self._section, name, float(figure), None, None, unit)
            shown = _number(row.value, unit)
        else:
            unit = "s" if isinstance(figure, Timing) else "×"
            row = _Row(self._section, name, figure.median, figure.low, figure.high, unit)
            shown = _number(row.value, unit)
            if figure.low != figure.high:
                shown += f"   [{_number(figure.low, unit)} – {_number(figure.high, unit)}]"
        self._rows.append(row)
        print(f"  {name:<58} {shown}", flush=True)

    def note(self, text: str) -> None:
        """A sentence below the rows so far, e.g. why a peer is missing and how to install it."""
        self._notes.append(text)
        print(f"  ({text})", flush=True)

    def finish(self, options: Options, bars: Sequence[Bar] = ()) -> None:
        """Writes the JSON and holds the bars, as asked.

        Raises:
            SystemExit: status 1, naming every bar that falls short.
        """
        short = [text for bar in bars if (text := bar.shortfall(self.figures.get(bar.figure)))]
        if options.json is not None:
            options.json.write_text(
                json.dumps(
                    {
                        "benchmark": self.title,
                        "quick": options.quick,
                        "machine": self._machine,
                        "versions": self._versions,
                        "figures": [vars(row) for row in self._rows],
                        "bars": [vars(bar) for bar in bars],
                        "falls_short": short,
                        "notes": self._notes,
                    },
                    indent=2,
                    ensure_ascii=False,
                )
                + "\n"
            )
        if options.check:
            print(f"\n{len(bars) - len(short)} of {len(bars)} bars hold")
            if short:
                raise SystemExit("falls short:\n" + "\n".join(f"  {text}" for text in short))


def _number(value: float, unit: str) -> str:
    """A figure with its unit, seconds at a readable scale."""
    if unit != "s":
        return f"{value:,.4g} {unit}".rstrip()
    for scale, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{value / scale:.3g} {name}"
    return f"{value * 1e9:.3g} ns"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The short hash of the checkout, marked where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@contextmanager
def quiet() -> Iterator[None]:
    """What others print to the standard output, past Python too, goes to the standard error."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
