"""A ledger that anybody can recompute, and what is found in one that was touched."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner, Result

import privfed
from privfed import auditing, exports, keyring, seals, statements, verification
from privfed.cli.app import app
from privfed.cli.exits import exit_code
from privfed.crypto import keys
from privfed.errors import RunChanged, RunFolderError
from privfed.privacy.accountant import Accountant
from privfed.privacy.audit.result import Audit, digest
from privfed.privacy.errors import LedgerCorrupt
from privfed.privacy.events import Charge, NoiseSite, PoissonGaussian, PrivacyUnit, to_canonical_json
from privfed.privacy.ledger import Entry, Ledger
from privfed.seals import COORDINATOR, Seal, SealError
from privfed.witness import Witness

from .house import ACCOUNTANT, House, config
from .tampering import tamper

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder."""
    path = tmp_path_factory.mktemp("verified") / "run"
    overrides = ["rounds=3", "privacy.noise_multiplier=3", "evaluation.local_steps=1", "privacy.noise='distributed'"]
    privfed.run(privfed.load_config(overrides=[*overrides, "method.name='fedsgd'"]), out=path)
    return path


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def check(target: Path, keys_file: Path | None = None) -> verification.Verification:
    return verification.verify(verification.find_book(target, keys_file), delta=1e-5, accountant=ACCOUNTANT)


def test_what_a_run_leaves_verifies(run: Path) -> None:
    found = check(run)
    assert found.rounds == 3
    sites = {site.name: site for site in found.sites}
    assert sites[COORDINATOR].entries == 3 + 1 and sites[COORDINATOR].epsilon is None
    summary = json.loads((run / "summary.json").read_text())
    for name, epsilon in summary["privacy"]["epsilon"]["per_site"].items():
        site = sites[name]
        assert site.epsilon is not None and site.epsilon.value == pytest.approx(epsilon)
        assert site.signed == site.entries == 1 + 2 * 3  # terms; a reserve and its settlement a round
    assert any("run's own folder" in note for note in found.notes)


def test_keys_from_elsewhere_are_what_signatures_are_held_against(run: Path, tmp_path: Path) -> None:
    given = tmp_path / "keys.json"
    given.write_text((run / "keys.json").read_text())
    assert not any("run's own folder" in note for note in check(run, given).notes)
    other = json.loads(given.read_text()) | {"hospital-2": "00" * 32}
    given.write_text(json.dumps(other))
    with pytest.raises(LedgerCorrupt, match=r"hospital-2.*another key"):
        check(run, given)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": "zz"}', '{"a": "00"}'])
