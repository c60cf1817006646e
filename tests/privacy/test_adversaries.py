"""The table of design/privacy.md, section 4, cell by cell."""

import math

import dp_accounting
import numpy as np
import pytest

from privfed.privacy import rdp
from privfed.privacy.accountant import Accountant
from privfed.privacy.adversaries import Adversary, Deployment, Exposure, check_supported, exposures, seen_by
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import Charge, Gaussian, NoiseSite, PoissonGaussian, PrivacyUnit, Skellam

SHARED = Accountant()
RECORD, PATIENT, CLIENT = PrivacyUnit.RECORD, PrivacyUnit.PATIENT, PrivacyUnit.CLIENT


def deployment(unit: PrivacyUnit, noise: NoiseSite, **changes: object) -> Deployment:
    return Deployment(**{"unit": unit, "noise": noise, "secure_sum": True, "threshold": 4, **changes})  # type: ignore[arg-type]


def table(where: Deployment, charges: list[Charge], **options: object) -> dict[tuple[Adversary, int], Exposure]:
    lines = exposures(where, charges, 1e-5, SHARED, **options)  # type: ignore[arg-type]
    return {(line.adversary, line.colluders): line for line in lines}


def value(line: Exposure) -> float:
    assert line.epsilon is not None, line.reason
    return line.epsilon.value


def shares(count: int, colluders: int, *, rounds: int = 20) -> Charge:
    """z = 5 from all of `count` shares, at so fine a scale that Skellam is Gaussian to a thousandth."""
    event = Skellam(
        share_variance=25 * 10**10 // count, shares=count, colluders=colluders, dim=100, l2_squared=10**10, l1=10**6
    )
    return Charge(event, rounds)


def gaussian(noise: float, rounds: int = 20) -> float:
    """ε of Gaussian noise by RDP at integer orders, where Skellam's bound is."""
    whole = rdp.ORDERS == np.round(rdp.ORDERS)
    return rdp.epsilon(np.where(whole, rounds * rdp.ORDERS / (2 * noise**2), np.inf), 1e-5)


def test_local_noise_is_the_same_against_everybody() -> None:
    charges = [Charge(PoissonGaussian(0.1, 2.0), 100)]
    lines = table(deployment(RECORD, NoiseSite.LOCAL), charges, colluders=(1, 9))
    assert len(lines) == 5
    assert {value(line) for line in lines.values()} == {SHARED.epsilon(charges, 1e-5).value}


@pytest.mark.parametrize(("unit", "noise"), [(RECORD, NoiseSite.LOCAL), (CLIENT, NoiseSite.CENTRAL)])
def test_what_is_released_in_shares_beside_the_updates_is_read_by_shares(unit: PrivacyUnit, noise: NoiseSite) -> None:
    """A site's own noise, or the server's, does not cover counts whose noise came in shares."""
    charges = [Charge(Gaussian(8.0), 20), shares(5, 0)]
    lines = table(deployment(unit, noise), charges, colluders=(2, 4))
    model, other = (value(lines[who, 0]) for who in (Adversary.MODEL_USER, Adversary.OTHER_SITE))
    assert SHARED.epsilon([shares(5, 0)], 1e-5).value < model < other
    if noise is NoiseSite.LOCAL:
        assert other < value(lines[Adversary.COALITION, 2]) < value(lines[Adversary.COALITION, 4])
        assert "own share alone" in lines[Adversary.COALITION, 4].reason


@pytest.mark.parametrize("unit", [RECORD, PATIENT, CLIENT])
@pytest.mark.parametrize("sites", [3, 5])
def test_shared_noise_against_a_site_that_knows_its_own_share(unit: PrivacyUnit, sites: int) -> None:
    """σ·√((n−1)/n); the design's exact Gaussian values are 3.85 → 4.87 at n = 3 and 4.38 at n = 5. At a scale this fine
    Skellam noise costs no more than a ten-thousandth above them; RDP alone is 8 % above."""
    lines = table(deployment(unit, NoiseSite.DISTRIBUTED), [shares(sites, 0)])
    full = value(lines[Adversary.SERVER, 0])
    assert full == value(lines[Adversary.MODEL_USER, 0])
    for got, noise in ((full, 5.0), (value(lines[Adversary.OTHER_SITE, 0]), 5 * math.sqrt((sites - 1) / sites))):
        exact = dp_accounting.get_epsilon_gaussian(noise / math.sqrt(20), 1e-5)
        assert exact * (1 - 1e-9) <= got <= exact * (1 + 1e-4) < gaussian(noise)


