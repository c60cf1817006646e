"""How much noise a target ε needs."""

import math
from collections.abc import Callable, Iterable

from .accountant import Accountant
from .errors import NoGuarantee
from .events import Charge

_LEAST, _MOST = 1e-3, 1e6  # noise multipliers beyond either end are mistakes, not mechanisms
SLACK = 0.005
"""How far below the target ε may end up, relatively."""
_AIM = 0.998  # inside the slack, so that a step which lands near it ends the search
_MAX_STEPS = 60


def noise_multiplier_for(
    target_epsilon: float,
    delta: float,
    charges: Callable[[float], Iterable[Charge]],
    accountant: Accountant,
    *,
    near: float | None = None,
) -> float:
    """The least noise multiplier whose plan costs at most `target_epsilon`, within half a percent of ε.

    The search asks the accountant about five significant digits only, in a fixed order: the same question put twice
    to one accountant is answered from its cache. It asks the quick bounds first, which are never below the final one.

    **Guarantees.** `accountant.epsilon(charges(result), delta).value <= target_epsilon`.

    Args:
        target_epsilon: greater than 0.
        delta: in (0, 1).
        charges: the whole plan as a function of its noise multiplier; more noise must not cost more.
        accountant: prices the plan, and remembers.
        near: where to begin, if the answer to nearly the same question is known.

    Raises:
        NoGuarantee: no noise multiplier reaches the target: some charge does not depend on it.
        ValueError: a target out of range, or a plan that no noise multiplier makes as expensive as the target.

    Example:
        >>> def plan(sigma: float) -> list[Charge]:
        ...     return [Charge(PoissonGaussian(sample_rate=0.1, noise_multiplier=sigma), count=400)]
        >>> noise_multiplier_for(4.0, 1e-5, plan, Accountant())
        2.3385
    """
    if not (target_epsilon > 0 and math.isfinite(target_epsilon)):
        raise ValueError(f"target_epsilon must be positive and finite, got {target_epsilon}")

    def by_rdp(sigma: float) -> float:
        return accountant.rdp_epsilon(charges(sigma), delta)

    def quickly(sigma: float) -> float:
        return accountant.quick_epsilon(charges(sigma), delta)

    def finely(sigma: float) -> float:
        return accountant.epsilon(charges(sigma), delta).value

    # Each search starts from the answer of a quicker and larger bound: enough noise, and close to what is sought.
    enough = near or _least(by_rdp, target_epsilon, *_bracket(by_rdp, target_epsilon, start=1.0))
    low, high = _bracket(quickly, target_epsilon, start=enough)
    enough = _least(quickly, target_epsilon, low, high)
    if finely(enough) >= target_epsilon * (1 - SLACK):
        return enough
    low, high = _bracket(finely, target_epsilon, start=enough)
    return _least(finely, target_epsilon, low, high)


def _bracket(epsilon: Callable[[float], float], target: float, start: float) -> tuple[float, float]:
    """Two noise multipliers, the lower too small for the target and the upper enough."""
    low = high = _round_up(start)
    factor = 1.1 if start != 1.0 else 2.0  # near an answer already, or anywhere
    while epsilon(high) > target:
        if high >= _MOST:
            raise NoGuarantee(
                f"no noise_multiplier up to {_MOST:g} brings ε to {target:g}: part of the plan does not depend on it"
            )
        low, high = high, _round_up(high * factor)
        factor *= factor
    while epsilon(low) <= target:
        if low <= _LEAST:
            raise ValueError(
                f"the plan costs less than target_epsilon = {target:g} with any noise_multiplier from {_LEAST:g}: "
                "lower the target"
            )
        low, high = _round_up(low / factor), low
        factor *= factor
    return low, high


def _least(epsilon: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Narrows the bracket until `high` is within the slack, by secants of log ε over log σ with bisection as guard."""
    below, above = epsilon(low), epsilon(high)
    for step in range(_MAX_STEPS):
        if above >= target * (1 - SLACK):
            break
        middle = math.sqrt(low * high)
        if step % 3 < 2 and 0 < above and math.isfinite(below):
            slope = math.log(high / low) / math.log(above / below)
            middle = low * (target * _AIM / below) ** slope
        sigma = _round_up(middle)
        if not low < sigma < high:  # nothing between them in five digits
            sigma = _round_up(math.sqrt(low * high))
            if not low < sigma < high:
                break
        value = epsilon(sigma)
        if value > target:
            low, below = sigma, value
        else:
            high, above = sigma, value
    return high


def _round_up(sigma: float) -> float:
    """Five significant digits, away from zero."""
    unit = 10.0 ** (math.floor(math.log10(sigma)) - 4)
    rounded = float(f"{math.ceil(sigma / unit - 1e-9) * unit:.5g}")
    return min(max(rounded, _LEAST), _MOST)
