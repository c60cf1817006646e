"""Membership inference: a model that remembers is told from one that does not."""

import numpy as np
import pytest
from numpy.typing import NDArray

from privfed.privacy.audit import membership

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def game(n: int, shadows: int, gap: float, seed: int = 0) -> tuple[Floats, Flags, Floats, Flags]:
    """Losses of records of very different difficulty, smaller by a factor e^gap for those a model has seen."""
    random = np.random.default_rng(seed)
    difficulty = random.normal(0, 2, n)

    def losses(inside: Flags) -> Floats:
        return np.exp(difficulty - gap * inside + random.normal(0, 0.3, inside.shape))

    members = random.random(n) < 0.5
    included = np.argsort(random.random((shadows, n)), axis=0) < shadows // 2  # every record in half of them
    return losses(members), members, losses(included), included


def test_lira_sees_what_a_loss_threshold_does_not() -> None:
    losses, members, shadow, included = game(400, 24, gap=1.0)
    by_loss = membership.attack(membership.loss_scores(losses), members)
    by_ratio = membership.attack(membership.lira_scores(losses, shadow, included), members)
    assert by_loss.auc < 0.7 < 0.9 < by_ratio.auc
    assert by_ratio.tpr > 0.3 > by_loss.tpr
    assert by_ratio.tpr_low < by_ratio.tpr < by_ratio.tpr_high


def test_a_model_that_does_not_remember_is_not_found_to() -> None:
    areas = []
    for seed in range(20):
        losses, members, shadow, included = game(200, 16, gap=0.0, seed=seed)
        areas.append(membership.attack(membership.lira_scores(losses, shadow, included), members).auc)
    assert np.mean(areas) == pytest.approx(0.5, abs=0.03)  # a standard error of 0.041/√20 = 0.009


def test_the_area_and_the_rate_are_those_of_a_count_by_hand() -> None:
    members = np.r_[np.ones(20, bool), np.zeros(200, bool)]
    scores = np.r_[np.full(5, 10.0), np.full(15, -1.0), np.full(2, 20.0), np.zeros(198)]
    found = membership.attack(scores, members)
    # 2 of 200 others lie above 5 members: TPR 5/20 at FPR 1 %; pairs won: 5 · 198 of 20 · 200
    assert found.tpr == 0.25
    assert found.auc == pytest.approx(5 * 198 / 4000)
    assert np.all(np.diff(found.fpr) >= 0) and found.fpr[-1] == found.roc_tpr[-1] == 1.0


def test_without_a_claim_the_verdict_is_inconclusive_whatever_is_found() -> None:
    losses, members, shadow, included = game(400, 24, gap=3.0)
    scores = membership.lira_scores(losses, shadow, included)
    found = membership.audit(scores, members, name="m", delta=1e-5, seed=0)
    assert found.epsilon_lower > 1 and found.figures["auc"] > 0.95
    assert found.verdict == "inconclusive"
    # Scores of one model's records hang together: no claim falls by them
    assert (
        membership.audit(scores, members, name="m", delta=1e-5, seed=0, claimed_epsilon=0.1).verdict == "inconclusive"
    )


def test_independent_scores_can_break_a_claim_and_rarely_break_one_that_is_kept() -> None:
    members = np.arange(1000) % 2 == 0
    alarms = 0
    for seed in range(100):
        # Randomised response at ε = 1
        truth = np.random.default_rng(seed).random(1000) < 1 / (1 + np.exp(-1.0))
        scores = np.where(truth == members, 1.0, -1.0)
        kept = membership.audit(scores, members, name="m", delta=1e-5, seed=seed, claimed_epsilon=1.0, independent=True)
        alarms += kept.verdict == "violation"
    assert alarms <= 5
    broken = membership.audit(
        members * 1.0, members, name="m", delta=1e-5, seed=0, claimed_epsilon=1.0, independent=True
    )
    assert broken.verdict == "violation"


def test_a_loss_of_nothing_and_of_very_much_have_confidences() -> None:
    found = membership.confidences(np.array([0.0, np.log(2), 1e6]))
    assert np.isfinite(found).all() and found[1] == pytest.approx(0.0)
    assert found[0] > 20 > -20 > found[2]


def test_too_few_records_or_shadow_models_are_refused() -> None:
    losses, members, shadow, included = game(30, 8, gap=1.0)
    with pytest.raises(ValueError, match="at least 20 members"):
        membership.attack(losses, members)
    with pytest.raises(ValueError, match="two shadow models with it"):
        membership.lira_scores(losses, shadow[:1], included[:1])
    with pytest.raises(ValueError, match="must be"):
        membership.lira_scores(losses, shadow[:, :5], included)


def test_groups_have_thresholds_of_their_own_and_small_ones_are_left_out() -> None:
    random = np.random.default_rng(3)
    members = np.arange(2000) % 2 == 0
    labels = ["a"] * 980 + ["b"] * 980 + ["few"] * 30 + ["others"] * 10
    scores = random.standard_normal(2000) + np.array([members[i] * (2.0 if i < 980 else 0.0) for i in range(2000)])
    found = membership.audit(scores, members, name="x", delta=1e-5, seed=0, groups={"site": labels})
    assert [(group.by, group.name, group.members) for group in found.groups] == [("site", "a", 490), ("site", "b", 490)]
    first, second = found.groups
    # Φ(2/√2) = 0.921 and chance, with the deviations of 490 of each kind: 0.009 and 0.018
    assert first.auc == pytest.approx(0.921, abs=0.03) and second.auc == pytest.approx(0.5, abs=0.06)
    assert first.auc_low < 0.921 < first.auc_high and second.auc_low < 0.5 < second.auc_high
    assert found.figures["auc_gap_site"] == pytest.approx(first.auc - second.auc)


def test_intervals_of_areas_hold_as_often_as_they_say() -> None:
    random = np.random.default_rng(4)
    members = np.arange(120) % 2 == 0
    found = [membership.attack(random.standard_normal(120) + members, members) for _ in range(400)]
    held = np.mean([one.auc_low <= 0.7602 <= one.auc_high for one in found])  # Φ(1/√2)
    assert held >= 0.92  # 95 %, less three deviations of 400 trials


def test_curve_keeps_its_left_end_and_is_short() -> None:
    random = np.random.default_rng(5)
    members = np.arange(20_000) % 2 == 0
    found = membership.attack(random.standard_normal(20_000) + members, members)
    points = membership.roc_points(found)
    assert len(points) <= 100 and points[0][0] == 0.0 and points[-1] == (1.0, 1.0)
    assert points == tuple(sorted(points)) and sum(rate < 0.01 for rate, _ in points) > 20
    whole = dict(zip(found.fpr.tolist(), found.roc_tpr.tolist(), strict=True))  # the last of a rate is the highest
    assert all(whole.get(rate, 0.0) == hits or rate == 0.0 for rate, hits in points)
