"""Configurations: strict in, commented out, and the same again."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import privfed
from privfed import config_io
from privfed.api import prepare
from privfed.config import Aggregation, Config, Evaluation, Outage, Policy, Privacy, Simulation
from privfed.data.columns import Categorical, Numeric
from privfed.data.sources import BreastCancer
from privfed.data.tables import Table
from privfed.errors import ConfigError
from privfed.methods import FedAvg, Fomaml, Local, Reptile
from privfed.models import MLP


def loaded(text: str, path: Path, *overrides: str) -> Config:
    file = path / "run.toml"
    file.write_text(text, encoding="utf-8")
    return config_io.load_config(file, overrides)


def refusal(text: str, path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(text, path)
    return str(caught.value)


def test_nothing_said_is_the_main_job() -> None:
    config = privfed.load_config()
    assert config == Config()
    assert (config.data, config.privacy.target_epsilon, config.aggregation.kind) == (BreastCancer(), 4.0, "masked")
    assert prepare(config).data.simulated


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("round = 3", ["unknown key round = 3", "did you mean rounds?"]),
        ("[privacy]\ntarget_epsilom = 2", ["privacy.target_epsilom = 2", "did you mean privacy.target_epsilon?"]),
        ("[method]\nname = 'fomaml'\ninner_step = 2", ["method.inner_step = 2", "did you mean method.inner_steps?"]),
        ("[method]\nlocal_steps = 2", ["unknown key method.local_steps = 2"]),  # the default method has no such key
        ("[zebra]\nx = 1", ["unknown key zebra", "known keys: ", "privacy"]),
        (
            "[[simulation.outages]]\nround = 1\nsite = 'a'\nstp = 'mask'",
            ["simulation.outages[0].stp = 'mask'", "step?"],
        ),
    ],
)
def test_an_unknown_key_is_named_with_its_value_and_the_nearest(text: str, told: list[str], tmp_path: Path) -> None:
    message = refusal(text, tmp_path)
    assert all(part in message for part in told), message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rounds = 'ten'", ["rounds = 'ten'", "int", "rounds of federated learning"]),
        ("rounds = 2.5", ["rounds = 2.5", "int"]),
        ("rounds = true", ["rounds = True", "int"]),
        ("rounds = 0", ["rounds = 0", "1"]),
        ("[privacy]\nsample_rate = 1.5", ["privacy.sample_rate = 1.5", "1.0"]),
        ("[privacy]\nsample_rate = nan", ["privacy.sample_rate = nan"]),
        ("[privacy]\ntarget_epsilon = -1", ["privacy.target_epsilon = -1", "0", "budget"]),
        ("[privacy]\ndelta = 1", ["privacy.delta = 1", "1.0"]),
        ("[privacy]\nunit = 'records'", ["privacy.unit = 'records'", "'record'", "'client'", "did you mean 'record'?"]),
        ("[aggregation]\nkind = 'mask'", ["aggregation.kind = 'mask'", "masked", "plain"]),
        ("[model]\nhidden = [16, 0]", ["model.hidden", "0"]),
        ("[model]\nhidden = 16", ["model.hidden = 16", "widths of the hidden layers"]),
        ("name = '../up'", ["name = '../up'"]),
        ("privacy = 4", ["privacy = 4"]),
        ("[[simulation.outages]]\nround = -1\nsite = 'a'", ["simulation.outages[0].round = -1", "0"]),
        ("[[simulation.outages]]\nround = 1\nsite = 'a'\nstep = 'later'", ["outages[0].step = 'later'", "unmask"]),
        (
            "[method]\nname = 'fomalm'",
            ["method.name = 'fomalm'", "'reptile', 'fomaml', 'per-fedavg', ", "did you mean"],
        ),
        ("[data]\nsource = 'breast-cancr'", ["data.source = 'breast-cancr'", "did you mean 'breast-cancer'?"]),
        ("method = 'fomaml'", ["method = 'fomaml'"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(text: str, told: list[str], tmp_path: Path) -> None:
    message = refusal(text, tmp_path)
    assert all(part in message for part in told), message
    assert "`$" not in message  # the path is ours, not the decoder's


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    assert "is not valid TOML" in refusal("rounds = = 3", tmp_path)
    with pytest.raises(ConfigError, match="can not read the configuration"):
        config_io.load_config(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'")
    with pytest.raises(ConfigError, match="not UTF-8"):
        config_io.load_config(tmp_path / "latin.toml")


def test_whole_numbers_are_floats_where_floats_are_due(tmp_path: Path) -> None:
    assert loaded("[privacy]\ntarget_epsilon = 2", tmp_path).privacy.target_epsilon == 2.0


def test_overrides_are_toml_values_and_bare_words_on_top_of_the_file(tmp_path: Path) -> None:
    config = loaded(
        "rounds = 3\n[method]\nname = 'fedavg'\nlr = 0.25",
        tmp_path,
        "rounds=7",
        "method.local_steps = 4",
        "aggregation.kind=plain",
        "model.hidden=[8, 4]",
        'name="quoted"',
        "privacy.delta=1e-6",
        "simulation.outages=[{round=1, site='hospital-1', step='mask'}]",
    )
    assert config.rounds == 7
    assert config.method == FedAvg(local_steps=4, lr=0.25)
    assert config.aggregation.kind == "plain"
    assert config.model.hidden == (8, 4)
    assert (config.name, config.privacy.delta) == ("quoted", 1e-6)
    assert config.simulation.outages == (Outage(round=1, site="hospital-1", step="mask"),)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rounds", "--set takes key=value"),
        ("=3", "--set takes key=value"),
        ("a..b=3", "--set takes key=value"),
        ("rounds.x=3", "rounds = {'x': 3}"),
        ("privacy.epsilon=3", "privacy.epsilon"),
        ("rounds=ten", "rounds = 'ten'"),
    ],
)
def test_an_override_that_can_not_be_is_refused(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config_io.load_config(None, [override])


@pytest.mark.parametrize(
    ("override", "belongs"),
    [
        ("privacy.colluders=1", "noise in shares"),
        ("privacy.sampling=record", "privacy.unit = 'patient'"),
        ("privacy.max_records=3", "privacy.sampling = 'record'"),
        ("evaluation.target_epsilon=1", "evaluation.release = 'private'"),
        ("evaluation.public_sites=['hospital-1']", "evaluation.release = 'public-cohort'"),
    ],
)
def test_a_promise_that_nothing_reads_is_refused(override: str, belongs: str) -> None:
    with pytest.raises(ConfigError, match=f"does nothing in this run: it belongs to .*{belongs}"):
        config_io.check_used(config_io.load_config(None, [override]))


def test_a_word_where_a_list_belongs_is_told_how_to_write_it() -> None:
    with pytest.raises(ConfigError, match=r'it must be a list; write evaluation.public_sites = \["north"\]'):
        config_io.load_config(None, ["evaluation.public_sites=north"])


def test_an_override_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="rounds is a value, not a section"):
        config_io.load_config(None, ["rounds=3", "rounds.x=3"])


TABLE = Table(
    file='a "quoted" \\ file.csv',
    site="centre",
    label="out come",
    classes={"alive": ("0", "no"), "dead, or dependent": ("1",)},
    numeric=(Numeric(name="age", range=(0.0, 120.0)), Numeric(name="bp", range=(1e-9, 3e300), missing=True)),
    categorical=(Categorical(name="sex = ?", values=("M", "F", 'x "y" \\ é')),),
)
ODD = {
    "defaults": Config(),
    "another method": Config(method=Fomaml(inner_steps=3, inner_lr=1e-4)),
    "local": Config(method=Local(), privacy=Privacy(unit=privfed.config.PrivacyUnit.NONE)),
    "small and large numbers": Config(
        seed=2**63 - 1,
        privacy=Privacy(delta=1e-300, expected_batch_size=123456789.123, noise_multiplier=1e6, insecure_seed=0),
        aggregation=Aggregation(kind="plain", fraction_bits=0, limit=1e6, threshold=511, minimum_cohort=2, colluders=0),
    ),
    "outages": Config(
        simulation=Simulation(outages=(Outage(round=0, site='a "b" \\ é'), Outage(round=9, site="c", step="evaluate")))
    ),
    "deep": Config(model=MLP(hidden=(65536, 1)), evaluation=Evaluation(metric="auroc", every=7)),
    "policy": Config(policy=Policy(max_epsilon=math.inf, require_privacy=True)),
    "a table": Config(data=TABLE),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_printed_reads_back_the_same(name: str, tmp_path: Path) -> None:
    assert loaded(config_io.to_toml(ODD[name]), tmp_path) == ODD[name]


floats = st.floats(1e-300, 1.0, exclude_max=True)


@given(
    st.builds(
        Config,
        rounds=st.integers(1, 100_000),
        seed=st.integers(0, 2**63 - 1),
        method=st.one_of(
            st.builds(Reptile, inner_lr=floats, outer_lr=floats, inner_steps=st.integers(1, 100_000)),
            st.builds(FedAvg, lr=floats),
            st.builds(Local, lr=floats),
        ),
        privacy=st.builds(
            Privacy,
            delta=floats,
            max_grad_norm=st.floats(1e-6, 1e6),
            noise_multiplier=st.none() | floats,
            sample_rate=floats,
        ),
        aggregation=st.builds(Aggregation, limit=floats, threshold=st.none() | st.integers(2, 511)),
        simulation=st.builds(
            Simulation,
            dropout=floats,
            outages=st.lists(st.builds(Outage, round=st.integers(0, 9), site=st.text(min_size=1)), max_size=3).map(
                tuple
            ),
        ),
    )
)
def test_any_configuration_reads_back_the_same(config: Config) -> None:
    import tomllib

    assert config_io.decode(tomllib.loads(config_io.to_toml(config))) == config


def test_no_budget_reads_back_as_no_budget(tmp_path: Path) -> None:
    config = Config(privacy=Privacy(target_epsilon=math.inf, noise_multiplier=2.0))
    assert loaded(config_io.to_toml(config), tmp_path) == config


def test_every_key_is_printed_with_what_it_means() -> None:
    text = config_io.to_toml(Config())
    lines = text.splitlines()

    def keys(struct: msgspec.Struct) -> list[str]:
        here = [name for name in struct.__struct_fields__ if not isinstance(getattr(struct, name), msgspec.Struct)]
        below = [getattr(struct, name) for name in struct.__struct_fields__]
        return here + [key for value in below if isinstance(value, msgspec.Struct) for key in keys(value)]

    for key in keys(Config()):
        line = next(line for line in lines if line.removeprefix("# ").startswith(f"{key} ="))
        _, _, comment = line.partition("  # ")
        assert len(comment or line.partition("unset: ")[2]) > 10, line


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"privacy": Privacy(sample_rate=1.5)},
        {"privacy": Privacy(delta=math.nan)},
        {"method": Reptile(inner_steps=0)},
        {"name": "../../elsewhere"},
        {"aggregation": Aggregation(kind="shuffled")},
    ],
)
def test_a_configuration_built_in_python_is_checked_too(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        prepare(Config(**wrong))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"privacy": Privacy(target_epsilon=math.inf)}, "target_epsilon .* or noise_multiplier"),
        (
            {"privacy": Privacy(unit=privfed.config.PrivacyUnit.CLIENT)},
            "'client' with noise = 'local' hides each",
        ),
        ({"privacy": Privacy(noise=privfed.config.NoiseSite.CENTRAL)}, "with noise = 'central' sends un-noised sums"),
        (
            {"simulation": Simulation(outages=(Outage(round=0, site="hospital-9"),))},
            "no site 'hospital-9'; .*hospital-5",
        ),
        ({"aggregation": Aggregation(threshold=6)}, "threshold = 6 is above the cohort of 5"),
    ],
)
def test_what_can_not_run_is_refused_before_anything_is_written(
    wrong: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        privfed.run(Config(**wrong), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
