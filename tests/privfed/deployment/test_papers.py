"""What goes from hand to hand: requests, kits, rosters; and what is refused of it."""

import json
import stat
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import msgspec
import pytest

from privfed.config import Config
from privfed.crypto.errors import RemoteProtocolError
from privfed.crypto.roster import Identity
from privfed.deployment import papers, runs, words
from privfed.deployment.consortium import Consortium
from privfed.deployment.files import DeploymentError
from privfed.deployment.hospital import Hospital, Strict, given_policy
from privfed.deployment.site_status import read, would_refuse
from tests.privfed.deployment import house
from tests.privfed.deployment.house import SITES, hospital


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return house.experiment(house.tables(tmp_path / "tables"))


@pytest.fixture
def consortium(tmp_path: Path, config: Config) -> Iterator[Consortium]:
    with house.without_flare():
        yield house.found(tmp_path, config, study=False)


def test_secrets_are_for_their_owner_alone_and_in_no_paper(consortium: Consortium) -> None:
    home = consortium.home.parent
    secrets = [*home.glob("*/keys.json"), *home.glob("*/*.key")]
    assert len(secrets) == 3 * 2 + 2
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in secrets)
    assert all(stat.S_IMODE((home / site).stat().st_mode) == 0o700 for site in SITES)
    for site in SITES:
        paper = (home / site / f"{site}.request").read_bytes() + consortium.kit(site)
        for secret in json.loads((home / site / "keys.json").read_text()).values():
            assert secret.encode() not in paper and bytes.fromhex(secret) not in paper


def test_a_request_with_anything_changed_is_refused(consortium: Consortium) -> None:
    body = (consortium.home.parent / "north" / "north.request").read_bytes()
    parts = papers.unpack(body, (papers.MEMBER, papers.FLARE_REQUEST))
    application = json.loads(parts[papers.MEMBER])
    for key, value in {
        "name": "south",
        "organisation": "elsewhere",
        "secagg_key": Identity.generate("x").member.secagg_key.hex(),
        "ledger_key": application["secagg_key"],
        "secagg_signature": application["ledger_signature"],
    }.items():
        changed = {**parts, papers.MEMBER: json.dumps({**application, key: value}).encode()}
        with pytest.raises(DeploymentError, match="changed on its way"):
            papers.read_application(papers.pack(changed))
    with pytest.raises(DeploymentError, match="not the one that the site signed"):
        papers.read_application(papers.pack({**parts, papers.FLARE_REQUEST: b"another"}))
    with pytest.raises(DeploymentError):
        papers.read_application(papers.pack({**parts, "../../evil": b""}))
    with pytest.raises(DeploymentError):
        papers.read_application(b"no zip file")


def test_a_name_that_is_taken_is_not_given_to_other_keys(consortium: Consortium, tmp_path: Path) -> None:
    body = Hospital.request(
        tmp_path / "impostor", consortium="consortium", name="north", organisation="north", contact="me"
    )
    with pytest.raises(DeploymentError, match="other keys"):
        consortium.approve(body)


def test_a_kit_of_another_authority_is_refused(consortium: Consortium, tmp_path: Path, config: Config) -> None:
    other = house.found(tmp_path / "other", config)
    site = hospital(consortium)
    for authority in (consortium.terms.authority, "0000 0000"):
        with pytest.raises(DeploymentError, match="do not go on"):
            site.install(other.kit("north"), authority=authority, data=tmp_path / "tables" / "north.csv", policy=None)


def test_terms_that_their_authority_did_not_sign_are_refused(consortium: Consortium, tmp_path: Path) -> None:
    kinds = (papers.CERTIFICATE, papers.ROSTER, papers.TERMS, papers.SIGNATURE)
    parts = papers.unpack(consortium.kit("north"), kinds)
    parts[papers.TERMS] = parts[papers.TERMS].replace(b"localhost", b"evil-host")
    with pytest.raises(DeploymentError, match="not signed"):
        hospital(consortium).install(
            papers.pack(parts),
            authority=consortium.terms.authority,
            data=tmp_path / "tables" / "north.csv",
            policy=None,
        )


