"""Hessian-vector products of K networks at once: the second order of simulated sites that make no claim inside."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from .cohort import padded
from .stacked import StackedNetwork

_BYTES = 128 * 2**20
_PASSES = 6  # a product holds about so many times what a gradient does


def curvatures(
    network: StackedNetwork,
    theta: Tensor,
    vectors: Tensor,
    inputs: Tensor,
    targets: Tensor,
    rows: Tensor,
    counts: Tensor,
) -> Tensor:
    """[K, P]: for each network, the Hessian of its mean loss times its vector (Pearlmutter 1994), zero without records.

    Args:
        theta, vectors: [K, P].
        inputs, targets: records of all sites.
        rows: int64[Σ counts], row numbers in them, site after site.
        counts: int64[K], how many of them are each site's.
    """
    answers = torch.zeros_like(theta)
    first = torch.cumsum(counts, 0) - counts
    for members in _blocks(counts.tolist(), network):
        own = counts[members].unsqueeze(1)
        places = torch.arange(int(own.max()))
        mask = places < own
        taken = rows[(first[members].unsqueeze(1) + places).clamp_max(len(rows) - 1).flatten()].to(network.device)
        padding = (~mask).flatten().nonzero().squeeze(1).to(network.device)
        x, y = (padded(values, taken, padding).view(*mask.shape, *values.shape[1:]) for values in (inputs, targets))
        point, along = (tensor[members].to(network.device, network.dtype) for tensor in (theta, vectors))
        x = x.to(network.dtype) if x.is_floating_point() else x
        answers[members] = _products(network, point, along, x, y, mask.to(network.device)).to(answers)
    return answers


def _products(
    network: StackedNetwork, theta: Tensor, vectors: Tensor, inputs: Tensor, targets: Tensor, mask: Tensor
) -> Tensor:
    """[K, P]: the sum of all networks' mean losses has no terms between them, so one double backward serves all."""

    def mean_loss(theta: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        pieces = torch.split(theta, network._sizes)
        parameters = {name: piece.view(shape) for (name, shape), piece in zip(network._shapes, pieces, strict=True)}
        losses = network._loss(functional_call(network._model, parameters, (x,)), y)
        return torch.where(mask, losses, 0.0).sum() / mask.sum().clamp_min(1)

    with torch.enable_grad():
        point = theta.detach().clone().requires_grad_()
        total = vmap(mean_loss, randomness="different")(point, inputs, targets, mask).sum()
        (gradient,) = torch.autograd.grad(total, point, create_graph=True)
        along = (gradient * vectors).sum()
        if not along.requires_grad:  # a loss that is linear everywhere
            return torch.zeros_like(theta)
        (product,) = torch.autograd.grad(along, point, allow_unused=True, materialize_grads=True)
    return product


def _blocks(sizes: list[int], network: StackedNetwork) -> Iterator[Tensor]:
    """Networks that are worked on together, those with records alone; similar numbers of them side by side."""
    order = sorted((site for site, size in enumerate(sizes) if size), key=lambda site: -sizes[site])
    begin = 0
    while begin < len(order):
        per_site = _PASSES * (sizes[order[begin]] * network.bytes_per_record + network.parameters * 8)
        end = begin + max(1, _BYTES // per_site)
        yield torch.tensor(order[begin:end])
        begin = end
