"""Adapted layers while nothing is trained: one product of matrices where training needs three.

Decoding is short products and many of them, so that an adapter's own two cost far more than their share of the
arithmetic. Where the weights are float32 a rollout computes with a copy W + s·B·A (for DoRA m/‖W + s·B·A‖ ∘ (…)), made
once per rollout; the weights themselves are never touched. In bfloat16 a copy would round small deltas away, and what
is quantised has no such copy: there the pieces stay apart, and modules that are trained whole are simply the model's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from plumbline_trainer.rollout.narrow import narrow_linear

Forward = Callable[..., Tensor]


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[str]:
    """Compute with merged copies for a while; tells in words how adapted layers are computed."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = {layer: layer.__dict__.get("forward") for layer in layers}
    reasons: Counter[str] = Counter()
    try:
        for layer in layers:
            if (reason := _unfit(layer)) is not None:
                reasons[reason] += 1
            else:
                layer.forward = _merged(layer)
        yield _in_words(len(layers), reasons)
    finally:
        for layer, forward in before.items():
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward


def _unfit(layer: Any) -> str | None:
    """Why a layer keeps its pieces apart; None where it can be merged."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora.variants import DoraLinearVariant
    from transformers.pytorch_utils import Conv1D

    base, active = layer.get_base_layer(), layer.active_adapters
    if layer.disable_adapters or layer.merged:
        return "the adapter is switched off"
    if type(layer) is not Linear or type(base) not in (nn.Linear, Conv1D):
        return f"their base is a {type(base).__name__}"
    if base.weight.dtype != torch.float32:
        return f"their weights are {str(base.weight.dtype).removeprefix('torch.')}"
    if len(active) != 1 or active[0] not in layer.lora_A:
        return "they have not just one adapter"
    if type(layer.lora_variant.get(active[0])) not in (NoneType, DoraLinearVariant):
        return f"their adapter is a {type(layer.lora_variant[active[0]]).__name__}"
    return None


@torch.no_grad()
def _merged(layer: Any) -> Forward:
    """The forward pass of a layer with its adapter in the weight."""
    name, base = layer.active_adapters[0], layer.get_base_layer()
    a, b = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float()
    weight = base.weight if type(base) is nn.Linear else base.weight.t()
    merged = torch.addmm(weight, b, a, alpha=layer.scaling[name])
    if name in layer.lora_magnitude_vector:
        lengths = torch.linalg.vector_norm(merged, dim=1)
        merged.mul_((layer.lora_magnitude_vector[name].weight / lengths)[:, None])
    bias = base.bias

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return narrow_linear(x, merged, bias)

    return forward


def _in_words(layers: int, reasons: Counter[str]) -> str:
    if not layers:
        return "no adapter"
    apart = sum(reasons.values())
    if not apart:
        return "adapter merged into a copy of the weights"
    why = "; ".join(reasons)
    return f"adapter computed beside the weights in {apart} of {layers} layers: {why}"
