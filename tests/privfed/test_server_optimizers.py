"""Server optimisers of Reddi et al. 2021, two steps by hand; and in a run, beside any method."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from privfed import config_io, wire
from privfed.engines.local import LocalEngine
from privfed.errors import ConfigError
from privfed.methods import FedAvg, FedSGD, Scaffold
from privfed.methods.server import KEEPS, Adagrad, Adam, Momentum, Plain, Yogi, optimized
from privfed.parameters import decode

from .house import House, Tap, config

# Δ = 3, then Δ = 1; lr = .5, β₁ = .5, β₂ = .75, τ = 2, so that v begins at 4.
BY_HAND = (
    (Plain(), (3.0, 1.0)),
    (Momentum(lr=0.5, momentum=0.5), (1.5, 0.5 * 2.5)),
    # v: 4 + 9, 13 + 1; m with β₁ = 0 is Δ
    (Adagrad(lr=0.5, tau=2.0), (1.5 / (math.sqrt(13) + 2), 0.5 / (math.sqrt(14) + 2))),
    # m: 1.5, .75 + .5; v: .75·4 + .25·9 = 5.25, .75·5.25 + .25·1 = 4.1875
    (
        Adam(lr=0.5, beta_1=0.5, beta_2=0.75, tau=2.0),
        (0.75 / (math.sqrt(5.25) + 2), 0.625 / (math.sqrt(4.1875) + 2)),
    ),
    # v: 4 − .25·9·sign(4 − 9) = 6.25, 6.25 − .25·1·sign(6.25 − 1) = 6
    (Yogi(lr=0.5, beta_1=0.5, beta_2=0.75, tau=2.0), (0.75 / 4.5, 0.625 / (math.sqrt(6) + 2))),
)


@pytest.mark.parametrize(("optimizer", "steps"), BY_HAND, ids=lambda value: type(value).__name__)
def test_two_steps_by_hand(optimizer: Any, steps: tuple[float, float]) -> None:
    state: Any = {"theta": torch.zeros(1)}
    for update, expected in zip((3.0, 1.0), steps, strict=True):
        step, kept = optimized(optimizer, state, torch.tensor([update]))
        assert step.item() == pytest.approx(expected, rel=1e-6)
        assert all(name.startswith(KEEPS) for name in kept)
        state = {**state, **kept}
        # gradients, whose mean is subtracted, are stepped along alike
        assert optimized(optimizer, {"theta": torch.zeros(1)}, torch.tensor([-3.0]))[0].item() == pytest.approx(
            -steps[0], rel=1e-6
        )


def test_only_the_model_is_stepped() -> None:
    step, _ = optimized(Adam(), {"theta": torch.zeros(2)}, torch.tensor([1.0, 1.0, 5.0, 7.0]))
    assert step[2:].tolist() == [5.0, 7.0] and step[0] != 1.0


@pytest.mark.parametrize("method", [FedAvg(), FedSGD(), Scaffold()], ids=lambda method: type(method).__name__)
def test_a_run_steps_with_it_and_sites_are_not_sent_its_state(method: Any, tmp_path: Path) -> None:
    thetas = []
    for number, server in enumerate((Plain(), Adam())):
        (tmp_path / str(number)).mkdir()
        house = House(tmp_path / str(number))
        tap = Tap(LocalEngine(house.sites))
        federation = house.federation(config(method=method, server=server, rounds=2), engine=tap)
        reports = list(federation.rounds())
        assert all(not report.refused and not report.aborted for report in reports)
        requests = [wire.decode_request(request) for _, request, _ in tap.log]
        sent = {name for request in requests if not isinstance(request, wire.Step) for name in decode(request.state)}
        assert sent == set(method.init_server(torch.zeros(1)))
        assert {name for name in federation.state if name.startswith(KEEPS)} == (
            set() if isinstance(server, Plain) else {"server/mean", "server/square"}
        )
        thetas.append(federation.state["theta"])
    assert not torch.equal(*thetas)


def test_configuration_names_it_and_refuses_it_where_nothing_is_sent() -> None:
    read = config_io.load_config(None, ["server.name='yogi'", "server.lr=0.3"])
    assert read.server == Yogi(lr=0.3)
    assert config_io.load_config(None).server == Plain()
    with pytest.raises(ConfigError, match=r"server.name = 'adam' does nothing in this run"):
        config_io.check_used(config_io.load_config(None, ["server.name='adam'", "method.name='local'"]))
    with pytest.raises(ConfigError, match="beta_2"):
        config_io.load_config(None, ["server.name='adagrad'", "server.beta_2=0.9"])
