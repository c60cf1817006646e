"""Two classes or more."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .task import Labels

_BINS = 15  # of the confidence, as Guo et al. 2017 draw them


class Classification(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="name", tag="classification"
):
    """The classes of ``data.classes`` by cross-entropy; the second one is the positive one."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "auroc", "auprc", "ece")
    coupled: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    def misfit(self, classes: int) -> str | None:
        return None if classes >= 2 else "data.classes must name at least two classes, or task.name another task"

    def targets(self, labels: Labels) -> NDArray[Any]:
        return labels.classes()

    def outputs(self, classes: int) -> int:
        return classes

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, reduction="none")

    def score(self, outputs: Tensor, targets: Tensor, metric: str) -> float | None:
        """Accuracy; AUROC or AUPRC of class 1 against the rest; or the expected calibration error.

        The areas are undefined on records of one class.
        """
        if len(targets) == 0:
            return None
        if metric == "accuracy":
            return float((outputs.argmax(1) == targets).double().mean())
        if metric == "ece":
            return calibration_error(outputs, targets)
        positive = (targets == 1).numpy()
        if positive.all() or not positive.any():
            return None
        odds = positive_log_odds(outputs).numpy()
        if metric == "auroc":
            return rank_area(odds, positive)
        from sklearn.metrics import average_precision_score

        return float(average_precision_score(positive, odds)) if np.isfinite(odds).all() else None

    def predictions(self, outputs: Tensor, classes: Sequence[str]) -> Mapping[str, NDArray[Any]]:
        """The likeliest class, then one probability a class."""
        probabilities: NDArray[np.float32] = torch.softmax(outputs, dim=1).numpy()
        named = {f"p({name})": probabilities[:, number].round(6) for number, name in enumerate(classes)}
        return {"prediction": np.array(classes)[probabilities.argmax(1)], **named}


def rank_area(odds: NDArray[np.float32], positive: NDArray[np.bool_]) -> float | None:
    """The share of pairs in which the positive one ranks higher, ties counting half (Mann and Whitney 1947)."""
    from scipy.stats import rankdata

    ranks = rankdata(odds)
    ones, others = int(positive.sum()), int((~positive).sum())
    area = float(ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * others)
    return area if np.isfinite(area) else None


def positive_log_odds(outputs: Tensor) -> Tensor:
    """[n]: log odds of class 1 against all others together."""
    rest = torch.cat([outputs[:, :1], outputs[:, 2:]], 1)
    return outputs[:, 1] - torch.logsumexp(rest, 1)


def calibration_error(outputs: Tensor, targets: Tensor) -> float:
    """|confidence − accuracy| averaged over 15 equal bins of confidence (Guo et al. 2017, Equation 3)."""
    confidence, predicted = torch.softmax(outputs.double(), dim=1).max(1)
    right = (predicted == targets).double()
    at = (confidence * _BINS).ceil().long().clamp(1, _BINS) - 1
    gap = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, at, confidence - right)
    return float(gap.abs().sum() / len(targets))