def test_keys_that_are_none_are_refused(run: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(RunFolderError, match="name: public key in hex"):
        check(run, tmp_path / "keys.json")


def test_a_ledger_alone_says_that_its_keys_are_unknown(run: Path) -> None:
    assert any("no public keys" in note for note in check(run / "ledger.db").notes)
    with pytest.raises(RunFolderError, match="no ledger at"):
        check(run / "nothing.db")


FORGERIES = {
    "edited": (["UPDATE entries SET body = replace(body, 'fedsgd', 'fedsgb') WHERE site = 'hospital-1'"], "hospital-1"),
    "dropped": (["DELETE FROM entries WHERE site = 'hospital-2' AND sequence = 3"], "missing"),
    "truncated": (["DELETE FROM entries WHERE id = (SELECT MAX(id) FROM entries)"], "missing"),
    "truncated and covered up": (
        [
            "DELETE FROM entries WHERE id = (SELECT MAX(id) FROM entries)",
            "UPDATE sqlite_sequence SET seq = (SELECT MAX(id) FROM entries) WHERE name = 'entries'",
        ],
        "is not the one that was signed",
    ),
    "swapped": (
        [
            "UPDATE entries SET sequence = -1 WHERE site = 'hospital-3' AND sequence = 2",
            "UPDATE entries SET sequence = 2 WHERE site = 'hospital-3' AND sequence = 3",
            "UPDATE entries SET sequence = 3 WHERE site = 'hospital-3' AND sequence = -1",
        ],
        "hospital-3",
    ),
    "word dropped": (["DELETE FROM statements WHERE id = 2"], "missing"),
    "word dropped and covered up": (
        [
            "DELETE FROM statements WHERE id = 2",
            "UPDATE statements SET id = id - 1 WHERE id > 2",
            "UPDATE sqlite_sequence SET seq = seq - 1 WHERE name = 'statements'",
        ],
        "root",
    ),
    "word edited": (
        ["UPDATE statements SET body = replace(body, '\"round\":0', '\"round\":7') WHERE id = 1"],
        "signed",
    ),
    "words swapped": (
        [
            "UPDATE statements SET id = -1 WHERE id = 1",
            "UPDATE statements SET id = 1 WHERE id = 2",
            "UPDATE statements SET id = 2 WHERE id = -1",
        ],
        "root",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_touched_ledger_is_found(copy: Path, name: str) -> None:
    statements, told = FORGERIES[name]
    # A body is bytes, whatever SQLite's text functions make of it
    as_bytes = [
        re.sub(r"replace\(body, (.*)\) WHERE", r"CAST(replace(CAST(body AS TEXT), \1) AS BLOB) WHERE", statement)
        for statement in statements
    ]
    tamper(copy, *as_bytes)
    with pytest.raises(LedgerCorrupt, match=told):
        check(copy)


@pytest.fixture(scope="module")
def audited(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with what an attack found in its ledger."""
    return attacked(Path(shutil.copytree(run, tmp_path_factory.mktemp("verified") / "audited")), FOUND)


FOUND = Audit(
    level=3, name="one run", claimed_epsilon=2, delta=1e-5, epsilon_lower=2.5, confidence=0.95, trials=100,
    verdict="violation", note="an exact figure", seeds=(7,), power=0.9, figures={"auc": 1},
)  # fmt: skip


def attacked(path: Path, *found: Audit) -> Path:
    target = auditing.target_of(path)
    file = auditing.AuditFile(format=statements.FORMAT, run=target.name, created="2026-01-01T00:00:00Z", audits=found)
    auditing.record(target, file)
    auditing.write(target, file)
    return path


def coordinator(path: Path) -> list[Entry]:
    with Ledger(path / "ledger.db") as ledger:
        return [line.entry for line in ledger.entries(COORDINATOR)]


def test_an_audit_stands_in_the_chain_without_exact_figures(audited: Path) -> None:
    found, book = check(audited), verification.find_book(audited)
    assert (found.audits, found.rounds) == (1, 3)
    assert verification.verify_files(book, found) == ()
    (entry,) = (entry for entry in coordinator(audited) if entry.kind == "audit")
    stated = statements.audit_in(entry)
    assert stated.config == json.loads((audited / "run.json").read_text())["config_sha256"]
    assert (
        stated.headline.epsilon_lower == 2.5 and stated.headline.seeds == (7,) and stated.headline.claimed_epsilon == 2
    )
    assert "exact" not in entry.metadata["audit"] and "auc" not in entry.metadata["audit"]
    (whole,) = statements.read_audits(audited / "audit.json").audits
    assert digest(whole) == stated.digest  # figures that were counts are read as floats


def test_the_same_audit_stands_once_and_another_one_beside_it(audited: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(audited, tmp_path / "copy"))
    attacked(copy, FOUND)
    assert sum(entry.kind == "audit" for entry in coordinator(copy)) == 1
    attacked(copy, msgspec.structs.replace(FOUND, seeds=(8,), verdict="inconclusive", epsilon_lower=0.0))
    assert [entry.attempt for entry in coordinator(copy) if entry.kind == "audit"] == [0, 1]
    assert check(copy).audits == 2  # audit.json has the last, the ledger both


def test_without_its_key_no_audit_is_begun(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "ledger.db.key").unlink()
    with pytest.raises(RunFolderError, match="no key file"):
        auditing.require_recordable(auditing.target_of(copy))
    (copy / "ledger.db").unlink()
    with pytest.raises(RunFolderError, match="no ledger"):
        auditing.require_recordable(auditing.target_of(copy))
    assert not (copy / "ledger.db.key").exists()


@pytest.mark.parametrize("kind", ["audit", "end"])
def test_an_entry_that_somebody_slipped_in_is_not_signed_over(audited: Path, tmp_path: Path, kind: str) -> None:
    copy = Path(shutil.copytree(audited, tmp_path / "copy"))
    like = next(entry for entry in coordinator(copy) if entry.kind == kind)
    with Ledger(copy / "ledger.db") as ledger:
        ledger.witness(msgspec.structs.replace(like, attempt=7))
    found = check(copy)
    assert found.audits == 1 and any("1 entries after its last signed word" in note for note in found.notes)
    with pytest.raises(LedgerCorrupt, match=r"'coordinator', entry 6: the coordinator has not signed it"):
        attacked(copy, msgspec.structs.replace(FOUND, seeds=(8,)))


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("audit", {"audit": "{}"}, "states no audit"),
        ("audit", {"sha256": "zz"}, "states more, or less"),
        ("audit", {"more": "1"}, "states more, or less"),
        ("end", {"summary.json": "zz"}, "digests"),
        ("end", {"more": "00"}, "does not name"),
        ("end", {"config.toml": "00" * 32}, "does not name"),
    ],
)
def test_an_entry_that_is_signed_and_not_in_order_is_found(
    audited: Path, tmp_path: Path, kind: str, change: dict[str, str], says: str
) -> None:
    copy = Path(shutil.copytree(audited, tmp_path / "copy"))
    like = next(entry for entry in coordinator(copy) if entry.kind == kind)
    private = keyring.site_key(keyring.ledger_key(copy / "ledger.db"), COORDINATOR, "ledger")
    with Ledger(copy / "ledger.db") as ledger:
        entry = msgspec.structs.replace(like, attempt=7, metadata={**like.metadata, **change})
        Witness(ledger, private, {})._write(entry)
    with pytest.raises(LedgerCorrupt, match=rf"'coordinator', entry 6.*{says}"):
        check(copy)


def test_files_that_were_touched_are_named_with_exit_code_4(audited: Path, tmp_path: Path) -> None:
    def said(path: Path) -> Result:
        return CliRunner().invoke(app, ["accountant", "verify", str(path)])

    assert said(audited).exit_code == 0 and "as the ledger has them" in said(audited).stdout
    for name in ("summary.json", "metrics.jsonl", "datasets.json", "keys.json", "personal.safetensors", "audit.json"):
        copy = Path(shutil.copytree(audited, tmp_path / name))
        with (copy / name).open("ab") as file:
            file.write(b" \n")
        if name == "audit.json":  # one more space is no other result
            assert said(copy).exit_code == 0
            (copy / name).write_text((copy / name).read_text().replace('"violation"', '"supported"'))
        error = said(copy).exception
        assert isinstance(error, RunChanged) and f"{copy / name}" in str(error) and exit_code(error) == 4
    copy = Path(shutil.copytree(audited, tmp_path / "config"))
    (copy / "config.toml").write_text((copy / "config.toml").read_text() + "# \n")
    error = said(copy).exception
    assert isinstance(error, RunChanged) and "config.toml" in str(error)
    facts = json.loads((copy / "run.json").read_text())
    facts["config_sha256"] = hashlib.sha256((copy / "config.toml").read_bytes()).hexdigest()
    (copy / "run.json").write_text(json.dumps(facts))  # both were changed to agree with each other
    error = said(copy).exception
    assert isinstance(error, RunChanged) and "config.toml" in str(error)


def test_an_older_ledger_under_a_finished_run_is_found(audited: Path, tmp_path: Path) -> None:
    """All entries up to the last round hold by themselves; the summary shows that there was more."""
    copy = Path(shutil.copytree(audited, tmp_path / "copy"))
    gone = "site = 'coordinator' AND sequence > 3"
    tamper(
        copy,
        f"DELETE FROM entries WHERE {gone}",
        "DELETE FROM statements WHERE id > (SELECT MAX(id) FROM statements) - 2",
        *(
            f"UPDATE sqlite_sequence SET seq = (SELECT MAX(id) FROM {table}) WHERE name = '{table}'"
            for table in ("entries", "statements")
        ),
    )
    found, book = check(copy), verification.find_book(copy)
    with pytest.raises(RunChanged, match=r"audit\.json"):
        verification.verify_files(book, found)
    (copy / "audit.json").unlink()
    with pytest.raises(RunChanged, match="the ledger is an older copy"):
        verification.verify_files(book, found)


def test_an_unfinished_run_says_that_nothing_is_bound(run: Path, tmp_path: Path) -> None:
    with Ledger(run / "ledger.db") as ledger:
        rounds = [line for line in ledger.entries(COORDINATOR) if line.entry.kind == "witness"]
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "summary.json").unlink()
    name = rounds[0].entry.run
    assert statements.check_files(copy, name, rounds) == (
        "the run has not ended: nothing binds the files in its folder yet",
    )


def test_chains_written_anew_without_any_word_are_found_by_whoever_has_keys(audited: Path, tmp_path: Path) -> None:
    """All words are taken out, the last entry of a site too, and SQLite's counts agree: nothing else tells."""
    keys_of_sites = shutil.copy(audited / "keys.json", tmp_path / "keys-from-the-sites.json")
    bare = Path(shutil.copytree(audited, tmp_path / "bare"))
    tamper(bare, "DELETE FROM statements", "UPDATE sqlite_sequence SET seq = 0 WHERE name = 'statements'")
    verification.verify(verification.find_book(bare / "ledger.db"), delta=1e-5, accountant=ACCOUNTANT)
    told = CliRunner().invoke(app, ["accountant", "verify", str(bare / "ledger.db"), "--keys", str(keys_of_sites)])
    assert isinstance(told.exception, LedgerCorrupt) and exit_code(told.exception) == 4
    assert "'coordinator', entry 1: no signed word covers it" in str(told.exception)


def test_keys_of_some_sites_vouch_for_no_others(audited: Path, tmp_path: Path) -> None:
    some = json.loads((audited / "keys.json").read_text())
    del some["hospital-2"]
    (tmp_path / "some.json").write_text(json.dumps({**some, "hospital-9": some["hospital-1"]}))
    book = verification.find_book(audited, tmp_path / "some.json")
    found = verification.verify(book, delta=1e-5, accountant=ACCOUNTANT)
    assert any(note.startswith("hospital-2: its key is not among those given") for note in found.notes)
    assert any(note.startswith("hospital-9: it has a key and no chain") for note in found.notes)
    with pytest.raises(LedgerCorrupt, match=r"'hospital-2', entry 1: there is no key of its chain"):
        verification.require_signed(book, found)


def test_an_older_copy_is_found_by_whoever_kept_an_export(run: Path, audited: Path, tmp_path: Path) -> None:
    """An audit found a violation; ledger and folder are put back to before it, and hold by themselves."""

    def verified(path: Path, *more: str) -> Result:
        return CliRunner().invoke(app, ["accountant", "verify", str(path), *more])

    kept = tmp_path / "kept.jsonl"
    assert CliRunner().invoke(app, ["accountant", "export", str(audited), "--out", str(kept)]).exit_code == 0
    assert verified(audited, "--since", str(kept)).exit_code == 0
    assert verified(run).exit_code == 0
    told = verified(run, "--since", str(kept))
    assert isinstance(told.exception, LedgerCorrupt) and "'coordinator', entry 5" in str(told.exception)
    as_json = verified(run, "--since", str(kept), "--json")
    said = json.loads(as_json.stdout)
    assert as_json.exit_code == 4 and said["verified"] is False and said["entry"] == "site 'coordinator', entry 5"

    before = tmp_path / "before.jsonl"
    assert CliRunner().invoke(app, ["accountant", "export", str(run), "--out", str(before)]).exit_code == 0
    assert verified(audited, "--since", str(before)).exit_code == 0  # it has grown, and that is all
    for text in ("", "{}", "[1]\n2", '{"format": "privfed-ledger-export/1"}'):
        before.write_text(text)
        with pytest.raises(RunFolderError, match="no export"):
            exports.require_since(audited / "ledger.db", before)
    lines = kept.read_text().splitlines()
    kept.write_text(lines[0].replace('"ledger": "', '"ledger": "0'))
    with pytest.raises(LedgerCorrupt, match="of ledger 0"):
        exports.require_since(audited / "ledger.db", kept)


def test_a_ledger_that_does_not_verify_is_told_to_programs_too(copy: Path) -> None:
    tamper(copy, "DELETE FROM entries WHERE site = 'hospital-2' AND sequence = 3")
    told = CliRunner().invoke(app, ["accountant", "verify", str(copy), "--json"])
    assert told.exit_code == 4 and json.loads(told.stdout)["verified"] is False


def resigned(path: Path, change: Callable[[Seal], Seal], private: bytes, site: str) -> None:
    """Have one site's words changed and signed anew by whoever holds ``private``."""
    with Ledger(path / "ledger.db") as ledger:
        words = ledger.statements()
    updates = []
    for number, body in enumerate(words, start=1):
        word = seals.read(body)
        if word.site == site:
            word = msgspec.structs.replace(change(word), key=keys.verification_key(private).hex())
            word = msgspec.structs.replace(word, signature=keys.sign(private, word.statement).hex())
            updates.append((number, to_canonical_json(word).hex()))
    tamper(path, *(f"UPDATE statements SET body = x'{body}' WHERE id = {number}" for number, body in updates))


def test_a_smaller_epsilon_signed_anew_is_found(copy: Path) -> None:
    def smaller(word: Seal) -> Seal:
        return msgspec.structs.replace(word, epsilon=0.9 * (word.epsilon or 0.0))

    resigned(copy, smaller, bytes(range(32)), "hospital-1")
    with pytest.raises(LedgerCorrupt, match=r"hospital-1.*another key"):
        check(copy)
    (copy / "keys.json").unlink()  # nobody knows the site's key: its own events still tell
    with pytest.raises(LedgerCorrupt, match="its events give"):
        check(copy)


def test_a_false_word_of_the_site_itself_is_found(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.db") as ledger:
        entry = Entry(
            site="a",
            dataset="00",
            run="r",
            round=0,
            unit=PrivacyUnit.RECORD,
            noise=NoiseSite.LOCAL,
            charges=(Charge(PoissonGaussian(0.5, 2.0)),),
        )
        recorded = ledger.charge(entry)
        private = bytes(range(32))
        spent = msgspec.structs.replace(ACCOUNTANT.epsilon(entry.charges, 1e-5), value=0.1)
        word = seals.seal(
            ledger=ledger.id, site="a", dataset="00", last=recorded, genesis="", run="r", round=0, spent=spent,
            time=ledger._clock(), private=private,
        )  # fmt: skip
        ledger.add_statements([("a", word)])
    with pytest.raises(LedgerCorrupt, match=r"it says ε = 0\.1, its events give"):
        check(tmp_path / "l.db")


def test_a_word_that_is_none_is_no_word() -> None:
    for body in (b"", b"{}", b"\xff", b'{"ledger": "x"}'):
        with pytest.raises(SealError):
            seals.read(body)


def test_a_witness_takes_no_word_that_is_not_its_sites(tmp_path: Path) -> None:
    house = House(tmp_path)
    federation = house.federation(config(rounds=1))
    (report,) = tuple(federation.rounds())
    words = dict(report.words)
    members = {name: house.identities[name].member.ledger_key for name in house.names}
    witness = Witness(house.ledger, bytes(range(32)), members)
    witness.round("r", 0, {**words, "a": words["b"], "c": b"garbage"})
    (entry,) = house.ledger.entries(COORDINATOR)
    assert entry.entry.metadata == {"words": "3"} and entry.entry.dataset == seals.root(
        [words[name] for name in ("b", "d", "e")]
    )
    witness.round("r", 0, words)  # the round done again after a crash
    assert [line.entry.attempt for line in house.ledger.entries(COORDINATOR)] == [0, 1]
    assert check(tmp_path / "ledger.db").rounds == 2
    witness.round("r", 1, {"a": b""})  # nobody gave a word: nothing to witness
    assert len(house.ledger.entries(COORDINATOR)) == 2


def test_the_export_is_checked_without_privfed(audited: Path, tmp_path: Path) -> None:
    run = audited
    text = "\n".join(exports.lines(run / "ledger.db")) + "\n"
    file = tmp_path / "export.jsonl"
    script = [sys.executable, str(ROOT / "docs" / "check_export.py"), str(file)]

    def said(content: str) -> subprocess.CompletedProcess[str]:
        file.write_text(content, encoding="utf-8")
        return subprocess.run([*script, str(run / "keys.json")], capture_output=True, text=True, check=False)

    whole = said(text)
    assert whole.returncode == 0, whole.stderr
    assert "3 roots" in whole.stdout and "verified" in whole.stdout
    assert "level 3: violation, ε at least 2.5, claimed 2.0" in whole.stdout
    later = text.replace('\\"round\\":0,\\"run\\"', '\\"round\\":9,\\"run\\"')
    assert later != text and "NOT VERIFIED: site 'coordinator', entry 1" in said(later).stderr
    lines = text.splitlines()
    words = [number for number, line in enumerate(lines) if line.startswith('{"statement"')]
    dropped = lines[: words[1]] + lines[words[1] + 1 :]
    assert "root" in said("\n".join(dropped) + "\n").stderr
    assert "hospital-1" in said(text.replace("fedsgd", "fedsgb")).stderr
    better = text.replace("violation", "supported")
    assert better != text and "NOT VERIFIED: site 'coordinator', entry 5" in said(better).stderr


def test_the_check_without_privfed_names_what_nobody_signed(audited: Path, tmp_path: Path) -> None:
    file, keys = tmp_path / "export.jsonl", tmp_path / "keys.json"
    whole = list(exports.lines(audited / "ledger.db"))
    everyone = json.loads((audited / "keys.json").read_text())

    def said(lines: list[str], known: dict[str, str] | None) -> subprocess.CompletedProcess[str]:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        keys.write_text(json.dumps(known))
        script = [sys.executable, str(ROOT / "docs" / "check_export.py"), str(file)]
        return subprocess.run([*script, str(keys)][: 3 + bool(known)], capture_output=True, text=True, check=False)

    entries = sum('"site": "hospital-2"' in line or '"site":"hospital-2"' in line for line in whole)
    some = said(whole, {name: key for name, key in everyone.items() if name != "hospital-2"})
    assert some.returncode == 1 and "verified:" not in some.stdout
    assert f"site 'hospital-2', entries 1 to {entries}: there is no key of this chain" in some.stderr
    assert "hospital-1" not in some.stderr
    bare = said([line for line in whole if not line.startswith('{"statement"')], everyone)
    assert bare.returncode == 1
    assert f"site 'hospital-2', entries 1 to {entries}: no signed word covers them" in bare.stderr
    last = said(whole[:-1], everyone)  # the coordinator's last word, on the audit
    assert last.returncode == 1 and "site 'coordinator', entries 5 to 5: no signed word covers them" in last.stderr
    unknown = said(whole[:-1], None)
    assert unknown.returncode == 0 and "entries 5 to 5: no signed word" in unknown.stdout
    assert "give KEYS.json" in unknown.stdout and "hospital-1', entries" not in unknown.stdout


def test_a_second_accountant_of_the_chain_agrees_with_the_ledgers(run: Path) -> None:
    """`verification.Spends` reads settlements by its own rules."""
    with Ledger(run / "ledger.db") as ledger:
        for site in ledger.sites():
            if site == COORDINATOR:
                continue
            chain = ledger.entries(site)
            dataset = chain[0].entry.dataset
            own = verification.Spends(chain, dataset).upto(len(chain))
            assert Accountant().epsilon(own, 1e-5).value == pytest.approx(
                Accountant().epsilon(ledger.charges(site, dataset), 1e-5).value
            )
