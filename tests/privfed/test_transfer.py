"""Transfer: where a run starts, what of it is trained, and that neither changes who protects which record."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import privfed
from privfed.architecture import Schema, build_model, finished, network_size, parameter_count, whole_network
from privfed.config import Config, Policy
from privfed.config_io import decode
from privfed.doors import seen, split
from privfed.errors import ConfigError, DataError
from privfed.methods import Weighted
from privfed.models import CNN, MLP, Inputs, pieces
from privfed.parameters import to_vector
from privfed.policy import PolicyRefusal, check_policy
from privfed.prediction import predict
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.oracle.stacked import StackedNetwork
from privfed.tasks import Classification
from privfed.transfer import LastLayers, LowRank

from .house import round_plan

SCHEMA = Schema(features=4, classes=2)
HIDDEN = [6, 5]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def table(folder: Path, name: str, *, n: int, seed: int, shift: float = 0.0) -> Path:
    randomness = np.random.default_rng(seed)
    x = randomness.normal(size=(n, 4))
    y = (x[:, 0] * x[:, 1] + 0.3 * x[:, 2] + shift * x[:, 3] > 0).astype(int)
    rows = [
        ",".join(f"{v:.4f}" for v in row) + f",{label},{i % 3}" for i, (row, label) in enumerate(zip(x, y, strict=True))
    ]
    path = folder / name
    path.write_text("a,b,c,d,y,site\n" + "\n".join(rows) + "\n")
    return path


def section(path: Path) -> dict[str, Any]:
    return {
        "source": "csv",
        "file": str(path),
        "site": "site",
        "label": "y",
        "classes": {"no": ["0"], "yes": ["1"]},
        "numeric": [{"name": name, "range": [-2, 2]} for name in "abcd"],
    }


def settings(path: Path, **sections: Any) -> Config:
    base: dict[str, Any] = {
        "name": "toy",
        "rounds": 2,
        "data": section(path),
        "model": {"hidden": HIDDEN},
        "method": {"name": "fedavg", "local_steps": 2, "lr": 0.3, "personal_steps": 2},
        "privacy": {"noise_multiplier": 1.0, "target_epsilon": 50.0, "expected_batch_size": 10.0},
        "evaluation": {"local_steps": 2},
    }
    return decode({**base, **sections})


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def base(folder: Path, seed: int = 9) -> dict[str, str]:
    """A base with numbers of its own."""
    network = MLP(hidden=tuple(HIDDEN)).build(Inputs(4), 2, seed=seed)
    save_file({name: p.detach() for name, p in network.named_parameters()}, folder / "base.safetensors")
    return {"base": str(folder / "base.safetensors"), "sha256": digest(folder / "base.safetensors")}


WAYS: dict[str, dict[str, Any]] = {
    "all": {"train": "all"},
    "head": {"train": "last"},
    "two layers": {"train": "last", "layers": 2},
    "low rank": {"train": "low-rank", "rank": 2},
}
each_way = pytest.mark.parametrize("way", WAYS)


@each_way
def test_training_begins_at_the_base_and_a_finished_model_is_the_plain_network(way: str, tmp_path: Path) -> None:
    config = settings(table(tmp_path, "t.csv", n=60, seed=0), transfer={**WAYS[way], **base(tmp_path)})
    source = MLP(hidden=tuple(HIDDEN)).build(Inputs(4), 2, seed=9)
    records = next(iter(config.data.load(seed=0).sites.values()))
    trained = build_model(config, SCHEMA)
    with torch.no_grad():
        assert torch.allclose(trained(seen(config, records).inputs), source(records.inputs), atol=1e-6)
    start = to_vector(trained)
    assert len(start) == parameter_count(config, SCHEMA) == sum(size for _, size in pieces(trained))
    assert network_size(config, SCHEMA) == 4 * 6 + 6 + 6 * 5 + 5 + 5 * 2 + 2
    theta = start + 0.1 * torch.randn(len(start), generator=torch.Generator().manual_seed(0))
    torch.nn.utils.vector_to_parameters(theta, trained.parameters())
    plain = finished(config, SCHEMA, theta)
    with torch.no_grad():
        assert torch.allclose(trained(seen(config, records).inputs), plain(records.inputs), atol=1e-5)
    assert [name for name, _ in plain.named_parameters()] == [
        name for name, _ in whole_network(config, SCHEMA).named_parameters()
    ]


def test_sizes_by_hand(tmp_path: Path) -> None:
    """Linear 4-6-5-2. Head: 5 · 2 + 2. Two layers: 6 · 5 + 5 more. Rank 2: 2 (4 + 6) + 2 (6 + 5), and the head."""
    path = table(tmp_path, "t.csv", n=60, seed=0)
    sizes = {way: parameter_count(settings(path, transfer=WAYS[way]), SCHEMA) for way in WAYS}
    assert sizes == {"all": 77, "head": 12, "two layers": 47, "low rank": 20 + 22 + 12}
    wide = settings(path, transfer={"train": "low-rank", "rank": 64})  # no wider than a layer's own rank: 4 and 5
    assert parameter_count(wide, SCHEMA) == 4 * (4 + 6) + 5 * (6 + 5) + 12


@pytest.mark.parametrize("way", ["head", "two layers", "low rank"])
def test_convolutions_are_frozen_cut_and_adapted_alike(way: str) -> None:
    transfer = decode({"transfer": WAYS[way]}).transfer
    kind, inputs = CNN(shape=(1, 6, 6), channels=(4, 8), groups=2, hidden=(5,)), Inputs(36)
    x = torch.randn(3, 36, generator=torch.Generator().manual_seed(0))
    whole = kind.build(inputs, 3, seed=0)
    expected = whole(x).detach()
    frozen, trained = transfer.divided(kind.build(inputs, 3, seed=0))
    assert torch.allclose(trained(frozen(x) if frozen is not None else x), expected, atol=1e-6)
    assert frozen is None or not list(frozen.parameters())
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.05)
    after = trained(frozen(x) if frozen is not None else x).detach()
    transfer.merge(trained, whole)
    assert torch.allclose(whole(x), after, atol=1e-5) and not torch.allclose(after, expected, atol=1e-3)


@each_way
def test_the_closed_form_knows_what_is_frozen(way: str, tmp_path: Path) -> None:
    """One frozen base stands there for all K networks; what is trained has its K parameter vectors."""
    config = settings(table(tmp_path, "t.csv", n=60, seed=0), transfer={**WAYS[way], **base(tmp_path)})
    records = seen(config, next(iter(config.data.load(seed=0).sites.values())))
    stacked = StackedNetwork(
        build_model(config, SCHEMA), Classification().loss, records.inputs[:1], records.targets[:1]
    )
    assert stacked.closed_form and stacked.parameters == parameter_count(config, SCHEMA)


@each_way
@pytest.mark.parametrize("engine", ["opacus", "cohort"])
def test_a_run_with_transfer_from_start_to_predictions(way: str, engine: str, tmp_path: Path) -> None:
    path = table(tmp_path, "t.csv", n=90, seed=0)
    config = settings(path, transfer={**WAYS[way], **base(tmp_path)}, simulation={"engine": engine})
    run = privfed.run(config, out=tmp_path / "run")
    assert run.summary.complete and not run.summary.refusals
    assert len(run.theta) == parameter_count(config, SCHEMA)
    assert "says nothing of its source" in str(run.summary.base)
    (tmp_path / "base.safetensors").unlink()  # a finished model needs none
    assert len(predict(run.folder, path).table) == 90
    assert len(predict(run.folder, path, site="1").table) == 90
    kept = load_file(run.folder / "model.safetensors")
    start = MLP(hidden=tuple(HIDDEN)).build(Inputs(4), 2, seed=9).state_dict()
    same = {name for name in kept if torch.equal(kept[name], start[name])}
    assert (
        same
        == {
            "all": set(),
            "head": {"0.weight", "0.bias", "2.weight", "2.bias"},
            "two layers": {"0.weight", "0.bias"},
            "low rank": {"0.bias", "2.bias"},
        }[way]
    )


def test_a_source_run_s_claim_goes_with_its_model_and_its_ledger_composes(tmp_path: Path) -> None:
    """Pretraining is a run like another: its ε stands in the ledger, and a target on the same records adds to it."""
    path = table(tmp_path, "t.csv", n=90, seed=0)
    source = privfed.run(settings(path), out=tmp_path / "source")
    spent = source.summary.privacy.epsilon.max
    file = source.folder / "model.safetensors"
    transfer = {"train": "last", "base": str(file), "sha256": digest(file)}
    target = privfed.run(settings(path, transfer=transfer), out=tmp_path / "target", ledger=source.folder / "ledger.db")
    assert target.summary.base == (
        f"run {source.summary.run}, ε ≤ {spent:.3g} (δ = 1e-05, record) for its source's records"
    )
    assert target.summary.base in (tmp_path / "target" / "report.html").read_text().replace("&#39;", "'")
    together = target.summary.privacy.epsilon.max
    assert spent is not None and together is not None and together > 1.2 * spent
    free = privfed.run(settings(path, privacy={"unit": "none"}), out=tmp_path / "free")
    file = free.folder / "model.safetensors"
    open_ = settings(path, transfer={"base": str(file), "sha256": digest(file)})
    assert "without a claim" in str(privfed.run(open_, out=tmp_path / "t2").summary.base)


def test_one_frozen_record_is_one_record_still(tmp_path: Path) -> None:
    """The base makes one row of each record, and the split is by the record's own id."""
    path = table(tmp_path, "t.csv", n=90, seed=0)
    plain, frozen = settings(path), settings(path, transfer={**WAYS["head"], **base(tmp_path)})
    records = next(iter(plain.data.load(seed=0).sites.values()))
    before, after = split(plain, records, bytes(32)), split(frozen, records, bytes(32))
    assert np.array_equal(before.train.ids, after.train.ids) and after.train.inputs.shape[1] == 5
    one = seen(frozen, records.rows(np.arange(len(records)) == 3)).inputs
    assert torch.allclose(one, seen(frozen, records).inputs[3:4], atol=1e-6)


