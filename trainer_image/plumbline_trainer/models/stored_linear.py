"""Frozen linear layers that hold their weights as they are stored, and widen them for the length of a product.

Every bfloat16 number is a float32 number, so that a layer gives bit for bit what it would give with weights held as
float32, in half of their memory. A product with a few hundred rows takes about a tenth longer (`make bench`).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import threading
from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_room = threading.local()
"""Where weights of this thread are widened, as large as the largest of them."""


class _StoredLinear(torch.autograd.Function):
    """y = x·Wᵀ + b with W and b frozen and W narrower than x.

    x: [..., in], W: [out, in], b: [out].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, widened(weight, x), bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        (gradient,) = upstream
        return gradient @ widened(weight, gradient), None, None


def widened(weight: Tensor, like: Tensor) -> Tensor:
    """A weight in the type of what it is multiplied with; itself where it has that type.

    What comes back holds until the next weight is widened in this thread: all share one piece of memory, because pieces
    that come and go among activations that stay leave holes which nothing fits.
    """
    if weight.dtype == like.dtype:
        return weight
    room: Tensor | None = getattr(_room, "tensor", None)
    if room is None or room.dtype != like.dtype or room.device != weight.device or room.numel() < weight.numel():
        room = _room.tensor = torch.empty(weight.numel(), dtype=like.dtype, device=weight.device)
    return room[: weight.numel()].view(weight.shape).copy_(weight)


def fits_widened(weight: Tensor, x: Tensor) -> bool:
    """Whether a weight has the type of an input, or one whose every number is also of that type."""
    return weight.is_floating_point() and torch.promote_types(weight.dtype, x.dtype) == x.dtype


def _forward(self: Any, x: Tensor) -> Tensor:
    if self.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return nn.Linear.forward(self, x)
    result = _StoredLinear.apply(x, self.weight, self.bias)
    assert isinstance(result, Tensor)
    return result


def hold_as_stored(model: Any) -> list[Tensor]:
    """From now on linear layers of a model take inputs wider than their weights; the weights that may stay narrow.

    Left out are the output head, which is read directly and may be one with the embeddings, and layers whose weight a
    module of the model reads by itself: it may take the weight's type for that of the activations.
    """
    modules = dict(model.named_modules())
    kinds: set[type] = {type(module) for module in modules.values()}
    read = frozenset[str]().union(*(_weights_read(kind) for kind in kinds))
    head = model.get_output_embeddings()
    layers: list[Any] = [
        module
        for name, module in modules.items()
        if type(module) is nn.Linear and module is not head and name.rpartition(".")[2] not in read
    ]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    held = {id(layer) for layer in layers}
    others = [module for module in modules.values() if id(module) not in held]
    shared = {id(weight) for module in others for weight in module.parameters(recurse=False)}
    return [layer.weight for layer in layers if id(layer.weight) not in shared]


@cache
def _weights_read(kind: type) -> frozenset[str]:
    """Names n for which a class of transformers' models says `….n.weight` or `….n[i].weight` somewhere."""
    found: set[str] = set()
    for base in kind.__mro__:
        if not base.__module__.startswith("transformers.models."):
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            if isinstance(node, ast.Attribute) and node.attr == "weight":
                found |= {part.attr for part in ast.walk(node.value) if isinstance(part, ast.Attribute)}
    return frozenset(found)
