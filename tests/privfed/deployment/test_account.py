"""What a coordinator's account of a site may say, and what becomes of a lie in it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from privfed import config_io
from privfed.config import Config
from privfed.crypto import keys
from privfed.deployment import account, backup, runs
from privfed.deployment.account import Account, Ran
from privfed.deployment.consortium import Consortium
from privfed.deployment.files import DeploymentError
from privfed.deployment.hospital import ACCOUNTS, LEDGER
from privfed.deployment.site_status import read
from privfed.folder import RunFolder
from privfed.privacy.ledger import Ledger
from tests.privfed.deployment import house
from tests.privfed.deployment.house import account_of, hospital
from tests.privfed.deployment.test_blocks import block, spends


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return house.experiment(house.tables(tmp_path / "tables"), rounds=3)


@pytest.fixture
def consortium(tmp_path: Path, config: Config) -> Iterator[Consortium]:
    with house.without_flare():
        yield house.found(tmp_path, config, study=False)


def told(consortium: Consortium, **changed: Any) -> tuple[Ran, ...]:
    """The runs of the account, each told otherwise."""
    given = msgspec.json.decode(account.account(consortium, "north"), type=Account)
    return tuple(msgspec.structs.replace(ran, **changed) for ran in given.runs)


def restored(consortium: Consortium, run: RunFolder, *, before: int, after: int) -> None:
    """A backup is made after so many rounds of a run, and put back after more."""
    if before:
        block(consortium, run, before)
    path = consortium.home.parent / "north.backup"
    backup.make(hospital(consortium), path)
    block(consortium, run, after)
    shutil.rmtree(hospital(consortium).home)
    backup.restore(consortium.home.parent / "north", path.read_bytes())


def terms_at(consortium: Consortium, site: str, run: str) -> list[str]:
    """What a site's chain has of what a run promised."""
    with Ledger(hospital(consortium, site).home / LEDGER) as book:
        lines = [line.entry for line in book.entries(site)]
    return [entry.metadata["terms"] for entry in lines if (entry.kind, entry.run) == ("run", run)]


def test_what_the_chain_has_begun_is_not_told_otherwise(consortium: Consortium, config: Config) -> None:
    run = runs.begin(consortium, config)
    restored(consortium, run, before=1, after=1)
    more_noise = run.facts().noise_multiplier * 10
    fewer_rounds = config_io.to_toml(msgspec.structs.replace(config, rounds=1))
    before = spends(hospital(consortium).home / LEDGER, "north")
    for lie in ({"noise_multiplier": more_noise}, {"config": fewer_rounds}, {"side_noise": {"figures": 1.0}}):
        lie = {
            key: msgspec.convert(value, account.SideNoise) if key == "side_noise" else value
            for key, value in lie.items()
        }
        with pytest.raises(DeploymentError, match="than this site's own ledger"):
            account.catch_up(hospital(consortium), account_of(consortium, runs=told(consortium, **lie)))
    assert spends(hospital(consortium).home / LEDGER, "north") == before and hospital(consortium).restored is not None
    assert account.catch_up(hospital(consortium), account.account(consortium, "north")).charged == (run.path.name,)


def test_noise_that_its_own_configuration_denies_is_not_believed(tmp_path: Path, consortium: Consortium) -> None:
    config = house.experiment(
        house.tables(tmp_path / "tables"), privacy={"delta": 1e-5, "target_epsilon": 3.0, "noise_multiplier": 30.0}
    )
    restored(consortium, runs.begin(consortium, config), before=0, after=1)
    with pytest.raises(DeploymentError, match="is not what its configuration says"):
        account.catch_up(hospital(consortium), account_of(consortium, runs=told(consortium, noise_multiplier=60.0)))


def test_a_lie_about_a_run_that_the_chain_does_not_know_is_shown_by_another_sites_chain(
    consortium: Consortium, config: Config
) -> None:
    """Ten times the noise, and no words: this site alone can not know. It keeps what it needs to show it."""
    run = runs.begin(consortium, config)
    restored(consortium, run, before=0, after=2)
    true = read(hospital(consortium, "south")).epsilon
    lie = account_of(consortium, words=(), runs=told(consortium, noise_multiplier=run.facts().noise_multiplier * 10))
    account.catch_up(hospital(consortium), lie)
    assert read(hospital(consortium)).epsilon < true  # it came to too little
    assert terms_at(consortium, "north", run.path.name) != terms_at(consortium, "south", run.path.name)
    with Ledger(hospital(consortium).home / LEDGER) as book:
        (line,) = [line.entry for line in book.entries("north") if "account" in line.entry.metadata]
    (kept,) = (hospital(consortium).home / ACCOUNTS).iterdir()
    said = msgspec.json.decode(kept.read_bytes(), type=Account)
    assert kept.read_bytes() == lie and said.statement.hex() == line.metadata["account"] == kept.stem
    # The coordinator's own signature over the lie, from the chain and the file
    signature = bytes.fromhex(line.metadata["signature"])
    keys.verify(bytes.fromhex(consortium.terms.coordinator), signature, said.statement)
    backup.make(hospital(consortium), consortium.home.parent / "again")
    parts = backup.read((consortium.home.parent / "again").read_bytes())[1]
    assert parts[f"{ACCOUNTS}/{kept.name}"] == lie


def test_a_true_account_leaves_the_terms_that_the_other_sites_have(consortium: Consortium, config: Config) -> None:
    run = runs.begin(consortium, config)
    restored(consortium, run, before=0, after=1)
    account.catch_up(hospital(consortium), account.account(consortium, "north"))
    assert terms_at(consortium, "north", run.path.name) == terms_at(consortium, "south", run.path.name)


def test_an_account_that_is_refused_is_not_kept(consortium: Consortium, config: Config) -> None:
    restored(consortium, runs.begin(consortium, config), before=0, after=1)
    with pytest.raises(DeploymentError, match="a run is missing from it"):
        account.catch_up(hospital(consortium), account_of(consortium, runs=()))
    assert not (hospital(consortium).home / ACCOUNTS).exists()