# The weighted objective


def weighted(folder: Path, **changes: Any) -> Config:
    source = table(folder, "source.csv", n=200, seed=5)
    transfer = {"public_source": section(source), "source_sha256": digest(source)}
    method = {"name": "weighted", "local_steps": 1, "lr": 0.5, "source_rounds": 2, "personal_steps": 1, **changes}
    privacy = {"noise_multiplier": 1.0, "target_epsilon": 50.0, "expected_batch_size": 500.0}
    return settings(table(folder, "t.csv", n=90, seed=0), transfer=transfer, method=method, privacy=privacy)


class Recorder:
    """A door of constants."""

    def __init__(self) -> None:
        self.asked = 0

    def draw(self, part: str = "all") -> None:
        return None

    def gradient(self, theta: torch.Tensor, batch: None) -> torch.Tensor:
        return torch.full_like(theta, 1.0)

    def source_gradient(self, theta: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return torch.full_like(theta, 10.0)

    charges = ()


def test_the_weighted_step_by_hand() -> None:
    """θ − lr (α · 1 + β_r · 10): with lr .1, α 2, β .4 over 4 rounds: .6 in round 0, .4 in round 2, .2 from 4 on."""
    method, door = Weighted(local_steps=1, lr=0.1, target_weight=2.0, source_weight=0.4, source_rounds=4), Recorder()
    state = method.init_server(torch.zeros(3))
    moved = []
    for number in range(6):
        update, _ = method.contribute(state, {}, door)  # type: ignore[arg-type]  # a stand-in
        moved.append(round(float(-update[0, 0]), 6))
        state = method.serve({**state, "theta": torch.zeros(3)}, update[0], number / 6)
    assert moved == [0.6, 0.5, 0.4, 0.3, 0.2, 0.2] and door.asked == 4
    with pytest.raises(NoGuarantee, match=r"set transfer\.public_source"):
        bare = type("Bare", (), {"draw": Recorder.draw, "gradient": Recorder.gradient, "charges": ()})()
        method.contribute(method.init_server(torch.zeros(3)), {}, bare)


@pytest.mark.parametrize("engine", ["opacus", "cohort"])
def test_a_public_source_costs_no_epsilon_and_draws_towards_itself(engine: str, tmp_path: Path) -> None:
    config = weighted(tmp_path, source_weight=5.0)
    with_engine = decode({**json.loads(privfed_json(config)), "simulation": {"engine": engine}})
    heavy = privfed.run(with_engine, out=tmp_path / "heavy")
    privacy = {"noise_multiplier": 1.0, "target_epsilon": 50.0, "expected_batch_size": 500.0}
    fedavg = {"name": "fedavg", "local_steps": 1, "lr": 0.5}
    plain = settings(Path(str(config.data.file)), method=fedavg, privacy=privacy)
    alone = privfed.run(plain, out=tmp_path / "alone")
    assert heavy.summary.privacy.epsilon == alone.summary.privacy.epsilon
    source = config.transfer.public_source
    assert source is not None
    sites = source.load(seed=0).sites.values()
    x, y = torch.cat([s.inputs for s in sites]), torch.cat([s.targets for s in sites])

    def loss(theta: torch.Tensor) -> float:
        network = build_model(plain, SCHEMA)
        torch.nn.utils.vector_to_parameters(theta, network.parameters())
        return float(Classification().loss(network(x), y).mean().detach())

    assert loss(heavy.theta) < loss(alone.theta)


def privfed_json(config: Config) -> str:
    import msgspec

    return msgspec.json.encode(config).decode()


# What is refused


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"transfer": {"train": "last", "layers": 3}}, "the network has 3 layers: train fewer"),
        ({"transfer": {"train": "last"}, "model": {"hidden": []}}, "the network has 1 layers"),
        ({"transfer": {"train": "some"}}, "must be one of"),
        ({"method": {"name": "weighted"}}, "need each other"),
        ({"transfer": {"train": "last"}, "privacy": {"standardise_epsilon": 0.1}}, "remove one"),
        (
            {"transfer": {"train": "last"}, "model": {"name": "factory", "factory": "own_network:make"}},
            r"nn\.Sequential\(body, head\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        privfed.run(settings(table(tmp_path, "t.csv", n=60, seed=0), **sections), out=tmp_path / "run")


def test_a_base_is_known_by_its_digest(tmp_path: Path) -> None:
    path, named = table(tmp_path, "t.csv", n=60, seed=0), base(tmp_path)
    with pytest.raises(ConfigError, match=f"set transfer.sha256 = '{named['sha256']}'"):
        privfed.run(settings(path, transfer={"base": named["base"]}), out=tmp_path / "run")
    other = settings(path, transfer={**named, "sha256": "0" * 64})
    with pytest.raises(DataError, match="is not the file") as refusal:
        build_model(other, SCHEMA)
    missing = settings(path, transfer={"base": "/etc/hostname", "sha256": "0" * 64})
    with pytest.raises(DataError) as alike:
        build_model(missing, SCHEMA)
    assert str(refusal.value) == str(alike.value)  # a plan may name any file of a site: nothing is told of it


def test_a_base_of_another_shape_is_named(tmp_path: Path) -> None:
    path, named = table(tmp_path, "t.csv", n=60, seed=0), base(tmp_path)
    with pytest.raises(ConfigError, match=r"'0.weight' has shape \[7, 4\], the base has shape \[6, 4\]: set \[model\]"):
        build_model(settings(path, transfer=named, model={"hidden": [7, 5]}), SCHEMA)
    with pytest.raises(ConfigError, match=r"set \[model\]"):
        privfed.run(settings(path, transfer=named, model={"hidden": [7, 5]}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()  # the corrected run may have the folder
    three = Schema(features=4, classes=3)
    with pytest.raises(ConfigError, match=r"set transfer\.fresh_head = true"):
        build_model(settings(path, transfer=named), three)
    fresh = build_model(settings(path, transfer={**named, "fresh_head": True}), three)
    source = MLP(hidden=tuple(HIDDEN)).build(Inputs(4), 2, seed=9)
    assert isinstance(fresh, nn.Sequential) and isinstance(source, nn.Sequential)
    assert torch.equal(fresh[0].weight, source[0].weight) and fresh[4].weight.shape == (3, 5)


def test_a_site_opens_no_file_that_its_own_policy_does_not_trust(tmp_path: Path) -> None:
    config = weighted(tmp_path)
    plan = round_plan(config)
    assert config.transfer.source_sha256 is not None
    with pytest.raises(PolicyRefusal, match=r"policy\.trusted"):
        check_policy(plan, Policy(), insecure=False)
    check_policy(plan, Policy(trusted=(config.transfer.source_sha256,)), insecure=False)


def test_the_ways_are_settings_of_one_section() -> None:
    assert isinstance(decode({"transfer": {"train": "last"}}).transfer, LastLayers)
    assert isinstance(decode({"transfer": {"train": "low-rank"}}).transfer, LowRank)
