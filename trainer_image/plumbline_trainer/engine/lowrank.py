"""Linear layers with an adapter, computed in one piece: fewer passes over memory, nothing kept in vain.

peft adds x·Wᵀ and s·(x·Aᵀ)·Bᵀ as tensors of their own and lets autograd walk back through each. On a CPU these passes
cost as much as the adapter's products. Here the second product is accumulated onto the first, forward and backward.

For DoRA peft builds W + s·B·A in every forward pass to take the lengths of its rows. Here they come from the factors:
‖w + s·b·A‖² = ‖w‖² + 2s·b·(A·w) + s²·b·(A·Aᵀ)·bᵀ for a row w of W and b of B; nothing of the size of W is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType, NoneType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn


class _LowRankLinear(torch.autograd.Function):
    """y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ with W and b frozen.

    x: [T, in], W: [out, in], A: [r, in], B: [out, r].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inner = x @ a.t()
        ctx.save_for_backward(x, inner, weight, a, b)
        ctx.scale = scale
        return F.linear(x, weight, bias).addmm_(inner, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, inner, weight, a, b = ctx.saved_tensors
        (gradient,) = upstream
        at_inner = (gradient @ b).mul_(ctx.scale)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (gradient @ weight).addmm_(at_inner, a)
        return to_x, None, None, at_inner.t() @ x, (gradient.t() @ inner).mul_(ctx.scale), None


class _MagnitudeLinear(torch.autograd.Function):
    """y = m/‖W + s·B·A‖ ∘ (x·Wᵀ + s·(x·Aᵀ)·Bᵀ) + bias with W and bias frozen and, as in DoRA's section 4.3, no gradient
    through the lengths.

    x: [T, in], W: [out, in], A: [r, in], B: [out, r], m: [out], lengths: [out].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        lengths: Tensor,
        scale: float,
    ) -> Tensor:
        inner = x @ a.t()
        y = (x @ weight.t()).addmm_(inner, b.t(), alpha=scale)
        factor = magnitude / lengths
        y.mul_(factor)
        if bias is not None:
            y += bias
        ctx.save_for_backward(x, inner, weight, bias, a, b, magnitude, factor, y)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, Tensor, None, None]:
        x, inner, weight, bias, a, b, magnitude, factor, y = ctx.saved_tensors
        (gradient,) = upstream
        # y − bias = m·(…), so that the output itself serves for ∂y/∂m.
        products = (gradient * y).sum(dim=0)
        if bias is not None:
            products -= gradient.sum(dim=0) * bias
        to_magnitude = products / magnitude
        gradient = gradient * factor
        at_inner = (gradient @ b).mul_(ctx.scale)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (gradient @ weight).addmm_(at_inner, a)
        to_b = (gradient.t() @ inner).mul_(ctx.scale)
        return to_x, None, None, at_inner.t() @ x, to_b, to_magnitude, None, None


@torch.no_grad()
def row_lengths(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + s·B·A‖ of every row, [out]. W: [out, in], A: [r, in], B: [out, r]."""
    own = torch.linalg.vector_norm(weight, dim=1).square()
    mixed = ((weight @ a.t()) * b).sum(dim=1)
    change = ((b @ (a @ a.t())) * b).sum(dim=1)
    squares: Tensor = own + 2 * scale * mixed + scale**2 * change
    return squares.sqrt()


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Forward of a layer in one piece where that is the same, else peft's own."""
    active = self.active_adapters
    simple = (
        not args
        and not kwargs
        and not self.disable_adapters
        and not self.merged
        and len(active) == 1
        and active[0] in self.lora_A
        and type(self.lora_variant.get(active[0])) in (NoneType, DoraLinearVariant)
    )
    if simple:
        name, base = active[0], self.base_layer
        a, b, dropout = self.lora_A[name].weight, self.lora_B[name].weight, self.lora_dropout[name]
        drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        same_type = x.dtype == base.weight.dtype == a.dtype == b.dtype
        frozen = not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
        if same_type and frozen and not drops and not torch.is_autocast_enabled(x.device.type):
            flat = x.reshape(-1, x.shape[-1])
            scale = self.scaling[name]
            if name in self.lora_magnitude_vector:
                lengths = row_lengths(base.weight, a, b, scale)
                magnitude = self.lora_magnitude_vector[name].weight
                result = _MagnitudeLinear.apply(flat, base.weight, base.bias, a, b, magnitude, lengths, scale)
            else:
                result = _LowRankLinear.apply(flat, base.weight, base.bias, a, b, scale)
            assert isinstance(result, Tensor)
            return result.view(*x.shape[:-1], result.shape[-1])
    result = LoraLinear.forward(self, x, *args, **kwargs)
    assert isinstance(result, Tensor)
    return result


def use_one_piece(model: nn.Module) -> None:
    """From now on compute adapted linear layers in one piece."""
    for layer in _layers(model):
        layer.forward = MethodType(_forward, layer)


@contextmanager
def in_one_piece(model: nn.Module) -> Iterator[None]:
    """Compute adapted linear layers in one piece for a while."""
    use_one_piece(model)
    try:
        yield
    finally:
        use_separate_pieces(model)


def use_separate_pieces(model: nn.Module) -> None:
    """From now on compute adapted linear layers as peft does."""
    for layer in _layers(model):
        layer.__dict__.pop("forward", None)


def _layers(model: nn.Module) -> Iterator[Any]:
    """Adapted layers around a plain linear layer; others, such as transposed ones, stay with peft."""
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear:
            yield module
