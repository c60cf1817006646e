import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[1] / "fuzz" / "fuzz_crypto.py"


@pytest.mark.parametrize("seed", [0, 1])
def test_forged_messages_raise_nothing_else_and_allocate_little(seed: int) -> None:
    """Mutated, restructured and re-signed messages, in a process that may map 64 MiB more than it has."""
    subprocess.run([sys.executable, str(HARNESS), "--runs", "3000", "--seed", str(seed)], check=True)
