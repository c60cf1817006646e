"""README.md: what it tells a user to type is understood, and has a guarantee where it claims one."""

import re
import shlex
from pathlib import Path

import pytest

from privfed import config_io
from privfed.selection import check_selection

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("  #")[0].split(" > ")[0].strip() for line in README.splitlines() if line.startswith("    privfed run")
]


def overrides(command: str) -> list[str]:
    words = shlex.split(command)
    return [words[number + 1] for number, word in enumerate(words) if word == "--set"]


def test_commands_are_found() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", [command for command in COMMANDS if "--set" in command])
def test_settings_of_the_commands_are_keys_with_a_guarantee(command: str) -> None:
    settings = overrides(command)
    if "data.patient" in command:  # a column of the user's own table
        settings = [setting for setting in settings if not setting.startswith("data.")]
    config = config_io.load_config(overrides=settings)
    config_io.check(config)
    check_selection(config)
    assert config.method.guarantee(config.privacy.unit, config.privacy.noise) is None


def test_keys_that_the_text_names_exist() -> None:
    shown = config_io.to_toml(config_io.load_config())
    for section, key in re.findall(r"`(privacy|evaluation|aggregation|policy)\.([a-z_]+)", README):
        assert re.search(rf"^(# )?{key} =", shown[shown.index(f"[{section}]") :], flags=re.MULTILINE), (section, key)
