"""Adapters as training leaves them, without training: every kind, moved away from its start by seeded amounts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from plumbline_api.training import Lora
from plumbline_trainer.engine.optimizer import named_trainables
from plumbline_trainer.models import adapters
from support.tiny import Style

KINDS = ("plain", "rsLora", "dora", "saved", "everything")


def lora_of(kind: str, style: Style = "llama", **fields: Any) -> Lora:
    """A low-rank adaptation of a kind; `saved` trains head, embeddings and norms whole."""
    gpt2 = style == "gpt2"
    saved = ["wte", "lm_head", "ln_f", "ln_1"] if gpt2 else ["embed_tokens", "lm_head", "norm", "input_layernorm"]
    made: Mapping[str, dict[str, Any]] = {
        "plain": {},
        "rsLora": {"rsLora": True},
        "dora": {"dora": True},
        "saved": {"modulesToSave": saved},
        "everything": {"rsLora": True, "dora": True, "modulesToSave": saved},
    }
    return Lora.model_validate({"rank": 4, **made[kind], **fields})


@torch.no_grad()
def move(model: Any, seed: int, size: float = 0.02) -> Any:
    """Move everything that an attached adapter trains away from where it started; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in named_trainables(model).items():
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_B" in name:
            parameter.copy_(noise * size)
        elif "lora_magnitude" in name:
            parameter.mul_(1 + noise * 5 * size)
        elif "lora_A" not in name:
            parameter.add_(noise * size)
    return model


def attach_and_move(model: Any, lora: Lora, seed: int, size: float = 0.02) -> Any:
    """A model with an adapter that is not at its start, in evaluation mode."""
    adapters.attach_lora(model, lora, seed)
    return move(model, seed, size).eval()
