"""Linear layers with an adapter, computed in one piece: fewer passes over memory, nothing kept in vain.

peft adds x·Wᵀ and s·(x·Aᵀ)·Bᵀ as tensors of their own and lets autograd walk back through each. On a CPU these passes
cost as much as the adapter's products. Here the second product is accumulated onto the first, forward and backward.

Where the last linear layer of a gated feed-forward block, y = down(act(gate) ∘ up), is frozen or has such an adapter,
its input is not kept for the backward pass but computed again from gate and up, which are kept once: two tensors of the
block's inner width instead of four, the largest that a layer keeps.

Weights may be narrower than what they are multiplied with (`models.stored_linear`). Under autocast factors are wider
than what they are multiplied with: they are narrowed, and their gradients widened; peft widens and narrows the layer's
input, which is a hundred times as large.

For DoRA peft builds W + s·B·A in every forward pass to take the lengths of its rows. Here they come from the factors:
‖w + s·b·A‖² = ‖w‖² + 2s·b·(A·w) + s²·b·(A·Aᵀ)·bᵀ for a row w of W and b of B; nothing of the size of W is written.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import MethodType, NoneType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from plumbline_trainer.engine.forwards import body_of
from plumbline_trainer.engine.norms import can_be_one, norm_forward
from plumbline_trainer.models.stored_linear import fits_widened, widened


class _LowRankLinear(torch.autograd.Function):
    """y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ with W and b frozen.

    x: [T, in], W: [out, in], A: [r, in], B: [out, r].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.kind, ctx.scale = a.dtype, scale
        a, b = a.to(x.dtype), b.to(x.dtype)
        inner = x @ a.t()
        ctx.save_for_backward(x, inner, weight, a, b)
        return F.linear(x, widened(weight, x), bias).addmm_(inner, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, inner, weight, a, b = ctx.saved_tensors
        (gradient,) = upstream
        at_inner = (gradient @ b).mul_(ctx.scale)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (gradient @ widened(weight, gradient)).addmm_(at_inner, a)
        to_a, to_b = at_inner.t() @ x, (gradient.t() @ inner).mul_(ctx.scale)
        return to_x, None, None, to_a.to(ctx.kind), to_b.to(ctx.kind), None


class _GatedLinear(torch.autograd.Function):
    """y = h·Wᵀ + bias + s·(h·Aᵀ)·Bᵀ for h = act(gate) ∘ up, with W and bias frozen; without an adapter y = h·Wᵀ + bias.

    gate, up: [T, in], W: [out, in], A: [r, in], B: [out, r].
    """

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        activation: Callable[[Tensor], Tensor],
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
    ) -> Tensor:
        product = activation(gate)
        # Written over where it is memory of its own: an activation may also hand back what it was given.
        product = product * up if product.data_ptr() == gate.data_ptr() else product.mul_(up)
        y = F.linear(product, widened(weight, product), bias)
        inner, ctx.kind = None, None
        if a is not None and b is not None:
            ctx.kind = a.dtype
            a, b = a.to(product.dtype), b.to(product.dtype)
            inner = product @ a.t()
            y.addmm_(inner, b.t(), alpha=scale)
        ctx.save_for_backward(gate, up, inner, weight, a, b)
        ctx.activation, ctx.scale = activation, scale
        return y

    @staticmethod
    def backward(
        ctx: Any, *upstream: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, Tensor | None, Tensor | None, None]:
        gate, up, inner, weight, a, b = ctx.saved_tensors
        (gradient,) = upstream
        to_product, to_a, to_b = gradient @ widened(weight, gradient), None, None
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.activation(gate)
        if inner is not None:
            at_inner = (gradient @ b).mul_(ctx.scale)
            to_product.addmm_(at_inner, a)
            to_a, to_b = at_inner.t() @ (activated.detach() * up), (gradient.t() @ inner).mul_(ctx.scale)
            to_a, to_b = to_a.to(ctx.kind), to_b.to(ctx.kind)
        to_up = to_product * activated.detach()
        (to_gate,) = torch.autograd.grad(activated, gate, to_product.mul_(up))
        return to_gate, to_up, None, None, None, to_a, to_b, None


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
        y = (x @ widened(weight, x).t()).addmm_(inner, b.t(), alpha=scale)
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
            to_x = (gradient @ widened(weight, gradient)).addmm_(at_inner, a)
        to_b = (gradient.t() @ inner).mul_(ctx.scale)
        return to_x, None, None, at_inner.t() @ x, to_b, to_magnitude, None, None


