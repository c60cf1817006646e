"""Level 1: one mechanism, released many times with and without a canary."""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..noise import derive_key, insecure_key
from .bounds import clopper_pearson_upper, mu_lower
from .curves import Curve, GaussianCurve, strength_at
from .result import Audit, verdict_of

_Floats = NDArray[np.float64]

Release = Callable[[bool, bytes], _Floats]
"""``release(with_canary, key)``: one release float64[d], all randomness from ``key``."""
Scores = Callable[[bool, int, bytes], _Floats]
"""``scores(with_canary, trials, key)``: float64[trials], one number a release, larger where the canary shows."""

LEAST_TRIALS = 40
_CANDIDATES = 128  # thresholds that are tried on the first half
_SIMULATIONS = 60  # of an ideal audit, for its power


def scores_of(release: Release, direction: _Floats, progress: Callable[[int], None] = lambda done: None) -> Scores:
    """Scores ⟨release, direction⟩ of releases made one by one.

    Args:
        release: makes one; each gets a key of its own.
        direction: float64[d]: where the canary moves a release.
        progress: called with the number of releases since the last call.
    """

    def scores(with_canary: bool, trials: int, key: bytes) -> _Floats:
        found = np.empty(trials)
        for trial in range(trials):
            found[trial] = release(with_canary, derive_key(key, trial.to_bytes(8, "big"))) @ direction
            progress(1)
        return found

    return scores


def audit(
    scores: Scores,
    *,
    name: str,
    trials: int,
    claimed_epsilon: float,
    delta: float,
    seed: int,
    curve: Curve | None = None,
    confidence: float = 0.95,
    note: str = "",
) -> Audit:
    """Try to tell releases with a canary from those without.

    Half of the releases choose a threshold, the others count the errors. Clopper–Pearson bounds both rates, each at
    half of 1 − confidence; the strongest member of the claim's family that they reject gives ε.

    Args:
        scores: makes releases and scores them.
        trials: N, releases with the canary, and as many without.
        claimed_epsilon: at ``delta``.
        seed: all keys derive from it. The canary is not secret and these releases protect nobody.
        curve: the claim's trade-off curve; default that of the Gaussian mechanism with the claimed ε.

    Guarantees:
        A mechanism that keeps the claim is called a violation with probability at most 1 − confidence, whatever the
        scores are, as long as releases are independent.
    """
    if trials < LEAST_TRIALS:
        raise ValueError(f"trials must be at least {LEAST_TRIALS}, got {trials}")
    key = insecure_key(seed, b"audit mechanism")
    found, missed = (scores(included, trials, derive_key(key, bytes([included]))) for included in (True, False))
    return judge(
        found,
        missed,
        level=1,
        name=name,
        claimed_epsilon=claimed_epsilon,
        delta=delta,
        curve=curve or GaussianCurve.of(claimed_epsilon, delta),
        confidence=confidence,
        note=note,
        seed=seed,
    )


def judge(
    with_canary: _Floats,
    without: _Floats,
    *,
    level: Literal[1, 4],
    name: str,
    claimed_epsilon: float | None,
    delta: float,
    curve: Curve,
    confidence: float,
    note: str,
    seed: int,
) -> Audit:
    """The audit of two sets of independent scores, float64[n] and float64[k]."""
    alpha = 1 - confidence
    fpr, fnr = _error_rates(with_canary, without, alpha)
    strength = strength_at(curve, fpr, fnr)
    lower = curve.epsilon(strength, delta) if strength > 0 else 0.0
    rejected = claimed_epsilon is not None and strength > 1 and lower > claimed_epsilon
    if claimed_epsilon is not None and not rejected:
        lower = min(lower, claimed_epsilon)  # a hair of another accountant is no finding
    power = None
    if claimed_epsilon is not None:
        power = _power(curve, len(with_canary), len(without), alpha)
    return Audit(
        level=level,
        name=name,
        claimed_epsilon=claimed_epsilon,
        delta=delta,
        epsilon_lower=lower,
        confidence=confidence,
        trials=min(len(with_canary), len(without)),
        verdict=verdict_of(rejected=rejected, claimed_epsilon=claimed_epsilon, power=power),
        note=note,
        seeds=(seed,),
        power=power,
        figures={"fpr_upper": fpr, "fnr_upper": fnr, "strength": strength},
    )


def _error_rates(with_canary: _Floats, without: _Floats, alpha: float) -> tuple[float, float]:
    """FPR⁺ and FNR⁺ on the second halves, at a threshold from the first. A score that is no number is the canary's."""
    found, missed = (np.nan_to_num(scores, nan=np.inf, posinf=np.inf) for scores in (with_canary, without))
    half, other = len(found) // 2, len(missed) // 2
    threshold = _threshold(found[:half], missed[:other], alpha)
    fpr = clopper_pearson_upper(int((missed[other:] >= threshold).sum()), len(missed) - other, alpha / 2)
    fnr = clopper_pearson_upper(int((found[half:] < threshold).sum()), len(found) - half, alpha / 2)
    return float(fpr), float(fnr)


def _threshold(found: _Floats, missed: _Floats, alpha: float) -> float:
    """Where the bound would be good if these were the scores that count.

    Not simply where it would be best: among thresholds that these scores do not tell apart from the best one, by a
    standard deviation, the one with the most equal error rates. The very best is in a tail too often, by luck.
    """
    found, missed = np.sort(found), np.sort(missed)
    both = np.sort(np.concatenate([found, missed]))
    candidates = np.unique(both[np.linspace(0, len(both) - 1, _CANDIDATES).astype(int)])
    positives = len(missed) - np.searchsorted(missed, candidates, side="left")
    negatives = np.searchsorted(found, candidates, side="left")
    bound = mu_lower(
        clopper_pearson_upper(positives, len(missed), alpha / 2),
        clopper_pearson_upper(negatives, len(found), alpha / 2),
    )
    best = int(np.argmax(bound))
    estimate = mu_lower(positives[best] / len(missed), negatives[best] / len(found))
    # Both rates lie two deviations below their bounds, the estimate some three: a generous one
    deviation = 0.6 * float(np.nan_to_num(estimate - bound[best], posinf=0.0))
    uneven = np.abs(positives / len(missed) - negatives / len(found))
    return float(candidates[int(np.argmin(np.where(bound >= bound[best] - deviation, uneven, np.inf)))])


@lru_cache(maxsize=64)
def _power(curve: Curve, with_canary: int, without: int, alpha: float) -> float:
    """How often this very audit rejects the claim of an ideal mechanism with half of the noise."""
    randomness = np.random.default_rng([with_canary, without])
    caught = 0
    for _ in range(_SIMULATIONS):
        found = curve.scores(2.0, np.ones(with_canary, dtype=bool), randomness)
        missed = curve.scores(2.0, np.zeros(without, dtype=bool), randomness)
        fpr, fnr = _error_rates(found, missed, alpha)
        caught += fnr < curve.fnr(1.0, fpr)
    return caught / _SIMULATIONS
