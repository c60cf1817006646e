"""Survival by discrete-time hazards: a loss that is a sum over records, so that each record can be protected."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .task import Labels
from .times import SOONEST, concordance, signed_times


class Survival(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="name", tag="survival"):
    """The logistic hazard of each of the public intervals that end at ``bins`` (Kvamme and Borgan 2021, Equation 7).

    ``data.label`` is the time. An event in interval k: −log h_k − Σ_{j<k} log(1 − h_j), h = sigmoid(outputs). A record
    lost to view counts for the intervals that it lived through whole, an event after the last interval as such a one.
    """

    event: Annotated[str, Meta(min_length=1, description="column that tells whether the event happened")]
    events: Annotated[tuple[str, ...], Meta(min_length=1, description="its texts that mean yes")] = ("1",)
    bins: Annotated[
        tuple[Annotated[float, Meta(gt=0)], ...],
        Meta(min_length=1, max_length=1000, description="public ends of the intervals, ascending, in the label's unit"),
    ]

    metrics: ClassVar[tuple[str, ...]] = ("c-index",)
    coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not all(np.isfinite(self.bins)) or any(b <= a for a, b in zip(self.bins, self.bins[1:], strict=False)):
            raise ValueError("task.bins must be finite and ascending")
        if self.bins[0] <= SOONEST:
            raise ValueError(f"task.bins must begin above {SOONEST:g}: choose another unit of time")

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.event,)

    def misfit(self, classes: int) -> str | None:
        if classes:
            return "it predicts a time, and data.classes names classes: leave them away"
        return None

    def targets(self, labels: Labels) -> NDArray[Any]:
        signed = signed_times(labels, self.event, self.events)
        horizon = np.float32(self.bins[-1])
        return np.where(np.abs(signed) > horizon, -horizon, signed)

    def outputs(self, classes: int) -> int:
        return len(self.bins)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        ends = targets.new_tensor(self.bins)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        time, happened = targets.abs().unsqueeze(1), (targets > 0).unsqueeze(1)
        lived = torch.where(happened, ends < time, ends <= time)
        struck = happened & (starts < time) & (time <= ends)
        return (functional.softplus(outputs) * lived + functional.softplus(-outputs) * struck).sum(1)

    def score(self, outputs: Tensor, targets: Tensor, metric: str) -> float | None:
        """Harrell's C of the expected time, within the last interval's end."""
        return concordance(-self._expected(outputs), targets.double().numpy())

    def predictions(self, outputs: Tensor, classes: Sequence[str]) -> Mapping[str, NDArray[Any]]:
        """The expected time without event up to the last interval's end, then the chance to live beyond each end."""
        alive = self._alive(outputs)
        chances = {f"S({end:g})": alive[:, number].round(6) for number, end in enumerate(self.bins)}
        return {"prediction": self._expected(outputs).round(6), **chances}

    def _alive(self, outputs: Tensor) -> NDArray[np.float64]:
        """float64[n, intervals]: the chance to have lived through each interval."""
        alive: NDArray[np.float64] = torch.exp(-functional.softplus(outputs.double()).cumsum(1)).numpy()
        return alive

    def _expected(self, outputs: Tensor) -> NDArray[np.float64]:
        """float64[n]: ∫ S(t) dt up to the last end, S linear within an interval."""
        alive = np.column_stack([np.ones(len(outputs)), self._alive(outputs)])
        widths = np.diff([0.0, *self.bins])
        area: NDArray[np.float64] = ((alive[:, 1:] + alive[:, :-1]) / 2) @ widths
        return area
