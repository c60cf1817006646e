"""A ledger that anybody can recompute, and what is found in one that was touched."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import privfed
from privfed import exports, seals, verification
from privfed.crypto import keys
from privfed.errors import RunFolderError
from privfed.privacy.accountant import Accountant
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
    assert sites[COORDINATOR].entries == 3 and sites[COORDINATOR].epsilon is None
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


def test_the_export_is_checked_without_privfed(run: Path, tmp_path: Path) -> None:
    text = "\n".join(exports.lines(run / "ledger.db")) + "\n"
    file = tmp_path / "export.jsonl"
    script = [sys.executable, str(ROOT / "docs" / "check_export.py"), str(file)]

    def said(content: str) -> subprocess.CompletedProcess[str]:
        file.write_text(content, encoding="utf-8")
        return subprocess.run([*script, str(run / "keys.json")], capture_output=True, text=True, check=False)

    whole = said(text)
    assert whole.returncode == 0, whole.stderr
    assert "3 roots" in whole.stdout and "verified" in whole.stdout
    later = text.replace('\\"round\\":0,\\"run\\"', '\\"round\\":9,\\"run\\"')
    assert later != text and "NOT VERIFIED: site 'coordinator', entry 1" in said(later).stderr
    lines = text.splitlines()
    words = [number for number, line in enumerate(lines) if line.startswith('{"statement"')]
    dropped = lines[: words[1]] + lines[words[1] + 1 :]
    assert "root" in said("\n".join(dropped) + "\n").stderr
    assert "hospital-1" in said(text.replace("fedsgd", "fedsgb")).stderr


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
