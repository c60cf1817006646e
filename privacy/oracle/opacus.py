"""The private door of one site: Opacus takes each record's gradient and clips it, `noise.release` noises the sum."""

import math
import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..errors import NoGuarantee
from .door import DoorSettings, Loss, NoisedDoor, Records


class OpacusDoor(NoisedDoor):
    """Clipped, noised and metered gradients of one site's records (Abadi et al. 2016, Algorithm 1, lines 4 to 9).

    Args:
        model: the network. It is wrapped once; its parameters are overwritten at each query.
        loss: per-record loss. A loss that couples records is refused (`NoGuarantee`).
        records: the site's training records.
        settings: the public constants.
        randomness: the site's own generator; draws and noise come from it.

    Guarantees:
        Each answer is PoissonSampled(q, Gaussian(σ)) for one record added to or removed from the drawn part. A draw
        without records is answered with noise. What is computed for a record before its clip does not depend, to the
        last bit, on the other records: see `_InOrder`; networks with more than linear layers and ReLU are asked for
        one record at a time. Norms and sums are float64, whose rounding is below 1e-9 C. A record whose gradient is
        not finite counts as zero. The number of records, drawn or held, changes nothing but the sum. The privacy of q
        and of the denominator rests on the caller: they must be public.
    """

    def __init__(
        self, *, model: nn.Module, loss: Loss, records: Records, settings: DoorSettings, randomness: np.random.Generator
    ) -> None:
        refuse_coupling_layers(model)
        self._loss = loss
        self._module = GradSampleModule(model.double(), loss_reduction="sum")
        for module in self._module.modules():
            if type(module) is nn.Linear:
                module.forward = partial(_linear, module)  # type: ignore[method-assign]
        by_row = all(type(module) in _BY_ROW for module in model.modules())
        self._alone = False  # the probe puts two records together, which is where they could meet
        self._parameters = list(self._module.parameters())
        size = sum(parameter.numel() for parameter in self._parameters)
        super().__init__(parameters=size, records=records, settings=settings, randomness=randomness)
        self._optimizer = DPOptimizer(
            torch.optim.SGD(self._parameters, lr=0.0),
            noise_multiplier=settings.noise_multiplier,
            # Rounding may lift a clipped norm a hair above its limit: clip below C, so that C is the sensitivity.
            max_grad_norm=settings.max_grad_norm * (1 - 1e-6),
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self._refuse_coupled_loss()
        self._alone = not by_row

    def _sum_at(self, theta: Tensor, rows: Tensor) -> Tensor:
        vector_to_parameters(theta[0].double(), self._parameters)
        return self._sum_over(rows)

    def _sum_over(self, rows: Tensor) -> Tensor:
        """float64[P]: the clipped sum over ``rows`` at the parameters that were set."""
        return self._clipped_sum(self._records.inputs[rows], self._records.targets[rows])

    def _clipped_sum(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """float64[P]: Σ over records of g · min(1, C/‖g‖)."""
        self._backward(inputs, targets)
        finite = torch.stack([p.grad_sample.isfinite().flatten(1).all(1) for p in self._parameters]).all(0)
        for parameter in self._parameters:
            parameter.grad_sample[~finite] = 0.0
        self._optimizer.clip_and_accumulate()
        return torch.cat([parameter.summed_grad.flatten() for parameter in self._parameters])

    def _backward(self, inputs: Tensor, targets: Tensor) -> None:
        """Leaves each record's gradient in the parameters' grad_sample."""
        if not self._alone or len(targets) < 2:
            self._backward_at_once(inputs, targets)
            return
        each: list[list[Tensor]] = []
        for row in range(len(targets)):
            self._backward_at_once(inputs[row : row + 1], targets[row : row + 1])
            each.append([parameter.grad_sample for parameter in self._parameters])
        for parameter, samples in zip(self._parameters, zip(*each, strict=True), strict=True):
            parameter.grad_sample = torch.cat(samples)

    def _backward_at_once(self, inputs: Tensor, targets: Tensor) -> None:
        self._optimizer.zero_grad()
        with warnings.catch_warnings():
            # torch warns that inputs need no gradient; Opacus's hooks do not need them to.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            torch.autograd.backward(self._loss(self._module(inputs.double()), targets).sum())

    def _refuse_coupled_loss(self) -> None:
        """Probe losses and g{a, b} = g{a} + g{b} on synthetic records, at parameters that are not all zero."""
        probe = torch.Generator().manual_seed(0)  # no secret: synthetic inputs
        shape = self._records.inputs.shape[1:]
        pair = torch.randn(2, *shape, generator=probe)
        before = parameters_to_vector(self._parameters).detach().clone()
        vector_to_parameters(0.1 * torch.randn(self._size, generator=probe, dtype=torch.float64), self._parameters)
        # Without clipping: a coupling that only rescales gradients does not show where all of them are cut to norm C.
        limit, self._optimizer.max_grad_norm = self._optimizer.max_grad_norm, math.inf
        targets = [self._records.targets.new_tensor(labels) for labels in self._probes()]
        coupled = any(self._coupled(pair, both) for both in targets)
        self._optimizer.max_grad_norm = limit
        vector_to_parameters(before, self._parameters)
        if coupled:
            raise NoGuarantee(
                "the loss or the model lets one record move another record's gradient, so clipping bounds nothing: "
                "use a loss that is a sum over records and layers without batch statistics (GroupNorm, LayerNorm), "
                "or privacy.unit = 'client' or 'none'"
            )

    def _probes(self) -> list[list[int]]:
        """Targets of two synthetic records: equal and different classes; of a number, also an order that matters."""
        return [[0, 1], [0, 0], *([[2, 1], [1, 2]] if self._records.targets.is_floating_point() else [])]

    def _coupled(self, pair: Tensor, targets: Tensor) -> bool:
        """Whether either record of the pair changes the loss or the gradient of the other."""

        def probe(rows: slice) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                losses = self._loss(self._module(pair[rows].double()), targets[rows])
            return losses, self._clipped_sum(pair[rows], targets[rows])

        (losses, together), (loss_a, a), (loss_b, b) = probe(slice(2)), probe(slice(1)), probe(slice(1, 2))
        if not losses.shape == (2,) or not loss_a.shape == loss_b.shape == (1,):
            return True
        alone = torch.cat([loss_a, loss_b])
        return not all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in ((losses, alone), (together, a + b)))


_BY_ROW = (nn.Sequential, nn.Linear, nn.ReLU, nn.Flatten, nn.Unflatten, nn.Identity)
"""Layers whose every output number is, to the last bit, a function of its own row, with `_InOrder` for the linear."""


def refuse_coupling_layers(model: nn.Module) -> None:
    """Raise `NoGuarantee` for layers that mix the records of a batch or that Opacus can not take apart."""
    for name, module in model.named_modules():
        # Opacus's validator lets a frozen or non-affine batch norm pass; its statistics still mix records.
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise NoGuarantee(f"layer {name!r} is {type(module).__name__}, which mixes records: use nn.GroupNorm")
    problems = ModuleValidator.validate(model, strict=False)
    if problems:
        raise NoGuarantee(f"Opacus can not take per-record gradients of this model: {problems[0]}")


class _InOrder(torch.autograd.Function):
    """x Wᵀ + b and its gradient by x, added up one column at a time: each number is a function of its own row alone.

    A matrix kernel takes rows in blocks, and its rounding depends on how many there are and where a row stands. At a
    model made for it, whose sums cancel before a ReLU, one more record then changed the gradients of others from
    nothing to C: it moved the clipped sum by 2.9 C, in float64 too. Products and sums of two numbers round one way.
    The gradients by W and b are Opacus's, from products alone.
    """

    @staticmethod
    def forward(context: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(weight)
        return _columns(inputs, weight.T) if bias is None else _columns(inputs, weight.T) + bias

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = context.saved_tensors
        return _columns(gradients[0], weight), None, None


def _columns(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows @ matrix for float64[..., k] and float64[k, m]."""
    total = rows.new_zeros(*rows.shape[:-1], matrix.shape[1])
    for column, factors in zip(rows.unbind(-1), matrix, strict=True):
        total += column.unsqueeze(-1) * factors
    return total


def _linear(module: nn.Linear, inputs: Tensor) -> Tensor:
    outputs: Tensor = _InOrder.apply(inputs, module.weight, module.bias)  # type: ignore[no-untyped-call]  # torch
    return outputs
