"""What hospitals have beside crashes: full disks, wrong clocks, cut lines, other versions. Over real processes.

``make test-pilot`` runs these; they take minutes.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from privfed import __version__, config_io
from privfed.config import Config
from privfed.deployment import account, backup, runs
from privfed.deployment.hospital import KIT, LEDGER, Hospital
from tests.privfed.deployment import house
from tests.privfed.deployment.house import SITES
from tests.privfed.deployment.network import Wire
from tests.privfed.deployment.test_blocks import INSECURE, same_as_in_process, spends

pytest.importorskip("nvflare", reason="the extra [nvflare] is not installed")

from tests.privfed.deployment.test_faults import ROUNDS, Federation

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.skipif(not os.environ.get("PRIVFED_PILOT"), reason="minutes over real processes: make test-pilot"),
]
ROOT = Path(__file__).parents[3]


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    with Federation(tmp_path) as federation:
        yield federation


def charged(home: Path, site: str) -> list[object]:
    return [entry for entry in spends(home / site / LEDGER, site) if entry[0] == "charge"]


# A full disk


def test_a_full_disk_at_a_site_costs_rounds_and_no_entry(federation: Federation) -> None:
    """Nothing can be written: the site refuses, and takes part again when there is room."""
    federation.after(2)
    pids = federation.loopback.job_pids("south")
    assert pids
    before = len(charged(federation.home, "south"))
    fill(pids, 0)
    federation.until(lambda reports: any("south" in report.refused for report in reports))
    written = charged(federation.home, "south")
    assert before <= len(written) <= before + 1  # one may have been under way
    fill(federation.loopback.job_pids("south"), resource.RLIM_INFINITY)
    federation.finish()
    reports = runs.progress(federation.loopback.run())
    assert any("south" in report.contributed for report in reports if report.round >= len(written))
    refused = [report for report in reports if "south" in report.refused]
    assert refused and not any(report.contributed for report in refused)  # of three, none may be missing
    assert all("at the site" in report.refused["south"] or "the site can not" in report.refused["south"]
               for report in refused)  # fmt: skip


def fill(pids: list[int], most: int) -> None:
    """Let these processes write no file beyond so many bytes."""
    for pid in pids:
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, hard))


# A line that is cut


@pytest.fixture
def wired(tmp_path: Path) -> Iterator[tuple[Federation, Wire]]:
    """A consortium in which south reaches the server over a wire of ours."""
    federation = Federation(tmp_path)
    with Wire(federation.loopback.consortium.terms.port) as wire:
        path = tmp_path / "south" / KIT / "startup" / "fed_client.json"
        text = path.read_text()
        port = federation.loopback.consortium.terms.port
        assert f"localhost:{port}" in text
        path.write_text(text.replace(f"localhost:{port}", f"localhost:{wire.port}"))
        with federation:
            yield federation, wire


@pytest.mark.parametrize("how", ["cut", "hold"])
def test_a_lost_line_costs_rounds_and_the_site_comes_back(wired: tuple[Federation, Wire], how: str) -> None:
    federation, wire = wired
    federation.after(2)
    getattr(wire, how)()
    federation.until(lambda reports: any("south" not in report.contributed for report in reports))
    wire.mend()
    federation.finish()
    reports = runs.progress(federation.loopback.run())
    lost = [report.round for report in reports if "south" not in report.contributed]
    assert lost and "south" in reports[-1].contributed
    assert all(not report.contributed for report in reports if report.round in lost)


# A wrong clock

CLOCK = r"""
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long off(void) { const char *text = getenv("CLOCK_AHEAD"); return text ? atol(text) : 0; }
int clock_gettime(clockid_t id, struct timespec *at) {
  int failed = syscall(SYS_clock_gettime, id, at);
  if (!failed && id == CLOCK_REALTIME) at->tv_sec += off();
  return failed;
}
time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}
int gettimeofday(struct timeval *at, void *zone) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  at->tv_sec = now.tv_sec;
  at->tv_usec = now.tv_nsec / 1000;
  return 0;
}
"""


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, str]]:
    """The environment of a process whose clock is so many seconds ahead, for all that it loads."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("a process's own clock is set by a small library in C: no cc here")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(CLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "clock.so", folder / "clock.c"], check=True)
    environment = lambda seconds: {"LD_PRELOAD": str(folder / "clock.so"), "CLOCK_AHEAD": str(seconds)}  # noqa: E731
    code = "import time; print(time.time())"
    out = subprocess.check_output([sys.executable, "-c", code], env={**os.environ, **environment(86_400)})
    assert abs(float(out) - time.time() - 86_400) < 60
    return environment


