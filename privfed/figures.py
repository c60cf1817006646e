"""How good the model is, through noise: what a site counts, and what is read from the noised sum."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privfed.privacy.events import PrivacyUnit
from privfed.privacy.units import Patients

from .config import Config
from .data.records import SiteData
from .tasks.classification import positive_log_odds
from .terms import BINS, CLIENT_STEPS

_WIDEST = 6.0  # log-odds; beyond are the outermost bins
_REDRAWS = 200


@dataclass(frozen=True)
class Released:
    """A figure of all sites' test records together, read from noised counts.

    Attributes:
        score: accuracy, or AUROC of all records pooled; None where the noise left nothing to read.
        deviation: standard deviation of ``score`` that the noise makes; None as above.
    """

    score: float | None
    deviation: float | None


def counted(config: Config, test: SiteData, outputs: Tensor) -> NDArray[np.int64]:
    """int64[cells]: a site's counts of the model's outputs float32[n, classes] on its test records."""
    rows = torch.arange(len(test))
    if config.privacy.unit is PrivacyUnit.PATIENT:
        assert test.patients is not None  # `doors.check_units`
        rows = Patients.of(test.patients.tolist()).at_most(1, rows)  # one record speaks for its patient
    outputs, targets = outputs[rows], test.targets[rows]
    if config.metric == "accuracy":
        right = int((outputs.argmax(1) == targets).sum())
        if config.privacy.unit is PrivacyUnit.CLIENT:
            return np.array([CLIENT_STEPS, round(CLIENT_STEPS * right / len(rows))] if len(rows) else [0, 0])
        return np.array([len(rows), right])
    # Total: were there outputs that could not be counted, a refusal would tell of their records without noise
    odds = positive_log_odds(outputs).double().nan_to_num(nan=0.0).clamp(-_WIDEST, _WIDEST)
    cell = ((odds + _WIDEST) / (2 * _WIDEST) * (BINS - 1)).round().long() + BINS * (targets == 1)
    return torch.bincount(cell, minlength=2 * BINS).numpy()


def read(config: Config, total: NDArray[np.int64], variance: int) -> Released:
    """The figure in a noised sum int64[cells] of `counted`, whose noise has ``variance`` in each cell."""
    score = _score(config, total)
    if score is None:
        return Released(None, None)
    shown = min(max(score, 0.0), 1.0)
    # What the noise does to the score, by adding some more of its kind: no records are asked
    again = np.random.default_rng(0).normal(0.0, variance**0.5, (_REDRAWS, len(total)))
    scores = [value for noised in total + again if (value := _score(config, noised)) is not None]
    return Released(shown, float(np.std(np.array(scores) - score)) if len(scores) > _REDRAWS // 2 else None)


def _score(config: Config, total: NDArray[np.int64] | NDArray[np.float64]) -> float | None:
    if config.metric == "accuracy":
        return float(total[1] / total[0]) if total[0] >= 1 else None
    # As they are: of 64 cells of noise, those below zero balance those above; cut off, they draw AUROC to a half
    counts = total.astype(np.float64)
    negative, positive = counts[:BINS], counts[BINS:]
    if min(negative.sum(), positive.sum()) < 1:
        return None
    pairs = negative.sum() * positive.sum()
    below = np.cumsum(negative) - negative / 2  # of one bin, half are taken to be right
    return float((positive * below).sum() / pairs)
