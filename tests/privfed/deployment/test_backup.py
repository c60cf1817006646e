"""Backup and restore of a site, and that a restored ledger forgets nothing."""

import math
import os
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from privfed import wire
from privfed.config import Config
from privfed.deployment import account, backup, files, runs
from privfed.deployment.account import Account
from privfed.deployment.consortium import Consortium
from privfed.deployment.files import DeploymentError
from privfed.deployment.history import as_it_is
from privfed.deployment.hospital import LEDGER, POLICY, RESTORED, STATES
from privfed.deployment.inspection import About, Inspector, Look, Order, decode_reply
from privfed.deployment.site_status import read, would_refuse
from privfed.deployment.survey import Finding, survey
from privfed.engines.local import LocalEngine
from privfed.privacy.events import PrivacyUnit
from privfed.privacy.ledger import Ledger
from tests.privfed.deployment import house
from tests.privfed.deployment.house import SITES, account_of, hospital
from tests.privfed.deployment.test_blocks import Killed, block, spends

ROUNDS = 3


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return house.experiment(house.tables(tmp_path / "tables"), rounds=ROUNDS)


@pytest.fixture
def consortium(tmp_path: Path, config: Config) -> Iterator[Consortium]:
    with house.without_flare():
        yield house.found(tmp_path, config, study=False)


def saved(consortium: Consortium, tmp_path: Path) -> bytes:
    backup.make(hospital(consortium), tmp_path / "north.backup")
    return (tmp_path / "north.backup").read_bytes()


def lost(consortium: Consortium) -> Path:
    """The disk of the site is gone."""
    home = consortium.home.parent / "north"
    shutil.rmtree(home)
    return home


def without_claim(config: Config) -> Config:
    return msgspec.structs.replace(config, privacy=msgspec.structs.replace(config.privacy, unit=PrivacyUnit.NONE))


def test_a_backup_is_for_its_owner_alone_and_has_what_can_not_be_made_again(
    consortium: Consortium, config: Config, tmp_path: Path
) -> None:
    block(consortium, runs.begin(consortium, config), 1)
    with house.at_work(consortium.home.parent):  # a job is under way meanwhile
        manifest, parts = backup.read(saved(consortium, tmp_path))
    path = tmp_path / "north.backup"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (manifest.site, manifest.sequence) == (
        "north",
        len(spends(consortium.home.parent / "north" / LEDGER, "north")),
    )
    assert {"keys.json", "ledger.db", "ledger.db.key", "policy.toml", "roster"} <= parts.keys()
    assert not [name for name in parts if name.startswith(STATES) or "journal" in name]
    with pytest.raises(DeploymentError, match="is there already"):
        backup.make(hospital(consortium), path)


def test_a_changed_backup_is_none(consortium: Consortium, tmp_path: Path) -> None:
    body = saved(consortium, tmp_path)
    manifest, parts = backup.read(body)
    del parts["policy.toml"]
    named = msgspec.json.encode(manifest)
    outside = {**manifest.sha256, "kit/startup/../../../evil": manifest.sha256["site.toml"]}
    for bad in (
        b"",
        body[:-100],
        backup.papers.pack({backup.MANIFEST: named, **parts}),
        backup.papers.pack({backup.MANIFEST: named, **parts, "policy.toml": b"max_epsilon = 100"}),
        backup.papers.pack({backup.MANIFEST: named, **backup.read(body)[1], "more": b""}),
        backup.papers.pack(
            {
                backup.MANIFEST: msgspec.json.encode(msgspec.structs.replace(manifest, sha256=outside)),
                **backup.read(body)[1],
                "kit/startup/../../../evil": backup.read(body)[1]["site.toml"],
            }
        ),
    ):
        with pytest.raises(DeploymentError, match=r"no backup of a site|damaged"):
            backup.restore(tmp_path / "put" / "back" / "here", bad)
    assert not list(tmp_path.rglob("evil")) and not (tmp_path / "put").exists()


def test_a_restored_site_takes_part_in_nothing_before_it_has_caught_up(
    consortium: Consortium, config: Config, tmp_path: Path
) -> None:
    block(consortium, runs.begin(consortium, config), ROUNDS)
    body, before = saved(consortium, tmp_path), read(hospital(consortium)).epsilon
    backup.restore(lost(consortium), body)
    north = hospital(consortium)
    with pytest.raises(DeploymentError, match="privfed site catch-up"):
        with north.opened():
            pass
    with pytest.raises(DeploymentError, match="privfed site catch-up"):
        would_refuse(north, config)
    about = decode_reply(Inspector(lambda: north).handle(msgspec.msgpack.encode(Look(b""))))
    assert isinstance(about, About) and about.unready and str(north.home) not in about.unready
    # The run is over, and the site's last word on it is in the restored chain: nothing is missing
    done = account.catch_up(north, account.account(consortium, "north"))
    assert done.charged == () and done.epsilon == pytest.approx(before)
    with north.opened():
        pass
    with pytest.raises(DeploymentError, match="nothing to catch up on"):
        account.catch_up(north, account.account(consortium, "north"))


