"""The private door of a site whose patients have several records."""

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import NoGuarantee
from ..events import Charge, PatientMixture, PoissonGaussian
from ..noise import poisson_sample
from ..units import Patients, PatientSampling, clipped_patient_sum, executed_event
from .door import ALL, Batch, DoorSettings, Loss, Records, rows_of
from .opacus import OpacusDoor


class PatientDoor(OpacusDoor):
    """Gradients that hide a whole patient: what is sampled, clipped and booked belongs together.

    Args:
        patients: who owns which row of `records`.
        sampling: "patient": patients are drawn, and each one's summed gradient is clipped. "record": records are drawn
            and clipped one by one, at most `max_records` of a patient.
        max_records: k, public; for "record" only.
        settings: as of `OpacusDoor`; with "patient" its sample rate is that of a patient and its clip that of a
            patient's sum.

    Guarantees:
        For one patient added or removed with all records, each answer is PoissonSampled(q, Gaussian(σ)) with
        "patient", and the mixture of Gaussians over Binomial(k, q) records with "record"; `charges` names which.

    Raises:
        NoGuarantee: a patient's records lie in several parts of the split: parts then do not compose in parallel.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        loss: Loss,
        records: Records,
        settings: DoorSettings,
        randomness: np.random.Generator,
        patients: Patients,
        sampling: PatientSampling = "patient",
        max_records: int | None = None,
    ) -> None:
        # Refuses "record" without a bound before anything is drawn
        executed_event(sampling, sample_rate=settings.sample_rate, noise_multiplier=1.0, max_records=max_records)
        if len(patients.owner) != len(records):
            raise ValueError(f"patients must own {len(records)} rows, got {len(patients.owner)}")
        _refuse_divided_patients(records, patients)
        self._patients, self._sampling, self._max_records = patients, sampling, max_records
        super().__init__(model=model, loss=loss, records=records, settings=settings, randomness=randomness)

    def draw(self, part: str = ALL) -> Batch:
        rows, rate = rows_of(self._records, part), self._settings.sample_rate
        if self._max_records is not None and self._sampling == "record":
            rows = self._patients.at_most(self._max_records, rows)
            return self._meter.drawn(Batch(part, rows[poisson_sample(len(rows), rate, self._randomness)]))
        return self._meter.drawn(Batch(part, self._patients.draw(rows, rate, self._randomness)))

    @property
    def charges(self) -> tuple[Charge, ...]:
        return tuple(
            Charge(self._executed(charge.event), charge.count, charge.group)
            for charge in super().charges
            if isinstance(charge.event, PoissonGaussian)
        )

    def _executed(self, event: PoissonGaussian) -> PoissonGaussian | PatientMixture:
        return executed_event(
            self._sampling,
            sample_rate=event.sample_rate,
            noise_multiplier=event.noise_multiplier,
            max_records=self._max_records,
        )

    def _sum_over(self, rows: Tensor) -> Tensor:
        if self._sampling == "record":
            return super()._sum_over(rows)
        self._backward(self._records.inputs[rows], self._records.targets[rows])
        grads = [parameter.grad_sample for parameter in self._parameters]
        return clipped_patient_sum(grads, self._patients.owner[rows], self._settings.max_grad_norm)


def _refuse_divided_patients(records: Records, patients: Patients) -> None:
    seen: set[int] = set()
    for name, rows in records.parts.items():
        if name == ALL:
            continue
        here = {int(owner) for owner in torch.unique(patients.owner[rows])}
        if seen & here:
            raise NoGuarantee(
                "some patient has records in several parts of the split, which then do not compose in parallel: split "
                "by a keyed hash of the patient, not of the record"
            )
        seen |= here
