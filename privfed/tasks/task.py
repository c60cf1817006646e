"""The shape of a task: which targets it reads from a table, what the model's outputs mean, and how good they are."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

LOWER_IS_BETTER = frozenset({"mae", "rmse", "ece"})
"""Figures of which less is better; of all others, more is."""


class Labels(Protocol):
    """A table's label columns, as a task reads them."""

    def classes(self) -> NDArray[np.int64]:
        """int64[n]: the class of each record by ``data.classes``, −1 for a label that is in none."""
        ...

    def numbers(self) -> NDArray[np.float64]:
        """float64[n]: the label column, NaN where a value is missing."""
        ...

    def among(self, column: str, texts: Sequence[str]) -> NDArray[np.float64]:
        """float64[n]: 1 where a further column holds one of ``texts``, 0 where another, NaN where nothing."""
        ...


class Task(Protocol):
    """What a run learns to predict. A target is one number a record, whatever the task."""

    metrics: ClassVar[tuple[str, ...]]
    """Its figures of merit, the default first."""
    coupled: ClassVar[bool]
    """Whether a record moves the loss of others: then no record can be protected by itself."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a table that it reads beside ``data.label``."""
        ...

    def misfit(self, classes: int) -> str | None:
        """Why the task can not be learned from labels of so many classes; None where it can."""
        ...

    def targets(self, labels: Labels) -> NDArray[Any]:
        """int64[n] or float32[n]; −1 or NaN where a record has none."""
        ...

    def outputs(self, classes: int) -> int:
        """How many outputs the model has."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[B]: the loss of each record, of outputs [B, …] and targets [B]."""
        ...

    def score(self, outputs: Tensor, targets: Tensor, metric: str) -> float | None:
        """A figure of merit of outputs float32[n, …]; None where there is nothing to measure."""
        ...

    def predictions(self, outputs: Tensor, classes: Sequence[str]) -> Mapping[str, NDArray[Any]]:
        """Columns [n] for a user: ``prediction``, and what else the outputs say."""
        ...


def usable(targets: NDArray[Any]) -> NDArray[np.bool_]:
    """bool[n]: which records have a target."""
    found: NDArray[np.bool_] = np.isfinite(targets) if targets.dtype.kind == "f" else targets >= 0
    return found
