"""privfed accountant report: the verdicts' rules, the numbers, the JSON form, and a page that a browser shows."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

import privfed
from privfed import audit_report, auditing, summary
from privfed.audit_report import accounts, figures, formats, second_opinion, verdicts, words
from privfed.audit_report.evidence import Evidence, RunEvidence, Statement, gather, read_statement
from privfed.audit_report.model import ORDER, AuditReport, AuditResult, Finding, Opinion
from privfed.audit_report.rules import bounds, claim, conduct, releases
from privfed.cli.app import app
from privfed.errors import ConfigError, RunChanged, RunFolderError
from privfed.privacy.accountant import Accountant
from privfed.privacy.audit.result import Audit
from privfed.privacy.events import Charge, Event, Gaussian, NoiseSite, PoissonGaussian, PrivacyUnit, Skellam
from privfed.privacy.ledger import Entry, Ledger, Recorded

from .tampering import tamper
from .test_report import CHROMIUM, Outline, _contrast

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "docs" / "audit-report.schema.json"
ACCOUNTANT = Accountant()
DELTA = 1e-5
QUICK = ("rounds=2", "evaluation.local_steps=1")
CLEAN = {
    "level": 1, "name": "one release", "claimed_epsilon": 2.5, "delta": DELTA, "epsilon_lower": 0.3, "confidence": 0.95,
    "trials": 10_000, "verdict": "supported", "note": "made up", "seeds": [7], "power": 0.99, "figures": {},
}  # fmt: skip
MEMBERSHIP = CLEAN | {
    "level": 4, "name": "personal models, LiRA", "claimed_epsilon": None, "epsilon_lower": 50.0, "power": None,
    "verdict": "inconclusive", "figures": {"auc": 0.61, "tpr_at_1_percent_fpr": 0.04},
    "roc": [[0.0, 0.0], [0.01, 0.04], [0.5, 0.7], [1.0, 1.0]],
    "groups": [{
        "by": "site", "name": "hospital-1", "members": 80, "others": 30, "auc": 0.7, "auc_low": 0.6, "auc_high": 0.8,
        "tpr": 0.1, "tpr_low": 0.02, "tpr_high": 0.2,
    }],
}  # fmt: skip


def make_run(path: Path, *overrides: str, ledger: Path | None = None) -> Path:
    privfed.run(privfed.load_config(overrides=[*QUICK, *overrides]), out=path, ledger=ledger)
    return path


def attacked(folder: Path, *results: dict[str, Any]) -> Path:
    """The folder, with the results of attacks in its ledger and beside it, as `privfed audit` leaves them."""
    found = tuple(msgspec.convert(result, Audit) for result in results)
    target = auditing.target_of(folder)
    file = auditing.AuditFile(format="privfed audit/1", run=target.name, created="2026-01-01T00:00:00Z", audits=found)
    auditing.record(target, file)
    (folder / "audit.json").unlink(missing_ok=True)
    auditing.write(target, file)
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose sites add their own noise, and give exact figures to the coordinator."""
    return make_run(tmp_path_factory.mktemp("audit") / "local", "privacy.noise_multiplier=4")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with noise in shares."""
    settings = ("method.name='fedsgd'", "privacy.noise='distributed'", "privacy.noise_multiplier=3", "rounds=3")
    return make_run(tmp_path_factory.mktemp("audit") / "shared", *settings)


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which no exact figure leaves a site. Nobody has attacked it."""
    path = tmp_path_factory.mktemp("audit") / "silent"
    return make_run(path, "privacy.noise_multiplier=4", "policy.release_figures=false")


