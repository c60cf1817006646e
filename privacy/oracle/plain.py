"""The door without privacy: exact gradients, for runs that claim nothing and models that never leave their site."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..events import Charge
from .door import ALL, Batch, Loss, Records, check_theta, sample_exactly


class PlainDoor:
    """Exact mean gradients over Poisson draws of one site's records.

    Args:
        model: the network; its parameters are overwritten at each query.
        loss: per-record loss.
        records: the site's training records.
        sample_rate: 1.0 takes every record at every draw.
        randomness: decides the draws.
    """

    def __init__(
        self, *, model: nn.Module, loss: Loss, records: Records, sample_rate: float, randomness: np.random.Generator
    ) -> None:
        self._model, self._loss, self._records = model, loss, records
        self._sample_rate, self._randomness = sample_rate, randomness
        self._parameters = list(model.parameters())
        self._size = sum(parameter.numel() for parameter in self._parameters)

    def draw(self, part: str = ALL) -> Batch:
        return sample_exactly(self._records, part, self._sample_rate, self._randomness)

    def gradient(self, theta: Tensor, batch: Batch) -> Tensor:
        check_theta(theta, self._size)
        if len(batch._rows) == 0:
            return torch.zeros_like(theta)
        return parameters_to_vector(torch.autograd.grad(self._mean_loss(theta, batch), self._parameters)).unsqueeze(0)

    def curvature(self, theta: Tensor, batch: Batch, vector: Tensor) -> Tensor:
        """float32[1, P]: the Hessian of the draw's mean loss, times ``vector`` [1, P] (Pearlmutter 1994)."""
        check_theta(theta, self._size)
        if len(batch._rows) == 0:
            return torch.zeros_like(theta)
        mean = self._mean_loss(theta, batch)
        gradient = parameters_to_vector(torch.autograd.grad(mean, self._parameters, create_graph=True))
        along = (gradient * vector[0].detach()).sum()
        if not along.requires_grad:  # a loss that is linear everywhere
            return torch.zeros_like(theta)
        rows = torch.autograd.grad(along, self._parameters, allow_unused=True, materialize_grads=True)
        return parameters_to_vector(rows).unsqueeze(0)

    def _mean_loss(self, theta: Tensor, batch: Batch) -> Tensor:
        vector_to_parameters(theta[0], self._parameters)
        outputs = self._model(self._records.inputs[batch._rows])
        return self._loss(outputs, self._records.targets[batch._rows]).mean()

    @property
    def charges(self) -> tuple[Charge, ...]:
        """Nothing is claimed, so nothing is booked."""
        return ()
