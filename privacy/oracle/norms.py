"""Layers of K networks at once, with each record's gradient norm in closed form.

The batch of K sites is an ordinary batch, site after site: [K·B, …]. Only the layers below know about K: each applies
site k's parameters to site k's records. One backward pass to their outputs gives g; from g and the layer's input follow
every record's gradient norm and the weighted sum of the gradients, without the gradients of all records ever standing
in memory together (Goodfellow 2015; Li et al. 2022, "ghost clipping"; Bu et al. 2023, "book-keeping").
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class UnknownUse(Exception):
    """A layer was called in a way whose closed form is not known here: the caller takes the general path."""


@dataclass
class Pass:
    """What a layer knows of one pass.

    Attributes:
        sites: K.
        weight, bias: the layer's parameters [K, …].
        calls: how often it was called.
        records: B.
        entered: its input, or what the closed form needs of it.
        left: its output, to which the backward pass goes.
        products: gradients of the single records, where the layer needs them for their norms anyway.
    """

    sites: int
    weight: Tensor
    bias: Tensor | None
    calls: int = 0
    records: int = 0
    entered: Tensor = field(default_factory=lambda: torch.empty(0))
    left: Tensor = field(default_factory=lambda: torch.empty(0))
    products: Tensor | None = None

    def note(self, entered: Tensor, left: Tensor) -> Tensor:
        """Keep what the closed form needs of a forward pass."""
        if not left.requires_grad:
            left.requires_grad_()  # the first layer: the graph begins at its output
        self.entered, self.left = entered.detach(), left
        return left

    def without(self, lost: Tensor, g: Tensor) -> Tensor:
        """``g`` with zeros for the records of the mask ``lost`` [K, B], and zeros here too: 0 · ∞ is no number."""

        def blank(tensor: Tensor) -> Tensor:
            by_record = tensor.reshape(lost.numel(), -1)
            return by_record.masked_fill(lost.flatten().unsqueeze(1), 0.0).reshape(tensor.shape)

        if self.entered.is_floating_point():
            self.entered = blank(self.entered)
        if self.products is not None:
            self.products = blank(self.products)
        return blank(g)

    @property
    def numel(self) -> int:
        """Numbers that are held for the backward pass and the sums."""
        products = 0 if self.products is None else self.products.numel()
        return self.entered.numel() + 2 * self.left.numel() + products


class Leaf(nn.Module, ABC):
    """One layer of K networks.

    Args:
        layer: the layer of one network; its settings are taken, its parameters are not.
    """

    pass_: Pass

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer_settings: Any = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
        self.has_bias = getattr(layer, "bias", None) is not None

    def forward(self, inputs: Tensor) -> Tensor:
        now = self.pass_
        now.calls += 1
        if now.calls > 1 or inputs.ndim == 0 or inputs.shape[0] % now.sites:
            raise UnknownUse
        now.records = inputs.shape[0] // now.sites
        return self.apply_stacked(inputs)

    @abstractmethod
    def apply_stacked(self, inputs: Tensor) -> Tensor:
        """The layer's outputs for inputs [K·B, …]."""

    @abstractmethod
    def square_norms(self, g: Tensor) -> Tensor:
        """[K, B]: each record's squared gradient norm, from the gradient of ``left``."""

    @abstractmethod
    def weighted_sums(self, g: Tensor, factors: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Σ over records of factor · gradient into ``weight`` [K, …] and ``bias`` [K, …]; ``factors`` is [K, B]."""


class _Products(Leaf):
    """A layer whose record gradient is Σ_t g_t ⊗ u_t over T positions: Linear (T = 1 or a sequence), convolutions."""

    def square_norms(self, g: Tensor) -> Tensor:
        u, g = self._positions(g)
        positions, inner, outer = u.shape[2], u.shape[3], g.shape[3]
        if positions == 1:
            squares = _square_norm(u)
            return ((squares + 1 if self.has_bias else squares) * _square_norm(g)).squeeze(2)
        if inner * outer > 2 * positions * (inner + outer):
            # The products would take more room than what they are of: ‖Σ_t g_t ⊗ u_t‖² = Σ_{t,s} (u_t · u_s)(g_t · g_s)
            squares = ((u @ u.mT) * (g @ g.mT)).sum((2, 3)).clamp_min(0.0)
        else:  # and their weighted sum is then nearly free
            self.pass_.products = (g.mT @ u).flatten(2)
            squares = _square_norm(self.pass_.products)
        return squares + _square_norm(g.sum(2)) if self.has_bias else squares

    def weighted_sums(self, g: Tensor, factors: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        u, g = self._positions(g)
        if self.pass_.products is not None:
            sums = torch.bmm(factors.unsqueeze(1), self.pass_.products)
            shift = torch.bmm(factors.repeat_interleave(g.shape[2], 1).unsqueeze(1), g.flatten(1, 2)).squeeze(1)
        else:
            weighted = (g * factors[:, :, None, None]).flatten(1, 2)
            sums, shift = torch.bmm(weighted.mT, u.flatten(1, 2)), _sum_of_rows(weighted)
        weight.copy_(self.as_weight(sums.view(self.pass_.sites, g.shape[3], u.shape[3])))
        if bias is not None:
            bias.copy_(shift)

    def as_weight(self, products: Tensor) -> Tensor:
        """[K, *shape of the weight] from [K, O, D]."""
        return products

    def _positions(self, g: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.pass_.sites, self.pass_.records, -1)
        return self.pass_.entered.view(*shape, self.pass_.entered.shape[-1]), g.reshape(*shape, g.shape[-1])


class StackedLinear(_Products):
    """nn.Linear of K networks, for inputs [K·B, …, in]."""

    def apply_stacked(self, inputs: Tensor) -> Tensor:
        if inputs.ndim < 2:
            raise UnknownUse
        entered = inputs.reshape(self.pass_.sites, -1, inputs.shape[-1])
        left = self.pass_.note(entered, _affine(entered, self.pass_.weight.mT, self.pass_.bias))
        return left.view(*inputs.shape[:-1], left.shape[-1])


class StackedConv2d(_Products):
    """nn.Conv2d of K networks, channels last: the windows as rows, one product a site."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        settings = self.layer_settings
        self.kernel, self.stride = _pair(settings["kernel_size"]), _pair(settings["stride"])
        self.padding, self.dilation = _pair(settings["padding"]), _pair(settings["dilation"])
        self.channels = settings["in_channels"]

    def apply_stacked(self, inputs: Tensor) -> Tensor:
        if inputs.ndim != 4:
            raise UnknownUse
        n, c, height, width = inputs.shape
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = self.kernel, self.stride, self.padding, self.dilation
        out_h, out_w = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
        # First the columns of all windows, then windows as runs of columns: long copies, and few of them
        image = functional.pad(inputs.detach().permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph)).contiguous()
        a_record, a_row, a_column, _ = image.stride()
        columns = image.as_strided(
            (n, out_h, width + 2 * pw, kh, c), (a_record, sh * a_row, a_column, dh * a_row, 1)
        ).contiguous()
        a_record, a_row, a_column, _, _ = columns.stride()
        windows = columns.as_strided(
            (n, out_h, out_w, kw, kh * c), (a_record, a_row, sw * a_column, dw * a_column, 1)
        ).reshape(self.pass_.sites, -1, kw * kh * c)
        weight = self.pass_.weight.view(self.pass_.sites, -1, c, kh, kw).permute(0, 1, 4, 3, 2).flatten(2)
        geometry = (self.kernel, self.stride, self.padding, self.dilation, (out_h, out_w))
        left: Tensor = _Windows.apply(inputs, windows, weight, self.pass_.bias, geometry)  # type: ignore[no-untyped-call]
        self.pass_.note(windows, left)
        return left.view(n, out_h, out_w, -1).permute(0, 3, 1, 2)

    def as_weight(self, products: Tensor) -> Tensor:
        columns_of_rows = products.view(*products.shape[:2], *reversed(self.kernel), self.channels)
        return columns_of_rows.permute(0, 1, 4, 3, 2)


