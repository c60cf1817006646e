"""Level 3: one run with many canaries, each in it or not by its own fair coin."""

from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .bounds import curve_rejected, one_run_epsilon
from .curves import Curve, GaussianCurve
from .result import Audit, verdict_of

_Floats = NDArray[np.float64]

Run = Callable[[NDArray[np.bool_]], _Floats]
"""``run(included)``: one run with the canaries where ``included`` bool[m] is true, and a score float64[m] of each."""

_GUESSED = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)  # shares of the canaries that may be guessed at
LEAST_CANARIES = 10
_SHOWN = tuple(step / 100 for step in range(101))  # what canaries may show of what ideal ones do
_SIMULATIONS = 200


def canaries(number: int, dim: int, *, norm: float, randomness: np.random.Generator) -> _Floats:
    """float64[number, dim]: random orthogonal vectors of L2 norm ``norm`` (QR): none shows in another's score.

    Raises:
        ValueError: more of them than dimensions.
    """
    if not 1 <= number <= dim:
        raise ValueError(f"number must be from 1 to dim = {dim}, got {number}: orthogonal vectors are no more")
    vectors, triangle = np.linalg.qr(randomness.standard_normal((dim, number)))
    # Signs of the diagonal: QR's own convention would not be uniform over rotations
    return norm * (vectors * np.sign(np.diag(triangle))).T


def white_box(releases: _Floats, vectors: _Floats) -> _Floats:
    """float64[m]: Σ_t ⟨release_t, c_i⟩ of releases float64[T, d] and canaries float64[m, d]."""
    scores: _Floats = vectors @ releases.sum(axis=0)
    return scores


def audit(
    run: Run,
    *,
    name: str,
    number: int,
    claimed_epsilon: float,
    delta: float,
    seed: int,
    curve: Curve | None = None,
    confidence: float = 0.95,
    note: str = "",
) -> Audit:
    """Guess which canaries were in one run.

    The canaries with the largest scores are guessed to be in, as many with the smallest to be out; of the others the
    auditor abstains. How many guesses there are is chosen before the run, for the claim and the number of canaries
    alone: where an ideal run with half of the noise would stand out most. The bound is that of the claim's trade-off
    curve (`curve_rejected`), chosen in advance as well; the one of Steinke et al. 2023, which assumes (ε, δ) alone,
    stands beside it in `figures` and decides nothing.

    Args:
        run: called once.
        number: m.
        seed: of the coins.
        curve: as of `mechanism.audit`.

    Guarantees:
        A run that keeps the claim is called a violation with probability at most 1 − confidence, whatever the scores
        are and however the canaries disturb each other.
    """
    if number < LEAST_CANARIES:
        raise ValueError(f"number must be at least {LEAST_CANARIES}, got {number}")
    claim = curve or GaussianCurve.of(claimed_epsilon, delta)
    alpha = 1 - confidence
    guesses = _guesses(claim, number, alpha)
    included = np.random.default_rng([seed, number]).integers(0, 2, number).astype(bool)
    correct = _correct(run(included.copy()), included, guesses)

    def rejects(strength: float) -> bool:
        return _rejects(claim, strength, number, guesses, correct, alpha)

    strength = claim.strongest(rejects)
    lower = claim.epsilon(strength, delta) if strength > 0 else 0.0
    rejected = strength > 1 and lower > claimed_epsilon
    if not rejected:
        lower = min(lower, claimed_epsilon)
    power, shown = _power(claim, number, guesses, correct, alpha)
    general = one_run_epsilon(delta, canaries=number, guesses=guesses, correct=correct, alpha=alpha)
    return Audit(
        level=3,
        name=name,
        claimed_epsilon=claimed_epsilon,
        delta=delta,
        epsilon_lower=lower,
        confidence=confidence,
        trials=number,
        verdict=verdict_of(rejected=rejected, claimed_epsilon=claimed_epsilon, power=power),
        note=note,
        seeds=(seed,),
        power=power,
        figures={
            "guesses": guesses,
            "correct": correct,
            "strength": strength,
            "canaries_show": shown,
            "epsilon_lower_any_mechanism": general,
        },
    )


def _correct(scores: _Floats, included: NDArray[np.bool_], guesses: int) -> int:
    """How many guesses are right. A score that is no number counts as the largest."""
    if scores.shape != included.shape:
        raise ValueError(f"run must give {len(included)} scores, got shape {scores.shape}")
    order = np.argsort(np.nan_to_num(scores, nan=np.inf, posinf=np.inf), kind="stable")
    return int(included[order[-guesses // 2 :]].sum() + (~included[order[: guesses // 2]]).sum())


def _rejects(claim: Curve, strength: float, number: int, guesses: int, correct: int, alpha: float) -> bool:
    def fnr(fpr: float) -> float:
        return claim.fnr(strength, fpr)

    return curve_rejected(fnr, canaries=number, guesses=guesses, correct=correct, alpha=alpha)


@lru_cache(maxsize=64)
def _ideal(claim: Curve, strength: float, number: int) -> tuple[tuple[_Floats, NDArray[np.bool_]], ...]:
    """Scores and coins of ideal runs."""
    randomness = np.random.default_rng([number, 1])
    drawn = [randomness.integers(0, 2, number).astype(bool) for _ in range(_SIMULATIONS)]
    return tuple((claim.scores(strength, included, randomness), included) for included in drawn)


@lru_cache(maxsize=512)
def _ideal_correct(claim: Curve, strength: float, number: int, guesses: int) -> NDArray[np.int64]:
    return np.array([_correct(scores, included, guesses) for scores, included in _ideal(claim, strength, number)])


@lru_cache(maxsize=64)
def _guesses(claim: Curve, number: int, alpha: float) -> int:
    """How many guesses to make: where half of the noise would stand out most from the claim."""
    plans = []
    for share in _GUESSED:
        guesses = 2 * max(1, int(number * share / 2))
        correct = _ideal_correct(claim, 2.0, number, guesses)
        margin = correct.mean() - _least_correct(claim, number, guesses, alpha)
        plans.append((margin / (correct.std() + 0.5), guesses))
    return max(plans)[1]


def _power(claim: Curve, number: int, guesses: int, correct: int, alpha: float) -> tuple[float, float]:
    """How often half of the noise would have been caught, and how much the canaries showed of what ideal ones do.

    Canaries that did not move the run as they should, because they disturb each other or because their loss saturates,
    would not have moved it with half of the noise either: the power is that of canaries as weak as these. A mechanism
    that hides more than it claims looks the same, and is then not supported, which is the careful side.
    """
    shown = _SHOWN[
        bisect_right(_SHOWN, correct, lo=1, key=lambda s: _ideal_correct(claim, s, number, guesses).mean()) - 1
    ]
    least = _least_correct(claim, number, guesses, alpha)
    return float((_ideal_correct(claim, 2 * shown, number, guesses) >= least).mean()), shown


@lru_cache(maxsize=256)
def _least_correct(claim: Curve, number: int, guesses: int, alpha: float) -> int:
    """The fewest correct guesses that reject the claim."""
    low, high = 0, guesses + 1
    while high - low > 1:
        middle = (low + high) // 2
        enough = _rejects(claim, 1.0, number, guesses, middle, alpha)
        low, high = (low, middle) if enough else (middle, high)
    return high
