"""Answers from a policy to be judged: one per prompt, by the rollout engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plumbline_trainer.models.tokenizer import Tokenizer
from plumbline_trainer.rollout.huggingface import TOKENS_PER_BATCH, HuggingFaceRollout
from plumbline_trainer.rollout.interface import Prompt

if TYPE_CHECKING:
    from plumbline_trainer.engine.distributed import Ranks


@dataclass(frozen=True)
class Answer:
    """What a policy said."""

    ids: list[int]
    """Without the end token."""
    finished: bool
    """Whether it ended by itself; else it was cut at the longest length."""


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
    """Answer every prompt once.

    Args:
        model: causal language model, on its device.
        tokenizer: its tokenizer; any of the end tokens ends an answer.
        prompts: rendered up to where the answer begins, none empty.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token; else tokens are drawn from softmax(logits/temperature).
        seed: of the draws.
        tokens_per_batch: budget of one batch.
        ranks: processes that share the prompts; each gets all answers.
        at_step: told at every step the share of this process's work that is done; it may raise to stop.

    Returns:
        One answer per prompt, in order.
    """
    engine = HuggingFaceRollout(
        model,
        tokenizer,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        tokens_per_batch=tokens_per_batch,
        ranks=ranks,
    )
    sampled = engine.sample(prompts, answers=1, seed=seed, at_step=at_step)
    return [Answer(one.ids[:-1] if one.finished else one.ids, one.finished) for (one,) in sampled]
