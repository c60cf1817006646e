"""Work whose result is kept on disk: a benchmark that was stopped goes on where it was."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

HERE = Path(__file__).parent.parent
P = ParamSpec("P")
R = TypeVar("R")


class Cells:
    """Each piece of work once. Results are named by what was asked and by the code: any change of it starts anew.

    Args:
        benchmark: the benchmark's file.
    """

    def __init__(self, benchmark: str) -> None:
        files = [Path(benchmark), *sorted((HERE / "examples").glob("*.toml"))]
        for folder in ("privfed", "privacy", "crypto"):
            files += sorted((HERE / folder).rglob("*.py"))
        self._code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        self._folder = HERE / "runs" / Path(benchmark).stem
        self._folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, work: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """`work(*arguments)`; what it takes and returns is plain data."""
        asked = json.dumps([self._code, work.__name__, arguments, named], sort_keys=True)
        file = self._folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"
        if not file.exists():
            done = file.with_suffix(f".{os.getpid()}")
            done.write_text(json.dumps(work(*arguments, **named)))
            done.replace(file)
        result: R = json.loads(file.read_text())
        return result