def test_colluders_up_to_the_threshold_and_beyond() -> None:
    lines = table(deployment(RECORD, NoiseSite.DISTRIBUTED), [shares(10, 3)], colluders=(0, 2, 3, 4, 9))
    costs = [value(lines[Adversary.COALITION, c]) for c in (0, 2, 3, 4, 9)]
    assert costs == sorted(costs)
    assert costs[0] == value(lines[Adversary.SERVER, 0])
    for c, cost in ((2, costs[1]), (3, costs[2])):
        exact = dp_accounting.get_epsilon_gaussian(5 * math.sqrt((10 - c) / 200), 1e-5)
        assert exact * (1 - 1e-9) <= cost <= exact * (1 + 1e-3)
    own = gaussian(5 / math.sqrt(10))
    assert costs[3] == costs[4] == pytest.approx(own, rel=1e-3)
    assert "own share" in lines[Adversary.COALITION, 4].reason
    # The ledger's own number is that of its tolerated colluders
    assert costs[2] == SHARED.epsilon([shares(10, 3)], 1e-5).value


def test_without_a_secure_sum_the_server_sees_each_share_alone() -> None:
    lines = table(deployment(RECORD, NoiseSite.DISTRIBUTED, secure_sum=False, threshold=None), [shares(10, 0)])
    own = gaussian(5 / math.sqrt(10))
    assert value(lines[Adversary.SERVER, 0]) == pytest.approx(own, rel=1e-3)
    assert value(lines[Adversary.MODEL_USER, 0]) < value(lines[Adversary.OTHER_SITE, 0]) < own


def test_a_trusted_server_has_no_epsilon_against_itself() -> None:
    charges = [Charge(Gaussian(5.0), 20)]
    lines = table(deployment(CLIENT, NoiseSite.CENTRAL), charges, colluders=(2,))
    for key in ((Adversary.SERVER, 0), (Adversary.COALITION, 2)):
        assert lines[key].epsilon is None and "trusted" in lines[key].reason
    assert value(lines[Adversary.OTHER_SITE, 0]) == value(lines[Adversary.MODEL_USER, 0])


@pytest.mark.parametrize(
    ("changes", "amplified"),
    [
        ({"selection": "poisson", "selection_rate": 0.1, "cohort_hidden": True}, True),
        ({"selection": "poisson", "selection_rate": 0.1, "cohort_hidden": False}, False),
        ({"selection": "other", "selection_rate": 0.1, "cohort_hidden": True}, False),
        ({"selection": "all", "cohort_hidden": True}, False),
    ],
)
def test_selection_is_credited_only_if_poisson_and_hidden(changes: dict[str, object], amplified: bool) -> None:
    """z = 1, T = 100: q = 0.1 costs a few, q = 1 costs 91.8. A site that was in 12 rounds is charged for 12, or for all
    100 at the rate."""
    participated, every = [Charge(Gaussian(1.0), 12)], [Charge(Gaussian(1.0), 100)]
    lines = table(deployment(CLIENT, NoiseSite.CENTRAL, **changes), participated, every_round=every)
    plain = SHARED.epsilon(participated, 1e-5).value
    assert value(lines[Adversary.OTHER_SITE, 0]) == plain
    expected = SHARED.epsilon([Charge(PoissonGaussian(0.1, 1.0), 100)], 1e-5).value if amplified else plain
    assert value(lines[Adversary.MODEL_USER, 0]) == expected


def test_hidden_selection_without_the_whole_run_earns_nothing() -> None:
    where = deployment(CLIENT, NoiseSite.CENTRAL, selection="poisson", selection_rate=0.1, cohort_hidden=True)
    charges = [Charge(Gaussian(1.0), 12)]
    assert seen_by(Adversary.MODEL_USER, where, charges)[0] == tuple(charges)


@pytest.mark.parametrize(
    ("unit", "noise", "reason"),
    [
        (PrivacyUnit.NONE, NoiseSite.LOCAL, "claims nothing"),
        (PrivacyUnit.NONE, NoiseSite.DISTRIBUTED, "claims nothing"),
        (CLIENT, NoiseSite.LOCAL, "distributed"),
        (RECORD, NoiseSite.CENTRAL, "un-noised"),
        (PATIENT, NoiseSite.CENTRAL, "un-noised"),
    ],
)
def test_unsupported_combinations_are_refused_with_the_reason(unit: PrivacyUnit, noise: NoiseSite, reason: str) -> None:
    with pytest.raises(NoGuarantee, match=reason):
        check_supported(unit, noise)
    with pytest.raises(NoGuarantee, match=reason):
        exposures(deployment(unit, noise), [], 1e-5, SHARED)


def test_colluders_belong_to_the_coalition() -> None:
    for adversary, colluders in ((Adversary.SERVER, 1), (Adversary.COALITION, -1)):
        with pytest.raises(ValueError, match="colluders"):
            seen_by(adversary, deployment(RECORD, NoiseSite.DISTRIBUTED), [], colluders=colluders)
