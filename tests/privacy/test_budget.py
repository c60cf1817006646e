"""A budget: the last round that fits is allowed, the next is not."""

import math
import pickle

import pytest

from privfed.privacy.accountant import Accountant
from privfed.privacy.budget import Budget
from privfed.privacy.errors import BudgetExhausted
from privfed.privacy.events import Charge, Gaussian, PoissonGaussian

ROUND = Charge(PoissonGaussian(0.1, 2.0), 5)


def times(rounds: int) -> list[Charge]:
    return [Charge(ROUND.event, ROUND.count * rounds)]


def test_the_edge_is_inside_and_a_millionth_beyond_is_not() -> None:
    accountant = Accountant()
    cost = accountant.epsilon(times(10), 1e-5).value
    for limit in (cost, cost / (1 + 0.9e-6)):
        Budget(epsilon=limit, delta=1e-5).ensure(accountant, times(9), [ROUND], site="a")
    with pytest.raises(BudgetExhausted) as caught:
        Budget(epsilon=cost / (1 + 1.1e-6), delta=1e-5).ensure(accountant, times(9), [ROUND], site="a")
    error = caught.value
    assert (error.site, error.would_be, error.delta) == ("a", cost, 1e-5)
    assert error.spent == accountant.epsilon(times(9), 1e-5).value < error.limit < error.would_be
    assert "'a'" in str(error) and "raise the budget" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_release_without_noise_never_fits_a_finite_budget() -> None:
    with pytest.raises(BudgetExhausted):
        Budget(epsilon=1e9, delta=1e-5).ensure(Accountant(), [], [Charge(Gaussian(0.0))], site="a")
    Budget(epsilon=math.inf, delta=1e-5).ensure(Accountant(), [], [Charge(Gaussian(0.0))], site="a")


@pytest.mark.parametrize("rounds", [1, 2, 7, 8, 20])
def test_remaining_rounds_are_exactly_those_that_fit(rounds: int) -> None:
    accountant = Accountant()
    budget = Budget(epsilon=accountant.epsilon(times(3 + rounds), 1e-5).value, delta=1e-5)
    assert budget.remaining_rounds(accountant, times(3), [ROUND]) == rounds
    assert budget.remaining_rounds(accountant, times(3 + rounds), [ROUND]) == 0
    assert Budget(epsilon=math.inf, delta=1e-5).remaining_rounds(accountant, [], []) == 2**20


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0)])
def test_impossible_budgets_are_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(ValueError, match=r"epsilon|delta"):
        Budget(epsilon=epsilon, delta=delta)
