"""A number with a public range: a measurement, or a rating."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor

from .task import Labels


class _Number(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="name"):
    """What numbers have in common, over a public ``range`` and a public ``typical`` value.

    The model learns 4 (y − typical) / (high − low), y clipped to the range, as inputs are scaled: from public
    constants, not from the records. Its loss is half the squared error.
    """

    coupled: ClassVar[bool] = False

    @property
    def span(self) -> tuple[float, float]:
        raise NotImplementedError

    @property
    def middle(self) -> float:
        low, high = self.span
        return (low + high) / 2

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    def misfit(self, classes: int) -> str | None:
        if classes:
            return "it predicts a number, and data.classes names classes: leave them away"
        return None

    def targets(self, labels: Labels) -> NDArray[Any]:
        low, high = self.span
        return (4 * (np.clip(labels.numbers(), low, high) - self.middle) / (high - low)).astype(np.float32)

    def outputs(self, classes: int) -> int:
        return 1

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.squeeze(1) - targets).square() / 2

    def score(self, outputs: Tensor, targets: Tensor, metric: str) -> float | None:
        """Mean absolute error or root mean squared error, in the label's own unit."""
        if len(targets) == 0:
            return None
        error = self._values(outputs.squeeze(1)) - self._values(targets)
        return float(error.abs().mean() if metric == "mae" else error.square().mean().sqrt())

    def predictions(self, outputs: Tensor, classes: Sequence[str]) -> Mapping[str, NDArray[Any]]:
        return {"prediction": self._values(outputs.squeeze(1)).numpy().round(6)}

    def _values(self, scaled: Tensor) -> Tensor:
        """float64[n] in the label's unit, within the range."""
        low, high = self.span
        return (scaled.double().nan_to_num(nan=0.0) * (high - low) / 4 + self.middle).clamp(low, high)


class Regression(_Number, frozen=True, kw_only=True, tag="regression"):
    """A numeric label."""

    range: Annotated[
        tuple[float, float], Meta(description="public [low, high] of the label; values outside count as the nearer end")
    ]
    typical: Annotated[float | None, Meta(description="public typical value; default the middle of the range")] = None

    metrics: ClassVar[tuple[str, ...]] = ("mae", "rmse")

    def __post_init__(self) -> None:
        _check_range(self.range)
        if self.typical is not None and not self.range[0] <= self.typical <= self.range[1]:
            raise ValueError(f"task.typical must lie in task.range, got {self.typical}")

    @property
    def span(self) -> tuple[float, float]:
        return self.range

    @property
    def middle(self) -> float:
        return (self.range[0] + self.range[1]) / 2 if self.typical is None else self.typical


class Rating(_Number, frozen=True, kw_only=True, tag="rating"):
    """How much a user likes an item, on a public scale."""

    scale: Annotated[tuple[float, float], Meta(description="lowest and highest rating")] = (1.0, 5.0)

    metrics: ClassVar[tuple[str, ...]] = ("rmse", "mae")

    def __post_init__(self) -> None:
        _check_range(self.scale)

    @property
    def span(self) -> tuple[float, float]:
        return self.scale


def _check_range(span: tuple[float, float]) -> None:
    low, high = span
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(f"the task's range must be [low, high] with low < high, got {[low, high]}")