class _Narrowed(torch.autograd.Function):
    """Tensors in another type, by one kernel for all of them, and their gradients back by another."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.kinds = [tensor.dtype for tensor in tensors]
        return _copied(tensors, [dtype] * len(tensors))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # One that took no part in the loss has zeros here.
        return None, *_copied(upstream, ctx.kinds)


def _copied(tensors: Sequence[Tensor], kinds: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
    copies = tuple(torch.empty_like(tensor, dtype=kind) for tensor, kind in zip(tensors, kinds, strict=True))
    torch._foreach_copy_(copies, list(tensors))
    return copies


@torch.no_grad()
def row_lengths(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + s·B·A‖ of every row, [out]. W: [out, in], A: [r, in], B: [out, r]."""
    own = torch.linalg.vector_norm(weight, dim=1).square()
    mixed = ((weight @ a.t()) * b).sum(dim=1)
    change = ((b @ (a @ a.t())) * b).sum(dim=1)
    squares: Tensor = own + 2 * scale * mixed + scale**2 * change
    return squares.sqrt()


@dataclass(frozen=True)
class _Parts:
    """A frozen linear layer with an adapter of one piece, or without one."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    magnitude: Tensor | None = None


def _parts(layer: nn.Module, x: Tensor) -> _Parts | None:
    """Of a layer that can be computed in one piece for an input; None if it cannot."""
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind)
    if cast and torch.get_autocast_dtype(kind) != x.dtype:
        return None
    parts: _Parts | None = None
    if type(layer) is nn.Linear:
        parts = _Parts(layer.weight, layer.bias)
    elif type(layer) is LoraLinear and type(layer.base_layer) is nn.Linear:
        parts = _adapted_parts(layer)
    if parts is None or parts.weight.requires_grad or (parts.bias is not None and parts.bias.requires_grad):
        return None
    if cast:
        # Factors are narrowed, as autocast does; the lengths that DoRA divides by are left to peft.
        return parts if parts.weight.dtype == x.dtype and parts.magnitude is None else None
    factors = [factor for factor in (parts.a, parts.b) if factor is not None]
    same = fits_widened(parts.weight, x) and all(x.dtype == factor.dtype for factor in factors)
    return parts if same else None


def _adapted_parts(layer: Any) -> _Parts | None:
    active, base = layer.active_adapters, layer.base_layer
    if layer.merged:
        return None
    if layer.disable_adapters:
        return _Parts(base.weight, base.bias)
    if len(active) != 1 or active[0] not in layer.lora_A:
        return None
    name = active[0]
    narrow = layer.__dict__.get(NARROWED, {})
    dropout = layer.lora_dropout[name]
    drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
    if drops or type(layer.lora_variant.get(name)) not in (NoneType, DoraLinearVariant):
        return None
    magnitude = layer.lora_magnitude_vector[name].weight if name in layer.lora_magnitude_vector else None
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _Parts(base.weight, base.bias, narrow.get(id(a), a), narrow.get(id(b), b), layer.scaling[name], magnitude)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Forward of a layer in one piece where that is the same, else peft's own."""
    parts = None if args or kwargs else _parts(self, x)
    if parts is None or parts.a is None or parts.b is None:
        result = LoraLinear.forward(self, x, *args, **kwargs)
        assert isinstance(result, Tensor)
        return result
    flat = x.reshape(-1, x.shape[-1])
    weight, bias, a, b, scale = parts.weight, parts.bias, parts.a, parts.b, parts.scale
    if parts.magnitude is not None:
        lengths = row_lengths(widened(weight, a), a, b, scale)
        result = _MagnitudeLinear.apply(flat, weight, bias, a, b, parts.magnitude, lengths, scale)
    else:
        result = _LowRankLinear.apply(flat, weight, bias, a, b, scale)
    assert isinstance(result, Tensor)
    return result.view(*x.shape[:-1], result.shape[-1])


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    """Forward of a gated feed-forward block, the product within the last layer where that is the same."""
    gate, up = self.gate_proj(x), self.up_proj(x)
    parts = _parts(self.down_proj, up)
    if parts is None or parts.magnitude is not None or gate.dtype != up.dtype or not torch.is_grad_enabled():
        result = self.down_proj(self.act_fn(gate) * up)
    else:
        flat = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
        result = _GatedLinear.apply(*flat, self.act_fn, parts.weight, parts.bias, parts.a, parts.b, parts.scale)
        result = result.view(*x.shape[:-1], result.shape[-1])
    assert isinstance(result, Tensor)
    return result


