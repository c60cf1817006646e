"""Cox's proportional hazards, stratified by site: a loss in which each record's term depends on the others."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor

from .task import Labels
from .times import concordance, signed_times


class Cox(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="name", tag="cox"):
    """Cox 1975, Breslow's handling of ties; every site's risk sets are of its own records.

    An event at t costs log Σ_{times ≥ t} exp(s_j) − s. The sum runs over other records, so a clip of a record's
    gradient bounds nothing. Such a run makes no claim about records or patients: use ``survival`` for that.
    """

    event: Annotated[str, Meta(min_length=1, description="column that tells whether the event happened")]
    events: Annotated[tuple[str, ...], Meta(min_length=1, description="its texts that mean yes")] = ("1",)

    metrics: ClassVar[tuple[str, ...]] = ("c-index",)
    coupled: ClassVar[bool] = True

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.event,)

    def misfit(self, classes: int) -> str | None:
        if classes:
            return "it predicts a risk, and data.classes names classes: leave them away"
        return None

    def targets(self, labels: Labels) -> NDArray[Any]:
        return signed_times(labels, self.event, self.events)

    def outputs(self, classes: int) -> int:
        return 1

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        risk, time = outputs.squeeze(1), targets.abs()
        order = torch.argsort(time, descending=True)
        at_risk = torch.logcumsumexp(risk[order], 0)
        # How many have this time or a later one: of equal times, all of them
        many = torch.searchsorted(-time[order], -time, right=True)
        return (at_risk[many - 1] - risk) * (targets > 0)

    def score(self, outputs: Tensor, targets: Tensor, metric: str) -> float | None:
        return concordance(outputs.squeeze(1).double().numpy(), targets.double().numpy())

    def predictions(self, outputs: Tensor, classes: Sequence[str]) -> Mapping[str, NDArray[Any]]:
        """The logarithm of the relative hazard: it orders records, and is no chance of anything."""
        return {"prediction": np.asarray(outputs.squeeze(1).double().numpy()).round(6)}
