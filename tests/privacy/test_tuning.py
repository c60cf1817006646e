"""What choosing among private runs costs."""

import math

import numpy as np
import pytest

from privfed.privacy import rdp
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import Charge, Gaussian, PoissonGaussian
from privfed.privacy.tuning import divergence_of, epsilon_of_best

RUN = (Charge(PoissonGaussian(0.1, 2.0), 50),)


def test_one_candidate_costs_what_it_costs() -> None:
    assert epsilon_of_best([RUN], 1e-5) == pytest.approx(rdp.epsilon(divergence_of(RUN), 1e-5))


def test_the_bound_is_theorem_two_worked_by_hand() -> None:
    """A Gaussian of σ has RDP λ/2σ²; with E[K] = 10, η = 1, γ = 1/10."""
    sigma = 4.0
    own = np.array([order / (2 * sigma**2) for order in rdp.ORDERS])
    once = min(2 * (1 - 1 / order) * order / (2 * sigma**2) + 2 * math.log(10) / order for order in rdp.ORDERS)
    by_hand = rdp.epsilon(own + once + math.log(10) / (rdp.ORDERS - 1), 1e-6)
    assert epsilon_of_best([(Charge(Gaussian(sigma)),)] * 10, 1e-6) == pytest.approx(by_hand, rel=1e-6)


def test_more_candidates_cost_more_and_the_dearest_counts() -> None:
    costs = [epsilon_of_best([RUN] * number, 1e-5) for number in (1, 2, 10, 100)]
    assert costs == sorted(costs) and costs[0] < costs[-1]
    dear = (Charge(PoissonGaussian(0.1, 1.0), 50),)
    assert epsilon_of_best([RUN, dear], 1e-5) == pytest.approx(epsilon_of_best([dear, dear], 1e-5))


def test_what_has_no_noise_has_no_bound() -> None:
    with pytest.raises(NoGuarantee, match="without noise"):
        epsilon_of_best([RUN, (Charge(Gaussian(0.0)),)], 1e-5)
    with pytest.raises(NoGuarantee, match="nothing to choose"):
        epsilon_of_best([], 1e-5)
