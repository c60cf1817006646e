"""Who looks on at the coordinator: what is shown, and when it ends."""

import json
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from privfed.cli.app import app
from privfed.cli.watch import picture
from privfed.config import Config
from privfed.deployment import files, runs, submission
from privfed.deployment.consortium import LAST, Consortium
from privfed.deployment.files import DeploymentError
from privfed.deployment.watching import watcher as watching
from privfed.engines.contract import Engine
from privfed.folder import RunFolder
from privfed.watching import QUIET_LOOKS, View, Watcher
from tests.privfed.deployment import house
from tests.privfed.deployment.house import SITES
from tests.privfed.deployment.test_blocks import INSECURE, block


@pytest.fixture
def consortium(tmp_path: Path, config: Config) -> Iterator[Consortium]:
    with house.without_flare():
        yield house.found(tmp_path, config)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return house.experiment(house.tables(tmp_path / "tables"), privacy=INSECURE)


class Looking:
    """An engine that looks at the run before every message."""

    def __init__(self, engine: Engine, watcher: Watcher) -> None:
        self._engine, self._watcher = engine, watcher
        self.views: list[View] = []

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        self.views.append(self._watcher.look())
        replies = dict(self._engine.exchange(requests, deadline_seconds))
        if len(self.views) > 7 and len(requests) == 3:
            replies.pop("south", None)  # the second round has no sum
        return replies


def test_every_phase_is_seen_with_who_is_asked(tmp_path: Path, config: Config, consortium: Consortium) -> None:
    run = runs.begin(consortium, config)
    watcher = watching(consortium, run)
    assert watcher.look() == View(
        run=run.path.name, state="idle", done=0, planned=3, sites_out=SITES, metric=config.metric
    )
    seen: list[Looking] = []

    def looking(engine: Engine) -> Looking:
        seen.append(Looking(engine, watcher))
        return seen[0]

    assert not block(consortium, run, 2, wrap=looking)
    phases = [view.phase for view in seen[0].views]
    steps = ("advertise", "share", "mask", "consistency", "unmask", "evaluate")
    assert phases[:6] == [f"round 1: {step}" for step in steps]
    assert all(view.state == "at work" and view.sites_in == SITES for view in seen[0].views[:6])
    assert seen[0].views[6].done == 1 and seen[0].views[6].epsilon
    after = watcher.look()
    assert (after.state, after.phase, after.done) == ("idle", "", 2)
    assert any("no sum" in fault for fault in after.faults)
    files.write(consortium.home / LAST, b"2 sites are there, a sum needs 3: south did not come\n")
    assert "south did not come" in watcher.look().faults[-1]


def test_what_is_followed_ends_with_the_run_or_when_nobody_works_on_it(
    tmp_path: Path, config: Config, consortium: Consortium
) -> None:
    run = runs.begin(consortium, config)
    watcher, pauses = watching(consortium, run), [0]

    def pause() -> None:
        pauses[0] += 1
        if pauses[0] == QUIET_LOOKS - 2:
            block(consortium, run, 1)  # in time: between two jobs it was quiet

    views = list(watcher.follow(pause))
    assert [(view.state, view.done) for view in views] == [("idle", 1)] and pauses[0] == QUIET_LOOKS - 1
    block(consortium, run, 3)
    assert [view.state for view in watcher.follow(pause)] == ["over"]


def test_the_command_ends_with_what_to_do(tmp_path: Path, config: Config, consortium: Consortium,
                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("privfed.cli.watch.LOOK_SECONDS", 0.0)
    run = runs.begin(consortium, config)
    result = CliRunner().invoke(app, ["coordinator", "watch", str(consortium.home), "--json"])
    assert result.exit_code == 3 and "resume" in result.stderr
    (line,) = result.stdout.splitlines()
    assert json.loads(line)["run"] == run.path.name
    once = CliRunner().invoke(app, ["coordinator", "watch", str(consortium.home), "--once"])
    assert once.exit_code == 0 and "idle; 0 of 3 rounds; no site was asked yet, of 3" in once.stdout


def test_the_live_table_has_rounds_sites_figures_and_faults(
    tmp_path: Path, config: Config, consortium: Consortium
) -> None:
    run = runs.begin(consortium, config)
    block(consortium, run, 1)
    watcher = watching(consortium, run)
    view = watcher.look()
    out = StringIO()
    Console(file=out, width=160).print(picture(view, watcher.rows))
    text = out.getvalue()
    assert "1 of 3 rounds" in text and "3 of 3" in text and config.metric in text
    assert view.epsilon is not None and f"{view.epsilon:.3f}" in text


def test_the_page_of_a_run_has_the_rosters_sites_and_why_the_last_block_ended(
    consortium: Consortium, config: Config
) -> None:
    from privfed.web.page import Renderer

    run = runs.begin(consortium, config)
    block(consortium, run, 1)
    files.write(consortium.home / LAST, b"2 sites are there, a sum needs 3: <south> did not come\n")
    watcher = watching(consortium, run)
    parts = Renderer().parts(watcher, watcher.look())
    assert "the last block ended: 2 sites are there, a sum needs 3: &lt;south&gt; did not come" in parts["standing"]
    assert all(f"<bdi>{site}</bdi></th><td>in</td>" in parts["sites"] for site in SITES)


def test_one_command_at_a_time_drives_a_run(consortium: Consortium, config: Config) -> None:
    run: RunFolder = runs.begin(consortium, config)
    assert not submission.under_way(run)
    with files.locked(run.path / runs.DRIVER, "it"):
        assert submission.under_way(run)
        with pytest.raises(DeploymentError, match=r"another process is at work in .* submit or resume"):
            submission.drive(consortium, run)
