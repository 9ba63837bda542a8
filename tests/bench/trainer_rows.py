"""The rows of `make bench-trainer`: committed lengths, random ids, and how much arithmetic they ask for."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from plumbline_api.training import Training
from plumbline_trainer.data.encode import Encoded, EncodedResponse
from plumbline_trainer.engine.packing import packed_length
from plumbline_trainer.engine.references import by_prompt
from plumbline_trainer.engine.schedule import cut_step
from plumbline_trainer.engine.unpaired import mismatched_rows
from torch import nn

PROFILES: dict[str, list[list[int]]] = json.loads((Path(__file__).parent / "profiles.json").read_text())
"""Name → tokens of prompt, chosen and rejected answer of each row. Drawn once from log-normal distributions, then
committed; changing them needs an ADR."""
METHODS = ("sft", "dpo", "kto", "kto-pairs", "rewardModel")
"""`kto` on unpaired rows, `kto-pairs` on preference rows: both are the stage `kto`."""
NO_REFERENCE = frozenset({"sft", "rewardModel"})
"""Methods without a pass of a reference."""
ONLINE_METHODS = ("ppo", "grpo")
"""They take the prompts of a profile and sample the answers."""


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
    """The first rows of a profile as a method takes them; where it has fewer its lengths come again, with other ids."""
    rng = random.Random(f"{profile}/ids")
    lengths = itertools.islice(itertools.cycle(PROFILES[profile]), count)
    low = min(100, vocabulary // 2)

    def ids(length: int) -> list[int]:
        return [rng.randrange(low, vocabulary) for _ in range(length)]

    def answer(length: int, role: Literal["completion", "chosen", "rejected"]) -> EncodedResponse:
        return EncodedResponse(ids(length), [True] * length, role)

    rows = []
    for number, (prompt, chosen, rejected) in enumerate(lengths):
        first, good, bad = ids(prompt), answer(chosen, "chosen"), answer(rejected, "rejected")
        liked, disliked = replace(good, role="desirable"), replace(bad, role="undesirable")
        responses = {
            "sft": [replace(good, role="completion")],
            "dpo": [good, bad],
            "kto": [[liked, disliked][number % 2]],
            "kto-pairs": [liked, disliked],
            "rewardModel": [
                replace(item, reads=(len(item.ids) - 1,), rank=rank) for rank, item in enumerate((good, bad))
            ],
            "ppo": [],
            "grpo": [],
        }[method]
        rows.append(Encoded(f"{profile}/{number}", f"{number}", first, responses))
    return rows


def shape_of(model: Any, adapter: int) -> Shape:
    """The shape of a causal language model."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()  # a reward model has none
    linear = sum(
        module.weight.numel()
        for name, module in model.model.layers.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name  # an adapter's wrapper is none itself
    )
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scores = 0 if head is None else head.weight.numel()
    return Shape(config.num_hidden_layers, linear, scores, config.num_attention_heads * size, adapter)


def our_operations(shape: Shape, steps: Sequence[Sequence[Encoded]], method: str, training: Training) -> float:
    """Floating-point operations without padding, each prompt once, the head at scored tokens only."""
    rows = [row for step in steps for row in step]
    if method == "rewardModel":
        return _packed(replace(shape, head=0), rows, trained=True)
    if method == "sft":
        return _packed(shape, rows, trained=True)
    total, further = _packed(shape, rows, trained=True), []
    for step in steps if method.startswith("kto") else ():
        others = mismatched_rows(step, training.max_length)
        first = cut_step([packed_length(row) for row in step], budget=training.token_budget, ranks=1)[0][0]
        # Rows of the first micro-batch lend their prompts.
        total += _packed(shape, [others[index] for index in first], trained=False, lent=True)
        total += _packed(shape, [row for index, row in enumerate(others) if index not in first], trained=False)
        further += others
    return total + _packed(shape, by_prompt([*rows, *further], [], 2**30), trained=False)


def their_operations(shape: Shape, rows: Sequence[Encoded], method: str, batch: int) -> float:
    """The same for every answer with a prompt of its own, padded to the longest of its device batch."""
    # In a device batch trl's DPO and reward model count pairs, its KTO answers.
    size = 2 * batch if method in ("dpo", "rewardModel") else batch
    answers = [(len(row.prompt), len(response.ids)) for row in rows for response in row.responses]
    total = 0.0
    for start in range(0, len(answers), size):
        part = answers[start : start + size]
        own = [prompt + answer for prompt, answer in part]
        total += _padded(shape, own, trained=True)
        if method not in NO_REFERENCE:
            total += _padded(shape, own, trained=False)
        if method.startswith("kto"):
            others = [prompt + part[index - 1][1] for index, (prompt, _) in enumerate(part)]
            total += 2 * _padded(shape, others, trained=False)
    return total


def _packed(shape: Shape, rows: Sequence[Encoded], *, trained: bool, lent: bool = False) -> float:
    """Of one pass; `lent`: of the prompts only the last token is computed."""
    tokens = sum(packed_length(row) - (len(row.prompt) - 1 if lent else 0) for row in rows)
    scored = sum(sum(response.mask) for row in rows for response in row.responses)
    pairs = sum(
        (len(row.prompt) if lent else len(row.prompt) ** 2 / 2)
        + sum(len(r.ids) * (len(row.prompt) + len(r.ids) / 2) for r in row.responses)
        for row in rows
    )
    # Our head keeps its derivative in the forward pass: two products in all.
    return pass_operations(shape, tokens, pairs, 2.0 * shape.head * scored, products=2, trained=trained)


def _padded(shape: Shape, lengths: Sequence[int], *, trained: bool) -> float:
    longest = max(lengths)
    tokens = longest * len(lengths)
    # trl 1.16 on a CPU takes the head at every position, and computes its logits again in the backward pass.
    return pass_operations(
        shape, tokens, longest**2 / 2 * len(lengths), 2.0 * shape.head * tokens, products=3, trained=trained
    )


def pass_operations(shape: Shape, tokens: float, pairs: float, head: float, *, products: int, trained: bool) -> float:
    """A backward pass through frozen weights costs as much as the forward pass, plus the adapter's own gradients."""
    forward = 2.0 * (shape.linear + shape.adapter) * tokens + 4.0 * shape.width * shape.layers * pairs
    return 2 * forward + 2.0 * shape.adapter * tokens + products * head if trained else forward + head
