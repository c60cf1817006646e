"""Level 4: whose records were a model trained on? Loss thresholds and LiRA, with shadow models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from .bounds import clopper_pearson_lower, clopper_pearson_upper
from .curves import ApproximateCurve
from .mechanism import judge
from .result import Audit, Group

_Floats = NDArray[np.float64]
_Flags = NDArray[np.bool_]

LEAST_RECORDS = 20  # of members, and of others
LOW_FPR = 0.01
_ROC_POINTS = 100
_FEW = 32  # shadow models on one side of a record; with fewer all records share one variance


@dataclass(frozen=True)
class Attack:
    """How well scores tell members from others.

    Attributes:
        auc: area under the ROC; 0.5 is chance.
        auc_low, auc_high: its interval by Hanley and McNeil 1982, Equation 2, if records were independent.
        tpr: true-positive rate at a false-positive rate of at most 1 % on these records.
        tpr_low, tpr_high: its Clopper–Pearson interval, two-sided, if records were independent.
        fpr, roc_tpr: the ROC, float64[n] each, rising, for a plot on logarithmic axes.
    """

    auc: float
    auc_low: float
    auc_high: float
    tpr: float
    tpr_low: float
    tpr_high: float
    fpr: _Floats
    roc_tpr: _Floats


def confidences(losses: _Floats) -> _Floats:
    """float64[...]: ln(p/(1 − p)) of the true class's probability p = exp(−loss): near normal over models.

    Carlini et al. 2022, "Membership inference attacks from first principles", Section IV-C.
    """
    bounded = np.clip(np.asarray(losses, np.float64), 1e-12, 700.0)
    return -bounded - np.log(-np.expm1(-bounded))


def loss_scores(losses: _Floats) -> _Floats:
    """float64[n]: the smaller the loss, the likelier a member (Yeom et al. 2018, Adversary 2)."""
    return -np.asarray(losses, np.float64)


def lira_scores(losses: _Floats, shadow_losses: _Floats, included: _Flags) -> _Floats:
    """float64[n]: log-likelihood ratios (Carlini et al. 2022, Algorithm 1, online).

    Args:
        losses: float64[n], of each record under the model that is attacked.
        shadow_losses: float64[S, n], under models trained by the same rule on random halves of the records.
        included: bool[S, n], which records each shadow model was trained on. Every record needs at least two models
            with it and two without.
    """
    seen, shadows = confidences(losses), confidences(shadow_losses)
    if shadows.shape != included.shape or shadows.shape[1:] != seen.shape:
        raise ValueError(f"shadow_losses and included must be [S, {len(seen)}], got {shadows.shape}, {included.shape}")
    if int(min(included.sum(axis=0).min(), (~included).sum(axis=0).min())) < 2:
        raise ValueError("every record needs two shadow models with it and two without: train more of them")
    scores = np.zeros_like(seen)
    for side, sign in ((included, 1.0), (~included, -1.0)):
        count = side.sum(axis=0)
        mean = np.where(side, shadows, 0.0).sum(axis=0) / count
        squares = np.where(side, (shadows - mean) ** 2, 0.0).sum(axis=0)
        variance = squares / (count - 1)
        if int(count.min()) < _FEW:
            variance = np.full_like(mean, squares.sum() / (count - 1).sum())
        scores += sign * norm.logpdf(seen, mean, np.sqrt(variance) + 1e-6)
    return scores


def attack(scores: _Floats, members: _Flags, *, confidence: float = 0.95) -> Attack:
    """Area, and true-positive rate at a low false-positive rate, of scores float64[n] for bool[n]."""
    positives, negatives = int(members.sum()), int((~members).sum())
    if min(positives, negatives) < LEAST_RECORDS:
        raise ValueError(
            f"membership inference needs at least {LEAST_RECORDS} members and as many others, got {positives} and "
            f"{negatives}"
        )
    ranks = rankdata(scores)
    auc = (float(ranks[members].sum()) - positives * (positives + 1) / 2) / (positives * negatives)
    thresholds = np.unique(scores)[::-1]
    inside, outside = np.sort(scores[members]), np.sort(scores[~members])
    tpr = 1 - np.searchsorted(inside, thresholds, side="left") / positives
    fpr = 1 - np.searchsorted(outside, thresholds, side="left") / negatives
    allowed = fpr <= LOW_FPR + 1e-9
    best = float(tpr[allowed].max(initial=0.0))
    hits, alpha = round(best * positives), (1 - confidence) / 2
    spread = norm.isf(alpha) * _auc_deviation(auc, positives, negatives)
    return Attack(
        auc=auc,
        auc_low=max(0.0, auc - spread),
        auc_high=min(1.0, auc + spread),
        tpr=best,
        tpr_low=float(clopper_pearson_lower(hits, positives, alpha)),
        tpr_high=float(clopper_pearson_upper(hits, positives, alpha)),
        fpr=fpr,
        roc_tpr=tpr,
    )


def _auc_deviation(auc: float, positives: int, negatives: int) -> float:
    first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (first - auc**2) + (negatives - 1) * (second - auc**2)
    return math.sqrt(max(0.0, variance) / (positives * negatives))


def roc_points(found: Attack) -> tuple[tuple[float, float], ...]:
    """At most 100 points of the ROC, close together where false positives are few."""
    fpr, tpr = np.r_[0.0, found.fpr], np.r_[0.0, found.roc_tpr]
    least = fpr[fpr > 0].min(initial=1.0)
    wanted = np.r_[0.0, np.geomspace(least, 1.0, _ROC_POINTS - 1)]
    last = np.unique(
        np.searchsorted(fpr, wanted * (1 + 1e-9), side="right") - 1
    )  # the highest of a false-positive rate
    return tuple((float(fpr[place]), float(tpr[place])) for place in last)


def by_group(
    scores: _Floats, members: _Flags, labels: Sequence[str], *, by: str, confidence: float = 0.95
) -> tuple[Group, ...]:
    """The attack on each group of at least 20 members and 20 others, with a threshold of its own.

    Args:
        labels: n of them, the group of each record.
        by: what the records are grouped by.
    """
    groups = []
    for name in sorted(set(labels)):
        own = np.array([label == name for label in labels])
        inside, outside = int((own & members).sum()), int((own & ~members).sum())
        if min(inside, outside) < LEAST_RECORDS:
            continue
        found = attack(scores[own], members[own], confidence=confidence)
        groups.append(
            Group(
                by=by,
                name=name,
                members=inside,
                others=outside,
                auc=float(found.auc),
                auc_low=float(found.auc_low),
                auc_high=float(found.auc_high),
                tpr=float(found.tpr),
                tpr_low=float(found.tpr_low),
                tpr_high=float(found.tpr_high),
            )
        )
    return tuple(groups)


def audit(
    scores: _Floats,
    members: _Flags,
    *,
    name: str,
    delta: float,
    seed: int,
    claimed_epsilon: float | None = None,
    independent: bool = False,
    confidence: float = 0.95,
    note: str = "",
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Audit:
    """Membership inference as an audit of the model's owner's claim, or of a model that claims nothing.

    The bound assumes nothing about the mechanism: `ApproximateCurve`. Halves of the records choose the threshold.

    Args:
        scores: float64[n], from `loss_scores` or `lira_scores`.
        members: bool[n].
        claimed_epsilon: of the model; None where none is claimed: the audit then only tells how much it reveals.
        independent: every score is of a model of its own. Scores of one model's records hang together, and the
            interval is then an approximation: no claim is called violated on its ground.
        groups: what records are grouped by → the group of each: the same attack on each group, in `Audit.groups`, and
            the largest difference of areas in `figures`.

    Guarantees:
        Without `independent` or a claim the verdict is "inconclusive". With both, a claim that is kept is called a
        violation with probability at most 1 − confidence.
    """
    found = attack(scores, members, confidence=confidence)
    order = np.random.default_rng([seed, len(scores)]).permutation(len(scores))
    shuffled, inside = scores[order], members[order]
    judged = judge(
        shuffled[inside],
        shuffled[~inside],
        level=4,
        name=name,
        claimed_epsilon=claimed_epsilon if independent else None,
        delta=delta,
        curve=ApproximateCurve(claimed_epsilon or 1.0, delta),
        confidence=confidence,
        note=note,
        seed=seed,
    )
    parts = {
        by: by_group(scores, members, labels, by=by, confidence=confidence) for by, labels in (groups or {}).items()
    }
    gaps = {
        f"auc_gap_{by}": max(group.auc for group in part) - min(group.auc for group in part)
        for by, part in parts.items()
        if len(part) > 1
    }
    figures = {
        **judged.figures,
        "auc": found.auc,
        "tpr_at_1_percent_fpr": found.tpr,
        "tpr_low": found.tpr_low,
        "tpr_high": found.tpr_high,
        "members": float(members.sum()),
        "others": float((~members).sum()),
        **gaps,
    }
    return Audit(
        level=4,
        name=name,
        claimed_epsilon=claimed_epsilon,
        delta=delta,
        epsilon_lower=judged.epsilon_lower,
        confidence=confidence,
        trials=len(scores),
        verdict=judged.verdict,
        note=note,
        seeds=(seed,),
        power=judged.power,
        figures=figures,
        roc=roc_points(found),
        groups=tuple(group for part in parts.values() for group in part),
    )
