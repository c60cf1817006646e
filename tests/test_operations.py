"""What examples/operations promises about the service and the image."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPERATIONS = ROOT / "examples" / "operations"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The service, with a program that is on every machine in the place of ours."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = (OPERATIONS / "privfed-site.service").read_text()
    path = tmp_path / "privfed-site.service"
    path.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={shutil.which('true')}", text, flags=re.MULTILINE))
    return path


def test_systemd_understands_every_line_of_the_service(unit: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    about_it = [line for line in done.stderr.splitlines() if unit.name in line]
    assert (done.returncode, done.stdout, about_it) == (0, "", [])


def test_the_service_is_shut_in(unit: Path) -> None:
    """systemd's own measure, from 0 to 10 (times 10 on its command line), of what a service could reach."""
    analyze = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", "--no-pager", str(unit)]
    done = subprocess.run(analyze, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_is_made_of_named_files_and_runs_as_nobody_special() -> None:
    text = (OPERATIONS / "Containerfile").read_text()
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith(("#", " "))]
    copied = {name for word, rest in steps if word == "COPY" and "--from" not in rest for name in rest.split()[:-1]}
    ignored = (OPERATIONS / "Containerfile.dockerignore").read_text().splitlines()
    assert copied == {line[1:] for line in ignored if line.startswith("!")} and "*" in ignored
    assert all((ROOT / name).exists() for name in copied)
    users = [rest for word, rest in steps if word == "USER"]
    assert users == ["privfed"] and "--uid 10001" in text
    bases = [rest.split()[0] for word, rest in steps if word == "FROM"]
    assert bases and all(re.search(r":\d+\.\d+\.\d+", base) for base in bases)  # never a tag that moves
