"""What rounding does to a model's predictions: a few texts through the adapter and through the merged weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


class KlProbe:
    """Measures, for every adapter of a chain, the KL divergence between adapter on and adapter merged."""

    def __init__(self) -> None:
        self.divergence: dict[str, float] = {}
        """Stage that trained the adapter → mean KL(adapter on ‖ merged) in nats per token."""
        self._ids: list[Tensor] = []
        self._expected: list[Tensor] = []

    def before(self, model: Any, tokenizer: Tokenizer, adapter: Adapter, name: str) -> None:
        """Predict with the adapter on top of the weights, as it was trained."""
        if not self._ids:
            self._ids = [
                torch.tensor([tokenizer.hf(text)["input_ids"][:PROBE_TOKENS]], dtype=torch.long) for text in PROBE_TEXTS
            ]
        with adapter_on(model, adapter):
            self._expected = [_predict(model, ids) for ids in self._ids]

    def after(self, model: Any, name: str) -> None:
        """Predict with the merged weights and compare."""
        total, tokens = 0.0, 0
        for ids, expected in zip(self._ids, self._expected, strict=True):
            merged = _predict(model, ids)
            total += float((expected.exp() * (expected - merged)).sum())
            tokens += ids.numel()
        self.divergence[name] = max(total / tokens, 0.0)
        self._expected = []


@contextmanager
def adapter_on(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """While this is open the model computes with the adapter beside its weights."""
    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(_adding(delta)) for name, delta in adapter.deltas.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(delta: Delta) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        hidden = inputs[0].to(delta.a.dtype)
        change = (hidden @ delta.a.T) @ delta.b.T * delta.scale
        return output + change.to(output.dtype)

    return hook


@torch.no_grad()
def _predict(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities of the next token at every position: [T, V] float64, so that small differences are seen."""
    return torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].double(), dim=-1)
