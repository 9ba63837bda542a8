"""The rows of `make bench-trainer`: committed lengths, random ids, and how much arithmetic they ask for."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from plumbline_trainer.data.encode import Encoded, EncodedResponse
from plumbline_trainer.engine.packing import packed_length

PROFILES: dict[str, list[list[int]]] = json.loads((Path(__file__).parent / "profiles.json").read_text())
"""Name → tokens of prompt, chosen and rejected answer of each row. Drawn once from log-normal distributions, then
committed; changing them needs an ADR."""
PASSES = {
    # What is computed per step: (with gradient, without), beside the reference pass.
    "sft": (1, 0),
    "dpo": (1, 0),
}


@dataclass(frozen=True)
class Shape:
    """What arithmetic depends on."""

    layers: int
    linear: int
    """Weights of all linear layers of the blocks."""
    head: int
    """Weights of the output head."""
    width: int
    """Heads × size of a head: attention costs 2 · 2 · width per visible pair and layer."""
    adapter: int
    """Weights of the adapter."""


def make_rows(method: str, profile: str, count: int, vocabulary: int) -> list[Encoded]:
    """The first rows of a profile as a method takes them."""
    rng = random.Random(f"{profile}/ids")
    lengths = PROFILES[profile]
    if count > len(lengths):
        raise SystemExit(f"profile {profile} has {len(lengths)} rows, {count} were asked for")
    low = min(100, vocabulary // 2)

    def ids(length: int) -> list[int]:
        return [rng.randrange(low, vocabulary) for _ in range(length)]

    def answer(length: int, role: Literal["completion", "chosen", "rejected"]) -> EncodedResponse:
        return EncodedResponse(ids(length), [True] * length, role)

    rows = []
    for number, (prompt, chosen, rejected) in enumerate(lengths[:count]):
        first, good, bad = ids(prompt), answer(chosen, "chosen"), answer(rejected, "rejected")
        responses = [replace(good, role="completion")] if method == "sft" else [good, bad]
        rows.append(Encoded(f"{profile}/{number}", f"{number}", first, responses))
    return rows


def shape_of(model: Any, adapter: int) -> Shape:
    """The shape of a causal language model."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    linear = sum(module.weight.numel() for module in model.model.layers.modules() if hasattr(module, "in_features"))
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(config.num_hidden_layers, linear, head.weight.numel(), config.num_attention_heads * size, adapter)


def _forward(shape: Shape, tokens: int, pairs: float) -> float:
    return 2.0 * (shape.linear + shape.adapter) * tokens + 4.0 * shape.width * shape.layers * pairs


def our_operations(shape: Shape, rows: Sequence[Encoded], method: str) -> float:
    """Floating-point operations on rows without padding, each prompt once, the head at scored tokens only.

    A backward pass through frozen weights costs as much as the forward pass, plus the adapter's own gradients. The head
    takes two products where something is trained, one where nothing is.
    """
    tokens = sum(packed_length(row) for row in rows)
    scored = sum(sum(response.mask) for row in rows for response in row.responses)
    pairs = sum(
        len(row.prompt) ** 2 / 2 + sum(len(r.ids) * (len(row.prompt) + len(r.ids) / 2) for r in row.responses)
        for row in rows
    )
    forward, (trained, read) = _forward(shape, tokens, pairs), PASSES[method]
    reference = 0 if method == "sft" else 1
    adapters = 2.0 * shape.adapter * tokens
    head = 2.0 * shape.head * scored
    return trained * (2 * forward + adapters + 2 * head) + (read + reference) * (forward + head)


def their_operations(shape: Shape, rows: Sequence[Encoded], method: str, batch: int) -> float:
    """The same for every answer with a prompt of its own, padded to the longest of its device batch.

    trl 1.16 on a CPU takes the head at every position, and computes its logits again in the backward pass.
    """
    total = 0.0
    trained, read = PASSES[method]
    reference = 0 if method == "sft" else 1
    for start in range(0, len(rows), batch):
        sequences = [len(row.prompt) + len(r.ids) for row in rows[start : start + batch] for r in row.responses]
        longest = max(sequences)
        tokens = longest * len(sequences)
        forward = _forward(shape, tokens, longest**2 / 2 * len(sequences))
        head = 2.0 * shape.head * tokens
        adapters = 2.0 * shape.adapter * tokens
        total += trained * (2 * forward + adapters + 3 * head) + (read + reference) * (forward + head)
    return total
