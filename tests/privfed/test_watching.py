"""Who looks on at any run: what is seen while it goes, what is not, and that looking changes nothing."""

import fcntl
import io
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

import privfed
from privfed import folder
from privfed.cli.app import app
from privfed.cli.exits import exit_code
from privfed.cli.watch import picture
from privfed.engines.contract import Progress
from privfed.errors import PrivfedError, RunFolderError
from privfed.federation import RoundReport
from privfed.folder import RunFolder, held
from privfed.watching import NOW, QUIET_LOOKS, View, Watcher, named, row_of, telling
from tests.privfed.watched import stand_at, watched

SITES = ("north", "south", "west")
QUICK = ("rounds=2", "evaluation.local_steps=1", "privacy.noise_multiplier=4", "seed=3")


def listing(path: Path) -> dict[str, tuple[int, int, bytes]]:
    return {one.name: (one.stat().st_ino, one.stat().st_mtime_ns, one.read_bytes()) for one in sorted(path.iterdir())}


def append(path: Path, text: str) -> None:
    with (path / folder.METRICS).open("a") as file:
        file.write(text)


def line(path: Path, number: int, **changed: Any) -> str:
    """A further round's line, made of the first one."""
    first = json.loads((path / folder.METRICS).read_text().splitlines()[0])
    return json.dumps(first | {"round": number} | changed) + "\n"


def test_a_run_is_seen_as_it_goes(tmp_path: Path) -> None:
    home = tmp_path / "run"
    watcher, views = Watcher(home), []
    assert watcher.look() == View(run="run", state="not begun", done=0, planned=0)

    def looked(_: Progress) -> None:
        views.append(watcher.look())

    ended: list[RoundReport] = []

    def round_ended(report: RoundReport) -> None:
        ended.append(report)
        view = watcher.look()
        assert (view.state, view.done, view.planned) == ("at work", report.round + 1, 2)
        assert watcher.rows[-1] == msgspec.structs.replace(row_of(report), seconds=round(report.seconds, 4))
        assert view.epsilon == report.epsilon and view.score is not None

    privfed.run(privfed.load_config(overrides=QUICK), out=home, observer=round_ended, watch=looked)
    phases = [view.phase for view in views]
    for step in ("advertise", "share", "mask", "unmask", "evaluate"):
        assert any(f"round 1: {step}" == phase for phase in phases), phases
    assert all(len(view.sites_in) == 5 for view in views if view.phase)
    last = watcher.look()
    assert (last.state, last.done, last.phase, len(last.sites_in), last.sites_out) == ("over", 2, "", 5, ())
    assert watcher.summary is not None and watcher.summary.complete
    assert not (home / NOW).exists() and len(ended) == 2
    assert list(Watcher(home).follow(lambda: None)) == [last]


def test_what_is_told_to_onlookers_never_ends_a_run_and_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / NOW).write_text("left by a run that was killed")
    with telling(tmp_path):
        pass  # refused before it began: the folder is as it was
    assert (tmp_path / NOW).exists()
    with telling(tmp_path) as tell:
        tell(0, "mask", SITES)
        assert json.loads((tmp_path / NOW).read_text()) == {"round": 0, "step": "mask", "asked": list(SITES)}
    assert list(tmp_path.iterdir()) == []
    with telling(tmp_path / "gone") as tell:
        tell(0, "mask", SITES)


def test_what_is_seen_has_no_figure_of_a_single_site(tmp_path: Path) -> None:
    home = watched(tmp_path / "run", SITES, over=False)
    watcher = Watcher(home)
    shown = repr((watcher.look(), watcher.rows, watcher.sites))
    for text in (home / folder.METRICS).read_text().splitlines():
        for figures in json.loads(text)["sites"].values():
            for name in ("global_score", "personalized", "local_only"):
                assert repr(figures[name]) not in shown
            assert f"records={figures['records']}" not in shown


def test_looking_writes_nothing_and_keeps_nobody_out(tmp_path: Path) -> None:
    home = watched(tmp_path / "run", SITES, over=False)
    before = listing(home)
    first, second = Watcher(home), Watcher(home)
    assert first.look() == second.look()
    assert listing(home) == before and first.look().state == "idle"
    with RunFolder(home).locked():
        assert first.look().state == second.look().state == "at work"
    with RunFolder(home).locked():  # at once: nobody who looked on has it
        pass


