"""Patients with several records: who owns which row, and sums of gradients that one patient moves by at most C."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .events import PatientMixture, PoissonGaussian
from .noise import poisson_sample

PatientSampling = Literal["patient", "record"]

_HAIR = 1 - 1e-6  # float32 may round a clipped norm up: clip a hair below C, so that C is the sensitivity


@dataclass(frozen=True)
class Patients:
    """Which patient each row of a table belongs to.

    Args:
        owner: int64[n], a number for each patient from 0 on. Rows of one patient need not stand together.
    """

    owner: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        if self.owner.dtype != torch.int64 or self.owner.ndim != 1:
            raise TypeError(f"owner must be int64[n], got {self.owner.dtype}{list(self.owner.shape)}")

    @classmethod
    def of(cls, ids: Sequence[Hashable]) -> "Patients":
        """From the id column of a table, one entry a row."""
        numbers: dict[Hashable, int] = {}
        return cls(torch.tensor([numbers.setdefault(name, len(numbers)) for name in ids], dtype=torch.int64))

    def draw(self, rows: Tensor, sample_rate: float, randomness: np.random.Generator) -> Tensor:
        """All of `rows` int64[m] that belong to the patients of one Poisson draw: each patient alone, at the rate."""
        present = torch.unique(self.owner[rows])
        drawn = present[poisson_sample(len(present), sample_rate, randomness)]
        return rows[torch.isin(self.owner[rows], drawn)]

    def at_most(self, max_records: int, rows: Tensor) -> Tensor:
        """`rows` int64[m] without those that come after the first `max_records` of their patient.

        What is left of a patient depends on that patient's own rows and their order alone.
        """
        if max_records < 1:
            raise ValueError(f"max_records must be at least 1, got {max_records}")
        order = torch.argsort(self.owner[rows], stable=True)
        owners = self.owner[rows][order]
        starts = torch.searchsorted(owners, owners, side="left")
        kept = order[torch.arange(len(owners)) - starts < max_records]
        return rows[torch.sort(kept).values]


def executed_event(
    sampling: PatientSampling, *, sample_rate: float, noise_multiplier: float, max_records: int | None
) -> PoissonGaussian | PatientMixture:
    """The event of one release under the patient unit, by what was sampled *and* clipped.

    Args:
        sampling: "patient": patients were drawn, and each one's summed gradient clipped. "record": records were drawn
            and clipped one by one, at most `max_records` of a patient.
        max_records: k; for "record" only. Patients that are drawn and clipped as units may have any number.
    """
    if sampling == "patient":
        return PoissonGaussian(sample_rate, noise_multiplier)
    if max_records is None:
        raise ValueError('max_records must be given with sampling = "record": without it no patient is bounded')
    return PatientMixture(sample_rate, max_records, noise_multiplier)


def clipped_patient_sum(grad_samples: Sequence[Tensor], owner: Tensor, max_grad_norm: float) -> Tensor:
    """float32[P]: Σ over patients of s · min(1, C/‖s‖), where s is the sum of the patient's per-record gradients.

    Args:
        grad_samples: per parameter, float32[b, ...]: each drawn record's gradient.
        owner: int64[b], each drawn record's patient.
        max_grad_norm: C.

    Guarantees:
        A patient moves the result by at most C in L2, whatever the number of records. A patient with a gradient that
        is not finite counts as zero. Without records the result is zero.
    """
    if len(owner) == 0:
        return torch.cat([grads.new_zeros(grads.shape[1:].numel()) for grads in grad_samples])
    patients, position = torch.unique(owner, return_inverse=True)
    sums = []
    for grads in grad_samples:
        flat = grads.reshape(len(owner), -1)
        sums.append(flat.new_zeros(len(patients), flat.shape[1]).index_add_(0, position, flat))
    norms = torch.stack([torch.linalg.vector_norm(s, dim=1, dtype=torch.float64) for s in sums]).norm(dim=0)
    factors = torch.where(norms.isfinite(), (max_grad_norm * _HAIR / norms.clamp_min(1e-300)).clamp_max(1.0), 0.0)
    for s in sums:
        s[~norms.isfinite()] = 0.0  # 0 · ∞ is no number
    return torch.cat([(factors.to(s.dtype) @ s) for s in sums])