GATED = ast.dump(ast.parse("self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))", mode="eval").body)


@cache
def is_gated(forward: Callable[..., Any]) -> bool:
    """Whether a module's forward is down_proj(act_fn(gate_proj(x)) · up_proj(x)) and nothing else."""
    match body_of(forward, ["self", "x"]):
        case [ast.Return(value=ast.expr() as value)]:
            return ast.dump(value) == GATED
        case [ast.Assign(targets=[ast.Name(id=name)], value=value), ast.Return(value=ast.Name(id=returned))]:
            return name == returned and ast.dump(value) == GATED
    return False


def use_one_piece(model: nn.Module) -> None:
    """From now on compute adapted linear layers in one piece."""
    for layer, forward in _layers(model):
        layer.forward = MethodType(forward, layer)


@contextmanager
def in_one_piece(model: nn.Module) -> Iterator[None]:
    """Compute adapted linear layers in one piece for a while.

    Under autocast their factors are narrowed together: on a GPU hundreds of kernels become one, each of which takes
    longer to launch than to run.
    """
    found = list(_layers(model))
    adapted = [layer for layer, forward in found if forward is _forward]
    for layer, forward in found:
        layer.forward = MethodType(forward, layer)
    if narrow := _narrowed(adapted):
        for layer in adapted:
            layer.__dict__[NARROWED] = narrow
    try:
        yield
    finally:
        for layer, _ in found:
            layer.__dict__.pop("forward", None)
            layer.__dict__.pop(NARROWED, None)


NARROWED = "_plumbline_narrowed"
"""Where a layer finds its factors narrowed, by the identity of the wide ones."""


def _narrowed(layers: Sequence[Any]) -> dict[int, Tensor]:
    """The factors of layers in autocast's type, where that is on and another one, and every factor is whole."""
    kinds = {layer.base_layer.weight.device.type for layer in layers}
    if len(kinds) != 1 or not torch.is_autocast_enabled(kind := kinds.pop()):
        return {}
    dtype = torch.get_autocast_dtype(kind)
    factors = {
        id(factor): factor
        for layer in layers
        for name in layer.active_adapters
        if name in layer.lora_A
        for factor in (layer.lora_A[name].weight, layer.lora_B[name].weight)
        if factor.dtype != dtype
    }
    if not factors or any(type(factor) not in (Tensor, nn.Parameter) for factor in factors.values()):
        return {}  # none, or such as ranks keep parts of
    narrow = _Narrowed.apply(dtype, *factors.values())
    return dict(zip(factors, narrow, strict=True))


def use_separate_pieces(model: nn.Module) -> None:
    """From now on compute adapted linear layers as peft does."""
    for layer, _ in _layers(model):
        layer.__dict__.pop("forward", None)


def _layers(model: nn.Module) -> Iterator[tuple[Any, Callable[..., Tensor]]]:
    """What is computed in one piece, and how: adapted layers around a plain linear layer (others, such as transposed
    ones, stay with peft), gated feed-forward blocks, and norms."""
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear:
            yield module, _forward
        elif is_gated(type(module).forward) and not any(module.get_submodule("act_fn").parameters()):
            yield module, _gated_forward
        elif can_be_one(module):
            yield module, norm_forward