@pytest.fixture(scope="module")
def good(silent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for which everything can be decided: the same, and attacks found nothing."""
    return attacked(Path(shutil.copytree(silent, tmp_path_factory.mktemp("audit") / "good")), CLEAN)


@pytest.fixture
def keys(good: Path, tmp_path: Path) -> Path:
    """The public keys, as if the sites had sent them."""
    return Path(shutil.copy(good / "keys.json", tmp_path / "keys-from-the-sites.json"))


def result(**changes: Any) -> AuditResult:
    where = {"ledger": "00", "run": "r", "sha256": "00", "roc": [], "groups": []}
    return msgspec.convert(CLEAN | where | changes, AuditResult)


def build(*targets: Path, **settings: Any) -> AuditReport:
    return audit_report.build(targets, accountant=ACCOUNTANT, **settings)


def read(*targets: Path, **settings: Any) -> Evidence:
    return gather(targets, accountant=ACCOUNTANT, **settings)


def finding(report: AuditReport, rule: str) -> Finding:
    return next(found for found in report.findings if found.rule == rule)


def lines_of(evidence: Evidence) -> list[Recorded]:
    return [line for _, line in evidence.spends()]


def line(event: Event, *, unit: str = "record", noise: str = "local", kind: str = "charge", **changes: Any) -> Recorded:
    """An entry as it stands in a chain."""
    fields: dict[str, Any] = {
        "kind": kind, "site": "a", "dataset": "00", "run": "r", "round": 0, "unit": PrivacyUnit(unit),
        "noise": NoiseSite(noise), "charges": (Charge(event),),
    }  # fmt: skip
    return Recorded(entry=Entry(**{**fields, **changes}), sequence=1, time="2026-01-01T00:00:00+00:00", hash="00")


def with_config(run: RunEvidence, section: str, **changes: Any) -> RunEvidence:
    config = run.history.config
    changed = msgspec.structs.replace(getattr(config, section), **changes)
    history = dataclasses.replace(run.history, config=msgspec.structs.replace(config, **{section: changed}))
    return dataclasses.replace(run, history=history)


# The verdict


def test_verdict_is_the_gravest(good: Path) -> None:
    found = [Finding(rule="r", verdict=verdict, reason="") for verdict in ORDER]
    for number, verdict in enumerate(ORDER):
        assert verdicts.overall(found[number:]) == verdict
    assert verdicts.overall([]) == "INCONCLUSIVE"


def test_claim_is_supported_where_everything_holds(good: Path, keys: Path) -> None:
    report = build(good, keys=keys)
    assert {found.verdict for found in report.findings} == {"CLAIM-SUPPORTED"}, report.findings
    assert report.verdict == "CLAIM-SUPPORTED"


@pytest.mark.parametrize("missing", ["keys", "audit", "power", "folder", "budget"])
def test_what_can_not_be_decided_is_inconclusive(
    good: Path, keys: Path, silent: Path, tmp_path: Path, missing: str
) -> None:
    folder = Path(shutil.copytree(silent if missing in ("audit", "power") else good, tmp_path / "run"))
    target, statement = folder, Statement()
    given = Path(shutil.copy(folder / "keys.json", tmp_path / "given.json")) if missing != "keys" else None
    if missing == "power":
        attacked(folder, CLEAN | {"verdict": "inconclusive"})
    if missing in ("folder", "budget"):
        target = folder / "ledger.db"
        statement = Statement(budget_epsilon=9.0) if missing == "folder" else Statement()
    report = build(target, keys=given, statement=statement)
    assert report.verdict == "INCONCLUSIVE", report.findings


def test_known_seed_is_unsound(tmp_path: Path) -> None:
    report = build(make_run(tmp_path / "run", "privacy.noise_multiplier=4", "privacy.insecure_seed=1"))
    found = finding(report, "seed is secret")
    assert report.verdict == found.verdict == "UNSOUND-CLAIM" and report.claim.void
    assert found.evidence[0].startswith("hospital-1, entry 2 (run ")
    assert "KNOWN SEED" in report.execution.randomness
    assert "not valid" in Outline(audit_report.html(report)).words


def test_release_without_noise_is_unsound(tmp_path: Path) -> None:
    report = build(make_run(tmp_path / "run", "privacy.unit='none'", "privacy.noise='local'"))
    assert finding(report, "every release has noise").verdict == report.verdict == "UNSOUND-CLAIM"
    assert report.claim.epsilon is None and report.sites[0].epsilon is None
    assert {row.epsilon for row in report.adversaries} == {None}
    assert "no bound" in Outline(audit_report.html(report)).words


def test_budget_is_held_against_every_site(good: Path, keys: Path) -> None:
    report = build(good, keys=keys, statement=Statement(budget_epsilon=0.5))
    found = finding(report, "budget is kept")
    assert report.verdict == found.verdict == "BUDGET-EXCEEDED"
    assert [text.partition(":")[0] for text in found.evidence[1:5]] == [f"hospital-{number}" for number in range(1, 5)]
    assert report.claim.budget == 0.5
    assert bounds.budget_is_kept(None, {"a": 1.0}).verdict == "INCONCLUSIVE"
    budget = bounds.Budget(1.0, DELTA, "test")
    assert bounds.budget_is_kept(budget, {"a": 1.0, "b": 0.5}).verdict == "CLAIM-SUPPORTED"
    assert bounds.budget_is_kept(budget, {"a": math.inf}).verdict == "BUDGET-EXCEEDED"


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "violation"},
        {"epsilon_lower": 2.6},  # more than its own claim of 2.5, whatever it calls that
        {"epsilon_lower": 50.0, "claimed_epsilon": 60.0},  # more than this report's ε
    ],
)
def test_attack_above_the_claim_is_a_violation(good: Path, keys: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "run"))
    attacked(folder, CLEAN | change)
    attacked(folder, CLEAN | {"seeds": [8]})  # made again until it looks well: the first one stands
    for target in (folder, folder / "ledger.db"):
        report = build(target, keys=keys)
        assert report.verdict == "AUDIT-VIOLATION" and report.claim.void
        said = finding(report, "attacks stay below the claim")
        assert said.reason.startswith("1 of 3 attacks") and report.audits[1].name in said.evidence[0]


def test_attack_on_personal_models_is_not_held_against_the_claim(good: Path, keys: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "run"))
    attacked(folder, CLEAN, MEMBERSHIP)
    report = build(folder, keys=keys)
    assert report.verdict == "CLAIM-SUPPORTED"
    assert len(report.audits) == 2  # the first one stood there already
    assert report.audits[1].groups[0].name == "hospital-1" and report.audits[1].roc[1] == (0.01, 0.04)
    alone = build(folder / "ledger.db", keys=keys).audits[1]
    assert (alone.groups, alone.roc, alone.figures) == ((), (), {})  # exact figures are not in the ledger
    assert any("Personal models were attacked" in hazard for hazard in report.hazards)


def resaid(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "the figures": ("summary.json", lambda path: resaid(path / "summary.json", '"seconds": ', '"seconds": 1')),
    "the rounds": ("metrics.jsonl", lambda path: resaid(path / "metrics.jsonl", '"seconds":', '"seconds":1')),
    "the facts": ("run.json", lambda path: resaid(path / "run.json", '"noise_multiplier": 4', '"noise_multiplier": 9')),
    "the keys": ("keys.json", lambda path: resaid(path / "keys.json", '"', ' "')),
    "the model": ("model.safetensors", lambda path: (path / "model.safetensors").write_bytes(b"")),
    "an audit": (
        "audit.json",
        lambda path: resaid(path / "audit.json", '"epsilon_lower": 0.3', '"epsilon_lower": 0.2'),
    ),
    "another run's audit": ("audit.json", lambda path: resaid(path / "audit.json", '"run": "', '"run": "x')),
    "no audit": ("audit.json", lambda path: (path / "audit.json").write_text("[]")),
    "no rounds": ("metrics.jsonl", lambda path: (path / "metrics.jsonl").unlink()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_file_is_unsound_and_named(good: Path, keys: Path, tmp_path: Path, change: str) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "run"))
    name, do = CHANGES[change]
    do(folder)
    report = build(folder, keys=keys)
    found = finding(report, "files are as the run left them")
    assert report.verdict == found.verdict == "UNSOUND-CLAIM" and not report.intact
    assert len(found.evidence) == 1 and f"{folder / name}" in found.evidence[0]
    assert invoke(str(folder), "--keys", str(keys), "--format", "json").exit_code == 4


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl"])
def test_file_that_can_not_be_read_any_more_is_named_as_changed(good: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "run"))
    (folder / name).write_text("{\n")
    with pytest.raises(RunChanged, match=rf"{name} is not as the run left it"):
        build(folder)


def test_models_may_be_left_out_of_what_an_auditor_gets(good: Path, keys: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "run"))
    for name in ("model", "personal", "checkpoint"):
        (folder / f"{name}.safetensors").unlink()
    report = build(folder, keys=keys)
    assert report.verdict == "CLAIM-SUPPORTED"
    assert len(finding(report, "files are as the run left them").evidence) == 3


def test_summary_that_no_ledger_knows_is_unsound(good: Path, local: Path, keys: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "run"))
    for name in ("ledger.db", "keys.json"):
        shutil.copy(local / name, folder / name)
    found = finding(build(folder), "files are as the run left them")
    assert found.verdict == "UNSOUND-CLAIM" and "audit.json" in found.evidence[0]
    (folder / "audit.json").unlink()
    assert "the ledger is an older copy" in finding(build(folder), "files are as the run left them").evidence[0]


def test_baseline_that_was_changed_is_unsound(good: Path, local: Path, keys: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(local, tmp_path / "bare"))
    resaid(bare / "summary.json", '"seconds": ', '"seconds": 1')
    report = build(good, keys=keys, baseline=bare)
    assert finding(report, "files are as the run left them").verdict == "UNSOUND-CLAIM"


def test_attack_at_a_smaller_delta_does_not_refute_the_report() -> None:
    strong = result(claimed_epsilon=60.0, epsilon_lower=50.0, delta=1e-7)
    assert not bounds._violates(strong, 40.0, DELTA)  # (40, 1e-5) may go with (55, 1e-7)
    assert bounds._violates(msgspec.structs.replace(strong, delta=1e-4), 40.0, DELTA)


# A ledger that is not what was written


@pytest.mark.parametrize(
    ("statement", "entry"),
    [
        (
            "UPDATE entries SET body = CAST(replace(body, '4.0', '9.0') AS BLOB) WHERE id = 7",
            "entry 2",
        ),
        ("DELETE FROM entries WHERE site = 'hospital-2' AND sequence = 2", "the file as a whole"),
        ("UPDATE statements SET body = replace(body, '\"epsilon\":', '\"epsilon\":1') WHERE id = 1", "signed word 1"),
    ],
)
def test_tampered_ledger_still_gives_a_report(good: Path, tmp_path: Path, statement: str, entry: str) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "run"))
    tamper(folder, statement)
    page = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["accountant", "report", str(folder), "--out", str(page)])
    assert done.exit_code == 4
    text = Outline(page.read_text(encoding="utf-8")).words
    assert "UNSOUND CLAIM" in text and "A ledger does not verify" in text and entry in text


def test_file_that_is_no_ledger_any_more_still_gives_a_report(good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "run"))
    content = bytearray((folder / "ledger.db").read_bytes())
    content[:100] = bytes(100)
    (folder / "ledger.db").write_bytes(content)
    report = build(folder)
    assert report.verdict == "UNSOUND-CLAIM" and report.sites == () and report.claim.epsilon is None
    Outline(audit_report.html(report))
    assert "not a ledger" in report.verification[0].reason or report.verification[0].reason
    done = CliRunner().invoke(app, ["accountant", "report", str(folder), "--format", "json"])
    assert done.exit_code == 4


# Claims that do not hold


def test_noise_that_was_not_configured_is_unsound(local: Path) -> None:
    (run,) = read(local).runs
    lines = lines_of(read(local))
    weaker = dataclasses.replace(run, facts=msgspec.structs.replace(run.facts, noise_multiplier=3.9))
    found = conduct.booked_as_configured(lines, [weaker])
    assert found is not None and found.verdict == "UNSOUND-CLAIM"
    assert "noise multiplier 4 booked, 3.9 configured" in found.evidence[0]
    larger = with_config(run, "privacy", sample_rate=0.9)
    found = conduct.booked_as_configured(lines, [larger])
    assert found is not None and "sample rate 0.5 booked, 0.9 configured" in found.evidence[0]
    assert conduct.booked_as_configured(lines, []) is None


def test_more_shares_than_sites_is_unsound(shared: Path) -> None:
    evidence = read(shared)
    (run,) = evidence.runs
    rounds = tuple(msgspec.structs.replace(r, contributed=r.contributed[:4]) for r in run.history.rounds)
    fewer = dataclasses.replace(run, history=dataclasses.replace(run.history, rounds=rounds))
    found = conduct.booked_as_configured(lines_of(evidence), [fewer])
    assert found is not None and "5 shares of noise booked, 4 sites in the sum" in found.evidence[0]


def test_contribution_without_an_entry_is_unsound(local: Path) -> None:
    evidence = read(local)
    lines = [entry for entry in lines_of(evidence) if (entry.entry.site, entry.entry.round) != ("hospital-3", 1)]
    found = conduct.contributions_are_booked(lines, evidence.runs)
    assert found is not None and found.verdict == "UNSOUND-CLAIM" and found.evidence[0].startswith("hospital-3, run ")


def test_summary_that_says_less_is_unsound(local: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(local, tmp_path / "run"))
    said = json.loads((folder / "summary.json").read_text())
    said["privacy"]["epsilon"]["per_site"]["hospital-4"] *= 0.9
    (folder / "summary.json").write_text(json.dumps(said))
    found = finding(build(folder), "summary agrees with the ledger")
    assert found.verdict == "UNSOUND-CLAIM" and len(found.evidence) == 1 and "hospital-4" in found.evidence[0]


def test_amplification_by_an_exposed_cohort_is_unsound() -> None:
    found = claim.amplification_is_earned([line(PoissonGaussian(0.1, 1.0), unit="client", noise="central")])
    assert found is not None and found.verdict == "UNSOUND-CLAIM" and "exposed" in found.reason
    assert claim.amplification_is_earned([line(PoissonGaussian(0.1, 1.0))]) is None
    assert claim.amplification_is_earned([line(Gaussian(1.0), unit="client", noise="central")]) is None


@pytest.mark.parametrize(("unit", "noise"), [("record", "central"), ("client", "local"), ("patient", "central")])
def test_combination_without_a_guarantee_is_unsound(unit: str, noise: str) -> None:
    found = claim.combination_has_a_guarantee([line(Gaussian(1.0), unit=unit, noise=noise)])
    assert found is not None and found.verdict == "UNSOUND-CLAIM" and found.evidence[0].startswith("a, entry 1")
    assert claim.combination_has_a_guarantee([line(Gaussian(1.0))]) is None


def test_shares_of_noise_without_a_secure_sum_are_unsound(shared: Path) -> None:
    evidence = read(shared)
    plain = with_config(evidence.runs[0], "aggregation", kind="plain")
    found = conduct.secure_sum_stood(lines_of(evidence), [plain])
    assert found is not None and found.verdict == "UNSOUND-CLAIM"
    assert conduct.secure_sum_stood(lines_of(evidence), evidence.runs) is None


def test_exact_figures_are_never_supported(local: Path) -> None:
    (run,) = read(local).runs
    for changes, statement, verdict in (
        ({}, Statement(), "INCONCLUSIVE"),
        ({}, Statement(released=("metrics",)), "UNSOUND-CLAIM"),
        ({"release": "private"}, Statement(), "UNSOUND-CLAIM"),
        ({"release": "public-cohort", "public_sites": ("hospital-1",)}, Statement(), "UNSOUND-CLAIM"),
    ):
        found = releases.figures_are_covered([with_config(run, "evaluation", **changes)], statement)
        assert found is not None and found.verdict == verdict, (changes, statement)


def test_personal_models_that_leave_are_unsound(local: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(local, tmp_path / "run"))
    folder.chmod(0o755)
    (folder / "personal.safetensors").chmod(0o644)
    found = finding(build(folder), "personal models stay")
    assert found.verdict == "UNSOUND-CLAIM" and "personal.safetensors" in found.evidence[0]
    assert finding(build(local), "personal models stay").verdict == "CLAIM-SUPPORTED"
    stated = build(local, statement=Statement(released=("personal-models",)))
    assert finding(stated, "personal models stay").verdict == "UNSOUND-CLAIM"


def test_figures_of_sites_held_out_of_training_are_exact_too(local: Path) -> None:
    """The same figures, as if they were of sites that took no part: they come from records all the same."""
    (run,) = read(local).runs
    rounds = tuple(msgspec.structs.replace(one, unseen=one.sites, sites={}) for one in run.history.rounds)
    unseen = dataclasses.replace(run, history=dataclasses.replace(run.history, rounds=rounds))
    found = releases.figures_are_covered([unseen], Statement())
    assert found is not None and found.verdict == "INCONCLUSIVE"
    found = releases.figures_are_covered([with_config(unseen, "evaluation", release="private")], Statement())
    assert found is not None and found.verdict == "UNSOUND-CLAIM"


def test_large_delta_is_unsound(good: Path, keys: Path) -> None:
    report = build(good, keys=keys, delta=0.01)
    assert report.verdict == "UNSOUND-CLAIM" and finding(report, "δ is small").verdict == "UNSOUND-CLAIM"
    assert claim.delta_is_small(1e-3) is None


def test_keys_of_some_sites_support_no_claim(good: Path, keys: Path) -> None:
    some = json.loads(keys.read_text())
    del some["hospital-1"]
    keys.write_text(json.dumps(some))
    report = build(good, keys=keys)
    told = finding(report, "keys come from the sites")
    assert told.verdict == report.verdict == "INCONCLUSIVE" and "no key of hospital-1" in told.evidence[0]


def test_accountants_must_agree() -> None:
    def opinion(name: str, value: float | None) -> Opinion:
        return Opinion(accountant=name, epsilon=value, tolerance=0.0, note="why")

    judged: Callable[..., Finding] = bounds.accountants_agree
    assert judged(2.0, [opinion("PLD, x", 2.001), opinion("RDP, y", 2.3)]).verdict == "CLAIM-SUPPORTED"
    assert judged(1.9, [opinion("PLD, x", 2.001), opinion("RDP, y", 2.3)]).verdict == "UNSOUND-CLAIM"
    assert judged(2.0, [opinion("RDP, privfed", 2.0), opinion("PLD, x", None)]).verdict == "INCONCLUSIVE"
    assert judged(2.0, []).verdict == "INCONCLUSIVE"
    assert judged(math.inf, [opinion("PLD, x", 2.0)]).verdict == "INCONCLUSIVE"


def test_units_that_do_not_compose_have_no_bound(tmp_path: Path) -> None:
    account = accounts.Account(
        book=None,  # type: ignore[arg-type]  # not asked
        site="a", dataset="00", audience="federation", lines=(line(Gaussian(5.0)), line(Gaussian(5.0), unit="patient")),
        charges=(Charge(Gaussian(5.0), 2),), cost=ACCOUNTANT.epsilon([Charge(Gaussian(5.0), 2)], DELTA),
    )  # fmt: skip
    found = claim.one_unit_is_claimed([account])
    assert found is not None and found.verdict == "UNSOUND-CLAIM"
    assert math.isinf(accounts.totals([account], DELTA, ACCOUNTANT)["a"].value)


# The numbers


def test_claim_is_what_the_run_cost(local: Path, shared: Path) -> None:
    for folder in (local, shared):
        said = msgspec.json.decode((folder / "summary.json").read_bytes(), type=summary.Summary)
        report = build(folder)
        assert report.claim.epsilon == pytest.approx(said.privacy.epsilon.max, rel=1e-6)
        assert {row.site: row.epsilon for row in report.sites} == pytest.approx(said.privacy.epsilon.per_site, rel=1e-6)
        ours = [(row.adversary, row.colluders, row.epsilon) for row in report.adversaries]
        theirs = [(row.adversary, row.colluders, row.epsilon) for row in said.privacy.adversaries]
        assert [row[:2] for row in ours] == [row[:2] for row in theirs]
        assert [row[2] for row in ours] == pytest.approx([row[2] for row in theirs], rel=1e-6)


def test_ledger_alone_tells_the_adversaries_and_no_more(shared: Path) -> None:
    report = build(shared / "ledger.db")
    assert report.adversaries == build(shared).adversaries
    assert finding(report, "folders of all runs are given").verdict == "INCONCLUSIVE"


def test_entries_that_do_not_say_what_the_server_saw_give_no_bound_against_it(tmp_path: Path) -> None:
    event = Skellam(share_variance=2_196_608, shares=5, colluders=2, dim=64, l2_squared=652_864, l1=6464)
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.charge(line(event, noise="distributed").entry)
    by_name = {row.adversary: row for row in build(tmp_path / "ledger.db").adversaries}
    assert by_name["curious server"].epsilon is None and "does not say" in by_name["curious server"].reason
    assert by_name["server and colluding sites"].epsilon is None
    assert by_name["external model user"].epsilon is not None


def test_runs_on_one_ledger_compose(local: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(local, tmp_path / "first"))
    second = make_run(tmp_path / "second", "privacy.noise_multiplier=4", ledger=folder / "ledger.db")
    report = build(folder, second)
    assert len(report.composition.ledgers) == 1 and len(report.composition.runs) == 2
    assert all(row.given for row in report.composition.runs)
    once, twice = build(local).claim.epsilon, report.claim.epsilon
    assert once is not None and twice is not None and once < twice < 2 * once
    assert report.curves.epsilon[0].across == (1, 2, 3, 4)
    assert finding(report, "summary agrees with the ledger").verdict == "CLAIM-SUPPORTED"  # each up to its own end
    assert finding(build(folder), "folders of all runs are given").verdict == "INCONCLUSIVE"


def test_two_ledgers_count_together(local: Path, shared: Path) -> None:
    one, other, both = (build(*targets).claim.epsilon for targets in ((local,), (shared,), (local, shared)))
    assert one is not None and other is not None and both is not None and both > max(one, other)


def test_baseline_gives_its_figures_alone(local: Path, tmp_path: Path) -> None:
    bare = make_run(tmp_path / "bare", "privacy.unit='none'", "privacy.noise='local'")
    report = build(local, baseline=bare)
    assert report.claim.epsilon == build(local).claim.epsilon
    assert any("non-private baseline" in row.model and row.mean is not None for row in report.utility)
    assert any("baseline run" in hazard for hazard in report.hazards)


def test_every_entry_stands_in_the_event_ledger(local: Path, shared: Path) -> None:
    for folder, rounds in ((local, 2), (shared, 3)):
        report = build(folder)
        assert {group.site: group.entries for group in report.events} == {
            f"hospital-{number}": rounds for number in range(1, 6)
        }
    group = build(shared).events[0]
    assert group.kind == "settled" and group.shares == (5, 5) and (group.first_round, group.last_round) == (0, 2)


def test_curves_end_at_the_claim(local: Path, shared: Path) -> None:
    for folder in (local, shared):
        report = build(folder)
        (curve,) = report.curves.epsilon
        values = [value for value in curve.epsilon if value is not None]
        assert values == sorted(values) and values[-1] == pytest.approx(report.claim.epsilon)
        by_delta = [pair.epsilon for pair in report.curves.delta if pair.epsilon is not None]
        assert by_delta == sorted(by_delta, reverse=True)
    noise = build(shared).curves.noise
    assert [row.shares for row in noise] == [5, 5, 5] and {row.least for row in noise} == {4}
    assert {row.shares for row in build(local).curves.noise} == {None}


def test_second_accountant_on_shares_of_noise_agrees() -> None:
    event = Skellam(share_variance=2_196_608, shares=5, colluders=2, dim=64, l2_squared=652_864, l1=6464)
    for charges in ([Charge(event, 10)], [Charge(event, 10), Charge(Gaussian(5.0), 3)]):
        theirs, ours, near = second_opinion.second_opinions(charges, DELTA, ACCOUNTANT)
        # The same bound over other orders: equal but for the grid of orders
        assert theirs.epsilon == pytest.approx(ours.epsilon, rel=0.01)
        assert near.epsilon is None and "small a variance" in near.note
    fine = msgspec.structs.replace(event, share_variance=2_196_608 * 10**4, l2_squared=652_864 * 10**4)
    for charges in ([Charge(fine, 10)], [Charge(fine, 10), Charge(Gaussian(5.0), 3)]):
        _, ours, near = second_opinion.second_opinions(charges, DELTA, ACCOUNTANT)
        reported = ACCOUNTANT.epsilon(charges, DELTA).value
        assert near.epsilon == pytest.approx(reported, rel=1e-3) and reported < 0.95 * (ours.epsilon or 0)
    # Of two parts, the dearer one is what everybody is asked about
    parts = [Charge(fine, 10, "s/train"), Charge(fine, 2, "s/test")]
    assert second_opinion.second_opinions(parts, DELTA, ACCOUNTANT)[2].epsilon == pytest.approx(
        second_opinion.second_opinions(parts[:1], DELTA, ACCOUNTANT)[2].epsilon
    )
    sampled = msgspec.structs.replace(event, sample_rate=0.5)
    assert second_opinion.second_opinions([Charge(sampled)], DELTA, ACCOUNTANT)[0].epsilon is None


def test_trade_off_is_that_of_the_pairs() -> None:
    alpha = np.linspace(0, 1, 11)
    assert figures.least_misses(alpha, [(0.0, 0.0)]) == pytest.approx(1 - alpha)
    strict, loose = (figures.least_misses(alpha, [(DELTA, epsilon)]) for epsilon in (1.0, 4.0))
    assert (strict >= loose).all() and loose[0] == pytest.approx(1 - DELTA)
    both = figures.least_misses(alpha, [(DELTA, 4.0), (0.1, 1.0)])
    assert (both >= loose).all() and (both > loose).any()


def test_audited_point_is_measured_or_that_of_a_gaussian() -> None:
    audit = result(epsilon_lower=1.1)
    # G_μ with μ = 2 Φ⁻¹(1 − x) at α = β = x; ε = 1.1 at δ = 1e-5 is μ ≈ 0.28, so x = Φ(−0.14) ≈ 0.44
    assert figures.audited_point(audit) == pytest.approx((0.44, 0.44), abs=0.01)
    assert figures.audited_point(msgspec.structs.replace(audit, epsilon_lower=0.0)) == (0.5, 0.5)
    measured = msgspec.structs.replace(audit, figures={"fpr_upper": 0.1, "fnr_upper": 0.3})
    assert figures.audited_point(measured) == (0.1, 0.3)


def test_statement_stands_in_the_report(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "about.toml"
    path.write_text('curator = "A clinic"\npurpose = "Research"\nreleased = ["metrics"]\nbudget_epsilon = 3\n')
    stated = read_statement(path)
    report = build(good, statement=stated)
    assert report.about.curator == "A clinic" and report.claim.budget == 3.0
    path.write_text("curater = 'A clinic'\n")
    with pytest.raises(ConfigError, match=r"curater.*Known keys: curator, purpose"):
        read_statement(path)


def test_same_files_give_the_same_report(good: Path) -> None:
    assert audit_report.html(build(good)) == audit_report.html(audit_report.build([good]))


# The JSON form


def test_figures_of_every_task_are_named_and_drawn(tmp_path: Path, good: Path) -> None:
    """Of an error less is better: the best is the least, and it may be above one."""
    report = build(good)
    points = tuple(
        audit_report.model.Point(run="r", round=number, epsilon=1.0 + number, model="global", score=9.0 - number)
        for number in range(3)
    )
    curves = msgspec.structs.replace(report.curves, accuracy=points, metric="mean absolute error", lower_is_better=True)
    drawn = figures.accuracy_plot(msgspec.structs.replace(report, curves=curves))
    assert drawn is not None and "Less is better" in drawn.desc and "global 7.000" in drawn.desc


def test_released_figures_are_drawn_and_spent_noise_is_told(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "spent", "method.name='fedsgd'", "privacy.noise='distributed'", "privacy.target_epsilon=2",
        "rounds=3", "privacy.schedule='spend'", "evaluation.release='private'",
    )  # fmt: skip
    report = build(folder)
    told = {fact.term: fact.value for fact in report.mechanism.constants}["Noise multiplier"]
    levels = [one.noise_multiplier for one in read(folder).runs[0].history.rounds]
    assert told.startswith(f"{min(levels):.6g} to {max(levels):.6g}, round by round")
    assert finding(report, "booked as configured").verdict == "CLAIM-SUPPORTED"
    assert [point.model for point in report.curves.accuracy] == ["global"] * 3
    assert finding(report, "figures are covered").verdict == "CLAIM-SUPPORTED"


def test_gap_between_sites_and_figures_of_held_out_sites_are_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "held", "privacy.noise_multiplier=4", "evaluation.unseen_sites=['hospital-5']")
    report = build(folder)
    assert re.search(r"between sites, run .*: \d\.\d{3} in accuracy of the personalised models", report.subgroup_gap)
    assert sum("1 sites held out of training" in line.model for line in report.utility) == 3


def test_schema_is_the_published_one() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == audit_report.schema(), (
        "the report's types have changed: python -c 'from privfed import audit_report; print(audit_report.schema())' "
        "> docs/audit-report.schema.json"
    )
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA.read_text(encoding="utf-8")))


def test_reports_follow_the_schema(good: Path, local: Path, shared: Path) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    for report in (build(good), build(local, shared), build(shared / "ledger.db")):
        text = audit_report.to_json(report)
        validator.validate(json.loads(text))
        assert msgspec.json.decode(text, type=AuditReport) == report
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(json.loads(audit_report.to_json(report)) | {"verdict": "FINE"})


# The page


EVIL = '<script>alert("x")</script> & $a_b$'


@pytest.fixture(scope="module")
def pages(good: Path, local: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """case → its page."""
    root = tmp_path_factory.mktemp("pages")
    group = MEMBERSHIP["groups"][0] | {"name": EVIL, "by": EVIL}
    broken = Path(shutil.copytree(good, root / "attacked"))
    attacked(broken, CLEAN | {"epsilon_lower": 4.0, "name": EVIL}, MEMBERSHIP | {"groups": [group], "note": EVIL})
    with Ledger(root / "evil.db") as ledger:
        for number in range(70):
            for place, audience in enumerate(("federation", "public")):
                event, site = PoissonGaussian(0.1, 1.0 + number / 40), f"{EVIL} {number}"
                ledger.charge(line(event, site=site, audience=audience, round=place).entry)
    (root / "broken.db").write_bytes(b"no ledger")
    about = Statement(curator=EVIL, purpose=EVIL, data_product=EVIL, date=EVIL, data_domain=EVIL)
    reports = {
        "good": build(good, keys=good / "keys.json"),
        "local": build(local),
        "shared": build(shared, statement=Statement(budget_epsilon=0.05)),
        "attacked": build(broken, statement=about),
        "many": build(root / "evil.db"),
        "broken": build(root / "broken.db"),
    }
    return {name: audit_report.html(report) for name, report in reports.items()}


CASES = ("good", "local", "shared", "attacked", "many", "broken")


@pytest.mark.parametrize("case", CASES)
def test_page_is_well_formed_and_accessible(pages: dict[str, str], case: str) -> None:
    outline = Outline(pages[case])
    tags = [tag for tag, _ in outline.elements]
    assert dict(outline.elements)["html"] == {"lang": "en"}
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in outline.elements if tag == "th")
    assert tags.count("table") == tags.count("caption")
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id stands twice"
    for _, attributes in outline.elements:
        assert set((attributes.get("aria-labelledby") or "").split()) <= set(ids)
        target = re.search(r"#([^)]+)", attributes.get("href") or attributes.get("clip-path") or "")
        assert target is None or target[1] in ids


@pytest.mark.parametrize("case", CASES)
def test_page_fetches_nothing_and_runs_nothing(pages: dict[str, str], case: str) -> None:
    page, outline = pages[case], Outline(pages[case])
    assert not re.search(r"(?i)https?:|//[a-z0-9-]+\.|@import|data:", page)
    assert not {"script", "link", "iframe", "object", "embed", "img", "form"} & {tag for tag, _ in outline.elements}
    assert not any(name.startswith("on") for _, attributes in outline.elements for name in attributes)
    assert all((attributes.get("href") or "#").startswith("#") for _, attributes in outline.elements)
    assert "nan" not in outline.words.lower().split() and "inf" not in outline.words.lower().split()
    assert "<script" not in page


def test_page_has_plots_that_say_what_they_show(pages: dict[str, str]) -> None:
    for case, number in (("good", 4), ("local", 5), ("shared", 5), ("many", 4), ("attacked", 5), ("broken", 0)):
        svgs = Outline(pages[case]).svgs
        assert len(svgs) == number, case  # without figures no ε against accuracy, without attacks no ROC
        for svg in svgs:
            (title, _), (desc, _) = svg["children"][:2]
            assert (title, desc) == ("title", "desc") and svg["attributes"]["role"] == "img"
    drawings = "".join(re.findall(r"<svg.*?</svg>", pages["attacked"], flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}", drawings)) == set()


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_colours_have_contrast(pages: dict[str, str], scheme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", pages["good"], flags=re.DOTALL)
    assert len(blocks) == 4  # light and dark of the run's page, and what this one adds
    colours = dict(re.findall(r"(--[a-z-]+): (#[0-9a-f]{6})", blocks[scheme] + blocks[2 + scheme]))
    for kind in ("good", "warn", "void"):
        assert _contrast(colours[f"--{kind}-ink"], colours[f"--{kind}-paper"]) >= 4.5, kind


def test_page_says_it_is_no_legal_determination(pages: dict[str, str]) -> None:
    for page in pages.values():
        assert Outline(page).words.count("Supporting evidence, not a legal determination.") == 2


def test_page_shows_verdict_reason_and_remedy(pages: dict[str, str]) -> None:
    words_ = Outline(pages["shared"]).words
    assert "BUDGET EXCEEDED The claim is sound, but a site spent more than it was allowed to." in words_
    assert (
        "budget ε = 0.05 at δ = 1e-05, stated by the curator" in words_ and "What to do: Release nothing more" in words_
    )
    assert "AUDIT VIOLATION" in Outline(pages["attacked"]).words and "CLAIM SUPPORTED" in Outline(pages["good"]).words
    assert "No spend could be read" in Outline(pages["broken"]).words


def test_each_term_is_explained_once() -> None:
    terms = [term for term, _ in words.GLOSSARY]
    assert len(terms) == len(set(terms))
    for term, meaning in words.GLOSSARY:
        longest = max(len(sentence.split()) for sentence in re.split(r"[.;:] ", meaning))
        assert longest <= 25, f"{term}: a sentence of {longest} words"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize("case", ["attacked", "many", "shared"])
def test_browser_shows_the_page(pages: dict[str, str], tmp_path: Path, case: str) -> None:
    from PIL import Image

    (tmp_path / "page.html").write_text(pages[case], encoding="utf-8")
    for width, dark in ((1100, False), (1100, True), (400, False)):
        picture = tmp_path / f"{width}-{dark}.png"
        done = subprocess.run(
            [
                str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
                "--enable-logging=stderr", f"--user-data-dir={tmp_path / f'profile-{width}-{dark}'}",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width},6000",
                f"--screenshot={picture}", (tmp_path / "page.html").as_uri(),
            ],
            capture_output=True, text=True, check=True, timeout=600,
        )  # fmt: skip
        assert [text for text in done.stderr.splitlines() if "CONSOLE" in text] == []
        with Image.open(picture) as image:
            shown = np.asarray(image.convert("RGB")).astype(int)
        assert shown.shape[1] == width
        assert tuple(shown[0, 0]) == ((0x14, 0x18, 0x1D) if dark else (0xFF, 0xFF, 0xFF))
        assert (shown[:, -4:] == shown[0, 0]).all(), "something sticks out at the right"


# The command


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["accountant", "report", *arguments])


def test_command_writes_each_format(good: Path, keys: Path, tmp_path: Path) -> None:
    for name in ("html", "json"):
        out = tmp_path / f"report.{name}"
        done = invoke(str(good), "--keys", str(keys), "--format", name, "--out", str(out))
        assert done.exit_code == 0 and "verdict: CLAIM-SUPPORTED" in done.stderr and done.stdout == ""
        assert invoke(str(good), "--keys", str(keys), "--format", name).stdout == out.read_text(encoding="utf-8")
    stated = invoke(str(good), "--format", "json", "--curator", "C", "--purpose", "P", "--date", "D", "--budget", "0.1")
    report = json.loads(stated.stdout)
    assert report["about"] == {"curator": "C", "purpose": "P", "data_product": "", "date": "D"}
    assert report["verdict"] == "BUDGET-EXCEEDED"


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["nowhere"], RunFolderError, "there is nothing at nowhere"),
        (["{good}", "--format", "docx"], ConfigError, "one of html, json, pdf"),
        (["{good}", "--delta", "2"], ConfigError, "between 0 and 1"),
        (["{good}", "--budget", "-1"], ConfigError, "greater than 0"),
        (["{good}", "--released", "data"], ConfigError, "one of metrics, personal-models"),
        (["{good}", "--out", "/nowhere/report.html"], RunFolderError, "another place with --out"),
        (["{good}", "--about", "nowhere.toml"], ConfigError, "can not read nowhere.toml"),
    ],
)
def test_errors_say_what_to_do(good: Path, arguments: list[str], error: type, says: str) -> None:
    done = invoke(*(argument.format(good=good) for argument in arguments))
    assert isinstance(done.exception, error) and says in str(done.exception)


def test_pdf_without_weasyprint_says_how_to_get_it(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "weasyprint", None)
    with pytest.raises(ConfigError, match=r"pip install .*'\.\[pdf\]'.*or use --format html"):
        formats.pdf(build(good))


@pytest.mark.filterwarnings("ignore")  # of WeasyPrint's own dependencies
def test_pdf_is_a_pdf(good: Path) -> None:
    try:
        import weasyprint  # noqa: F401  # whether it can be loaded
    except (ImportError, OSError) as missing:  # OSError: Pango, a system library, is missing
        pytest.skip(f"no WeasyPrint here: {missing}")
    assert formats.pdf(build(good)).startswith(b"%PDF-")


@pytest.fixture(autouse=True)
def _nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No command writes beside the tests."""
    monkeypatch.chdir(tmp_path)
    yield
