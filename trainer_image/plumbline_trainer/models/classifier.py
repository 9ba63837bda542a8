"""Sequence classifiers in Hugging Face layout as scorers of answers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from plumbline_api.errors import InputError
from torch import Tensor

from plumbline_trainer.data.encode import tokenize
from plumbline_trainer.data.rows import Message
from plumbline_trainer.data.templates import Renderer
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.models.dtypes import torch_dtype
from plumbline_trainer.models.tokenizer import Tokenizer


@dataclass
class Classifier:
    """A classifier with one label. What it says of a dialogue is its reward."""

    model: Any
    tokenizer: Tokenizer
    name: str
    """For messages."""
    precision: str = "float32"
    tokens_per_batch: int = 4096
    log: logging.Logger | None = None

    def score(self, dialogues: Sequence[Sequence[Message]], *, ranks: Ranks | None = None) -> Tensor:
        """Rewards of the last turn of each dialogue, [dialogues] float32 on the CPU.

        With a chat template the dialogue is rendered by it; without one, as for encoders, the turns before the answer
        and the answer are the two texts of a pair.

        Raises:
            InputError: if a prompt leaves no room for its answer.
        """
        ranks = ranks or Ranks()
        sequences, types = self._encode(dialogues)
        flat = torch.zeros(len(sequences), device=self.model.device if ranks.size > 1 else "cpu")
        for number, members in enumerate(padded_batches([len(ids) for ids in sequences], self.tokens_per_batch)):
            if number % ranks.size == ranks.rank:
                kinds = None if types is None else [types[index] for index in members]
                values = self._forward([sequences[index] for index in members], kinds)
                flat[torch.tensor(members)] = values.to(flat.device)
        # Every place is written by one rank and zero on the others, so the sum is exact.
        ranks.sum_tensors([flat])
        return flat.cpu()

    def _encode(self, dialogues: Sequence[Sequence[Message]]) -> tuple[list[list[int]], list[list[int]] | None]:
        """Ids of each dialogue, and which text of a pair each belongs to where the model wants to know."""
        types: list[list[int]] | None = None
        if not dialogues:
            return [], None
        if self.tokenizer.template is not None:
            render = Renderer(self.tokenizer)
            texts = [render(messages, generate=False, source=self.name) for messages in dialogues]
            prompts = [render(messages[:-1], generate=True, source=self.name) for messages in dialogues]
            found, before = tokenize(self.tokenizer, texts), tokenize(self.tokenizer, prompts)
        else:
            asked = ["\n".join(message.content for message in messages[:-1]) for messages in dialogues]
            pairs = self.tokenizer.hf(asked, [messages[-1].content for messages in dialogues])
            found, types = [list(ids) for ids in pairs["input_ids"]], pairs.get("token_type_ids")
            before = [list(ids) for ids in self.tokenizer.hf(asked)["input_ids"]]
        longest = self._longest()
        if longest is not None:
            self._cut(found, before, longest)
        return found, types

    def _cut(self, sequences: list[list[int]], prompts: Sequence[list[int]], longest: int) -> None:
        """Cut what is longer than the model reads at its end, in place, and say so."""
        cut = 0
        for number, (ids, prompt) in enumerate(zip(sequences, prompts, strict=True)):
            if len(prompt) >= longest:
                raise InputError(
                    f"a prompt of {len(prompt):,} tokens leaves no room for an answer within the {longest:,} tokens "
                    f"that {self.name} reads. Lower training.maxLength, or name a model that reads more"
                )
            if len(ids) > longest:
                sequences[number] = ids[:longest]
                cut += 1
        if cut and self.log is not None:
            self.log.warning("%s reads %s tokens: the ends of %s answers were cut off", self.name, longest, cut)

    def _longest(self) -> int | None:
        """Tokens that the model reads at most."""
        said = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        limits = [int(said)] if said else []
        if self.tokenizer.hf.model_max_length < 1_000_000:  # transformers says 1e30 where nobody knows
            limits.append(int(self.tokenizer.hf.model_max_length))
        return min(limits) if limits else None

    def _forward(self, sequences: Sequence[list[int]], types: Sequence[list[int]] | None) -> Tensor:
        """[n] float32.

        Decoders are read by transformers at the last token that is not the padding token. Where that is the end token
        as well, it would be read at the one before. So a batch is padded with a token that does not occur in it; it
        comes last and is masked, so that no other token sees it.
        """
        pad = padding_for(sequences, self.tokenizer.pad_id)
        width = max(len(ids) for ids in sequences)
        device = self.model.device
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in sequences], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sequences], device=device)
        for config in (self.model.config, self.model.config.get_text_config()):
            config.pad_token_id = pad
        inputs = {"input_ids": ids, "attention_mask": mask}
        if types is not None and "token_type_ids" in inspect.signature(self.model.forward).parameters:
            kinds = [[*kind[:width], *[0] * (width - len(kind))] for kind in types]
            inputs["token_type_ids"] = torch.tensor(kinds, device=device)
        enabled = self.precision == "bfloat16"
        with torch.no_grad(), torch.autocast(device.type, dtype=torch_dtype("bfloat16"), enabled=enabled):
            logits: Tensor = self.model(**inputs).logits
        return logits.float().reshape(len(sequences))


def padding_for(sequences: Sequence[Sequence[int]], declared: int) -> int:
    """The declared padding token where no sequence holds it, else the smallest id that none holds."""
    used = {token for ids in sequences for token in ids}
    return declared if declared not in used else next(token for token in range(len(used) + 1) if token not in used)


def padded_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices by batch, longest first, so that a batch padded to its longest sequence holds at most `budget` tokens.

    A sequence longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
