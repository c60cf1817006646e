"""``privfed accountant``: figures that others' accountants agree with, and questions that have no answer."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from privfed.cli.app import app
from privfed.crypto import keys
from privfed.errors import ConfigError, RunFolderError
from privfed.privacy.errors import NoGuarantee


def ask(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["accountant", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def answer(*arguments: str) -> Any:
    return json.loads(ask(*arguments, "--json"))


@pytest.mark.parametrize(
    ("z", "q", "steps", "rdp", "pld"),
    [(1.0, 0.01, 1000, 2.1014, 1.8282), (2.0, 0.1, 100, 2.5806, 2.3374), (30.0, 0.2, 1000, 0.8431, 0.7700)],
)
def test_epsilon_is_that_of_the_reference_table(z: float, q: float, steps: int, rdp: float, pld: float) -> None:
    question = ("epsilon", "-z", str(z), "-q", str(q), "-n", str(steps))
    found = answer(*question)
    assert found["epsilon"] == pytest.approx(pld, rel=2e-3)
    assert {"epsilon", "delta", "noise_multiplier", "accountant", "tolerance"} <= set(found)
    assert answer(*question, "--accountant", "rdp")["epsilon"] == pytest.approx(rdp, rel=1e-3)
    assert answer(*question, "--accountant", "prv")["epsilon"] == pytest.approx(pld, abs=0.03)


def test_accountants_stand_side_by_side() -> None:
    found = answer("epsilon", "-z", "1", "-q", "0.01", "-n", "1000", "--accountant", "all")["accountants"]
    values = {line["accountant"]: line["epsilon"] for line in found}
    assert len(values) == 5
    assert values["PLD, dp-accounting"] == pytest.approx(values["privfed, the least: PLD"], rel=1e-3)
    assert values["RDP, dp-accounting"] == pytest.approx(values["RDP, privfed"], rel=1e-6)
    assert "PRV, Opacus" in ask("compare", "-z", "1", "-q", "0.01", "-n", "1000")


def test_segments_and_a_file_of_events_are_two_ways_to_say_the_same(tmp_path: Path) -> None:
    events = [
        {"event": {"type": "poisson-gaussian", "sample_rate": 0.1, "noise_multiplier": 1.0}, "count": 10},
        {"event": {"type": "gaussian", "noise_multiplier": 8.0}, "count": 5},
    ]
    (tmp_path / "e.json").write_text(json.dumps(events))
    by_hand = answer("epsilon", "-z", "1", "-z", "8", "-q", ".1", "-q", "1", "-n", "10", "-n", "5")
    assert answer("epsilon", "--events", str(tmp_path / "e.json"))["epsilon"] == pytest.approx(by_hand["epsilon"])


def test_delta_and_calibrate_undo_epsilon() -> None:
    mechanism = ("-q", "0.1", "-n", "50")
    z = answer("calibrate", "--epsilon", "2", *mechanism)["noise_multiplier"]
    epsilon = answer("epsilon", "-z", str(z), *mechanism)["epsilon"]
    assert 1.98 < epsilon <= 2
    delta = answer("delta", "--epsilon", str(epsilon), "-z", str(z), *mechanism)["delta"]
    assert delta == pytest.approx(1e-5, rel=0.05)


def test_replacing_one_doubles_what_it_moves() -> None:
    replaced = answer("epsilon", "-z", "10", "-n", "7", "--adjacency", "replace-one")["epsilon"]
    assert replaced == pytest.approx(answer("epsilon", "-z", "5", "-n", "7")["epsilon"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["epsilon", "-z", "1", "-q", ".5", "--adjacency", "replace-one"], "replace-one.*without sampling"),
        (["epsilon", "-z", "1", "-q", ".5", "--delta", "1e-13"], "use --accountant rdp"),
        (["epsilon", "-z", "1", "--sampling", "shuffle"], "not a Poisson sample"),
        (["epsilon", "-z", "1", "--sampling", "uniform"], "must be one of poisson"),
        (["epsilon"], "either --noise-multiplier"),
        (["epsilon", "-z", "1", "--events", "e.json"], "either --noise-multiplier"),
        (["epsilon", "--events", "no-such-file"], "can not read"),
        (["epsilon", "-z", "1", "-z", "2", "-q", ".1", "-q", ".2", "-q", ".3"], "equally many"),
        (["epsilon", "-z", "-1"], "at least 0"),
        (["epsilon", "-z", "1", "-q", "2"], "sample_rate"),
        (["epsilon", "-z", "1", "--delta", "0"], "between 0 and 1"),
        (["epsilon", "-z", "1", "--accountant", "gdp"], "must be one of pld, rdp, prv, all"),
        (["calibrate", "--epsilon", "-1"], "positive"),
        (["calibrate", "--epsilon", "1e9"], "lower the target"),
        (["delta", "--epsilon", "inf", "-z", "1"], "finite"),
    ],
)
def test_a_question_without_an_answer_is_refused(arguments: list[str], told: str) -> None:
    with pytest.raises((ConfigError, NoGuarantee), match=told):
        ask(*arguments)


def test_events_that_are_none_are_refused(tmp_path: Path) -> None:
    for text in ("{}", "[]", '[{"event": {"type": "shuffled"}}]', "not json"):
        (tmp_path / "e.json").write_text(text)
        with pytest.raises(ConfigError):
            ask("epsilon", "--events", str(tmp_path / "e.json"))


def test_without_noise_there_is_no_bound() -> None:
    assert answer("epsilon", "-z", "0")["epsilon"] is None
    assert "ε = ∞" in ask("epsilon", "-z", "0")


def test_pictures_are_drawn(tmp_path: Path) -> None:
    ask("curve", "-z", "2", "-n", "10", "--plot", str(tmp_path / "curve.svg"))
    ask("epsilon", "-z", "2", "-n", "10", "--plot", str(tmp_path / "steps.svg"))
    for name in ("curve", "steps"):
        assert (tmp_path / f"{name}.svg").read_text().lstrip().startswith("<?xml")
    with pytest.raises(ConfigError, match="can not write"):
        ask("curve", "-z", "2", "--plot", str(tmp_path / "curve.what"))


def test_a_key_is_for_its_owner_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    told = ask("keygen", str(path))
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    public = keys.verification_key(bytes.fromhex(path.read_text())).hex()
    assert public in told and (tmp_path / "site.key.pub").read_text().strip() == public
    assert path.read_text().strip() not in told
    with pytest.raises(RunFolderError, match="never overwritten"):
        ask("keygen", str(path))


@pytest.mark.parametrize("command", ["show", "verify", "compose"])
@pytest.mark.parametrize("delta", ["0", "1", "2", "nan"])
def test_a_delta_that_is_none_is_refused_before_any_work(command: str, delta: str) -> None:
    with pytest.raises(ConfigError, match="--delta must be between 0 and 1"):
        ask(command, "no-ledger", "--delta", delta)


def test_a_new_key_is_told_to_programs_too(tmp_path: Path) -> None:
    told = json.loads(ask("keygen", str(tmp_path / "k"), "--json"))
    assert told["public_key"] == (tmp_path / "k.pub").read_text().strip()
    assert told["private_key_file"] == str(tmp_path / "k") and (tmp_path / "k").read_text().strip() not in str(told)