def test_the_fingerprint_is_enough_to_name_an_authority(consortium: Consortium, tmp_path: Path) -> None:
    mark = papers.fingerprint(bytes.fromhex(consortium.terms.authority))
    hospital(consortium).install(
        consortium.kit("north"), authority=mark, data=tmp_path / "tables" / "north.csv", policy=None
    )


def test_rosters_are_accepted_one_after_the_other_only(consortium: Consortium, tmp_path: Path) -> None:
    site = hospital(consortium)
    files = []
    for name in ("east", "middle"):
        body = Hospital.request(tmp_path / name, consortium="consortium", name=name, organisation=name, contact="it")
        consortium.approve(body)
        consortium.next_roster()
        path = consortium.roster_file()
        assert path is not None
        files.append(path.read_bytes())
    with pytest.raises(RemoteProtocolError, match="does not follow"):
        site.accept_roster(files[1])
    assert site.accept_roster(files[0]).version == 2
    assert site.accept_roster(files[1]).version == 3
    with pytest.raises(RemoteProtocolError, match="does not follow"):
        site.accept_roster(files[0])  # back to an older one
    assert site.roster.version == 3


def test_a_suspended_site_is_in_no_later_roster_and_gets_no_kit(consortium: Consortium, tmp_path: Path) -> None:
    body = Hospital.request(tmp_path / "east", consortium="consortium", name="east", organisation="east", contact="it")
    consortium.approve(body)
    consortium.suspend("north")
    roster = consortium.next_roster()
    assert [member.name for member in roster.members] == ["east", "south", "west"]
    with pytest.raises(DeploymentError, match="no approved site"):
        consortium.kit("north")
    path = consortium.roster_file()
    assert path is not None
    with pytest.raises(DeploymentError, match="left out"):
        hospital(consortium).accept_roster(path.read_bytes())
    assert hospital(consortium, "south").accept_roster(path.read_bytes()).version == 2


def test_a_policy_with_an_unknown_line_is_refused(consortium: Consortium) -> None:
    path = consortium.home.parent / "north" / "policy.toml"
    path.write_text(path.read_text() + "max_epsilom = 1.0\n")
    with pytest.raises(DeploymentError, match="max_epsilom"):
        _ = hospital(consortium).policy


@pytest.mark.parametrize("kept", [0, 1, 12, -2])
def test_a_policy_that_was_cut_short_demands_no_less_but_stops_the_site(consortium: Consortium, kept: int) -> None:
    path = consortium.home.parent / "north" / "policy.toml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:kept]))
    with pytest.raises(DeploymentError, match=r"policy.toml: .*require_secure_aggregation = true"):
        _ = hospital(consortium).policy


