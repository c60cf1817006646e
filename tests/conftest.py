"""One thread for everything, before anything imports torch: the suite shares its machine. Chance has no part in it."""

import os

import pytest
from hypothesis import HealthCheck, settings

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "agg")

# The same examples every time, and no clock: what fails, fails for all. `--hypothesis-profile=default` seeks others.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all combinations of settings, where a few stand for them")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """torch's one generator, from which modules get their first weights, whatever ran before in this worker."""
    import torch

    torch.manual_seed(0)
