"""Masked rounds over Flower: real processes, TLS, signed node keys. ``make test-flower``: they take minutes."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest

from privfed import config_io
from privfed.config import Config
from privfed.crypto.journal import JournalFile
from privfed.deployment import runs
from privfed.deployment.consortium import Consortium
from privfed.deployment.deposits import Deposits
from privfed.deployment.hospital import JOURNAL, LEDGER
from privfed.folder import RunFolder
from privfed.watching import NOW, Now
from tests.privfed.deployment import house
from tests.privfed.deployment.house import SITES
from tests.privfed.deployment.test_blocks import INSECURE, same_as_in_process, spends
from tests.privfed.engines.flare_rig import ROOT, Party, until

pytestmark = pytest.mark.skipif(not os.environ.get("PRIVFED_FLOWER"), reason="minutes: make test-flower")

APP = ROOT / "examples" / "flower"
MINUTES = 1800.0


class Federation:
    """A consortium over a Flower federation that was there before it."""

    def __init__(self, home: Path) -> None:
        from tests.privfed.engines.flower_rig import Rig

        self.home, self.paths = home, house.tables(home / "tables")
        self.config = self.experiment(rounds=2)
        # West's node goes into its folder; the others' reach a socket, at which the site answers
        sockets = {site: {"privfed-socket": str(home / f"{site}.sock")} for site in SITES[:2]}
        self.rig = Rig(home, {**sockets, SITES[2]: {"privfed": str(home / SITES[2])}})
        self.sites: list[Party] = []
        policy = msgspec.structs.replace(house.OPEN, max_epsilon=50.0)
        self.consortium: Consortium = house.found(home, self.config, port=self.rig.port, policy=policy, engine="flower")

    def __enter__(self) -> Self:
        for site in SITES[:2]:
            words = ["site", "serve", str(self.home / site), "--socket", str(self.home / f"{site}.sock")]
            self.sites.append(Party([sys.executable, "-m", "privfed", *words], self.home / f"{site}.site.out"))
        self.rig.__enter__()
        for site, node in self.rig.ids.items():
            self.consortium.set_node(site, node)
        return self

    def __exit__(self, *_: object) -> None:
        self.rig.__exit__()
        for site in self.sites:
            site.kill()

    def experiment(self, **more: Any) -> Config:
        waits = {"deadline_seconds": 120}
        return house.experiment(self.paths, privacy=INSECURE, simulation=waits, **more)

    def start(self, config: Config) -> RunFolder:
        """A run as a user starts it; its folder, once it is there."""
        path = self.home / "experiment.toml"
        path.write_text(config_io.to_toml(config))
        before = set((self.consortium.home / runs.RUNS).glob("*/run.json"))
        self.rig.run(APP, privfed=str(self.consortium.home), experiment=str(path))
        (made,) = until(lambda: set((self.consortium.home / runs.RUNS).glob("*/run.json")) - before)
        return RunFolder.open(made.parent)

    def at(self, run: RunFolder, round: int, step: str) -> None:
        """Return when the coordinator has sent that step."""

        def there() -> bool:
            path = run.path / NOW
            now = msgspec.json.decode(path.read_bytes(), type=Now) if path.exists() else None
            return now is not None and (now.round, now.step) == (round, step)

        until(there, MINUTES)

    def finished(self, run: RunFolder) -> None:
        until(lambda: runs.finished(run), MINUTES)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with Federation(tmp_path_factory.mktemp("flower")) as federation:
        yield federation


def test_a_masked_run_over_flower_equals_the_run_in_one_process(federation: Federation) -> None:
    run = federation.start(federation.config)
    federation.finished(run)
    same_as_in_process(federation.home, federation.config, run)
    for report in runs.progress(run):
        assert report.contributed == SITES and report.refused == {}
        print(f"round {report.round}: {report.seconds:.1f} s")
    logs = federation.rig.logs()
    for site in SITES:
        assert not Deposits(JournalFile(federation.home / site / JOURNAL), site).out  # wiped after the round
        for secret in json.loads((federation.home / site / "keys.json").read_text()).values():
            assert secret.encode() not in logs
        rows = Path(federation.paths[site]).read_text().splitlines()[1:]
        assert not any(row.encode() in logs for row in rows)


def test_a_site_that_restarts_in_a_round_is_not_in_its_sum_says_nothing_and_joins_a_later_one(
    federation: Federation,
) -> None:
    charged = len(spends(federation.home / "north" / LEDGER, "north"))
    run = federation.start(federation.experiment(rounds=3, name="restarted"))
    federation.at(run, 0, "mask")
    federation.rig.restart("north")
    federation.finished(run)
    first, *later = runs.progress(run)
    assert first.aborted is not None and "north" not in first.contributed  # three sites: no sum without it
    # When Flower sees it again is Flower's affair: one of the next rounds has it
    assert any(report.contributed == SITES for report in later)
    # What it can not know it refuses: whatever it says of that round is a reason, and no vector
    assert "north" not in first.refused or "north" in first.refused["north"]
    assert len(spends(federation.home / "north" / LEDGER, "north")) > charged


def test_a_node_whose_key_nobody_registered_is_not_let_in(federation: Federation) -> None:
    from tests.privfed.engines.flower_rig import node_key

    rig = federation.rig
    node_key(rig.home / "stranger.key")
    rig.nodes["stranger"] = {"privfed": str(federation.home / "north")}
    try:
        rig.start("stranger")
        assert rig.parties["stranger"].wait(120) != 0
    finally:
        rig.nodes.pop("stranger")
        rig.kill("stranger")
    assert rig.online() == set(SITES)


def test_a_node_does_not_speak_to_a_server_of_another_authority(federation: Federation, tmp_path: Path) -> None:
    from tests.privfed.engines.flower_rig import certificates

    certificates(tmp_path)
    rig = federation.rig
    rig.kill("west")
    ours = (rig.home / "ca.pem").read_bytes()
    try:
        (rig.home / "ca.pem").write_bytes((tmp_path / "ca.pem").read_bytes())
        before = len((rig.home / "west.out").read_bytes())
        rig.start("west")
        until(lambda: b"CERTIFICATE_VERIFY_FAILED" in (rig.home / "west.out").read_bytes()[before:])
    finally:
        (rig.home / "ca.pem").write_bytes(ours)
        rig.kill("west")  # and let in again when Flower has missed it
