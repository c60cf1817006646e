"""`privfed audit`: broken code is called a violation by the run's own audits, and sound code is not."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from privfed import api, auditing, config_io, contribution, folder, keyring
from privfed.auditing import personal
from privfed.cli import app
from privfed.config import Aggregation, Config, Evaluation, Privacy
from privfed.data.sources import BreastCancer
from privfed.errors import ConfigError, RunFolderError
from privfed.methods import FedAvg, FedRep, FedSGD, Fomaml, Local, Reptile
from privfed.privacy import noise, shared, skellam
from privfed.privacy.audit.result import Audit
from privfed.privacy.events import NoiseSite, PrivacyUnit
from privfed.privacy.oracle import door, opacus
from privfed.site import Site
from tests.privfed.house import changed

LOCAL = Privacy(noise_multiplier=1.2, target_epsilon=50.0, sample_rate=1.0, expected_batch_size=10.0)
SHARED = Privacy(
    noise=NoiseSite.DISTRIBUTED, noise_multiplier=1.2, target_epsilon=50.0, expected_batch_size=10.0, colluders=1
)
CLIENT = msgspec.structs.replace(SHARED, unit=PrivacyUnit.CLIENT)


@pytest.fixture(scope="module", autouse=True)
def known_key() -> Iterator[None]:
    """Every ledger's: level 2 tests the noise of a run's own keys, and of sound ones by the system it would find one in
    60,000 wanting (4 sites, 4 statistics each at 1e-6, and their independence)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keyring, "new_key", lambda: bytes(range(32)))
        yield


def config(**changes: Any) -> Config:
    fields: dict[str, Any] = {
        "name": "audited",
        "rounds": 2,
        "data": BreastCancer(sites=4),
        "method": FedAvg(local_steps=1, lr=0.5, personal_steps=2),
        "privacy": LOCAL,
        "evaluation": Evaluation(local_steps=1),
    }
    return Config(**{**fields, **changes})


def attacked(settings: Config, level: int, trials: int | None = None, seed: int = 1) -> Audit:
    target = auditing.Target(api.prepare(settings))
    (found,) = auditing.audit(target, levels=[level], trials=trials, seed=seed).audits
    assert found.level == level and found.seeds == (seed,)
    return found