@contextmanager
def south_ahead(tmp_path: Path, environment: dict[str, str]) -> Iterator[tuple[Any, Config, Path]]:
    """Three sites being started, one of them with another clock; their experiment, and its file."""
    from tests.privfed.deployment.loopback import SERVER, Loopback

    config = house.experiment(house.tables(tmp_path / "tables"), rounds=2, privacy=INSECURE)
    path = tmp_path / "experiment.toml"
    path.write_text(config_io.to_toml(config))
    with Loopback(tmp_path, config) as loopback:
        loopback.start(SERVER, "north", "west")
        loopback.start("south", environment=environment)
        yield loopback, config, path


def test_a_clock_a_day_ahead_is_named_before_the_run_and_every_order_is_too_old_by_it(
    tmp_path: Path, shifted: Callable[[int], dict[str, str]]
) -> None:
    with south_ahead(tmp_path, shifted(86_400)) as (loopback, _, path):
        loopback.connected()
        found = loopback.preflight(path)
        assert [what for what, one in found.items() if not one["ok"]] == ["clocks"]
        site, seconds, *words = found["clocks"]["found"].split()
        assert site == "south:" and 86_300 < float(seconds) < 86_500 and words == ["s", "ahead"]
        out, errors = (submitted := loopback.submit(path)).communicate(timeout=300)
        assert submitted.returncode == 3, errors.decode()
        reports = runs.progress(loopback.run())
        assert reports and all("deadline is over for 86" in report.refused["south"] for report in reports)
        assert not any(report.contributed for report in reports) and json.loads(out)["complete"] is False
        assert all(charged(tmp_path, site) == [] for site in SITES)


def test_a_site_whose_certificate_does_not_count_yet_by_its_clock_is_not_let_in(
    tmp_path: Path, shifted: Callable[[int], dict[str, str]]
) -> None:
    with south_ahead(tmp_path, shifted(-86_400)) as (loopback, config, path):
        loopback.connected("north", "west")
        found = loopback.preflight(path)
        wrong = {what: one["found"] for what, one in found.items() if not one["ok"]}
        assert wrong["connections"] == "missing: south" and wrong["answers"] == "south: no answer"
        assert "clock" in found["connections"]["next"]
        loopback.kill("south")
        loopback.start("south")
        loopback.connected()
        _, errors = (submitted := loopback.submit(path)).communicate(timeout=300)
        assert submitted.returncode == 0, errors.decode()
        same_as_in_process(tmp_path, config, loopback.run())


# Another version


def test_another_version_is_named_before_the_run_and_refused_in_it(tmp_path: Path) -> None:
    from tests.privfed.deployment.loopback import SERVER, Loopback

    older = tmp_path / "older"
    for package in ("privfed", "privacy", "crypto"):
        shutil.copytree(ROOT / package, older / package, symlinks=True)
    init = older / "privfed" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{__version__}"', '"0.0.9"'))
    config = house.experiment(house.tables(tmp_path / "tables"), rounds=2, privacy=INSECURE)
    path = tmp_path / "experiment.toml"
    path.write_text(config_io.to_toml(config))
    with Loopback(tmp_path, config) as loopback:
        loopback.start(SERVER, "north", "south")
        loopback.start("west", environment={"PYTHONPATH": str(older)})
        loopback.connected()
        found = loopback.preflight(path)
        told = f"privfed {__version__} at the coordinator and north and south, 0.0.9 at west"
        assert {what: one["found"] for what, one in found.items() if not one["ok"]} == {"versions": told}
        out, errors = (submitted := loopback.submit(path)).communicate(timeout=300)
        assert submitted.returncode == 3, errors.decode()
        reports = runs.progress(loopback.run())
        assert reports and not any(report.contributed for report in reports)
        reason = f"the plan is of privfed {__version__}, this site runs 0.0.9: use one version"
        assert all(report.refused == {"west": reason} for report in reports)
        assert all(charged(tmp_path, site) == [] for site in SITES)
        assert json.loads(out)["complete"] is False


