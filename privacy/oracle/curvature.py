"""Hessian-vector products of K networks at once: the second order of simulated sites that make no claim inside."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from .stacked import StackedNetwork

_BYTES = 128 * 2**20
_PASSES = 6  # a product holds about so many times what a gradient does


def curvatures(
    network: StackedNetwork, theta: Tensor, vectors: Tensor, inputs: list[Tensor], targets: list[Tensor]
) -> Tensor:
    """[K, P]: for each network, the Hessian of its mean loss times its vector (Pearlmutter 1994), zero without records.

    Args:
        theta, vectors: [K, P].
        inputs, targets: of each network, [n_k, …] and [n_k].
    """
    answers = torch.zeros_like(theta)
    for members in _blocks([len(one) for one in targets], network):
        width = max(len(targets[member]) for member in members)
        x = torch.stack([_padded(inputs[member], width) for member in members])
        y = torch.stack([_padded(targets[member], width) for member in members])
        mask = torch.stack([torch.arange(width) < len(targets[member]) for member in members])
        point, along = (tensor[members].to(network.device, network.dtype) for tensor in (theta, vectors))
        x = x.to(network.device, network.dtype) if x.is_floating_point() else x.to(network.device)
        product = vmap(_product(network), randomness="different")
        answers[members] = product(point, along, x, y.to(network.device), mask.to(network.device)).to(answers)
    return answers.detach()


def _product(network: StackedNetwork):  # type: ignore[no-untyped-def]  # what torch.func makes of it has no type
    """(theta, vector, inputs, targets, mask) → H · vector, of one network."""

    def mean_loss(theta: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        pieces = torch.split(theta, network._sizes)
        parameters = {name: piece.view(shape) for (name, shape), piece in zip(network._shapes, pieces, strict=True)}
        losses = network._loss(functional_call(network._model, parameters, (x,)), y)
        return torch.where(mask, losses, 0.0).sum() / mask.sum().clamp_min(1)

    def along(theta: Tensor, vector: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        gradient: Tensor = grad(mean_loss)(theta, x, y, mask)
        return (gradient * vector).sum()

    return grad(along)


def _padded(rows: Tensor, width: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(width - len(rows), *rows.shape[1:])])


def _blocks(sizes: list[int], network: StackedNetwork) -> Iterator[list[int]]:
    """Networks that are worked on together, those with records alone; similar numbers of them side by side."""
    order = sorted((site for site, size in enumerate(sizes) if size), key=lambda site: -sizes[site])
    begin = 0
    while begin < len(order):
        per_site = _PASSES * (sizes[order[begin]] * network.bytes_per_record + network.parameters * 8)
        end = begin + max(1, _BYTES // per_site)
        yield order[begin:end]
        begin = end
