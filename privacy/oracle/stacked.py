"""K copies of one network as one: clipped sums, or means, of per-record gradients at K parameter vectors at once."""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ..errors import NoGuarantee
from .door import Loss
from .norms import Leaf, Pass, UnknownUse, leaf_of
from .opacus import refuse_coupling_layers

_HAIR = 1 - 1e-6  # as of `OpacusDoor`: clip a hair below C, so that C is the sensitivity
_OPACUS_EPSILON = 1e-6  # Opacus divides by ‖g‖ + 1e-6


class StackedNetwork:
    """The per-record gradients of one network at K parameter vectors, summed with weights.

    Args:
        model: the network of one site. It is copied; what it holds is not changed.
        loss: per-record loss. A loss that couples records is refused.
        inputs, targets: [1, …] each, for their shapes and dtypes alone: no value of them is read.
        dtype: float64 agrees with Opacus to 1e-12, float32 to 1e-6 and is faster.
        device: where the networks live.

    Attributes:
        closed_form: every parameter belongs to exactly one layer of norms.py that is called exactly once. Else all
            gradients are taken one by one (vmap), whose memory is K·B·P.
        bytes_per_record: what one record needs while its gradient is taken.

    Guarantees:
        Each record's part of a clipped sum has L2 norm at most C(1 − 1e-6), and a record whose gradient is not finite
        counts as zero. Rows outside the mask count as zero whatever they hold. No record moves another's part: a
        network or loss in which it could is refused. The closed form was compared with gradients taken one by one, on
        synthetic records; where it differs it is not used.

        This holds up to rounding, at models that training arrives at. Matrix kernels round a record's numbers by how
        many others there are; at a model made for it that moves a clipped sum by several C, in float64 too, and
        `OpacusDoor` computes in an order that prevents it. So this is for sites that one process simulates, to which
        nobody sends such a model, and never for a real site.

    Raises:
        NoGuarantee: layers or a loss that mix records.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        inputs: Tensor,
        targets: Tensor,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        refuse_coupling_layers(model)
        self.dtype, self.device = dtype, torch.device(device)
        self._loss = loss
        self._model = copy.deepcopy(model).to(device=self.device, dtype=dtype)
        self._shapes = [(name, parameter.shape) for name, parameter in self._model.named_parameters()]
        self._sizes = [shape.numel() for _, shape in self._shapes]
        self.parameters = sum(self._sizes)
        self._stacked, self._leaves = _with_leaves(self._model)
        self.closed_form = bool(self._leaves)
        self.bytes_per_record = self.parameters * dtype.itemsize * 3
        self._refuse_coupled_loss(inputs, targets)
        self._compare_closed_form(inputs, targets)

    def clipped_sums(
        self, theta: Tensor, inputs: Tensor, targets: Tensor, mask: Tensor, *, max_grad_norm: float
    ) -> Tensor:
        """[K, P]: for each network, Σ over its records of g · min(1, C/‖g‖).

        Args:
            theta: [K, P], of this network's dtype, as are `inputs` unless they are integers.
            inputs: [K, B, …].
            targets: [K, B].
            mask: bool[K, B]: which rows are records. The others are padding.
            max_grad_norm: C.
        """
        return self._sums(theta, inputs, targets, mask, max_grad_norm)

    def mean_gradients(self, theta: Tensor, inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """[K, P]: each network's mean gradient, unclipped; zero without records. Arguments as of `clipped_sums`."""
        return self._sums(theta, inputs, targets, mask, None)

    def _sums(
        self, theta: Tensor, inputs: Tensor, targets: Tensor, mask: Tensor, max_grad_norm: float | None
    ) -> Tensor:
        if self.closed_form:
            try:
                return self._closed_sums(theta, inputs, targets, mask, max_grad_norm)
            except UnknownUse:  # a forward pass that depends on its data
                self.closed_form = False
        return self._general_sums(theta, inputs, targets, mask, max_grad_norm)

    def _closed_sums(
        self, theta: Tensor, inputs: Tensor, targets: Tensor, mask: Tensor, max_grad_norm: float | None
    ) -> Tensor:
        sites = len(theta)
        views = self._views(theta)
        leaves = self._leaves
        for name, leaf in leaves.items():
            leaf.pass_ = Pass(sites, views[f"{name}weight"], views.get(f"{name}bias"))
        try:
            with torch.enable_grad():
                losses = self._loss(self._stacked(inputs.flatten(0, 1)), targets.flatten())
                total = torch.where(mask.flatten(), losses, losses.new_zeros(())).sum()
                if any(leaf.pass_.calls != 1 for leaf in leaves.values()):
                    raise UnknownUse
                gradients = torch.autograd.grad(total, [leaf.pass_.left for leaf in leaves.values()])
            with torch.no_grad():
                pairs = list(zip(leaves.values(), gradients, strict=True))
                if max_grad_norm is None:
                    factors = mask / mask.sum(1, keepdim=True).clamp_min(1).to(theta.dtype)
                else:
                    norms = torch.stack([leaf.square_norms(g) for leaf, g in pairs]).sum(0).sqrt_()
                    finite = norms.isfinite()
                    factors = _factors(norms, mask & finite, max_grad_norm)
                    if not bool(finite.all()):
                        pairs = [(leaf, leaf.pass_.without(~finite, g)) for leaf, g in pairs]
                sums = torch.empty_like(theta)
                into = self._views(sums)
                for name, (leaf, g) in zip(leaves, pairs, strict=True):
                    leaf.weighted_sums(g, factors, into[f"{name}weight"], into.get(f"{name}bias"))
            return sums
        finally:
            self._held = sum(leaf.pass_.numel for leaf in leaves.values())
            for leaf in leaves.values():
                del leaf.pass_

    def _general_sums(
        self, theta: Tensor, inputs: Tensor, targets: Tensor, mask: Tensor, max_grad_norm: float | None
    ) -> Tensor:
        with torch.no_grad():
            gradients = self._each_gradient(theta, inputs, targets)
            if max_grad_norm is None:
                gradients[~mask] = 0.0
                return gradients.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
            norms = torch.linalg.vector_norm(gradients, dim=2)
            counted = mask & norms.isfinite()
            gradients[~counted] = 0.0
            return torch.bmm(_factors(norms, counted, max_grad_norm).unsqueeze(1), gradients).squeeze(1)

    def _each_gradient(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """[K, B, P]: every record's gradient, each taken alone."""

        def loss_of(vector: Tensor, one: Tensor, target: Tensor) -> Tensor:
            parameters = {
                name: piece.view(shape)
                for (name, shape), piece in zip(self._shapes, torch.split(vector, self._sizes), strict=True)
            }
            output = functional_call(self._model, parameters, (one.unsqueeze(0),))
            return self._loss(output, target.unsqueeze(0)).sum()

        each = vmap(vmap(grad(loss_of), in_dims=(None, 0, 0), randomness="different"), randomness="different")
        gradients: Tensor = each(theta, inputs, targets)
        return gradients

    def _views(self, theta: Tensor) -> dict[str, Tensor]:
        """Name → [K, *shape], the parameters of all networks in place."""
        pieces = torch.split(theta, self._sizes, dim=1)
        return {name: piece.view(len(theta), *shape) for (name, shape), piece in zip(self._shapes, pieces, strict=True)}

    def _synthetic(self, inputs: Tensor, count: int, probe: torch.Generator) -> Tensor:
        """``count`` records that stand in for those of any site."""
        shape = (count, *inputs.shape[1:])
        if not inputs.is_floating_point():
            return torch.randint(0, 2, shape, generator=probe, dtype=inputs.dtype).to(self.device)
        return torch.randn(shape, generator=probe, dtype=torch.float64).to(self.device, self.dtype)

    def _refuse_coupled_loss(self, inputs: Tensor, targets: Tensor) -> None:
        """Probe losses and g{a, b} = g{a} + g{b} on synthetic records, at parameters that are not all zero."""
        probe = torch.Generator().manual_seed(0)  # no secret: synthetic inputs
        pair = self._synthetic(inputs, 2, probe)
        pair = pair.double() if pair.is_floating_point() else pair
        model = copy.deepcopy(self._model).double()
        parameters = list(model.parameters())
        with torch.no_grad():
            for parameter in parameters:
                values = 0.1 * torch.randn(parameter.shape, generator=probe, dtype=torch.float64)
                parameter.requires_grad_().copy_(values.to(self.device))

        def asked(rows: slice, labels: Tensor) -> tuple[Tensor, Tensor]:
            losses = self._loss(model(pair[rows]), labels[rows])
            gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True, materialize_grads=True)
            return losses.detach(), torch.cat([gradient.flatten() for gradient in gradients])

        def coupled(labels: Tensor) -> bool:
            (losses, together), (loss_a, a), (loss_b, b) = (
                asked(rows, labels) for rows in (slice(2), slice(1), slice(1, 2))
            )
            if not losses.shape == (2,) or not loss_a.shape == loss_b.shape == (1,):
                return True
            pairs = ((losses, torch.cat([loss_a, loss_b])), (together, a + b))
            return not all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in pairs)

        with torch.enable_grad():
            if any(coupled(targets.new_tensor(labels).to(self.device)) for labels in ([0, 1], [0, 0])):
                raise NoGuarantee(
                    "the loss or the model lets one record move another record's gradient, so clipping bounds nothing: "
                    "use a loss that is a sum over records and layers without batch statistics (GroupNorm, LayerNorm), "
                    "or privacy.unit = 'client' or 'none'"
                )

    def _compare_closed_form(self, inputs: Tensor, targets: Tensor) -> None:
        """Keep the closed form only if it gives what gradients taken one by one give; measure what a record needs."""
        if not self.closed_form:
            return
        sites, records = 2, 3
        probe = torch.Generator().manual_seed(1)  # no secret: synthetic inputs
        x = self._synthetic(inputs, sites * records, probe).view(sites, records, *inputs.shape[1:])
        theta = 0.1 * torch.randn(sites, self.parameters, generator=probe, dtype=torch.float64)
        theta = theta.to(self.device, self.dtype)
        y = targets.new_tensor([[0, 1, 0], [1, 0, 0]]).to(self.device)
        mask = torch.tensor([[True, True, True], [True, True, False]], device=self.device)
        tolerance = 1e-9 if self.dtype == torch.float64 else 1e-3
        try:
            for max_grad_norm in (None, 1e-2):  # the clipped sum last: it holds more
                closed = self._closed_sums(theta, x, y, mask, max_grad_norm)
                general = self._general_sums(theta, x, y, mask, max_grad_norm)
                if not torch.allclose(closed, general, rtol=tolerance, atol=tolerance * float(general.abs().max())):
                    raise UnknownUse
            # Twice: layers without parameters between them hold about as much again
            self.bytes_per_record = 2 * self._held * self.dtype.itemsize // (sites * records)
        except Exception:  # whatever a model does to the stand-ins: without them it runs as it is
            self.closed_form = False
            self.bytes_per_record = self.parameters * self.dtype.itemsize * 3