def test_what_was_spent_after_the_backup_is_charged_at_its_worst(
    consortium: Consortium, config: Config, tmp_path: Path
) -> None:
    run = runs.begin(consortium, config)
    block(consortium, run, 1)
    body, at_backup = saved(consortium, tmp_path), read(hospital(consortium)).epsilon
    block(consortium, run, ROUNDS)
    true = read(hospital(consortium)).epsilon
    backup.restore(lost(consortium), body)
    north = hospital(consortium)
    assert read(north).epsilon == pytest.approx(at_backup) and at_backup < true
    done = account.catch_up(north, account.account(consortium, "north"))
    assert done.charged == (run.path.name,)
    assert done.epsilon >= true and read(north).epsilon == pytest.approx(done.epsilon)
    reason = would_refuse(north, config)
    assert reason is not None and "policy.max_epsilon" in reason


def test_a_run_that_is_not_over_is_not_gone_on_with(consortium: Consortium, config: Config, tmp_path: Path) -> None:
    """One that began after the backup: the restored ledger alone would not know it."""
    body = saved(consortium, tmp_path)
    run = runs.begin(consortium, config)
    block(consortium, run, 1)
    true = read(hospital(consortium)).epsilon
    backup.restore(lost(consortium), body)
    done = account.catch_up(hospital(consortium), account.account(consortium, "north"))
    assert done.charged == (run.path.name,) and done.epsilon >= true
    before = spends(consortium.home.parent / "north" / LEDGER, "north")
    block(consortium, run, 1)
    assert "lost its working memory" in runs.progress(run)[-1].refused["north"]
    assert spends(consortium.home.parent / "north" / LEDGER, "north") == before


def test_a_longer_ledger_is_never_overwritten(consortium: Consortium, config: Config, tmp_path: Path) -> None:
    run = runs.begin(consortium, config)
    block(consortium, run, 1)
    body = saved(consortium, tmp_path)
    for rounds in (0, 1):
        if rounds:
            block(consortium, run, rounds)
        home = consortium.home.parent / "north"
        before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file() and path.name != ".lock"}
        with pytest.raises(DeploymentError, match=r"would be forgotten\. Nothing was changed"):
            backup.restore(home, body)
        assert before == {path: path.read_bytes() for path in before} and not (home / RESTORED).exists()


def test_a_damaged_ledger_is_set_aside(consortium: Consortium, config: Config, tmp_path: Path) -> None:
    block(consortium, runs.begin(consortium, config), 1)
    body, north = saved(consortium, tmp_path), hospital(consortium)
    (north.home / LEDGER).write_bytes(b"damaged" * 1000)
    backup.restore(north.home, body)
    assert north.restored is not None and list(north.home.glob(f"{LEDGER}.damaged-*"))
    with Ledger(north.home / LEDGER) as book:
        book.verify()


