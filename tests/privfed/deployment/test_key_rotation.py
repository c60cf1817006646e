"""A site changes its keys: a new roster names the new ones, and the old ones count for nothing any more."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from privfed import seals
from privfed.config import Config
from privfed.crypto.errors import RemoteProtocolError
from privfed.crypto.roster import Roster, sign_roster
from privfed.deployment import account, backup, kits, runs
from privfed.deployment.consortium import LEDGER as BOOK
from privfed.deployment.consortium import Consortium
from privfed.deployment.files import DeploymentError
from privfed.deployment.hospital import NEXT, REQUEST, Hospital
from privfed.deployment.site_status import read
from privfed.errors import PrivfedError
from privfed.privacy.ledger import Ledger
from tests.privfed.deployment import house
from tests.privfed.deployment.house import account_of, hospital, signed_block
from tests.privfed.deployment.test_blocks import block


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return house.experiment(house.tables(tmp_path / "tables"), rounds=1, privacy={"delta": 1e-5, "target_epsilon": 1.0})


@pytest.fixture
def consortium(tmp_path: Path, config: Config) -> Iterator[Consortium]:
    with house.without_flare():
        yield house.found(tmp_path, config, study=False)


def rotated(consortium: Consortium) -> bytes:
    """All of it: the site's request, the coordinator's approval and roster, the kit, and everybody's acceptance."""
    request = hospital(consortium).rotate(contact="it")
    consortium.approve(request, replace=True)
    consortium.next_roster()
    hospital(consortium).renew(consortium.kit("north"))
    for other in ("south", "west"):
        hospital(consortium, other).accept_roster((consortium.roster_file() or Path()).read_bytes())
    return request


def test_a_site_changes_its_keys_and_its_ledger_goes_on(consortium: Consortium, config: Config) -> None:
    block(consortium, runs.begin(consortium, config), 1)
    home = consortium.home.parent / "north"
    old, secret = hospital(consortium).identity.member, (home / "keys.json").read_bytes()
    rotated(consortium)
    new = hospital(consortium).identity.member
    assert not {old.secagg_key, old.ledger_key} & {new.secagg_key, new.ledger_key}
    assert not (home / NEXT).exists() and (home / REQUEST).exists()
    assert all(secret[12:76] not in path.read_bytes() for path in home.rglob("*") if path.is_file())  # it is gone
    with Ledger(home / "ledger.db") as book:
        before = len(book.entries("north"))
    block(consortium, runs.begin(consortium, config), 1)
    with Ledger(home / "ledger.db") as book:
        assert len(book.entries("north")) > before
        book.verify()
    with Ledger(consortium.home / BOOK) as book:
        words = [seals.read(body) for body in book.statements("north")]
    assert [word.key for word in words] == [old.ledger_key.hex(), new.ledger_key.hex()]
    assert len({word.ledger for word in words}) == 1


def test_until_the_kit_has_come_the_old_keys_are_in_use(consortium: Consortium, config: Config) -> None:
    before = hospital(consortium).identity.member
    hospital(consortium).rotate(contact="it")
    assert hospital(consortium).identity.member == before
    run = runs.begin(consortium, config)
    block(consortium, run, 1)
    assert "north" in runs.progress(run)[-1].contributed
    with pytest.raises(DeploymentError, match="has new keys already"):
        hospital(consortium).rotate(contact="it")


def test_the_coordinator_takes_other_keys_only_where_it_is_told_to(consortium: Consortium) -> None:
    request = hospital(consortium).rotate(contact="it")
    with pytest.raises(DeploymentError, match="--replace"):
        consortium.approve(request)
    consortium.suspend("north")
    consortium.approve(request, replace=True)
    assert "north" in {member.name for member in consortium.members}


def test_keys_that_were_replaced_do_not_come_back(consortium: Consortium) -> None:
    first = (consortium.home.parent / "north" / "north.request").read_bytes()
    rotated(consortium)
    with pytest.raises(DeploymentError, match="do not come back"):
        consortium.approve(first, replace=True)


def test_whoever_has_the_old_keys_is_in_no_sum(consortium: Consortium, config: Config, tmp_path: Path) -> None:
    home = consortium.home.parent / "north"
    shutil.copytree(home, tmp_path / "thief")
    rotated(consortium)
    shutil.move(home, tmp_path / "honest")
    shutil.move(tmp_path / "thief", home)
    with pytest.raises(DeploymentError, match="does not have north with its keys"):
        hospital(consortium).accept_roster((consortium.roster_file() or Path()).read_bytes())
    run = runs.begin(consortium, config)
    block(consortium, run, 1)  # the thief answers in north's place, with the roster and the keys of before
    report = runs.progress(run)[-1]
    assert "roster version" in report.refused["north"] and "north" not in report.contributed
    # And with the new roster by force: the keys are not in it
    (home / "roster").write_bytes((tmp_path / "honest" / "roster").read_bytes())
    with pytest.raises((PrivfedError, ValueError), match="not in the roster"):
        with hospital(consortium).opened():
            pass


