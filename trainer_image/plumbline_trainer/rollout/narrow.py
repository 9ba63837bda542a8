"""Linear layers over a few tokens, as every step of decoding has them.

On a CPU x·Wᵀ is cut among threads and registers by the rows of x, of which there are as many as answers run. W·xᵀ is
cut by the rows of W, which is faster for a few answers; tests/bench/products.py measures by how much.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS_MIN = 512
"""Rows of a weight from which turning the product pays for turning its result back."""
TOKENS_MAX = 6
"""Tokens up to which it pays."""
HEAD_ROWS_MIN = 8192
HEAD_TOKENS_MAX = 64
"""The same of weights as large as an output head."""


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b, the product turned where that is faster; up to rounding it is the same.

    Args:
        x: […, in].
        weight: [out, in].
        bias: [out].
    """
    tokens = x.numel() // x.shape[-1]
    if not _pays(tokens, len(weight)) or x.device.type != "cpu" or _rounds(x, weight):
        return F.linear(x, weight, bias)
    turned = (weight @ x.reshape(tokens, -1).t()).t().contiguous()
    if bias is not None:
        turned += bias
    return turned.view(*x.shape[:-1], len(weight))


def _pays(tokens: int, rows: int) -> bool:
    if rows >= HEAD_ROWS_MIN:
        return 2 <= tokens <= HEAD_TOKENS_MAX
    return rows >= ROWS_MIN and 2 <= tokens <= TOKENS_MAX


def _rounds(x: Tensor, weight: Tensor) -> bool:
    """Whether something else than float32 is computed; that has kernels of its own."""
    return x.dtype != torch.float32 or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu")


@contextmanager
def narrow_linears(model: nn.Module) -> Iterator[None]:
    """Compute plain linear layers so for a while; what has a forward of its own already keeps it."""
    layers = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in module.__dict__]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return narrow_linear(x, layer.weight, layer.bias)
