"""Counts of figures: how much one unit moves them, whatever the model says; and what is read from them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from privfed.config import Config
from privfed.data.records import SiteData
from privfed.figures import Released, counted, read
from privfed.privacy.events import PrivacyUnit
from privfed.terms import BINS, CLIENT_STEPS, counts_of

from .house import changed, config, records

RECORD, PATIENT, CLIENT = PrivacyUnit.RECORD, PrivacyUnit.PATIENT, PrivacyUnit.CLIENT
MODELS = {
    "sound": lambda n: torch.randn(n, 2, generator=torch.Generator().manual_seed(0)),
    "far": lambda n: 1e30 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0)),
    "infinite": lambda n: torch.full((n, 2), torch.inf),
    "one infinite": lambda n: torch.tensor([[0.0, torch.inf]]).repeat(n, 1),
    "no numbers": lambda n: torch.full((n, 2), torch.nan),
}


def settings(unit: PrivacyUnit, metric: str = "accuracy") -> Config:
    return changed(changed(config(), "privacy", unit=unit), "evaluation", release="private", metric=metric)


def measured_records(n: int = 30) -> SiteData:
    data = records(1, n)
    return replace(data, patients=(np.arange(n) // 3).astype(np.uint64))


@pytest.mark.parametrize("metric", ["accuracy", "auroc"])
@pytest.mark.parametrize("unit", [RECORD, PATIENT])
@pytest.mark.parametrize("model", MODELS)
def test_one_unit_moves_the_counts_by_no_more_than_is_booked(unit: PrivacyUnit, metric: str, model: str) -> None:
    asked, data = settings(unit, metric), measured_records()
    release, outputs = counts_of(asked), MODELS[model](len(data))
    assert release is not None and data.patients is not None
    whole = counted(asked, data, outputs)
    units = data.patients if unit is PATIENT else data.ids
    longest = 0
    for one in np.unique(units):
        kept = units != one
        moved = whole - counted(asked, data.rows(kept), outputs[torch.from_numpy(kept)])
        event = release.event(share_variance=1, shares=1, colluders=0)
        assert int((moved**2).sum()) <= event.l2_squared and int(np.abs(moved).sum()) <= event.l1
        longest = max(longest, int((moved**2).sum()))
    assert longest > 0
    number = len(np.unique(units))
    assert whole.sum() == number if metric == "auroc" else whole[0] == number


@pytest.mark.parametrize("model", MODELS)
def test_a_whole_site_stands_as_its_accuracy_in_steps(model: str) -> None:
    asked, data = settings(CLIENT), measured_records()
    outputs = MODELS[model](len(data))
    right = float((outputs.argmax(1) == data.targets).double().mean())
    assert counted(asked, data, outputs).tolist() == [CLIENT_STEPS, round(CLIENT_STEPS * right)]
    assert counted(asked, data.rows(np.zeros(30, dtype=bool)), outputs[:0]).tolist() == [0, 0]


@pytest.mark.parametrize(("unit", "metric"), [(RECORD, "accuracy"), (PATIENT, "accuracy"), (PATIENT, "auroc")])
def test_a_site_without_test_records_counts_none(unit: PrivacyUnit, metric: str) -> None:
    nobody = measured_records().rows(np.zeros(30, dtype=bool))
    assert not counted(settings(unit, metric), nobody, torch.zeros(0, 2)).any()


def histogram(shift: float, n: int = 20_000) -> tuple[Any, float]:
    """Counts of log-odds N(±shift, 1) by label, and their AUROC."""
    randomness = np.random.default_rng(0)
    targets = randomness.integers(0, 2, n)
    odds = randomness.normal(size=n) + shift * (2 * targets - 1)
    outputs = torch.from_numpy(np.stack([np.zeros(n), odds], axis=1)).float()
    data = SiteData(np.arange(n, dtype=np.uint64), torch.zeros(n, 1), torch.from_numpy(targets))
    sample = np.sort(odds[targets == 0])
    return counted(settings(RECORD, "auroc"), data, outputs), float(
        np.searchsorted(sample, odds[targets == 1]).mean() / len(sample)
    )


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0])
def test_auroc_is_read_from_a_histogram(shift: float) -> None:
    counts, truth = histogram(shift)
    score = read(settings(RECORD, "auroc"), counts, 0).score
    assert score == pytest.approx(truth, abs=0.005)


def test_the_noise_of_many_empty_cells_does_not_draw_auroc_to_a_half() -> None:
    """2000 records in 64 cells, each with a noise of deviation 10: what is cut off at zero would add 100 of each."""
    counts, truth = histogram(1.0, n=2000)
    randomness = np.random.default_rng(1)
    totals = [counts + np.rint(randomness.normal(0, 10, 2 * BINS)).astype(np.int64) for _ in range(60)]
    drawn = [read(settings(RECORD, "auroc"), noised, 100) for noised in totals]
    scores = [one.score for one in drawn]
    deviations = [one.deviation for one in drawn]
    mean, spread = float(np.mean(scores)), float(np.std(scores))  # type: ignore[arg-type]
    assert abs(mean - truth) < 4 * spread / np.sqrt(60) + 0.005
    assert spread == pytest.approx(float(np.mean(deviations)), rel=0.4)  # type: ignore[arg-type]
    cut = [read(settings(RECORD, "auroc"), np.maximum(noised, 0), 0).score for noised in totals]
    assert float(np.mean(cut)) < truth - 0.02  # type: ignore[arg-type]  # what cutting would do, seen by the same test


@pytest.mark.parametrize("total", [[0, 0], [-7, 3], [0, 5]])
def test_noise_that_leaves_no_records_leaves_no_accuracy(total: list[int]) -> None:
    assert read(settings(RECORD), np.array(total), 100) == Released(None, None)


def test_noise_that_leaves_one_class_leaves_no_auroc() -> None:
    counts = np.zeros(2 * BINS, dtype=np.int64)
    counts[:BINS] = 5
    assert read(settings(RECORD, "auroc"), counts, 100).score is None
    counts[BINS] = -9
    assert read(settings(RECORD, "auroc"), counts, 100).score is None


def test_what_is_shown_is_a_share() -> None:
    assert read(settings(RECORD), np.array([10, 14]), 9).score == 1.0
    assert read(settings(RECORD), np.array([10, -2]), 9).score == 0.0
    shown = read(settings(RECORD), np.array([1000, 800]), 100)
    assert shown.score == 0.8
    # 10 / 1000 in the numerator and 0.8 of that in the denominator: √(1 + .64) · 0.01
    assert shown.deviation == pytest.approx(0.0128, rel=0.2)
