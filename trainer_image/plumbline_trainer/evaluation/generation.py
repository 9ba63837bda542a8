"""Answers from a policy: batched, left-padded, with a key-value cache; finished answers leave the batch.

Which token is taken at a step depends on the prompt, the seed and the row only, never on what else is in the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from plumbline_trainer.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from plumbline_trainer.engine.distributed import Ranks

TOKENS_PER_BATCH = 16384
"""Cached tokens of one batch, prompts and answers at their longest: a memory setting."""


@dataclass(frozen=True)
class Prompt:
    """What to answer."""

    row_id: str
    """Keys the random numbers of its answer."""
    ids: list[int]


@dataclass(frozen=True)
class Answer:
    """What a policy said."""

    ids: list[int]
    """Without the end token."""
    finished: bool
    """Whether it ended by itself; else it was cut at the longest length."""


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    ranks: Ranks | None = None,
    at_step: Callable[[float], None] | None = None,
) -> list[Answer]:
    """Answer every prompt.

    Args:
        model: causal language model, on its device, in evaluation mode.
        tokenizer: its tokenizer; any of the end tokens ends an answer.
        prompts: rendered up to where the answer begins, none empty.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token; else tokens are drawn from softmax(logits/temperature).
        seed: of the draws.
        tokens_per_batch: budget of one batch.
        ranks: processes that share the prompts; each gets all answers.
        at_step: told at every step the largest share of this process's steps that is done; it may raise to stop.

    Returns:
        One answer per prompt, in order.
    """
    mine = list(range(len(prompts)))
    if ranks is not None and ranks.size > 1:
        by_length = sorted(mine, key=lambda i: (len(prompts[i].ids), i))
        mine = by_length[ranks.rank :: ranks.size]
    answers: dict[int, Answer] = {}
    batches = plan_batches([prompts[i] for i in mine], max_new_tokens, tokens_per_batch)
    for number, batch in enumerate(batches):
        indices = [mine[i] for i in batch]

        def notify(step: int, number: int = number) -> None:
            if at_step is not None:
                at_step((number + step / max_new_tokens) / len(batches))

        found = _answer_batch(
            model,
            tokenizer,
            [prompts[i] for i in indices],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            at_step=notify,
        )
        answers.update(zip(indices, found, strict=True))
    if ranks is not None and ranks.size > 1:
        return _shared(answers, len(prompts), max_new_tokens, ranks)
    return [answers[i] for i in range(len(prompts))]


def plan_batches(prompts: Sequence[Prompt], max_new_tokens: int, tokens_per_batch: int) -> list[list[int]]:
    """Indices of prompts by batch: like lengths together, each batch within the budget (or one prompt alone)."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].ids), i))
    batches: list[list[int]] = []
    for index in order:
        longest = len(prompts[batches[-1][0]].ids) if batches else 0
        if batches and (len(batches[-1]) + 1) * (longest + max_new_tokens) <= tokens_per_batch:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _answer_batch(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    at_step: Callable[[int], None],
) -> list[Answer]:
    from transformers import DynamicCache

    device = model.device
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), tokenizer.pad_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, width - len(prompt.ids) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    draws = None if temperature == 0 else np.stack([uniform_draws(seed, p.row_id, max_new_tokens) for p in prompts])
    ends = torch.tensor(tokenizer.end_tokens)
    taken: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    running = list(range(len(prompts)))
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    for step in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1].float().cpu()
        tokens = logits.argmax(dim=-1) if draws is None else _draw(logits, temperature, draws[running, step])
        ended = torch.isin(tokens, ends)
        for place, row in enumerate(running):
            if bool(ended[place]):
                finished[row] = True
            else:
                taken[row].append(int(tokens[place]))
        stay = torch.nonzero(~ended).flatten()
        running = [running[i] for i in stay.tolist()]
        at_step(step + 1)
        if not running:
            break
        stay = stay.to(device)
        if len(stay) < len(mask):
            cache.batch_select_indices(stay)
            mask, positions = mask[stay], positions[stay]
        ids = tokens.to(device)[stay, None]
        mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [Answer(t, f) for t, f in zip(taken, finished, strict=True)]


def uniform_draws(seed: int, row_id: str, count: int) -> np.ndarray:
    """Numbers in [0, 1) for the steps of one answer: a function of seed and row."""
    key = int.from_bytes(hashlib.sha256(f"generate/{seed}/{row_id}".encode()).digest()[:16], "big")
    raw = np.random.Philox(key=key).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _draw(logits: Tensor, temperature: float, draws: np.ndarray) -> Tensor:
    """Invert the distribution function at the draws: [B, V] logits → [B] ids."""
    shares = torch.softmax(logits.double() / temperature, dim=-1).cumsum(dim=-1)
    # Scaled to the last sum, which rounding keeps from being 1, so that the largest draw still hits a token.
    wanted = torch.from_numpy(draws)[:, None] * shares[:, -1:]
    return torch.searchsorted(shares, wanted, right=True).flatten().clamp(max=logits.shape[-1] - 1)


def _shared(answers: dict[int, Answer], count: int, max_new_tokens: int, ranks: Ranks) -> list[Answer]:
    """Exchange answers as numbers: every rank fills its rows of one table, the sum is the whole of it."""
    table = torch.zeros((count, max_new_tokens + 2), dtype=torch.long, device=ranks.device)
    for index, answer in answers.items():
        values = [len(answer.ids), int(answer.finished), *answer.ids]
        table[index, : len(values)] = torch.tensor(values, device=ranks.device)
    ranks.sum_tensors([table])
    rows = table.cpu().tolist()
    return [Answer(row[2 : 2 + row[0]], bool(row[1])) for row in rows]
