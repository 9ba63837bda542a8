"""What rounding does to a model's predictions: a few texts through the adapter and through the merged weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from plumbline_trainer.models.merging import Adapter, Delta
from plumbline_trainer.models.tokenizer import Tokenizer

PROBE_TEXTS = (
    "A plumb line shows whether a wall stands true: a weight on a cord, and the eye of the mason.",
    "Question: how do I keep bread fresh for longer?\nAnswer: keep it whole, dry and wrapped in cloth.",
    "def area(width: float, height: float) -> float:\n    return width * height\n",
    "In 1844 the first message by telegraph went from Washington to Baltimore, 61 kilometres away.",
)
PROBE_TOKENS = 64


class LogitProbe:
    """Measures, for every adapter of a chain, how predictions differ between adapter on and adapter merged."""

    def __init__(self) -> None:
        self.divergence: dict[str, float] = {}
        """Stage that trained the adapter → mean KL(adapter on ‖ merged) in nats per token."""
        self.difference: dict[str, float] = {}
        """Stage that trained the adapter → largest difference of any logit."""
        self._ids: list[Tensor] = []
        self._expected: list[Tensor] = []

    def before(self, model: Any, tokenizer: Tokenizer, adapter: Adapter, name: str) -> None:
        """Predict with the adapter on top of the weights, as it was trained."""
        self._ids = self._ids or probe_ids(tokenizer)
        with adapter_on(model, adapter):
            self._expected = [probe_logits(model, ids) for ids in self._ids]

    def after(self, model: Any, name: str) -> None:
        """Predict with the merged weights and compare."""
        merged = [probe_logits(model, ids) for ids in self._ids]
        self.divergence[name] = mean_divergence(self._expected, merged)
        pairs = zip(self._expected, merged, strict=True)
        self.difference[name] = max(float((expected - found).abs().max()) for expected, found in pairs)
        self._expected = []


def probe_ids(tokenizer: Tokenizer) -> list[Tensor]:
    """The probing texts as token ids, [1, T] each."""
    return [torch.tensor([tokenizer.hf(text)["input_ids"][:PROBE_TOKENS]], dtype=torch.long) for text in PROBE_TEXTS]


def mean_divergence(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Mean over all positions of KL(expected ‖ found) in nats. Logits of [T, V] each."""
    total, tokens = 0.0, 0
    for one, other in zip(expected, found, strict=True):
        p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (one, other))
        total += float((p.exp() * (p - q)).sum())
        tokens += len(one)
    return max(total / tokens, 0.0)


@contextmanager
def adapter_on(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """While this is open the model computes with the adapter beside its weights."""
    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(_adding(delta)) for name, delta in adapter.deltas.items()]
    kept = {name: model.get_parameter(name).data for name in adapter.saved}
    for name, weight in adapter.saved.items():
        model.get_parameter(name).data = weight
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in kept.items():
            model.get_parameter(name).data = weight


def _adding(delta: Delta) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        hidden = inputs[0].to(delta.a.dtype)
        change = (hidden @ delta.a.T) @ delta.b.T * delta.scale
        if delta.magnitude is None:
            return output + change.to(output.dtype)
        weight = cast(Tensor, module.weight).to(delta.a.dtype)
        moved = (weight.T if delta.transposed else weight) + delta.scale * delta.b @ delta.a
        bias = cast("Tensor | None", module.bias)
        bias = torch.zeros((), dtype=delta.a.dtype) if bias is None else bias.to(delta.a.dtype)
        found = (output - bias + change) * (delta.magnitude / moved.norm(dim=1)) + bias
        result: Tensor = found.to(output.dtype)
        return result

    return hook


@torch.no_grad()
def probe_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits at every position: [T, V] float32, computed in float32 whatever the weights are stored as.

    Activations in bfloat16 would add differences of their own, larger than those of the weights.
    """
    with _in_float32(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.float()


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Every module computes in float32 while this is open; the copies of its weights live as long as its call."""
    kept: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def before(module: nn.Module, _inputs: Any) -> None:
        own = [(weight, weight.data) for weight in module.parameters(recurse=False) if weight.is_floating_point()]
        kept[module] = own
        for weight, data in own:
            weight.data = data.float()

    def after(module: nn.Module, _inputs: Any, _output: Any) -> None:
        for weight, data in kept.pop(module, []):
            weight.data = data

    handles = [
        handle
        for module in model.modules()
        if any(weight.dtype is not torch.float32 for weight in module.parameters(recurse=False))
        for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
