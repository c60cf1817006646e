"""A consortium whose messages go over Flower: its papers, and the commands that are not for it. No Flower is needed."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from privfed.cli.app import app
from privfed.config import Config
from privfed.deployment import papers, words
from privfed.deployment.consortium import Consortium
from privfed.deployment.files import DeploymentError
from privfed.deployment.hospital import Hospital
from tests.privfed.deployment import house
from tests.privfed.deployment.house import SITES


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return house.experiment(house.tables(tmp_path / "tables"))


@pytest.fixture
def consortium(tmp_path: Path, config: Config) -> Consortium:
    return house.found(tmp_path, config, engine="flower")


def ask(home: Path, name: str, **more: str) -> bytes:
    about = {"consortium": "consortium", "organisation": "hospital", "contact": "it@example.org"}
    return Hospital.request(home / f"{name}-asks", name=name, **about, **more)  # type: ignore[arg-type]


def test_it_has_keys_and_a_roster_and_no_certificates(tmp_path: Path, consortium: Consortium) -> None:
    assert consortium.terms.engine == "flower" and consortium.terms.ca == ""
    assert [member.name for member in consortium.members] == list(SITES)
    for site in SITES:
        assert Hospital.open(tmp_path / site).roster == consortium.roster()
        assert set(papers.unpack(consortium.kit(site), (papers.ROSTER, papers.TERMS, papers.SIGNATURE)))
    names = {path.name for path in tmp_path.rglob("*")}
    assert not names & {"kit", "ca", "server", "admin", "request", papers.CERTIFICATE}


def test_a_site_that_asked_for_another_engine_is_not_approved(tmp_path: Path, consortium: Consortium) -> None:
    with house.without_flare():
        flare = house.found(tmp_path / "other", consortium_config(consortium))
        with pytest.raises(DeploymentError, match="--engine flower"):
            consortium.approve(ask(tmp_path, "east"))
        with pytest.raises(DeploymentError, match="--engine nvflare"):
            flare.approve(ask(tmp_path, "far-east", engine="flower"))
        north = Hospital.open(tmp_path / "north")
        with pytest.raises(DeploymentError, match="this is not a file with"):
            north.install(flare.kit("north"), authority=flare.terms.authority, data=tmp_path, policy=None)


def consortium_config(consortium: Consortium) -> Config:
    return house.experiment(house.tables(consortium.home.parent / "others"))


def test_a_site_is_told_in_plain_words_that_runs_bring_code(consortium: Consortium) -> None:
    said = words.agreement(consortium.terms, house.OPEN, name="north", data="table.csv")
    assert "WHAT THE CONSORTIUM CAN CHANGE: which code" in said and "privfed site serve" in said
    assert "no code from elsewhere" not in said and "certificate of this site's own" not in said


def test_a_node_is_one_sites(consortium: Consortium) -> None:
    consortium.set_node("north", 2**63 + 5)
    consortium.set_node("south", 7)
    consortium.set_node("north", 8)
    assert Consortium(consortium.home).nodes == {"north": 8, "south": 7}
    with pytest.raises(DeploymentError, match="another site's"):
        consortium.set_node("west", 7)
    with pytest.raises(DeploymentError, match="no approved site"):
        consortium.set_node("nowhere", 9)


def test_flares_commands_say_what_to_do_instead(tmp_path: Path, consortium: Consortium) -> None:
    home, file = str(consortium.home), tmp_path / "experiment.toml"
    file.write_text("")
    for typed in (
        ["coordinator", "start", home],
        ["coordinator", "submit", home, str(file)],
        ["coordinator", "resume", home],
        ["coordinator", "preflight", home],
        ["site", "start", str(tmp_path / "north")],
    ):
        done = CliRunner().invoke(app, typed)
        assert isinstance(done.exception, DeploymentError) and "docs/flower.md" in str(done.exception), typed


def test_flowers_commands_are_for_such_a_consortium_alone(tmp_path: Path, config: Config) -> None:
    with house.without_flare():
        made = house.found(tmp_path, config)
    for typed in (
        ["consortium", "node", str(made.home), "north", "7"],
        ["site", "serve", str(tmp_path / "north"), "--socket", str(tmp_path / "socket")],
    ):
        done = CliRunner().invoke(app, typed)
        assert isinstance(done.exception, DeploymentError) and "NVIDIA FLARE" in str(done.exception), typed


def test_an_engine_that_there_is_not_is_bad_usage(tmp_path: Path) -> None:
    about = ["--consortium", "c", "--name", "n", "--organisation", "o", "--contact", "x", "--engine", "pigeon"]
    done = CliRunner().invoke(app, ["consortium", "request", str(tmp_path / "site"), *about])
    assert done.exit_code == 2 and not (tmp_path / "site").exists()