def test_a_roster_out_of_its_order_or_of_another_authority_is_not_accepted_with_new_keys(
    consortium: Consortium, tmp_path: Path
) -> None:
    hospital(consortium).rotate(contact="it")
    request = (consortium.home.parent / "north" / NEXT / "north.request").read_bytes()
    with pytest.raises(DeploymentError, match="does not have north with its keys"):
        hospital(consortium).renew(consortium.kit("north"))  # the kit of before
    consortium.approve(request, replace=True)
    consortium.next_roster()
    consortium.suspend("west")
    extra = Hospital.request(tmp_path / "east", consortium="consortium", name="east", organisation="e", contact="it")
    consortium.approve(extra)
    consortium.next_roster()  # version 3: the site has not seen version 2
    with pytest.raises(RemoteProtocolError, match="does not follow"):
        hospital(consortium).renew(consortium.kit("north"))
    before = hospital(consortium).identity.member
    assert (consortium.home.parent / "north" / NEXT / "keys.json").exists()
    assert hospital(consortium).identity.member == before


def test_a_renewal_that_was_cut_short_is_done_again(consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    consortium.approve(hospital(consortium).rotate(contact="it"), replace=True)
    consortium.next_roster()
    package = kits.package

    def full(*given: object, **more: object) -> Path:
        raise DeploymentError("the disk is full")

    monkeypatch.setattr(kits, "package", full)
    with pytest.raises(DeploymentError, match="the disk is full"):
        hospital(consortium).renew(consortium.kit("north"))
    monkeypatch.setattr(kits, "package", package)
    hospital(consortium).renew(consortium.kit("north"))
    with hospital(consortium).opened():
        pass
    with pytest.raises(DeploymentError, match="has no new keys"):
        hospital(consortium).renew(consortium.kit("north"))


def test_a_backup_of_before_the_keys_changed_catches_up_and_takes_part_with_new_ones(
    consortium: Consortium, config: Config, tmp_path: Path
) -> None:
    backup.make(hospital(consortium), tmp_path / "north.backup")
    rotated(consortium)
    block(consortium, runs.begin(consortium, config), 1)  # its word is signed by a key that the backup does not have
    true = read(hospital(consortium)).epsilon
    home = consortium.home.parent / "north"
    shutil.rmtree(home)
    backup.restore(home, (tmp_path / "north.backup").read_bytes())
    done = account.catch_up(hospital(consortium), account.account(consortium, "north"))
    assert done.outdated and done.epsilon >= true > 0
    with pytest.raises(DeploymentError, match="privfed site rotate"), hospital(consortium).opened():
        pass
    rotated(consortium)
    run = runs.begin(consortium, config)
    signed_block(consortium, run.path.name, 1)  # which reminds it of the word under the lost key
    assert "north" in runs.progress(run)[-1].contributed


def test_a_key_that_no_roster_names_is_not_the_sites(consortium: Consortium, config: Config, tmp_path: Path) -> None:
    backup.make(hospital(consortium), tmp_path / "north.backup")
    rotated(consortium)
    block(consortium, runs.begin(consortium, config), 1)
    home = consortium.home.parent / "north"
    shutil.rmtree(home)
    backup.restore(home, (tmp_path / "north.backup").read_bytes())
    forger = bytes(range(32))
    forged = sign_roster(Roster(version=2, previous=bytes(31) + b"1", members=()), forger).hex()
    for rosters, reason in (((), "does not know as its own"), ((forged,), "has not signed")):
        with pytest.raises(DeploymentError, match=reason):
            account.catch_up(hospital(consortium), account_of(consortium, rosters=rosters))
    assert hospital(consortium).restored is not None and hospital(consortium).roster.version == 1


def test_words_under_the_former_keys_count_when_a_backup_is_restored(
    consortium: Consortium, config: Config, tmp_path: Path
) -> None:
    block(consortium, runs.begin(consortium, config), 1)
    rotated(consortium)
    backup.make(hospital(consortium), tmp_path / "north.backup")
    shutil.rmtree(consortium.home.parent / "north")
    backup.restore(consortium.home.parent / "north", (tmp_path / "north.backup").read_bytes())
    assert account.catch_up(hospital(consortium), account.account(consortium, "north")).charged == ()
