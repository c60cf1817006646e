"""One thread for everything, before anything imports torch: the suite shares its machine."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "agg")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all combinations of settings, where a few stand for them")