@pytest.mark.parametrize("there", ["nothing", "an older ledger", "a damaged ledger"])
def test_a_restore_that_is_killed_anywhere_is_done_again_by_the_same_command(
    consortium: Consortium, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    older = tmp_path / "older"
    shutil.copytree(hospital(consortium).home, older)
    block(consortium, runs.begin(consortium, config), 1)
    body, home = saved(consortium, tmp_path), consortium.home.parent / "north"
    parts = backup.read(body)[1]
    replace, rename = os.replace, Path.rename
    left = math.inf  # steps to do

    def counted(move: Callable[..., object]) -> Callable[..., object]:
        def step(*given: Any) -> object:
            nonlocal left
            for act in (lambda: None, lambda: move(*given)):  # a draft has its bytes; it has its name
                done = act()
                left -= 1
                if left == 0:
                    raise Killed
            return done

        return step

    monkeypatch.setattr(os, "replace", counted(replace))
    monkeypatch.setattr(Path, "rename", counted(rename))
    at = 0
    while True:
        at += 1
        shutil.rmtree(home)
        if there != "nothing":
            shutil.copytree(older, home)
        if there == "a damaged ledger":
            (home / LEDGER).write_bytes(b"damaged" * 1000)
        left = at
        try:
            backup.restore(home, body)
        except Killed:
            left = math.inf
        else:
            break  # it was killed after every step
        if at > 1:  # from the first file on nothing takes part, with whatever is there
            with pytest.raises(DeploymentError), hospital(consortium).opened():
                pass
        backup.restore(home, body)
        assert {path: (home / path).read_bytes() for path in parts} == parts
        assert hospital(consortium).restored is not None
        assert not [path for path in home.rglob("*.new") if path.is_file()]
    assert at > 2 * (len(parts) if there == "nothing" else 2)


def test_a_marked_ledger_of_the_same_length_and_another_history_is_not_overwritten(
    consortium: Consortium, config: Config, tmp_path: Path
) -> None:
    older = tmp_path / "older"
    shutil.copytree(hospital(consortium).home, older)
    block(consortium, runs.begin(consortium, config), 1)
    body, home = saved(consortium, tmp_path), lost(consortium)
    shutil.copytree(older, home)
    block(consortium, runs.begin(consortium, config), 1)
    with Ledger(home / LEDGER) as book:
        hospital(consortium).mark(as_it_is(book, book.entries("north")))
    before = (home / LEDGER).read_bytes()
    with pytest.raises(DeploymentError, match="would be forgotten"):
        backup.restore(home, body)
    assert (home / LEDGER).read_bytes() == before


def test_another_sites_folder_is_left_alone(consortium: Consortium, tmp_path: Path) -> None:
    body = saved(consortium, tmp_path)
    with pytest.raises(DeploymentError, match="is the site 'south', the backup is of 'north'"):
        backup.restore(consortium.home.parent / "south", body)


def test_an_account_that_hides_a_run_is_found_out_by_the_sites_own_words(
    consortium: Consortium, config: Config, tmp_path: Path
) -> None:
    body = saved(consortium, tmp_path)
    block(consortium, runs.begin(consortium, config), ROUNDS)
    backup.restore(lost(consortium), body)
    north = hospital(consortium)
    with pytest.raises(DeploymentError, match="a run is missing from it"):
        account.catch_up(north, account_of(consortium, runs=()))
    assert spends(north.home / LEDGER, "north") == [] and north.restored is not None


def test_an_account_of_somebody_else_is_refused(consortium: Consortium, config: Config, tmp_path: Path) -> None:
    body = saved(consortium, tmp_path)
    block(consortium, runs.begin(consortium, config), 1)
    backup.restore(lost(consortium), body)
    north, good = hospital(consortium), account.account(consortium, "north")
    given = msgspec.json.decode(good, type=Account)
    other = msgspec.json.decode(account.account(consortium, "south"), type=Account)
    for bad in (b"", b"{}", good.replace(b'"over":false', b'"over":true'), account.account(consortium, "south")):
        with pytest.raises(DeploymentError, match=r"no account of this consortium|for the site 'south'"):
            account.catch_up(north, bad)
    with pytest.raises(DeploymentError, match="a word of another site"):
        account.catch_up(north, account_of(consortium, words=other.words))
    with pytest.raises(DeploymentError, match="never gave"):
        account.catch_up(north, account_of(consortium, words=(given.words[0].replace('"round":0', '"round":9'),)))
    assert north.restored is not None


def test_a_backup_of_a_copy_that_went_on_by_itself_counts_beside_what_the_words_are_about(
    consortium: Consortium, config: Config, tmp_path: Path
) -> None:
    """Two machines that both were this site: the chains part, and the words are of the other one."""
    first = saved(consortium, tmp_path)
    forgotten = runs.begin(consortium, config)
    block(consortium, forgotten, 1)
    home = lost(consortium)
    backup.restore(home, first)
    (home / RESTORED).unlink()  # by hand, as nobody should
    open_to_more = msgspec.structs.replace(hospital(consortium).policy, max_epsilon=20.0)
    files.write_toml(home / POLICY, open_to_more, comment="As it was agreed.")
    block(consortium, runs.begin(consortium, config), 1)
    kept = spends(home / LEDGER, "north")
    backup.make(hospital(consortium), tmp_path / "second")
    backup.restore(lost(consortium), (tmp_path / "second").read_bytes())
    done = account.catch_up(hospital(consortium), account.account(consortium, "north"))
    assert forgotten.path.name in done.charged and spends(home / LEDGER, "north")[: len(kept)] == kept


def test_a_disk_that_was_put_back_whole_is_found_by_the_preflight_and_catches_up(
    consortium: Consortium, config: Config
) -> None:
    north = hospital(consortium)
    shutil.copytree(north.home, north.home.with_name("snapshot"))
    block(consortium, runs.begin(consortium, config), 1)
    true = read(north).epsilon

    def ledgers() -> Finding:
        engine = LocalEngine({site: Inspector(lambda site=site: hospital(consortium, site)) for site in SITES})
        found = survey(consortium, None, Order.new(), engine, set)
        return next(one for one in found if one.what == "ledgers")

    assert ledgers().ok
    with pytest.raises(DeploymentError, match="nothing to catch up on"):
        account.catch_up(north, account.account(consortium, "north"))
    shutil.rmtree(north.home)
    shutil.move(north.home.with_name("snapshot"), north.home)
    finding = ledgers()
    assert not finding.ok and finding.found.startswith("north: its ledger has 0 entries") and "catch-up" in finding.next
    with pytest.raises(DeploymentError, match="have the coordinator send a new one"):  # this one may be any old one
        account.catch_up(north, account.account(consortium, "north"))
    with pytest.raises(DeploymentError, match="privfed site catch-up"), north.opened():
        pass
    account.catch_up(north, account.account(consortium, "north"))
    assert read(north).epsilon >= true and ledgers().ok
    (north.home / LEDGER).unlink()  # and now the ledger alone is gone, and there is no backup: a new one begins
    Ledger(north.home / LEDGER).close()
    finding = ledgers()
    assert not finding.ok and "another ledger" in finding.found and read(north).epsilon == 0
    with pytest.raises(DeploymentError, match="have the coordinator send a new one"):
        account.catch_up(north, account.account(consortium, "north"))
    account.catch_up(north, account.account(consortium, "north"))
    assert read(north).epsilon >= true and ledgers().ok
    with pytest.raises(DeploymentError, match="nothing to catch up on"):
        account.catch_up(north, account.account(consortium, "north"))


def test_a_site_whose_ledger_is_gone_does_not_begin_a_new_one_by_itself(
    consortium: Consortium, config: Config, tmp_path: Path
) -> None:
    block(consortium, runs.begin(consortium, config), ROUNDS)
    north, old = hospital(consortium), account.account(consortium, "north")
    true = read(north).epsilon
    (north.home / LEDGER).unlink()
    with pytest.raises(DeploymentError, match="is gone"), north.opened():
        pass
    for asked in (lambda: read(north), lambda: backup.make(north, tmp_path / "empty"), north.require_current):
        with pytest.raises(DeploymentError, match="is gone"):
            asked()
    assert not (north.home / LEDGER).exists()
    with pytest.raises(DeploymentError, match="have the coordinator send a new one"):
        account.catch_up(north, old)
    with pytest.raises(DeploymentError, match="privfed site catch-up"), north.opened():  # nor by a refused account
        pass
    account.catch_up(north, account.account(consortium, "north"))
    assert read(north).epsilon >= true
    with north.opened():
        pass


def test_an_account_from_before_the_restore_does_not_take_the_mark_away(
    consortium: Consortium, config: Config, tmp_path: Path
) -> None:
    body = saved(consortium, tmp_path)
    old = account.account(consortium, "north")  # of an earlier time: good then, and it lacks what came after
    block(consortium, runs.begin(consortium, config), ROUNDS)
    true = read(hospital(consortium)).epsilon
    backup.restore(lost(consortium), body)
    north = hospital(consortium)
    with pytest.raises(DeploymentError, match="have the coordinator send a new one"):
        account.catch_up(north, old)
    assert north.restored is not None and spends(north.home / LEDGER, "north") == []
    assert account.catch_up(north, account.account(consortium, "north")).epsilon >= true


def test_a_run_without_noise_is_charged_as_what_it_was(consortium: Consortium, config: Config, tmp_path: Path) -> None:
    for site in SITES:
        there = hospital(consortium, site)
        open_to_all = msgspec.structs.replace(there.policy, require_privacy=False, max_epsilon=None)
        files.write_toml(there.home / POLICY, open_to_all, comment="As it was agreed.")
    body = saved(consortium, tmp_path)
    block(consortium, runs.begin(consortium, without_claim(config)), 1)
    assert read(hospital(consortium)).epsilon == math.inf
    backup.restore(lost(consortium), body)
    north = hospital(consortium)
    unmeasured = account_of(consortium, words=())  # a round that was cut short has no word
    assert account.catch_up(north, unmeasured).epsilon == math.inf
    assert read(north).epsilon == math.inf


def test_a_ledger_is_not_put_beside_the_key_of_another(consortium: Consortium, config: Config, tmp_path: Path) -> None:
    block(consortium, runs.begin(consortium, config), 1)
    body, true = saved(consortium, tmp_path), read(hospital(consortium)).epsilon
    home = consortium.home.parent / "north"
    (home / LEDGER).unlink()
    (home / f"{LEDGER}.key").write_bytes(bytes(32))  # what a site that lost both would make
    with pytest.raises(DeploymentError, match="the key of another ledger"):
        backup.restore(home, body)
    assert not (home / LEDGER).exists() and not (home / RESTORED).exists()
    (home / f"{LEDGER}.key").unlink()
    backup.restore(home, body)
    assert read(hospital(consortium)).epsilon == pytest.approx(true)


def test_every_file_of_a_backup_stands_in_a_zip_that_other_programs_read(
    consortium: Consortium, tmp_path: Path
) -> None:
    saved(consortium, tmp_path)
    with zipfile.ZipFile(tmp_path / "north.backup") as archive:
        assert archive.testzip() is None


__all__ = ["SITES", "wire"]
