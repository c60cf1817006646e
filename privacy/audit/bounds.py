"""From counts of right and wrong guesses to lower bounds of ε that hold with a stated confidence.

Every bound here is exact or errs towards the mechanism: an ε that is reported is one that the data reject.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_ndtr, ndtr, ndtri
from scipy.stats import beta, binom

_Floats = NDArray[np.float64]

_MOST_EPSILON = 700.0  # e^ε is still a float64
_BISECTIONS = 60


def clopper_pearson_upper(hits: ArrayLike, trials: ArrayLike, alpha: float) -> _Floats:
    """float64[...]: what a rate is at most, given so many hits.

    Guarantees:
        P(rate > bound) ≤ ``alpha`` whatever the rate, for independent trials (Clopper and Pearson 1934). One-sided.
    """
    count, number = _counts(hits, trials)
    with np.errstate(invalid="ignore"):
        bound = beta.ppf(1 - alpha, count + 1, number - count)
    return np.where(count >= number, 1.0, bound)


def clopper_pearson_lower(hits: ArrayLike, trials: ArrayLike, alpha: float) -> _Floats:
    """float64[...]: what a rate is at least; as `clopper_pearson_upper`."""
    count, number = _counts(hits, trials)
    return 1.0 - clopper_pearson_upper(number - count, number, alpha)


def mu_lower(fpr_upper: ArrayLike, fnr_upper: ArrayLike) -> _Floats:
    """float64[...]: the least μ for which a μ-GDP mechanism can have error rates as small as these.

    max(0, Φ⁻¹(1 − FPR⁺) − Φ⁻¹(FNR⁺)), from Dong, Roth and Su 2022, Equation 6. Never its absolute value: rates that say
    nothing, FPR⁺ + FNR⁺ ≥ 1, give 0.

    Guarantees:
        If both rates hold together with a confidence, so does the bound, for every mechanism whose trade-off curve is
        Gaussian. For others it says which μ they do *not* have.
    """
    fpr, fnr = np.asarray(fpr_upper, np.float64), np.asarray(fnr_upper, np.float64)
    # A rate of 1 is +∞, of 0 is −∞: the bound is then 0 whatever the other one is
    useless = (fpr >= 1) | (fnr >= 1)
    with np.errstate(invalid="ignore"):
        bound: _Floats = np.where(useless, 0.0, np.maximum(0.0, -ndtri(fpr) - ndtri(fnr)))
    return bound


def gaussian_delta(mu: ArrayLike, epsilon: ArrayLike) -> _Floats:
    """float64[...]: δ(ε) of the μ-GDP mechanism: Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) (Dong et al. 2022, Corollary 1)."""
    m, e = np.asarray(mu, np.float64), np.asarray(epsilon, np.float64)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        delta = ndtr(m / 2 - e / m) - np.exp(e + log_ndtr(-m / 2 - e / m))
    return np.where(m <= 0, 0.0, np.maximum(0.0, delta))


def gaussian_epsilon(mu: ArrayLike, delta: float) -> _Floats:
    """float64[...]: ε at δ on the exact curve of the μ-GDP mechanism, rounded down."""
    m = np.asarray(mu, np.float64)
    low, high = np.zeros_like(m), np.full_like(m, _MOST_EPSILON)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        more = gaussian_delta(m, middle) > delta
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    return low


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The μ whose Gaussian mechanism has this ε at δ."""
    low, high = 0.0, 40.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if float(gaussian_delta(middle, epsilon)) < delta else (low, middle)
    return (low + high) / 2