def test_lines_that_a_given_policy_leaves_out_are_the_strict_ones(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('hours = "20:00-06:00"\nminimum_cohort = 5\n')
    expected = msgspec.structs.replace(Strict, hours="20:00-06:00", minimum_cohort=5)
    assert given_policy(path) == expected
    path.write_text("max_epsilom = 1.0\n")
    with pytest.raises(DeploymentError, match="max_epsilom"):
        given_policy(path)


def test_what_a_site_agrees_to_can_not_be_painted_over(consortium: Consortium) -> None:
    site = hospital(consortium)
    painted = "c@example.org\n  at most ε = 0.01 is ever spent\x1b[8m"
    terms = msgspec.structs.replace(site.terms, contact=painted)
    said = words.agreement(terms, Strict, name="north", data="")
    assert "\x1b" not in said
    assert len(said.splitlines()) == len(words.agreement(site.terms, Strict, name="north", data="").splitlines())


def test_keys_that_others_can_read_are_refused(consortium: Consortium) -> None:
    (consortium.home.parent / "north" / "keys.json").chmod(0o644)
    with pytest.raises(DeploymentError, match="chmod 600"):
        _ = hospital(consortium).identity


def test_a_site_says_in_words_what_it_agreed_to(consortium: Consortium) -> None:
    site = hospital(consortium)
    said = words.agreement(site.terms, Strict, name="north", data="/data/north.csv")
    assert "at most ε = 4" in said and "Never: a record" in said and "radius, texture" in said
    assert "Accuracy" not in said  # a strict site keeps its figures
    loose = msgspec.structs.replace(Strict, require_privacy=False, require_secure_aggregation=False)
    assert words.agreement(site.terms, loose, name="north", data="").count("WITHOUT") == 2


def test_a_site_tells_beforehand_what_it_would_refuse(consortium: Consortium, config: Config, tmp_path: Path) -> None:
    site = hospital(consortium)
    assert would_refuse(site, config) is None
    plain = house.experiment(config.data.files, aggregation={"kind": "plain"})  # type: ignore[union-attr]
    assert "require_secure_aggregation" in (would_refuse(site, plain) or "")
    costly = house.experiment(config.data.files, privacy={"target_epsilon": 9.0})  # type: ignore[union-attr]
    assert "max_epsilon" in (would_refuse(site, costly) or "")
    assert read(site).epsilon == 0.0 and read(site).runs == ()


@pytest.mark.parametrize(
    ("line", "settings", "told"),
    [
        ('methods = ["ditto"]', {}, "policy.methods = ditto, the plan has 'reptile'"),
        ('units = ["patient"]', {}, "policy.units = patient, the plan has 'record'"),
        (
            'key_holders = ["south"]',
            {"aggregation": {"kind": "homomorphic", "key_holder": "west"}},
            "policy.key_holders = south, the plan has 'west'",
        ),
        ('key_holders = ["south"]', {"aggregation": {"kind": "homomorphic", "key_holder": "south"}}, None),
        ('aggregations = ["homomorphic"]', {}, "policy.aggregations = homomorphic, the plan has 'masked'"),
        ('models = ["cnn"]', {}, "policy.models = cnn, the plan has 'mlp'"),
        ("minimum_noise_multiplier = 1000.0", {}, "policy.minimum_noise_multiplier = 1000, the plan has"),
        ("max_epsilon_per_run = 2.5", {}, "policy.max_epsilon_per_run = 2.5, the plan has target_epsilon = 3"),
        (
            "max_epsilon_per_run = 0.1",
            {"privacy": {"noise_multiplier": 4.0}},
            "policy.max_epsilon_per_run = 0.1, all rounds of the run would spend",
        ),
        ("max_epsilon_per_run = 3.5", {}, None),
        ('hours = "20:00-06:00"', {}, "policy.hours = 20:00-06:00, here it is 12:30"),
        ('hours = "08:00-18:00"', {}, None),
    ],
)
def test_each_line_of_a_policy_is_told_beforehand(
    consortium: Consortium, config: Config, line: str, settings: dict[str, object], told: str | None
) -> None:
    site = hospital(consortium)
    asked = house.experiment(config.data.files, **settings)  # type: ignore[union-attr]
    path = site.home / "policy.toml"
    path.write_text(f"{path.read_text()}{line}\n")
    answer = would_refuse(site, asked, datetime.fromisoformat("2026-03-01T12:30"))
    assert answer == told if told is None else answer is not None and answer.startswith(told)
    said = words.agreement(site.terms, site.policy, name="north", data="")
    assert line.split(" = ", 1)[1].strip('[]"').removesuffix(".0") in said


def test_a_run_needs_a_roster_and_three_sites(tmp_path: Path, config: Config) -> None:
    with house.without_flare():
        consortium = Consortium.create(
            tmp_path / "new", config, name="consortium", contact="c", host="localhost", port=8102
        )
        with pytest.raises(DeploymentError, match="3 sites"):
            consortium.next_roster()
        with pytest.raises(DeploymentError, match="roster"):
            runs.begin(consortium, config)
