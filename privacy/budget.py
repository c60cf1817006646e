"""What a site is willing to spend on one data set, over all runs and for one audience."""

from collections.abc import Iterable

import msgspec

from .accountant import Accountant
from .errors import BudgetExhausted
from .events import Charge

_ROUNDING = 1e-6  # a plan calibrated to the budget must fit into it whatever the last bits do
_HORIZON = 2**20  # rounds; nobody plans further


class Budget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An ε at a δ that the composition of everything ever charged must not exceed.

    Args:
        epsilon: greater than 0; may be infinite, which says that the site sets no limit.
        delta: in (0, 1).
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be greater than 0, got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be in (0, 1), got {self.delta}")

    def ensure(self, accountant: Accountant, prior: Iterable[Charge], new: Iterable[Charge], *, site: str) -> None:
        """Returns if `new` on top of `prior` stays within the budget, to a relative 1e-6.

        Raises:
            BudgetExhausted: it does not.
        """
        prior = tuple(prior)
        would_be = accountant.epsilon((*prior, *new), self.delta).value
        if not self._allows(would_be):
            spent = accountant.epsilon(prior, self.delta).value
            raise BudgetExhausted(site, spent=spent, would_be=would_be, limit=self.epsilon, delta=self.delta)

    def remaining_rounds(self, accountant: Accountant, prior: Iterable[Charge], each: Iterable[Charge]) -> int:
        """How many more rounds that each charge `each` fit on top of `prior`; never more than 2²⁰."""
        prior, each = tuple(prior), tuple(each)

        def fits(rounds: int) -> bool:
            more = (Charge(charge.event, charge.count * rounds, charge.group) for charge in each)
            return self._allows(accountant.epsilon((*prior, *more), self.delta).value)

        if not fits(1):
            return 0
        most = 1
        while most < _HORIZON and fits(2 * most):
            most *= 2
        step = most // 2 if most < _HORIZON else 0  # bisect between most, which fits, and 2 · most, which does not
        while step:
            if fits(most + step):
                most += step
            step //= 2
        return most

    def _allows(self, epsilon: float) -> bool:
        return epsilon <= self.epsilon * (1 + _ROUNDING)