def test_two_who_look_on_at_once_do_not_see_each_other(tmp_path: Path) -> None:
    home = watched(tmp_path / "run", SITES, over=False)
    (home / folder.LOCK).touch()
    with (home / folder.LOCK).open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # as another look has it for an instant
        assert not held(home / folder.LOCK)
        assert Watcher(home).look().state == "idle"


def test_a_run_waits_for_a_look_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[None] = []
    with open(tmp_path / folder.LOCK, "w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)

        def over(_: float) -> None:
            looks.append(None)
            fcntl.flock(other, fcntl.LOCK_UN)

        monkeypatch.setattr(folder.time, "sleep", over)
        with folder.locked(tmp_path, wait_seconds=60.0):
            assert looks == [None]


def test_half_a_line_and_a_round_without_its_checkpoint_are_not_shown(tmp_path: Path) -> None:
    home = watched(tmp_path / "run", SITES, over=False, rounds=6, complete=False)
    watcher = Watcher(home)
    assert watcher.look().done == 3
    fourth = line(home, 3)
    append(home, fourth[:40])
    assert watcher.look().done == 3
    append(home, fourth[40:])
    assert watcher.look().done == 3  # killed now, the round is done again
    stand_at(home, 4)
    assert watcher.look().done == 4 and len(watcher.rows) == 4


def test_a_resumed_run_shows_no_round_twice(tmp_path: Path) -> None:
    home = watched(tmp_path / "run", SITES, over=False, rounds=6, complete=False)
    watcher = Watcher(home)
    watcher.look()
    append(home, line(home, 3, aborted="the round that was cut short"))
    watcher.look()
    RunFolder(home).keep_metrics(RunFolder(home).metrics(3))  # as resuming does
    append(home, line(home, 3))
    stand_at(home, 4)
    view = watcher.look()
    assert view.done == len(watcher.rows) == 4 and [row.round for row in watcher.rows] == [0, 1, 2, 3]
    assert view.faults == () and watcher.sites["west"].contributed == 4


def test_another_run_in_the_same_place_is_told_apart(tmp_path: Path) -> None:
    home = watched(tmp_path / "run", SITES)
    watcher = Watcher(home)
    assert watcher.look().state == "over"
    os.rename(home, tmp_path / "old")
    assert watcher.look().state == "not begun"
    watched(home, ("a", "b", "c", "d"), over=False, rounds=8, complete=False)
    view = watcher.look()
    assert (view.state, view.done, view.planned, len(view.sites_in)) == ("idle", 4, 8, 4)
    assert watcher.summary is None and set(watcher.sites) == {"a", "b", "c", "d"}


def test_faults_are_told_with_their_site_and_round(tmp_path: Path) -> None:
    sites = (*SITES, "east", "centre")
    home = watched(
        tmp_path / "run", sites, over=False, refusals={"south": "policy.max_epsilon = 2"}, aborted={4: "few"}
    )
    watcher = Watcher(home)
    watcher.look()
    assert watcher.rows[0].faults == ("south refuses: policy.max_epsilon = 2",)
    assert watcher.rows[1].faults == ("north did not answer mask",)
    assert watcher.rows[4].faults == ("no sum: few",)
    assert watcher.sites["south"].fault == "round 1: refuses: policy.max_epsilon = 2"
    assert watcher.sites["north"].fault == "round 2: did not answer mask"
    assert (watcher.sites["north"].contributed, watcher.sites["north"].missed) == (4, 2)


def test_a_mean_over_one_site_is_that_sites_figure_and_is_not_shown(tmp_path: Path) -> None:
    alone = ['evaluation.release="public-cohort"', 'evaluation.public_sites=["south"]']
    two = ['evaluation.release="public-cohort"', 'evaluation.public_sites=["south","west"]']
    shown = []
    for name, overrides in (("alone", alone), ("two", two)):
        watcher = Watcher(watched(tmp_path / name, SITES, overrides=overrides))
        watcher.look()
        shown.append([value is None for row in watcher.rows for value in (row.loss, row.score, row.personalized)])
    assert all(shown[0]) and not any(shown[1])


def test_a_folder_can_not_write_to_the_terminal_of_who_looks_at_it(tmp_path: Path) -> None:
    evil = "no\x1b]0;title\x07\x1b[2J\r\u202e"
    home = watched(tmp_path / "run", (*SITES, evil), refusals={evil: evil}, aborted={1: evil}, over=False)
    watcher = Watcher(home, remark=lambda: evil)
    view = watcher.look()
    console = Console(force_terminal=True, file=io.StringIO(), width=200, color_system=None)
    console.print(picture(view, watcher.rows))
    assert isinstance(console.file, io.StringIO)
    plain = CliRunner().invoke(app, ["watch", str(home), "--once"]).output
    for text in (plain, console.file.getvalue(), *(site.fault for site in watcher.sites.values())):
        assert not set("\x1b\x07\r\u202e") & set(text)
    assert "no\ufffd" in plain


def test_a_site_that_is_no_longer_invited_is_out(tmp_path: Path) -> None:
    view = Watcher(watched(tmp_path / "run", (*SITES, "east"), over=False, leaves="east")).look()
    assert view.sites_in == SITES and view.sites_out == ("east",)


def test_thousands_of_sites_are_not_told_by_name() -> None:
    assert named(["a", "b"]) == "a, b"
    assert named([f"s{i}" for i in range(1000)]) == "s0, s1, s2, s3, s4, s5, s6, s7 and 992 more"


def test_held_out_sites_are_neither_in_nor_out(tmp_path: Path) -> None:
    home = watched(tmp_path / "run", SITES, over=False, overrides=['evaluation.unseen_sites=["away"]'])
    (home / folder.DATASETS).write_text(json.dumps(dict.fromkeys((*SITES, "late", "away"), "00")))
    view = Watcher(home).look()
    assert set(view.sites_in) == set(SITES) and view.sites_out == ("late",)


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        (folder.METRICS, b"{}\n", "metrics.jsonl: line 1 is damaged"),
        (folder.METRICS, b"\xff\n", "metrics.jsonl: line 1 is damaged"),
        (folder.CHECKPOINT, b"nothing", "checkpoint.safetensors is damaged"),
        (folder.SUMMARY, b"{", "summary.json is damaged"),
        (folder.CONFIG, b"rounds = 1\n", "is not the configuration that the run began with"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, damage: bytes, says: str) -> None:
    home = watched(tmp_path / "run", SITES, over=False)
    (home / name).write_bytes(damage)
    watcher = Watcher(home)
    for _ in range(2):
        with pytest.raises(RunFolderError, match=says):
            watcher.look()


def test_the_command_follows_a_run_and_ends_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privfed.cli.watch.LOOK_SECONDS", 0.0)
    home = watched(tmp_path / "run", SITES)
    over = CliRunner().invoke(app, ["watch", str(home)])
    assert over.exit_code == 0 and "round 6: 3 of 3 sites, global 0." in over.stdout
    assert "run: over; 6 of 6 rounds; in: north, south, west" in over.stdout and "ε = " in over.stderr
    (told,) = CliRunner().invoke(app, ["watch", str(home), "--json"]).stdout.splitlines()
    assert json.loads(told)["state"] == "over"
    watched(tmp_path / "idle", SITES, over=False)
    idle = CliRunner().invoke(app, ["watch", str(tmp_path / "idle")])
    assert idle.exit_code == 3 and f"privfed run --resume {tmp_path / 'idle'}" in idle.stderr
    none = CliRunner().invoke(app, ["watch", str(tmp_path / "nothing")])
    assert none.exit_code == 3 and "there is no run in" in none.stderr and not (tmp_path / "nothing").exists()


def test_who_waits_for_a_run_sees_it_begin(tmp_path: Path) -> None:
    watcher, looks = Watcher(tmp_path / "run"), [0]

    def pause() -> None:
        looks[0] += 1
        if looks[0] == QUIET_LOOKS - 2:
            watched(tmp_path / "run", SITES)

    assert [view.state for view in watcher.follow(pause)] == ["over"]


@pytest.mark.parametrize("options", [["--port", "1"], ["--web", "--once"], ["--web", "--json"], ["--allow-remote"]])
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, options: list[str]) -> None:
    assert CliRunner().invoke(app, ["watch", str(tmp_path), *options]).exit_code == 2


def test_a_page_without_its_packages_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    result = CliRunner().invoke(app, ["watch", str(tmp_path), "--web"])
    assert isinstance(result.exception, PrivfedError) and exit_code(result.exception) == 2
    assert "'.[web]'" in str(result.exception)