def epsilon_lower(fpr_upper: ArrayLike, fnr_upper: ArrayLike, delta: float) -> _Floats:
    """float64[...]: the least ε for which an (ε, δ) mechanism can have error rates as small as these.

    max{0, ln((1 − δ − FNR⁺)/FPR⁺), ln((1 − δ − FPR⁺)/FNR⁺)} (Kairouz, Oh and Viswanath 2015, Theorem 2.1). It assumes
    nothing about the mechanism, and is smaller than what `mu_lower` gives where that may be used.
    """
    fpr, fnr = np.asarray(fpr_upper, np.float64), np.asarray(fnr_upper, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        one = np.log(np.maximum(0.0, 1 - delta - fnr)) - np.log(fpr)
        other = np.log(np.maximum(0.0, 1 - delta - fpr)) - np.log(fnr)
    bound: _Floats = np.fmax(0.0, np.fmax(one, other))
    return bound


# One run, many canaries


def one_run_p_value(epsilon: float, delta: float, *, canaries: int, guesses: int, correct: int) -> float:
    """How likely an (ε, δ) mechanism lets so many guesses be correct, at most.

    Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run", Theorem 5.2, as their Appendix D
    computes it: P(Binomial(r, e^ε/(1+e^ε)) ≥ v) + 2mδ · max_i P(v > Binomial ≥ v − i)/i.

    Args:
        canaries: m, each included by its own fair coin.
        guesses: r, how many of them the adversary guessed; it abstained from the others.
        correct: v.
    """
    _check_guesses(canaries, guesses, correct)
    right = 1 / (1 + math.exp(-epsilon))
    exceeds = float(binom.sf(correct - 1, guesses, right))
    if correct == 0 or delta == 0:
        return min(1.0, exceeds)
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
    slope = float(np.max(below / np.arange(1, correct + 1)))
    return min(1.0, exceeds + 2 * canaries * delta * slope)


def one_run_epsilon(delta: float, *, canaries: int, guesses: int, correct: int, alpha: float) -> float:
    """The largest ε that `one_run_p_value` rejects at level ``alpha``; 0 if it rejects none."""

    def rejects(epsilon: float) -> bool:
        return one_run_p_value(epsilon, delta, canaries=canaries, guesses=guesses, correct=correct) < alpha

    return largest(rejects, most=50.0)


def curve_rejected(fnr: Callable[[float], float], *, canaries: int, guesses: int, correct: int, alpha: float) -> bool:
    """Whether under every mechanism with this trade-off curve so many correct guesses are less likely than ``alpha``.

    Mahloujifar, Melis and Chaudhuri 2025, "Auditing f-differential privacy in one run", Algorithm 3. With p_t the
    chance of exactly t correct guesses of g, let r_i = Σ_{t ≥ i} (t/m) p_t and h_i = Σ_{t ≥ i} ((g − t)/m) p_t.
    Turning one canary's coin makes its correct guess a wrong one and leaves the others': so h_i ≥ f(1 − r_{i+1}) for
    the curve f (by its convexity, over all canaries together). If P(≥ c correct) were α, then r_c ≥ αc/m, and h and r
    grow from there to more than all probability there is: r_0 + h_0 > g/m, a contradiction.

    Args:
        fnr: f, the least false-negative rate at a false-positive rate; convex, falling, its own inverse.
        canaries, guesses, correct: m, g and c, as of `one_run_p_value`.
    """
    _check_guesses(canaries, guesses, correct)
    right, wrong = alpha * correct / canaries, alpha * (guesses - correct) / canaries
    for i in range(correct - 1, -1, -1):
        more = max(wrong, fnr(1 - min(1.0, right)))
        right, wrong = right + i / (guesses - i) * (more - wrong), more
        if right + wrong > guesses / canaries:  # both only grow
            return True
    return False


def largest(holds: Callable[[float], bool], *, most: float) -> float:
    """The largest x in [0, most] where ``holds``, rounded down; 0 if nowhere. It must hold below wherever it does."""
    if holds(most):
        return most
    low, high = 0.0, most
    while high - low > 1e-4 * max(1e-2, low):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _counts(hits: ArrayLike, trials: ArrayLike) -> tuple[_Floats, _Floats]:
    count, number = np.asarray(hits, np.float64), np.asarray(trials, np.float64)
    if np.any(number < 1) or np.any(count < 0) or np.any(count > number):
        raise ValueError("hits must be from 0 to trials, and trials at least 1")
    return count, number


def _check_guesses(canaries: int, guesses: int, correct: int) -> None:
    if not 0 <= correct <= guesses <= canaries or canaries < 1:
        raise ValueError(f"correct ≤ guesses ≤ canaries must hold, got {correct}, {guesses} and {canaries}")