# A lost disk, and keys that change


def test_a_site_from_a_backup_and_then_with_new_keys_takes_part_with_its_certificates(tmp_path: Path) -> None:
    from tests.privfed.deployment.loopback import Loopback, kits
    from tests.privfed.engines.flare_rig import quick_certificates

    config = house.experiment(house.tables(tmp_path / "tables"), rounds=1, privacy={**INSECURE, "target_epsilon": 1.0})
    path, home = tmp_path / "experiment.toml", tmp_path / "north"
    path.write_text(config_io.to_toml(config))
    with Loopback(tmp_path, config) as loopback:
        loopback.everybody()
        backup.make(Hospital.open(home), tmp_path / "north.backup")
        _, errors = (submitted := loopback.submit(path)).communicate(timeout=300)
        assert submitted.returncode == 0, errors.decode()
        loopback.kill("north")
        shutil.rmtree(home)
        backup.restore(home, (tmp_path / "north.backup").read_bytes())
        kits.harden(home / KIT, "site", home)  # as `site start` does
        loopback.start("north")
        loopback.connected()
        found = loopback.preflight(path)
        assert not found["sites"]["ok"] and found["sites"]["found"].startswith("north: ")
        loopback.kill("north")
        consortium = loopback.consortium
        assert account.catch_up(Hospital.open(home), account.account(consortium, "north")).charged

        old = (home / KIT / "startup" / "client.crt").read_bytes()
        with quick_certificates():
            consortium.approve(Hospital.open(home).rotate(contact="it"), replace=True)
            consortium.next_roster()
            Hospital.open(home).renew(consortium.kit("north"))
        assert (home / KIT / "startup" / "client.crt").read_bytes() != old
        loopback.start("north")
        loopback.connected()
        assert loopback.preflight(path)["rosters"]["found"].startswith("south: it has accepted version 1, not 2")
        for other in ("south", "west"):
            Hospital.open(tmp_path / other).accept_roster((consortium.roster_file() or Path()).read_bytes())
        assert all(one["ok"] for one in loopback.preflight(path).values())
        _, errors = (submitted := loopback.submit(path)).communicate(timeout=300)
        assert submitted.returncode == 0, errors.decode()
        assert "north" in runs.progress(loopback.run())[-1].contributed


# Encrypted sums


def test_a_homomorphic_run_over_processes_equals_the_run_in_one(tmp_path: Path) -> None:
    from tests.privfed.deployment.loopback import Loopback

    config = house.experiment(
        house.tables(tmp_path / "tables"),
        privacy=INSECURE,
        aggregation={"kind": "homomorphic", "key_holder": "south"},
    )
    path = tmp_path / "experiment.toml"
    path.write_text(config_io.to_toml(config))
    with Loopback(tmp_path, config) as loopback:
        loopback.everybody()
        assert loopback.preflight(path)["a secure sum over zeros"]["found"].endswith("encrypted: zero")
        _, errors = (submitted := loopback.submit(path, block=2)).communicate(timeout=300)
        assert submitted.returncode == 0, errors.decode()
        same_as_in_process(tmp_path, config, loopback.run())


def test_a_killed_job_of_the_key_holder_costs_rounds_and_no_entry(tmp_path: Path) -> None:
    homomorphic = {"kind": "homomorphic", "key_holder": "south"}
    with Federation(tmp_path, aggregation=homomorphic) as federation:
        federation.after(1)
        for pid in federation.loopback.job_pids("south"):
            os.kill(pid, 9)
        federation.finish()
        reports = runs.progress(federation.loopback.run())
        assert len(reports) == ROUNDS and "south" in reports[-1].contributed