def _factors(norms: Tensor, counted: Tensor, max_grad_norm: float) -> Tensor:
    """[K, B]: min(1, C/‖g‖), and zero for what does not count: padding, and what is not finite."""
    factors = (max_grad_norm * _HAIR / (norms + _OPACUS_EPSILON)).clamp_max_(1.0)
    return factors.masked_fill_(~counted, 0.0)


def _with_leaves(model: nn.Module) -> tuple[nn.Module, dict[str, Leaf]]:
    """A copy with stand-ins for its layers, by name; no leaves where a parameter is in none or in several of them."""
    stacked = copy.deepcopy(model)
    leaves: dict[str, Leaf] = {}
    covered: list[str] = []
    for name, layer in list(stacked.named_modules(remove_duplicate=False)):
        if hasattr(layer, "inplace"):
            layer.inplace = False  # it would write over the output that the backward pass goes to
        leaf = leaf_of(layer)
        if leaf is None or not any(True for _ in layer.parameters(recurse=False)):
            continue  # what holds no parameters, as a frozen layer, stands there once for all K
        if not name:
            stacked = leaf
        else:
            parent, _, attribute = name.rpartition(".")
            setattr(stacked.get_submodule(parent), attribute, leaf)
        prefix = f"{name}." if name else ""
        leaves[prefix] = leaf
        covered += [f"{prefix}{parameter}" for parameter, _ in layer.named_parameters(recurse=False)]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    alone = len(names) == len(list(model.parameters())) and sorted(covered) == sorted(names)
    return stacked, leaves if alone else {}
