"""The noise for a target ε: never too little, hardly too much."""

import pytest

from privfed.privacy.accountant import Accountant
from privfed.privacy.calibration import noise_multiplier_for
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import Charge, Gaussian, PoissonGaussian


@pytest.mark.parametrize(
    ("target", "rate", "steps"),
    [(4.0, 0.1, 400), (1.0, 0.1, 400), (2.0, 0.01, 1000), (4.0, 1.0, 100), (8.0, 0.5, 50), (100.0, 0.2, 20)],
)
def test_epsilon_reaches_the_target_and_stays_below(target: float, rate: float, steps: int) -> None:
    accountant = Accountant()

    def plan(sigma: float) -> list[Charge]:
        return [Charge(PoissonGaussian(rate, sigma), steps)]

    sigma = noise_multiplier_for(target, 1e-5, plan, accountant)
    assert 0.995 * target <= accountant.epsilon(plan(sigma), 1e-5).value <= target
    assert Accountant().epsilon(plan(sigma), 1e-5).value <= target  # and not only in the eyes of that cache
    assert float(f"{sigma:.5g}") == sigma


def test_asking_again_computes_nothing() -> None:
    accountant = Accountant()
    priced = []

    def plan(sigma: float) -> list[Charge]:
        priced.append(sigma)
        return [Charge(PoissonGaussian(0.1, sigma), 100)]

    first = noise_multiplier_for(3.0, 1e-5, plan, accountant)
    asked, misses = len(priced), accountant._cost.cache_info().misses
    assert noise_multiplier_for(3.0, 1e-5, plan, accountant) == first
    assert priced[asked:] == priced[:asked]
    assert accountant._cost.cache_info().misses == misses


def test_a_plan_with_parts_and_a_fixed_release() -> None:
    accountant = Accountant()

    def plan(sigma: float) -> list[Charge]:
        return [
            Charge(PoissonGaussian(0.1, sigma), 100, "s/support"),
            Charge(PoissonGaussian(0.1, 2 * sigma), 100, "s/query"),
            Charge(Gaussian(8.0)),
        ]

    sigma = noise_multiplier_for(2.0, 1e-5, plan, accountant)
    assert 0.995 * 2 <= accountant.epsilon(plan(sigma), 1e-5).value <= 2


def test_targets_out_of_reach_are_refused() -> None:
    accountant = Accountant()
    with pytest.raises(NoGuarantee, match="does not depend on it"):
        noise_multiplier_for(0.5, 1e-5, lambda sigma: [Charge(Gaussian(1.0)), Charge(Gaussian(sigma))], accountant)
    with pytest.raises(ValueError, match="lower the target"):
        noise_multiplier_for(50.0, 1e-5, lambda sigma: [Charge(Gaussian(1.0))], accountant)
    for target in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="target_epsilon"):
            noise_multiplier_for(target, 1e-5, lambda sigma: [Charge(Gaussian(sigma))], accountant)
