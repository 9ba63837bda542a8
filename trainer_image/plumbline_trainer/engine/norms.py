"""Root-mean-square norms as one node that keeps its output alone.

y = w ∘ x̂ with x̂ = r·x and r = (mean(x²) + ε)^−½ (Zhang and Sennrich 2019). Autograd keeps x for the backward pass, and
the adapters behind the norm keep y: two tensors of the model's width where one says all, because x̂ = y/w. With
g = ∂L/∂y, ∂L/∂x = r·(w ∘ g − x̂·mean(g ∘ y)).

That is for a CPU. On a GPU PyTorch has one kernel for the norm, where the model's own lines are six.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbline_trainer.engine.forwards import body_of

SMALLEST = 1e-6
"""Least weight by which an output is divided again: far above where it would lose digits in float32."""


class _RootMeanSquare(torch.autograd.Function):
    """x: [..., d], weight: [d], float32 both; the weight is frozen and nowhere 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        factor = x.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
        y = (x * factor).mul_(weight)
        ctx.save_for_backward(y, factor, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        y, factor, weight = ctx.saved_tensors
        (gradient,) = upstream
        common = (gradient * y).mean(dim=-1, keepdim=True)
        to_x = (y / weight).mul_(common).neg_().addcmul_(gradient, weight).mul_(factor)
        return to_x, None, None


def norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Forward of a norm in one piece where that is the same, else the class's own."""
    weight, kind = self.weight, hidden_states.device.type
    if kind == "cuda" and hidden_states.dtype == weight.dtype:
        with torch.autocast(kind, enabled=False):
            return F.rms_norm(hidden_states, tuple(weight.shape), weight, self.variance_epsilon)
    in_one = (
        torch.is_grad_enabled()
        and hidden_states.requires_grad
        and not weight.requires_grad
        and hidden_states.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled(kind)
    )
    if in_one:
        result = _RootMeanSquare.apply(hidden_states, weight, self.variance_epsilon)
    else:
        result = type(self).forward(self, hidden_states)
    assert isinstance(result, Tensor)
    return result


def can_be_one(module: nn.Module) -> bool:
    """Whether a module is such a norm on a GPU, or on a CPU with a weight that its output can be divided by."""
    if not is_root_mean_square(type(module).forward):
        return False
    weight = module.get_parameter("weight").detach()
    if weight.device.type == "cuda":
        return True
    is_whole = type(weight) is Tensor  # not the part that a rank keeps of it
    return is_whole and weight.device.type == "cpu" and float(weight.abs().min()) > SMALLEST


_FORWARD = ast.dump(
    ast.parse(
        """
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * hidden_states.to(input_dtype)
"""
    )
)


@cache
def is_root_mean_square(forward: Callable[..., Any]) -> bool:
    """Whether a module's forward is the norm of Llama and its relatives and nothing else."""
    body = body_of(forward, ["self", "hidden_states"])
    return ast.dump(ast.Module(body, type_ignores=[])) == _FORWARD