class StackedConv1d(StackedConv2d):
    """nn.Conv1d of K networks: a Conv2d of one row."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        settings = self.layer_settings
        self.kernel, self.stride = (1, *settings["kernel_size"]), (1, *settings["stride"])
        self.padding, self.dilation = (0, *settings["padding"]), (1, *settings["dilation"])

    def apply_stacked(self, inputs: Tensor) -> Tensor:
        if inputs.ndim != 3:
            raise UnknownUse
        return super().apply_stacked(inputs.unsqueeze(2)).squeeze(2)

    def as_weight(self, products: Tensor) -> Tensor:
        return super().as_weight(products).squeeze(3)


class StackedEmbedding(Leaf):
    """nn.Embedding of K networks, for ids [K·B, …]. A token that comes twice adds its two gradients up first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.padding_id = self.layer_settings["padding_idx"]

    def apply_stacked(self, inputs: Tensor) -> Tensor:
        tokens, width = self.pass_.weight.shape[1:]
        ids = inputs.reshape(self.pass_.sites, -1)
        first = torch.arange(self.pass_.sites, device=ids.device).unsqueeze(1) * tokens
        rows = self.pass_.weight.reshape(-1, width).index_select(0, (ids + first).flatten())
        return self.pass_.note(ids, rows.view(self.pass_.sites, -1, width)).view(*inputs.shape, width)

    def square_norms(self, g: Tensor) -> Tensor:
        ids, g = self._tokens(g)
        return ((ids.unsqueeze(3) == ids.unsqueeze(2)) * (g @ g.mT)).sum((2, 3)).clamp_min(0.0)

    def weighted_sums(self, g: Tensor, factors: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        ids, g = self._tokens(g)
        tokens, width = weight.shape[1:]
        first = torch.arange(self.pass_.sites, device=ids.device).view(-1, 1, 1) * tokens
        sums = g.new_zeros(self.pass_.sites * tokens, width)
        weighted = (g * factors[:, :, None, None]).reshape(-1, width)
        weight.copy_(sums.index_add_(0, (ids + first).flatten(), weighted).view_as(weight))

    def _tokens(self, g: Tensor) -> tuple[Tensor, Tensor]:
        ids = self.pass_.entered.view(self.pass_.sites, self.pass_.records, -1)
        g = g.reshape(*ids.shape, g.shape[-1])
        return ids, g if self.padding_id is None else g * (ids != self.padding_id).unsqueeze(3)


class _Scales(Leaf):
    """A normalisation's own scale w and shift b: outputs = x̂ ⊙ w + b, with x̂ of each record alone."""

    def square_norms(self, g: Tensor) -> Tensor:
        scale, shift = self._per_record(g)
        squares = scale.square().sum(2)
        return squares + shift.square().sum(2) if self.has_bias else squares

    def weighted_sums(self, g: Tensor, factors: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        scale, shift = self._per_record(g)
        weight.copy_(torch.bmm(factors.unsqueeze(1), scale).view_as(weight))
        if bias is not None:
            bias.copy_(torch.bmm(factors.unsqueeze(1), shift).view_as(bias))

    def _per_record(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """[K, B, parameters] of w and of b."""
        dims = self.summed_over
        return (g * self.pass_.entered).sum(dims).flatten(2), g.sum(dims).flatten(2)

    summed_over: int


class StackedGroupNorm(_Scales):
    """nn.GroupNorm of K networks, for inputs [K·B, C, …]."""

    summed_over = 3

    def apply_stacked(self, inputs: Tensor) -> Tensor:
        normal = functional.group_norm(inputs, self.layer_settings["num_groups"], eps=self.layer_settings["eps"])
        normal = normal.reshape(self.pass_.sites, self.pass_.records, inputs.shape[1], -1)
        assert self.pass_.bias is not None  # an affine GroupNorm has both
        left = normal * self.pass_.weight[:, None, :, None] + self.pass_.bias[:, None, :, None]
        return self.pass_.note(normal, left).view(inputs.shape)


class StackedLayerNorm(_Scales):
    """nn.LayerNorm of K networks, for inputs [K·B, …, *normalized_shape]."""

    summed_over = 2

    def apply_stacked(self, inputs: Tensor) -> Tensor:
        shape = self.layer_settings["normalized_shape"]
        if inputs.ndim <= len(shape):
            raise UnknownUse
        normal = functional.layer_norm(inputs, shape, eps=self.layer_settings["eps"])
        normal = normal.reshape(self.pass_.sites, self.pass_.records, -1, math.prod(shape))
        left = normal * self.pass_.weight.flatten(1)[:, None, None]
        if self.pass_.bias is not None:
            left = left + self.pass_.bias.flatten(1)[:, None, None]
        return self.pass_.note(normal, left).view(inputs.shape)


def leaf_of(layer: nn.Module) -> Leaf | None:
    """The stacked layer that stands in for ``layer``; None where no closed form is known."""
    match layer:
        case nn.Linear() if type(layer) is nn.Linear:
            return StackedLinear(layer)
        case nn.Conv1d() | nn.Conv2d() if type(layer) in (nn.Conv1d, nn.Conv2d):
            if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                return None
            return StackedConv2d(layer) if isinstance(layer, nn.Conv2d) else StackedConv1d(layer)
        case nn.Embedding() if type(layer) is nn.Embedding:
            ordinary = layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
            return StackedEmbedding(layer) if ordinary else None
        case nn.GroupNorm() if type(layer) is nn.GroupNorm and layer.affine:
            return StackedGroupNorm(layer)
        case nn.LayerNorm() if type(layer) is nn.LayerNorm and layer.elementwise_affine:
            return StackedLayerNorm(layer)
    return None


class _Windows(torch.autograd.Function):
    """Windows × kernels; backward scatters the windows' gradients to the image they were cut from."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, windows: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry, ctx.shape = geometry, inputs.shape
        return _affine(windows, weight.mT, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return (None,) * 5
        (weight,) = ctx.saved_tensors
        (kh, kw), (sh, sw), (ph, pw), (dh, dw), (out_h, out_w) = ctx.geometry
        n, c, height, width = ctx.shape
        columns_of = torch.bmm(grads[0], weight).view(n, out_h, out_w, kw, kh * c)
        columns = columns_of.new_zeros(n, out_h, width + 2 * pw, kh * c)
        for j in range(kw):
            columns[:, :, j * dw : j * dw + sw * (out_w - 1) + 1 : sw] += columns_of[:, :, :, j]
        rows_of = columns.view(n, out_h, width + 2 * pw, kh, c)
        image = columns.new_zeros(n, height + 2 * ph, width + 2 * pw, c)
        for i in range(kh):
            image[:, i * dh : i * dh + sh * (out_h - 1) + 1 : sh] += rows_of[:, :, :, i]
        return image[:, ph : ph + height, pw : pw + width].permute(0, 3, 1, 2), None, None, None, None


def _square_norm(vectors: Tensor) -> Tensor:
    """‖v‖² along the last dimension."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return norms.square_()


def _sum_of_rows(matrices: Tensor) -> Tensor:
    """[K, O] of [K, N, O]: as a product, which takes half the time of `sum` along a middle dimension."""
    return torch.bmm(matrices.new_ones(1, 1, matrices.shape[1]).expand(len(matrices), -1, -1), matrices).squeeze(1)


def _affine(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(rows, matrix) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, matrix)


def _pair(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) else (value, value)