KINDS = {
    "local": config(),
    "sampled": config(
        method=Reptile(inner_steps=2, inner_lr=0.5),
        privacy=msgspec.structs.replace(LOCAL, sample_rate=0.5, noise_multiplier=0.7),
    ),
    "fomaml": config(method=Fomaml(outer_lr=1.0)),
    "shared": config(privacy=SHARED, method=FedSGD()),
    "client": config(privacy=CLIENT),
    "central": config(privacy=msgspec.structs.replace(CLIENT, noise=NoiseSite.CENTRAL, colluders=None)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sound_mechanisms_pass_levels_1_and_2(kind: str) -> None:
    first, second = attacked(KINDS[kind], 1, trials=120), attacked(KINDS[kind], 2)
    assert first.verdict in ("supported", "inconclusive")
    assert 0 < first.epsilon_lower < (first.claimed_epsilon or 0.0)  # the canary shows, and not too much
    assert second.verdict in ("supported", "inconclusive")
    assert second.note.startswith(f"{5 if KINDS[kind].privacy.unit is PrivacyUnit.CLIENT else 6} checks passed")


def test_a_sound_mechanism_is_supported_with_enough_releases() -> None:
    found = attacked(KINDS["local"], 1, trials=300)
    assert found.verdict == "supported"
    assert found.power is not None and found.power >= 0.95


def weak_release(divisor: float) -> Callable[..., Tensor]:
    def release(clipped_sum: Tensor, *, noise_multiplier: float, **others: Any) -> Tensor:
        return noise.release(clipped_sum, noise_multiplier=noise_multiplier / divisor, **others)

    return release


def test_a_third_of_the_noise_is_a_violation_at_every_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "release", weak_release(3.0))
    assert attacked(KINDS["local"], 1, trials=100).verdict == "violation"
    second = attacked(KINDS["local"], 2)
    assert second.verdict == "violation"
    assert "0.1" in second.note and "times the variance booked" in second.note
    third = attacked(KINDS["local"], 3, trials=400)
    assert third.verdict == "violation"
    assert third.epsilon_lower > (third.claimed_epsilon or 0.0)


def test_weak_shares_are_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = skellam.share
    monkeypatch.setattr(skellam, "share", lambda key, dim, variance: whole(key, dim, variance) // 3)
    assert attacked(KINDS["shared"], 1, trials=100).verdict == "violation"
    assert attacked(KINDS["shared"], 2).verdict == "violation"
    assert attacked(KINDS["client"], 1, trials=100).verdict == "violation"


def test_a_missing_clip_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    def unclipped(door: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        door._backward(inputs, targets)
        return torch.cat([parameter.grad_sample.sum(0).flatten() for parameter in door._parameters])

    monkeypatch.setattr(opacus.OpacusDoor, "_clipped_sum", unclipped)
    assert attacked(KINDS["local"], 1, trials=100).verdict == "violation"
    assert attacked(KINDS["local"], 3, trials=100).verdict == "violation"
    found = attacked(KINDS["local"], 2)
    assert found.verdict == "violation" and "clip: one unit moves the clipped sum by 10" in found.note


def test_one_noise_for_all_sites_is_a_violation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = api.run(config(rounds=1), out=tmp_path / "run")
    monkeypatch.setattr(keyring, "site_key", lambda key, site, purpose: noise.derive_key(key, purpose.encode()))
    (found,) = auditing.audit(auditing.target_of(made.folder), levels=[2]).audits
    assert found.verdict == "violation" and "a seed stands in two places" in found.note


def test_noise_that_anyone_can_recompute_is_a_violation() -> None:
    found = attacked(changed(KINDS["local"], "privacy", insecure_seed=3), 2)
    assert found.verdict == "violation" and "anyone can recompute" in found.note


def test_a_batch_that_is_used_again_does_not_get_past_the_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    class Again(FedAvg, frozen=True, tag_field="name", tag="fedavg"):
        """Declares two fresh draws, asks twice of one."""

        def contribute(self, broadcast: Any, shared: Any, door: Any) -> tuple[Tensor, Any]:
            theta, batch = broadcast["theta"].unsqueeze(0), door.draw()
            return -self.lr * (door.gradient(theta, batch) + door.gradient(theta, batch)), {}

    target = auditing.Target(api.prepare(config(method=FedAvg(local_steps=2))))
    ready = msgspec.structs.replace(target.config, method=Again(local_steps=2))
    object.__setattr__(target.ready, "config", ready)
    (found,) = auditing.audit(target, levels=[2]).audits
    assert found.verdict == "violation" and "what is booked" in found.note and "not released" in found.note


HEADED = config(rounds=1, method=FedRep(head_steps=1), model=config_io.load_config(None, ["model.hidden=[8]"]).model)


def audited(settings: Config, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """A run of these settings, then `privfed audit --level 2` on its folder: its exit code and what it says."""
    api.run(settings, out=folder)
    return command("audit", str(folder), "--level", "2"), capsys.readouterr().out


def test_a_sound_head_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = audited(HEADED, tmp_path / "run", capsys)
    assert code == 0 and "6 of 6 checks passed" in said


def test_a_head_without_noise_is_a_violation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer's 18 of 266 numbers are released as they are, then its biases alone."""

    def release(number: int) -> Callable[..., Tensor]:
        def noised(clipped_sum: Tensor, *, expected_batch_size: float, **others: Any) -> Tensor:
            released = noise.release(clipped_sum, expected_batch_size=expected_batch_size, **others)
            released[-number:] = clipped_sum[-number:] / expected_batch_size
            return released

        return noised

    monkeypatch.setattr(door, "release", release(18))
    code, said = audited(HEADED, tmp_path / "run", capsys)
    assert code == 4 and "VIOLATION" in said and "law of the noise: the noise of hospital-1" in said
    monkeypatch.setattr(door, "release", release(2))  # too few to show in the law of all of them together
    found = attacked(HEADED, 2)
    assert found.verdict == "violation" and "is missing or too small in 2 of 266 coordinates" in found.note


def test_a_head_that_is_fitted_without_noise_is_a_violation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked and booked is as declared, and what is sent is noised: but it begins at a head of exact records."""
    sound = FedRep.contribute

    def contribute(self: FedRep, broadcast: Any, shared: Any, door: Any) -> tuple[Tensor, Any]:
        start = broadcast["theta"].clone()
        start[-18:] += door._records.inputs.mean()
        return sound(self, {**broadcast, "theta": start}, shared, door)

    monkeypatch.setattr(FedRep, "contribute", contribute)
    code, said = audited(HEADED, tmp_path / "run", capsys)
    assert code == 4 and "VIOLATION" in said and "in another way than by the noised answers" in said


STRICT = msgspec.structs.replace(SHARED, noise_multiplier=None, target_epsilon=1.0)  # noise enough to take some away
COUNTED = config(rounds=1, privacy=STRICT, method=FedSGD(), evaluation=Evaluation(local_steps=1, release="private"))


def test_figures_through_too_little_noise_are_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "noise of the figures" in attacked(COUNTED, 2).note
    whole = shared.add_share
    sound = shared.CountSum.encode

    def encode(self: shared.CountSum, vector: Any, key: bytes) -> Any:
        with monkeypatch.context() as weak:
            weak.setattr(shared, "add_share", lambda *a, variance, **b: whole(*a, variance=max(1, variance // 4), **b))
            return sound(self, vector, key)

    monkeypatch.setattr(shared.CountSum, "encode", encode)
    found = attacked(COUNTED, 2)
    assert found.verdict == "violation" and "noise of the figures: the noise of hospital-1 has 0." in found.note


def test_counts_without_noise_never_leave_a_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site tests its share of noise before it relies on it: the run gives no figure."""
    monkeypatch.setattr(shared.CountSum, "encode", lambda self, vector, key: np.asarray(vector, np.int64))
    done = api.run(COUNTED, out=tmp_path / "run")
    assert all(report.released is None for report in done.reports)


def test_exact_figures_beside_noised_ones_make_the_report_unsound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metric leak, from the site's own code to the auditor's page."""
    monkeypatch.setattr(Site, "_shows_figures", lambda self, config: True)
    api.run(COUNTED, out=tmp_path / "run")
    assert command("accountant", "report", str(tmp_path / "run"), "--format", "json") == 0
    said = capsys.readouterr()
    (found,) = [one for one in json.loads(said.out)["findings"] if one["rule"] == "figures are covered"]
    assert found["verdict"] == "UNSOUND-CLAIM" and "exact figures of 4 sites beside the noised ones" in str(found)
    assert "verdict: UNSOUND-CLAIM" in said.err


@pytest.mark.parametrize("kind", ["local", "shared", "fomaml"])
def test_one_federated_run_shows_its_canaries_and_not_too_much(kind: str) -> None:
    found = attacked(KINDS[kind], 3, trials=300)
    assert found.verdict in ("supported", "inconclusive")
    assert 0 < found.epsilon_lower < (found.claimed_epsilon or 0.0)
    assert found.trials == 300


def test_canaries_show_through_all_rounds_what_ideal_ones_do() -> None:
    """True ε = 8 over eight rounds at real sites: a bound of 3 and more, and the power of the ideal mechanism."""
    privacy = Privacy(target_epsilon=8.0, sample_rate=1.0, expected_batch_size=10.0)
    found = attacked(config(rounds=8, privacy=privacy), 3, trials=1000)
    assert 7.5 < (found.claimed_epsilon or 0.0) <= 8 and found.verdict in ("supported", "inconclusive")
    assert found.epsilon_lower >= 3
    assert found.figures["canaries_show"] >= 0.9  # the standard deviation of ideal runs is below 0.04
    assert (found.power or 0.0) >= 0.75  # ideal runs: from 0.77


def test_a_third_of_the_noise_under_a_claim_of_two_is_a_violation_of_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "release", weak_release(3.0))
    privacy = Privacy(target_epsilon=2.0, sample_rate=1.0, expected_batch_size=10.0)
    found = attacked(config(rounds=3, privacy=privacy), 3, trials=1000)
    assert found.verdict == "violation" and 1.9 < (found.claimed_epsilon or 0.0) <= 2


def test_patients_are_audited_as_patients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several loud records of one patient count as one; a door that clips them one by one is found out."""
    prepared = api.prepare(config())
    settings = changed(prepared.config, "privacy", unit=PrivacyUnit.PATIENT)
    object.__setattr__(prepared, "config", settings)
    target = auditing.Target(prepared)
    first, third = (
        auditing.audit(target, levels=[1], trials=100).audits[0],
        auditing.audit(target, levels=[3], trials=200),
    )
    assert first.verdict != "violation" and third.audits[0].verdict != "violation"
    monkeypatch.setattr("privfed.privacy.oracle.patients.PatientDoor._sum_over", opacus.OpacusDoor._sum_over)
    broken = auditing.audit(target, levels=[1, 2, 3], trials=100).audits
    assert [one.verdict for one in broken] == ["violation"] * 3


def test_the_audit_can_be_done_again_from_its_seed() -> None:
    assert attacked(KINDS["local"], 3, trials=100) == attacked(KINDS["local"], 3, trials=100)
    assert attacked(KINDS["client"], 1, trials=40) == attacked(KINDS["client"], 1, trials=40)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return api.run(config(rounds=1), out=tmp_path_factory.mktemp("audit") / "run").folder


def test_personal_models_are_attacked_and_nothing_is_claimed_of_them(made: Path) -> None:
    found = auditing.audit(auditing.target_of(made), levels=[4], trials=8).audits
    assert [one.name for one in found] == ["personal models, loss threshold", "personal models, LiRA"]
    for one in found:
        assert one.claimed_epsilon is None and one.verdict == "inconclusive"
        assert 0.3 < one.figures["auc"] < 1.0
        assert one.figures["tpr_low"] <= one.figures["tpr_at_1_percent_fpr"] <= one.figures["tpr_high"]
        assert one.trials == 569


def test_subgroups_are_attacked_by_site_class_and_a_chosen_input(made: Path) -> None:
    target = auditing.target_of(made)
    column = target.ready.data.inputs[0]
    found = auditing.audit(target, levels=[4], trials=8, by=[column]).audits[1]
    by = {kind: [group for group in found.groups if group.by == kind] for kind in ("site", "class", column)}
    assert {group.name for group in by["site"]} <= set(target.ready.data.sites) and len(by["site"]) > 1
    assert {group.name for group in by["class"]} == set(target.ready.data.classes)
    assert {group.name for group in by[column]} == {"lower half", "upper half"}
    assert sum(group.members for group in by["class"]) == found.figures["members"]
    assert found.figures["auc_gap_class"] >= 0 and len(found.roc) > 10
    with pytest.raises(ConfigError, match=r"--by height: the model has no such input; it has .*radius"):
        auditing.audit(target, levels=[4], trials=8, by=["height"])


def test_groups_of_a_column_are_its_values() -> None:
    inputs = torch.tensor([[1.0, 0.0, 3.0], [0.0, 1.0, 1.0], [0.0, 0.0, 2.0]])
    assert personal._groups(inputs, [0, 1], ["f", "m"]) == ["f", "m", "no listed value"]
    assert personal._groups(inputs, [2], []) == ["upper half", "lower half", "lower half"]


def test_a_personal_model_that_remembers_is_seen_to(tmp_path: Path) -> None:
    """Long training of a wide network on a few records, by the local method alone."""
    settings = config(
        rounds=2,
        method=Local(steps=60, lr=1.0),
        model=config_io.load_config(None, ["model.hidden=[32]"]).model,
        privacy=Privacy(unit=PrivacyUnit.NONE),
    )
    folder_ = api.run(settings, out=tmp_path / "run").folder
    target = auditing.target_of(folder_)
    (loss, ratio) = auditing.audit(target, trials=8).audits  # level 4 is all that applies
    assert ratio.figures["auc"] > 0.52 and loss.level == ratio.level == 4


def test_results_stand_in_the_run_folder_for_the_owner_alone(made: Path) -> None:
    target = auditing.target_of(made)
    path = auditing.write(target, auditing.audit(target, levels=[2]))
    assert path == made / "audit.json" and path.stat().st_mode & 0o777 == 0o600
    auditing.write(target, auditing.audit(target, levels=[4], trials=8))
    again = auditing.read(path)
    assert [one.level for one in again.audits] == [2, 4, 4] and again.run == target.name
    assert json.loads(path.read_text())["format"] == "privfed audit/1"
    path.write_text("{")
    with pytest.raises(RunFolderError, match="is damaged"):
        auditing.write(target, auditing.audit(target, levels=[2]))
    path.unlink()


def test_nothing_secret_stands_in_a_result(made: Path) -> None:
    target = auditing.target_of(made)
    text = msgspec.json.encode(auditing.audit(target, levels=[2, 4], trials=8)).decode()
    key = keyring.ledger_key(made / folder.LEDGER)
    assert key.hex() not in text
    for name in target.ready.data.sites:
        assert keyring.site_key(key, name, "noise").hex() not in text
    assert not any(
        isinstance(value, list | np.ndarray) for one in json.loads(text)["audits"] for value in one["figures"]
    )


@pytest.mark.parametrize(
    ("settings", "options", "says"),
    [
        (config(privacy=Privacy(unit=PrivacyUnit.NONE)), {"levels": [1]}, "privacy.unit = 'none' makes none"),
        (config(privacy=Privacy(unit=PrivacyUnit.NONE)), {}, "claims nothing that could be audited"),
        (config(method=Local(steps=1)), {"levels": [3]}, "sends nothing"),
        (config(privacy=CLIENT), {"levels": [3]}, "use --level 1"),
        (config(), {"levels": [4]}, "give the folder of one"),
        (config(), {"levels": [7]}, "level must be one of 1, 2, 3 and 4"),
        (config(), {"levels": [1], "trials": 3}, "trials must be at least 40"),
        (config(), {"levels": [3], "trials": 3}, "at least 10"),
    ],
)
def test_what_does_not_apply_is_refused_with_the_reason(settings: Config, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        auditing.audit(auditing.Target(api.prepare(settings)), **options)


def test_the_method_is_refused_where_shares_would_not_cover_it() -> None:
    with pytest.raises(ConfigError):
        api.prepare(config(privacy=SHARED, method=FedAvg()))
    assert contribution.contribute  # what level 2 asks once


def command(*arguments: str) -> int:
    return int(app.app([*map(str, arguments)], standalone_mode=False) or 0)


def test_the_command_prints_writes_and_says_by_its_exit_code(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("audit", str(made), "--level", "2", "--level", "4", "--trials", "8", "--json", "--seed", "5") == 0
    said = capsys.readouterr()
    assert [one["seeds"] for one in json.loads(said.out)["audits"]] == [[5]] * 3
    assert "level 2, noise" in said.err and "audit.json" in said.err and "stands in the ledger, signed" in said.err
    monkeypatch.setattr(door, "release", weak_release(3.0))
    assert command("audit", str(made), "--level", "2", "--out", str(tmp_path / "a.json")) == 4
    said = capsys.readouterr()
    assert "VIOLATION" in said.out and "5 of 6 checks passed" in said.out
    assert auditing.read(tmp_path / "a.json").violated
    assert command("accountant", "show", str(made), "--json") == 0
    stated = json.loads(capsys.readouterr().out)["audits"]  # wherever the copy went, the ledger has it
    assert [one["verdict"] for one in stated if one["level"] == 2] == ["supported", "violation"]
    assert command("accountant", "show", str(made)) == 0 and "VIOLATION" in capsys.readouterr().out


def test_wrong_input_to_the_command_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").write_text("")
    for arguments, says in (
        (["audit", str(tmp_path)], "is not a run's folder"),
        (["audit", str(tmp_path / "none.toml")], "none.toml"),
        (["audit", "--level", "4"], "finished run"),
        (["audit", "--level", "9"], "'--level'"),
        (["audit", "--out", str(tmp_path / "there")], "exists already"),
    ):
        monkeypatch.setattr("sys.argv", ["privfed", *arguments])
        with pytest.raises(SystemExit) as ended:
            app.main()
        assert ended.value.code == 2
        assert says in capsys.readouterr().err


def test_the_aggregation_may_be_encrypted() -> None:
    settings = config(privacy=SHARED, method=FedSGD(), aggregation=Aggregation(kind="homomorphic"))
    assert attacked(settings, 3, trials=100).verdict != "violation"
