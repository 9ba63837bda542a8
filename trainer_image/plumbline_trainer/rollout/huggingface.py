"""Rollouts with the model that is trained, by transformers' forward pass and a decoding loop of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from plumbline_trainer.engine.attention import attention_of, plain_implementation
from plumbline_trainer.models.tokenizer import Tokenizer
from plumbline_trainer.rollout.cache import unfit
from plumbline_trainer.rollout.decoding import Decoder, Sampling
from plumbline_trainer.rollout.interface import Prompt, Sampled
from plumbline_trainer.rollout.merged import merged_adapters
from plumbline_trainer.rollout.narrow import narrow_linears
from plumbline_trainer.rollout.sharing import share_answers

if TYPE_CHECKING:
    from plumbline_trainer.engine.distributed import Ranks

TOKENS_PER_BATCH = 16384
"""Cached tokens of one batch, prompts and answers at their longest: a memory setting."""


class HuggingFaceRollout:
    """Samples from a causal language model in memory, adapters and all, as it is when asked."""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        ranks: Ranks | None = None,
        precision: str = "float32",
    ) -> None:
        """Take a model; nothing of it is changed, now or later.

        Args:
            model: causal language model of transformers, on its device.
            tokenizer: its tokenizer; any of the end tokens ends an answer.
            max_new_tokens: longest answer.
            temperature: 0 takes the likeliest token; else tokens are drawn from softmax(logits/temperature).
            tokens_per_batch: budget of cached tokens, every answer at its longest; results do not depend on it.
            ranks: processes that share the prompts; each gets all answers.
            precision: `bfloat16` computes with that type whatever the weights are, as training in it does.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.tokens_per_batch = tokens_per_batch
        self.ranks = ranks
        self.precision = precision
        self.plain_reason = unfit(model)
        """Why answers are sampled one at a time; None where they are batched."""
        self.adapter_path = ""
        """How the last rollout computed adapted layers, in words."""

    def describe(self) -> str:
        """How answers are sampled, for the log."""
        batched = "batched" if self.plain_reason is None else f"one answer at a time ({self.plain_reason})"
        return f"{batched}; {self.adapter_path}" if self.adapter_path else batched

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        answers: int,
        seed: int,
        at_step: Callable[[float], None] | None = None,
    ) -> list[list[Sampled]]:
        """Answer every prompt several times; see `RolloutEngine.sample`."""
        ranks = self.ranks if self.ranks is not None and self.ranks.size > 1 else None
        mine = list(range(len(prompts)))
        if ranks is not None:
            mine = sorted(mine, key=lambda i: (len(prompts[i].ids), i))[ranks.rank :: ranks.size]
        sampling = Sampling(self.max_new_tokens, self.temperature, seed)
        with self._arranged():
            decoder = Decoder(self.model, self.tokenizer, sampling, self.tokens_per_batch)
            decode = decoder.batched if self.plain_reason is None else decoder.singly
            found = decode([prompts[i] for i in mine], answers, at_step or (lambda share: None))
        by_prompt = dict(zip(mine, found, strict=True))
        if ranks is not None:
            return share_answers(by_prompt, len(prompts), answers, self.max_new_tokens, ranks)
        return [by_prompt[i] for i in range(len(prompts))]

    @contextmanager
    def _arranged(self) -> Iterator[None]:
        """Evaluation mode, transformers' own attention, adapters merged, narrow products turned; all put back."""
        model = self.model
        training = [module for module in model.modules() if module.training]
        model.eval()
        autocast = torch.autocast(model.device.type, dtype=torch.bfloat16) if self.precision == "bfloat16" else None
        try:
            with (
                attention_of(model, plain_implementation(model)),
                merged_adapters(model) as self.adapter_path,
                narrow_linears(model),
                autocast or nullcontext(),
            ):
                yield
        finally:
            for module in training:
                module.training = True
