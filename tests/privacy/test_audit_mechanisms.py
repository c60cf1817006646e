"""Mechanisms broken on purpose, each of which an audit must call a violation, and sound ones that none may."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from privfed.privacy import noise, selftest, skellam
from privfed.privacy.accountant import Accountant
from privfed.privacy.audit import mechanism, noise_test, one_run
from privfed.privacy.audit.bounds import gaussian_mu
from privfed.privacy.audit.curves import ComposedCurve, GaussianCurve, curve_of
from privfed.privacy.audit.result import Audit, verdict_of
from privfed.privacy.events import Charge, PoissonGaussian
from privfed.privacy.rotation import record_l2_bound
from privfed.privacy.shared import record_sum

Floats = NDArray[np.float64]
DELTA = 1e-5
DIM = 8
CANARY = np.eye(DIM)[0]


def normal(key: bytes, *shape: int) -> Floats:
    return np.random.default_rng(list(key)).standard_normal(shape)


def gaussian(mu: float) -> mechanism.Scores:
    return lambda with_canary, trials, key: normal(key, trials) + mu * with_canary


def audited(scores: mechanism.Scores, epsilon: float, **changes: object) -> Audit:
    options: dict[str, object] = {"trials": 2000, "claimed_epsilon": epsilon, "delta": DELTA, "seed": 1, **changes}
    return mechanism.audit(scores, name="toy", **options)  # type: ignore[arg-type]


# The verdict


def test_a_small_claim_is_never_supported_and_a_missing_power_neither() -> None:
    assert verdict_of(rejected=False, claimed_epsilon=1.99, power=1.0) == "inconclusive"
    assert verdict_of(rejected=False, claimed_epsilon=2.0, power=1.0) == "supported"
    assert verdict_of(rejected=False, claimed_epsilon=2.0, power=0.9) == "inconclusive"
    assert verdict_of(rejected=False, claimed_epsilon=2.0, power=None) == "inconclusive"
    assert verdict_of(rejected=False, claimed_epsilon=None, power=1.0) == "inconclusive"
    assert verdict_of(rejected=True, claimed_epsilon=0.1, power=None) == "violation"


def test_the_power_is_computed_and_falls_with_the_trials() -> None:
    many, few = audited(gaussian(0.9), 4.0, trials=2000), audited(gaussian(0.9), 4.0, trials=40)
    assert many.power is not None and few.power is not None
    assert many.power == 1.0 > few.power
    assert many.verdict == "supported"
    assert few.verdict == "inconclusive"


def test_the_power_is_what_mechanisms_with_half_of_the_noise_meet() -> None:
    mu, trials = gaussian_mu(2.0, DELTA), 200
    caught = [audited(gaussian(2 * mu), 2.0, trials=trials, seed=s).verdict == "violation" for s in range(200)]
    power = audited(gaussian(mu), 2.0, trials=trials).power
    # 60 simulations against 200 audits: a standard error of 0.07
    assert power == pytest.approx(np.mean(caught), abs=0.21)


# Level 1


@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_sound_mechanisms_are_rarely_called_violations(epsilon: float) -> None:
    """At most 5 % of alarms is the promise; Clopper–Pearson twice makes it less than 1 %."""
    scores = gaussian(gaussian_mu(epsilon, DELTA))
    alarms = [audited(scores, epsilon, trials=1000, seed=seed).verdict == "violation" for seed in range(400)]
    assert np.mean(alarms) <= 0.05


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
def test_a_third_of_the_noise_is_a_violation(epsilon: float) -> None:
    found = audited(gaussian(3 * gaussian_mu(epsilon, DELTA)), epsilon)
    assert found.verdict == "violation"
    assert found.epsilon_lower > epsilon


def test_scores_that_are_not_numbers_or_always_the_same_are_no_evidence_against() -> None:
    constant = audited(lambda with_canary, trials, key: np.zeros(trials), 4.0)
    assert constant.epsilon_lower == 0.0
    broken = audited(lambda with_canary, trials, key: np.full(trials, np.nan), 4.0)
    assert broken.epsilon_lower == 0.0


def test_an_audit_can_be_done_again() -> None:
    assert audited(gaussian(1.0), 4.0) == audited(gaussian(1.0), 4.0)
    assert audited(gaussian(1.0), 4.0, seed=2).figures != audited(gaussian(1.0), 4.0).figures
    with pytest.raises(ValueError, match="trials must be at least 40"):
        audited(gaussian(1.0), 4.0, trials=10)


def released(
    *, clip: Callable[[Floats], Floats], noise_multiplier: float = 1.0, steps: int = 1, rate: float = 1.0
) -> mechanism.Release:
    """A clipped, noised sum over three records and the canary, ``steps`` times; each a fresh Poisson draw."""
    others = normal(b"others", 3, DIM)

    def release(with_canary: bool, key: bytes) -> Floats:
        randomness = noise.generator(key)
        records = np.vstack([others, 50.0 * CANARY]) if with_canary else others
        total = np.zeros(DIM)
        for _ in range(steps):
            drawn = records[randomness.random(len(records)) < rate]
            total += sum((clip(record) for record in drawn), np.zeros(DIM))
            total += noise_multiplier * randomness.standard_normal(DIM)
        return total

    return release


def to_norm_one(record: Floats) -> Floats:
    return record / max(1.0, float(np.linalg.norm(record)))


def test_a_missing_clip_is_a_violation_and_a_clip_is_not() -> None:
    for clip, verdict in ((lambda record: record, "violation"), (to_norm_one, "supported")):
        found = audited(mechanism.scores_of(released(clip=clip), CANARY), 4.3772, trials=800)
        assert found.verdict == verdict  # σ = 1 costs 4.3772


CLAIM = (Charge(PoissonGaussian(0.1, 1.0), 20),)
COST = Accountant().epsilon(CLAIM, DELTA).value


def test_a_batch_that_is_used_again_but_booked_as_fresh_is_a_violation() -> None:
    """Twenty answers on one draw are P(q, σ/√20), not twenty P(q, σ): who is in the draw is in all of them."""

    def reused(with_canary: bool, key: bytes) -> Floats:
        randomness = noise.generator(key)
        inside = with_canary and randomness.random() < 0.1
        return 20 * inside * CANARY + randomness.standard_normal((20, DIM)).sum(axis=0)

    assert 2 < COST
    curve = curve_of(CLAIM)
    sound = mechanism.scores_of(released(clip=to_norm_one, steps=20, rate=0.1), CANARY)
    assert audited(sound, COST, curve=curve, trials=1500).verdict == "supported"
    assert audited(mechanism.scores_of(reused, CANARY), COST, curve=curve, trials=1500).verdict == "violation"


def test_sound_sampled_mechanisms_are_rarely_called_violations() -> None:
    curve = curve_of(CLAIM)
    assert isinstance(curve, ComposedCurve)

    def scores(with_canary: bool, trials: int, key: bytes) -> Floats:
        return curve.scores(1.0, np.full(trials, with_canary), np.random.default_rng(list(key)))

    alarms = [audited(scores, COST, curve=curve, trials=400, seed=s).verdict == "violation" for s in range(40)]
    assert np.mean(alarms) <= 0.05


def test_a_head_that_leaves_without_noise_is_a_violation() -> None:
    """FedRep with a private head: the body is noised, the head is what the canary made of it."""

    def release(with_canary: bool, key: bytes) -> Floats:
        body = normal(key, DIM) + with_canary * CANARY
        head = 1e-3 * with_canary * np.ones(2)
        return np.concatenate([body, head])

    found = audited(mechanism.scores_of(release, np.r_[CANARY, 1e4, 1e4]), 4.3772, trials=400)
    assert found.verdict == "violation"


def test_an_exact_figure_beside_the_update_is_a_violation() -> None:
    def release(with_canary: bool, key: bytes) -> Floats:
        update = normal(key, DIM) + with_canary * CANARY
        accuracy = (40 + with_canary) / 50  # of a model tested on its training records: one more is right
        return np.append(update, accuracy)

    found = audited(mechanism.scores_of(release, np.r_[CANARY, 1e4]), 4.3772, trials=400)
    assert found.verdict == "violation"


@pytest.mark.parametrize(("divisor", "verdict"), [(1, "supported"), (3, "violation")])
def test_noise_in_shares_is_audited_as_the_sum_that_the_server_sees(divisor: int, verdict: str) -> None:
    """Five honest sites' integers, one with the canary; the noise that the claim counts is that of all of them."""
    plan = record_sum(
        16,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=4.0,
        sample_rate=1.0,
        minimum_cohort=5,
        colluders=0,
        sites=5,
        most_bits=40,
        seed=b"public",
    )
    claimed = Accountant().epsilon((Charge(plan.event()),), DELTA).value
    assert plan.event().l2_squared <= record_l2_bound(1.0, plan.scale, plan.dim) ** 2

    def release(with_canary: bool, key: bytes) -> Floats:
        record = np.r_[1 - 1e-6, np.zeros(15)] if with_canary else np.zeros(16)
        integers = np.floor(plan.rotation.rotate(record) * plan.scale).astype(np.int64)
        variance = plan.noise.share_variance // divisor**2
        shares = [skellam.share(noise.derive_key(key, bytes([site])), plan.dim, variance) for site in range(5)]
        return plan.decode(integers + np.sum(shares, axis=0), summands=5)

    found = audited(mechanism.scores_of(release, np.eye(16)[0]), claimed, trials=800)
    assert found.verdict == verdict


