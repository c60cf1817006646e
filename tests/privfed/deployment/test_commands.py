"""The commands of a pilot, one after the other, with FLARE's part left away."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from privfed import config_io
from privfed.cli.app import app
from privfed.deployment import runs
from privfed.deployment.consortium import Consortium
from privfed.deployment.files import DeploymentError
from tests.privfed.deployment import house
from tests.privfed.deployment.house import SITES
from tests.privfed.deployment.test_blocks import INSECURE, block


@pytest.fixture(autouse=True)
def flareless() -> Iterator[None]:
    with house.without_flare():
        yield


def privfed(*words: object, answers: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], input=answers)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_pilot_from_its_founding_to_its_status(tmp_path: Path) -> None:
    config = house.experiment(house.tables(tmp_path / "tables"), rounds=1, evaluation={"every": 1, "local_steps": 5})
    experiment, home = tmp_path / "experiment.toml", tmp_path / "coordinator"
    experiment.write_text(config_io.to_toml(config))
    founded = privfed(
        "consortium", "new", home, "--experiment", experiment, "--name", "pilot", "--contact", "c@x.org", "--json"
    )
    authority = json.loads(founded.stdout)["fingerprint"]
    for site in SITES:
        asked = privfed(
            "consortium", "request", tmp_path / site, "--consortium", "pilot", "--name", site,
            "--organisation", site, "--contact", "it", "--json",
        )  # fmt: skip
        mark, request = json.loads(asked.stdout)["fingerprint"], tmp_path / site / f"{site}.request"
        with pytest.raises(DeploymentError, match="has no kit yet: privfed site init"):
            privfed("site", "status", tmp_path / site)
        with pytest.raises(DeploymentError, match="not from who you spoke to"):
            privfed("consortium", "approve", home, request, "--fingerprint", "0000")
        with pytest.raises(DeploymentError, match="nothing was signed"):
            privfed("consortium", "approve", home, request, answers="n\n")
        assert privfed("consortium", "approve", home, request, "--fingerprint", mark).exit_code == 0
    assert "Roster 1: north, south, west" in privfed("consortium", "roster", home).stdout
    for site in SITES:
        kit = tmp_path / f"{site}.kit"
        privfed("consortium", "kit", home, site, "--out", kit)
        table = tmp_path / "tables" / f"{site}.csv"
        said = privfed("site", "init", tmp_path / site, "--kit", kit, "--data", table, "--authority", authority)
        assert "What no coordinator and no job can change" in said.stdout and "120 records" in said.stdout
    assert privfed("site", "policy", "check", tmp_path / "north", experiment).exit_code == 0

    consortium = Consortium(home)
    run = runs.begin(consortium, config)
    block(consortium, run, 1)
    watched = json.loads(privfed("coordinator", "watch", home, "--json").stdout)
    assert (watched["run"], watched["state"], watched["done"], watched["planned"]) == (run.path.name, "over", 1, 1)
    assert watched["epsilon"] > 0 and watched["sites_in"] == list(SITES) and watched["sites_out"] == []
    told = privfed("coordinator", "watch", home, "--once")
    assert "round 1: 3 of 3 sites" in told.stdout and "over; 1 of 1 rounds" in told.stdout
    status = json.loads(privfed("site", "status", tmp_path / "north", "--json").stdout)
    assert status["epsilon"] > 0 and [line["rounds"] for line in status["runs"]] == [1]

    # The budget is the site's, over all runs: the next one does not fit any more
    again = privfed("site", "policy", "check", tmp_path / "north", experiment)
    assert again.exit_code == 3 and "policy.max_epsilon" in again.stdout
    privfed("consortium", "suspend", home, "west")
    assert Consortium(home).suspended == ("west",)


def test_a_backup_is_put_back_and_caught_up_with_and_keys_are_changed_by_the_commands_of_the_pages(
    tmp_path: Path,
) -> None:
    """docs/operations/backup.md and keys.md."""
    config = house.experiment(
        house.tables(tmp_path / "tables"), rounds=1, privacy={"delta": 1e-5, "target_epsilon": 1.0}
    )
    consortium = house.found(tmp_path, config, study=False)
    home, kept, said = tmp_path / "north", tmp_path / "north.backup", tmp_path / "north.account"
    assert "0 ledger entries" in privfed("site", "backup", home, kept).stdout
    block(consortium, runs.begin(consortium, config), 1)
    assert privfed("site", "status", home, "--check").exit_code == 0
    with pytest.raises(DeploymentError, match="would be forgotten"):
        privfed("site", "restore", home, kept)
    shutil.rmtree(home)
    assert "takes part in nothing" in privfed("site", "restore", home, kept).stdout
    for words in (("status", home, "--check"), ("start", home)):
        with pytest.raises(DeploymentError, match="catch-up"):
            privfed("site", *words)
    privfed("consortium", "account", consortium.home, "north", "--out", said)
    caught = privfed("site", "catch-up", home, said).stdout
    assert "charged for all its rounds: pilot-" in caught and "spent: ε = " in caught
    told = privfed("site", "status", home, "--check").stdout
    assert ", 1 run\n" in told and "all rounds charged by catch-up" in told and "over the limit" not in told
    policy = (home / "policy.toml").read_text()
    (home / "policy.toml").write_text("max_epsilon = 0.1\n" + re.sub("(?m)^max_epsilon = .*$", "", policy))
    assert "over the limit of 0.1" in privfed("site", "status", home).stdout
    (home / "policy.toml").write_text(policy)

    asked = json.loads(privfed("site", "rotate", home, "--contact", "it", "--json").stdout)
    approve = ("consortium", "approve", consortium.home, asked["request"], "--fingerprint", asked["fingerprint"])
    with pytest.raises(DeploymentError, match="--replace"):
        privfed(*approve)
    assert privfed(*approve, "--replace").exit_code == 0
    assert "Roster 2" in privfed("consortium", "roster", consortium.home).stdout
    kit = tmp_path / "north.kit"
    privfed("consortium", "kit", consortium.home, "north", "--out", kit)
    assert "with roster 2" in privfed("site", "renew", home, "--kit", kit).stdout
    for other in ("south", "west"):
        privfed("site", "roster", tmp_path / other, consortium.roster_file())
    run = runs.begin(consortium, config)
    block(consortium, run, 1)
    assert "north" in runs.progress(run)[-1].contributed


@pytest.mark.parametrize("name", ["st mary", "../st-mary", "-mary", "", "m" * 64])
def test_a_name_that_can_not_be_is_told_before_anything_is_made(tmp_path: Path, name: str) -> None:
    made = tmp_path / "made"
    with pytest.raises(DeploymentError, match=r"a site can not be named .*: take letters, digits and hyphens"):
        privfed(
            "consortium", "request", made, "--consortium", "pilot", f"--name={name}", "--organisation", "x",
            "--contact", "it",
        )  # fmt: skip
    experiment = tmp_path / "experiment.toml"
    experiment.write_text(config_io.to_toml(house.experiment(house.tables(tmp_path / "tables"), rounds=1)))
    with pytest.raises(DeploymentError, match="a consortium can not be named"):
        privfed("consortium", "new", made, "--experiment", experiment, f"--name={name}", "--contact", "x")
    assert not made.exists()  # the corrected command may have the folder


def test_a_stop_ends_a_block_after_the_round_that_is_under_way(tmp_path: Path) -> None:
    config = house.experiment(house.tables(tmp_path / "tables"), privacy=INSECURE)
    consortium = house.found(tmp_path, config)
    run = runs.begin(consortium, config)
    privfed("coordinator", "stop", consortium.home)
    assert not block(consortium, run, 3)
    assert len(runs.progress(run)) == 1


def test_a_server_for_others_needs_an_address_to_listen_on(tmp_path: Path) -> None:
    config = house.experiment(house.tables(tmp_path / "tables"))
    Consortium.create(tmp_path / "c", config, name="pilot", contact="c", host="fl.example.org", port=8102)
    with pytest.raises(DeploymentError, match="--address"):
        privfed("coordinator", "start", tmp_path / "c")