# Level 2


def test_shared_seeds_and_weak_noise_are_violations_and_sound_noise_is_not() -> None:
    streams = [normal(bytes([site]), 4000) for site in range(4)]

    def of(noises: list[Floats], scale: float = 1.0) -> Audit:
        return noise_test.audit(
            {
                "law": lambda: noise_test.check_gaussian(scale * noises[0], 1.0),
                "independence": lambda: noise_test.check_streams(noises),
            },
            name="noise",
            size=4000,
            statistics=noise_test.STATISTICS + 1,
            claimed_epsilon=4.0,
            delta=DELTA,
            seed=0,
        )

    assert of(streams).verdict == "supported" and of(streams).confidence == 1 - 5e-6
    assert of([*streams, streams[0]]).verdict == "violation"
    assert of([*streams, -streams[0]]).verdict == "violation"
    assert of([*streams, np.zeros(4000)]).verdict == "violation"
    weak = of(streams, scale=1 / 3)
    assert weak.verdict == "violation"
    assert "times the variance booked" in weak.note and weak.epsilon_lower == 0.0


def test_sound_noise_of_many_seeds_and_any_length_passes() -> None:
    for seed in range(300):
        size = 5 + 7 * seed
        streams = [normal(bytes([seed % 256, site, seed // 256]), size) for site in range(3)]
        noise_test.check_gaussian(2.5 * streams[0], 2.5)
        noise_test.check_streams(streams)


def test_another_law_of_the_same_variance_is_caught() -> None:
    random = np.random.default_rng(0)
    for broken in (
        random.choice([-1.0, 1.0], 4000),
        random.uniform(-(3**0.5), 3**0.5, 4000),
        random.normal(0.2, 0.98, 4000),
    ):
        with pytest.raises(selftest.SelfTestFailed):
            noise_test.check_gaussian(broken, 1.0)


def test_a_self_test_of_few_numbers_has_no_power_and_supports_nothing() -> None:
    few = noise_test.audit({}, name="noise", size=3, statistics=4, claimed_epsilon=4.0, delta=DELTA, seed=0)
    assert few.power is not None and few.power < 0.95
    assert few.verdict == "inconclusive"


# Level 3


def in_one_run(mu: float, seed: int = 7) -> one_run.Run:
    return lambda included: normal(seed.to_bytes(4, "big"), len(included)) + mu * included


def one(run: one_run.Run, epsilon: float, **changes: object) -> Audit:
    options: dict[str, object] = {"number": 1000, "claimed_epsilon": epsilon, "delta": DELTA, "seed": 3, **changes}
    return one_run.audit(run, name="toy run", **options)  # type: ignore[arg-type]


def test_one_run_bounds_epsilon_8_by_more_than_3() -> None:
    found = one(in_one_run(gaussian_mu(8.0, DELTA)), 8.0)
    assert 3.0 <= found.epsilon_lower <= 8.0
    assert found.verdict != "violation"
    assert found.figures["epsilon_lower_any_mechanism"] < found.epsilon_lower


def test_canaries_that_hardly_show_support_nothing() -> None:
    """Half of what an ideal canary shows: half of the noise would have looked like the claim."""
    found = one(in_one_run(gaussian_mu(4.0, DELTA) / 2), 4.0)
    assert found.verdict == "inconclusive"
    assert found.figures["canaries_show"] < 0.7
    assert found.power is not None and found.power < 0.5
    assert one(in_one_run(gaussian_mu(4.0, DELTA)), 4.0).verdict == "supported"


@pytest.mark.parametrize("epsilon", [2.0, 8.0])
def test_one_run_finds_a_third_of_the_noise(epsilon: float) -> None:
    assert one(in_one_run(3 * gaussian_mu(epsilon, DELTA)), epsilon).verdict == "violation"


def test_sound_runs_are_rarely_called_violations() -> None:
    mu = gaussian_mu(2.0, DELTA)
    alarms = [one(in_one_run(mu, seed), 2.0, number=100, seed=seed).verdict == "violation" for seed in range(400)]
    assert np.mean(alarms) <= 0.05


def test_canaries_that_disturb_each_other_raise_no_false_alarm() -> None:
    """In eight dimensions a hundred canaries lie across each other: less is seen, nothing is claimed wrongly."""
    mu = gaussian_mu(4.0, DELTA)
    vectors = normal(b"crowded", 100, DIM)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def run(included: NDArray[np.bool_]) -> Floats:
        return vectors @ (vectors[included].sum(axis=0) * mu + normal(b"noise", DIM))

    assert one(run, 4.0, number=100).verdict == "inconclusive"


def test_canaries_are_orthogonal_of_one_norm_and_scored_over_all_rounds() -> None:
    vectors = one_run.canaries(20, 50, norm=3.0, randomness=np.random.default_rng(0))
    np.testing.assert_allclose(vectors @ vectors.T, 9 * np.eye(20), atol=1e-12)
    releases = np.stack([vectors[:3].sum(axis=0), vectors[:1].sum(axis=0)])
    np.testing.assert_allclose(one_run.white_box(releases, vectors), [18, 9, 9, *[0] * 17], atol=1e-12)
    with pytest.raises(ValueError, match="orthogonal vectors are no more"):
        one_run.canaries(51, 50, norm=1.0, randomness=np.random.default_rng(0))


def test_a_run_is_asked_once_and_can_not_change_the_coins() -> None:
    asked = []

    def run(included: NDArray[np.bool_]) -> Floats:
        asked.append(included.copy())
        truth = included.astype(np.float64)
        included[:] = False
        return truth

    found = one(run, 2.0, number=100)
    assert len(asked) == 1 and 30 < asked[0].sum() < 70
    assert found.figures["correct"] == found.figures["guesses"]
    with pytest.raises(ValueError, match="number must be at least 10"):
        one(in_one_run(1.0), 2.0, number=5)
    with pytest.raises(ValueError, match="must give 100 scores"):
        one(lambda included: np.zeros(3), 2.0, number=100)


def test_the_curve_of_a_claim_stands_for_its_epsilon() -> None:
    assert GaussianCurve.of(4.0, DELTA).epsilon(1.0, DELTA) == pytest.approx(4.0)
