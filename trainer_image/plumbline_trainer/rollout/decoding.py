"""The decoding loop: prompts are computed once, answers leave when they finish, waiting ones take their places."""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from plumbline_trainer.models.tokenizer import Tokenizer
from plumbline_trainer.rollout.cache import RowCache
from plumbline_trainer.rollout.drawing import draw, uniform_draws
from plumbline_trainer.rollout.interface import Prompt, Sampled

REFILL_SHARE = 8
"""Waiting answers join when one in so many places is free, or all that wait fit: a pass for few prompts is dear."""
GROWTH = 1.25
"""Room for so many times the rows, since waiting prompts are shorter, is worth moving the cache for."""
SLACK_MAX = 64
"""Columns beyond the longest sequence while answers wait, so that rows are seldom moved back."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int
    temperature: float
    seed: int


@dataclass
class _Answer:
    """An answer while it is written."""

    prompt: int
    number: int
    prompt_length: int
    uniforms: np.ndarray | None
    ids: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def cached(self) -> int:
        """Tokens before its last one."""
        return self.prompt_length + len(self.ids) - 1


class Decoder:
    """Samples answers with one model. The same draws give the same tokens however answers are batched."""

    def __init__(self, model: Any, tokenizer: Tokenizer, sampling: Sampling, tokens_per_batch: int) -> None:
        self.model = model
        self.device = model.device
        self.sampling = sampling
        self.tokens_per_batch = tokens_per_batch
        self.pad = tokenizer.pad_id
        self.ends = frozenset(tokenizer.end_tokens)
        # The head's product for tokens that are known already would be most of a prompt's cost.
        self.head = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def batched(self, prompts: Sequence[Prompt], count: int, at_step: Callable[[float], None]) -> list[list[Sampled]]:
        """`count` answers to every prompt, with a cache whose rows come and go."""
        return _Batch(self, prompts, count, at_step).run()

    def singly(self, prompts: Sequence[Prompt], count: int, at_step: Callable[[float], None]) -> list[list[Sampled]]:
        """The same one answer at a time, without padding: right for every model that takes token ids.

        A prompt's cache is copied for each answer; a model that hands out none computes the sequence anew.
        """
        steps, found = self.sampling.max_new_tokens, []
        for index, prompt in enumerate(prompts):
            first = self.model(input_ids=self.ids([prompt.ids]), use_cache=True, **self.head)
            answers = [self.start(prompt, index, number) for number in range(count)]
            for answer in answers:
                cache = copy.deepcopy(getattr(first, "past_key_values", None))
                logits = first.logits
                while not self.take(answer, self.tokens(logits, [answer])[0]):
                    at_step((index * count + answer.number + len(answer.ids) / steps) / (len(prompts) * count))
                    if cache is None:
                        logits = self.model(
                            input_ids=self.ids([[*prompt.ids, *answer.ids]]), use_cache=False, **self.head
                        ).logits
                    else:
                        logits = self.model(
                            input_ids=self.ids([answer.ids[-1:]]), past_key_values=cache, use_cache=True, **self.head
                        ).logits
                at_step((index * count + answer.number + 1) / (len(prompts) * count))
            found.append([Sampled(answer.ids, answer.finished) for answer in answers])
        return found

    def ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of equally many ids on the model's device."""
        return torch.tensor(rows, dtype=torch.long, device=self.device)

    def start(self, prompt: Prompt, index: int, number: int) -> _Answer:
        """An empty answer with its random numbers."""
        sampling = self.sampling
        uniforms = None
        if sampling.temperature > 0:
            uniforms = uniform_draws(sampling.seed, prompt.row_id, sampling.max_new_tokens, number)
        return _Answer(index, number, len(prompt.ids), uniforms)

    def tokens(self, logits: Tensor, answers: Sequence[_Answer]) -> list[int]:
        """The next token of every answer from the last of the logits [B, …, V]."""
        logits = logits[:, -1]
        if self.sampling.temperature == 0:
            return [int(token) for token in logits.argmax(dim=-1).tolist()]
        uniforms = [float(answer.uniforms[len(answer.ids)]) for answer in answers if answer.uniforms is not None]
        wanted = torch.tensor(uniforms, dtype=torch.float64, device=self.device)
        return [int(token) for token in draw(logits, self.sampling.temperature, wanted).tolist()]

    def take(self, answer: _Answer, token: int) -> bool:
        """Append a token; whether the answer is complete with it."""
        answer.ids.append(token)
        answer.finished = token in self.ends
        return answer.finished or len(answer.ids) == self.sampling.max_new_tokens


@dataclass(frozen=True)
class _Group:
    """Answers to one prompt that join together."""

    prompt: int
    numbers: range


@dataclass(frozen=True)
class _Prefilled:
    """Prompts after their forward pass."""

    cache: DynamicCache
    """Left-padded, one row per prompt."""
    logits: Tensor
    """[prompts, 1, V]"""

    def row(self, index: int, tokens: int) -> _Prefilled:
        """One prompt for itself, so that the memory of the others can go."""
        alone = DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            keys, values = (part[index : index + 1, :, -tokens:].clone() for part in (layer.keys, layer.values))
            alone.update(keys, values, number)
        return _Prefilled(alone, self.logits[index : index + 1].clone())


class _Batch:
    """Answers under way: which of them run, which wait, and the cache of those that run."""

    def __init__(
        self, decoder: Decoder, prompts: Sequence[Prompt], count: int, at_step: Callable[[float], None]
    ) -> None:
        self.decoder = decoder
        self.prompts = prompts
        self.at_step = at_step
        self.total = len(prompts) * count
        self.done = 0
        self.found: list[list[Sampled | None]] = [[None] * count for _ in prompts]
        # Like lengths together, and the longest first: what joins later needs no more columns.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].ids), i))
        self.waiting = deque(_Group(index, range(count)) for index in order if count)
        self.held: _Prefilled | None = None
        """The first waiting prompt, where some of its answers have joined already."""
        self.running: list[_Answer] = []
        self.cache = RowCache(decoder.model.config.get_text_config().num_hidden_layers)

    def run(self) -> list[list[Sampled]]:
        """Go on until every answer is complete."""
        while self.running or self.waiting:
            if self.waiting:
                self._admit()
            if self.running:
                self._step()
        return [[answer for answer in answers if answer is not None] for answers in self.found]

    def _admit(self) -> None:
        """Let waiting answers join if enough places are free."""
        places, waiting = self._places(), self._count_waiting()
        free = places - len(self.running)
        if self.running and free < min(waiting, max(1, places // REFILL_SHARE)):
            return
        groups = self._next(free)
        if self.held is not None:
            self._join(self.held, groups[:1], places)
            groups, self.held = groups[1:], self.held if groups[0].prompt == self._first_waiting() else None
        if groups:
            prefilled = self._prefill([group.prompt for group in groups])
            if groups[-1].prompt == self._first_waiting():
                self.held = prefilled.row(len(groups) - 1, len(self.prompts[groups[-1].prompt].ids))
            self._join(prefilled, groups, places)

    def _places(self) -> int:
        """Rows that fit the budget, each at its longest."""
        columns = self._columns(len(self.prompts[self.waiting[0].prompt].ids))
        places = max(1, self.decoder.tokens_per_batch // columns)
        if places < len(self.running) + self._count_waiting():
            places = max(1, self.decoder.tokens_per_batch // (columns + _slack(columns)))
        return self.cache.places if self.running and places < GROWTH * self.cache.places else places

    def _columns(self, joining: int) -> int:
        """Tokens of the longest row at its end, with a prompt that joins."""
        prompt = max([joining, *(answer.prompt_length for answer in self.running)])
        return prompt + self.decoder.sampling.max_new_tokens

    def _count_waiting(self) -> int:
        return sum(len(group.numbers) for group in self.waiting)

    def _next(self, count: int) -> list[_Group]:
        """Take so many answers from those that wait, fewer if fewer do."""
        taken = []
        while count and self.waiting:
            group = self.waiting.popleft()
            now, later = group.numbers[:count], group.numbers[count:]
            taken.append(_Group(group.prompt, now))
            count -= len(now)
            if later:
                self.waiting.appendleft(_Group(group.prompt, later))
        return taken

    def _first_waiting(self) -> int | None:
        return self.waiting[0].prompt if self.waiting else None

    def _prefill(self, indices: Sequence[int]) -> _Prefilled:
        """One forward pass over prompts, left-padded; every layer keeps all tokens, whatever its window."""
        decoder = self.decoder
        rows = [self.prompts[index].ids for index in indices]
        width = max(map(len, rows))
        places = torch.arange(width, device=decoder.device)
        padding = torch.tensor([width - len(row) for row in rows], device=decoder.device)[:, None]
        cache = DynamicCache()
        output = decoder.model(
            input_ids=decoder.ids([[decoder.pad] * (width - len(row)) + list(row) for row in rows]),
            attention_mask=(places >= padding).long(),
            position_ids=(places - padding).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            **decoder.head,
        )
        return _Prefilled(cache, output.logits[:, -1:])

    def _join(self, prefilled: _Prefilled, groups: Sequence[_Group], places: int) -> None:
        """Draw the first tokens of answers; those that go on get places."""
        decoder = self.decoder
        new = [
            decoder.start(self.prompts[group.prompt], group.prompt, number)
            for group in groups
            for number in group.numbers
        ]
        copies = torch.tensor([len(group.numbers) for group in groups], device=decoder.device)
        tokens = decoder.tokens(prefilled.logits.repeat_interleave(copies, dim=0), new)
        alive = [answer for answer, token in zip(new, tokens, strict=True) if not self._complete(answer, token)]
        rows = []
        for source, group in enumerate(groups):
            going = sum(answer.prompt == group.prompt for answer in alive)
            if going:
                rows.append((source, going, len(self.prompts[group.prompt].ids)))
        if rows:
            self._make_room(places, len(alive), max(length for _, _, length in rows))
            self.cache.join(prefilled.cache, rows)
            self.running += alive
        self._tell()

    def _make_room(self, places: int, joining: int, width: int) -> None:
        """Have memory for rows that join."""
        cache, waiting = self.cache, self._count_waiting()
        wanted = min(max(places, cache.count + joining), cache.count + joining + waiting)
        if cache.count and cache.places >= wanted and cache.end >= width:
            return
        columns = self._columns(width)
        cache.reserve(wanted, columns + (_slack(columns) if waiting else 0), width)

    def _step(self) -> None:
        """One more token for every answer that runs."""
        decoder, cache, running = self.decoder, self.cache, self.running
        if cache.end == cache.columns:
            cache.reserve(cache.places, cache.columns, cache.width)
        cached = decoder.ids([[answer.cached] for answer in running])
        output = decoder.model(
            input_ids=decoder.ids([answer.ids[-1:] for answer in running]),
            attention_mask=(torch.arange(cache.width + 1, device=decoder.device) >= cache.width - cached).long(),
            position_ids=cached,
            past_key_values=cache,
            use_cache=True,
            **decoder.head,
        )
        cache.advance()
        tokens = decoder.tokens(output.logits, running)
        stay = [row for row, token in enumerate(tokens) if not self._complete(running[row], token)]
        if len(stay) < len(running):
            width = max((running[row].cached for row in stay), default=0)
            self.running = [running[row] for row in cache.keep(stay, width)]
        self._tell()

    def _complete(self, answer: _Answer, token: int) -> bool:
        """Append a token to an answer and file it if that completes it."""
        if not self.decoder.take(answer, token):
            return False
        self.found[answer.prompt][answer.number] = Sampled(answer.ids, answer.finished)
        self.done += 1
        return True

    def _tell(self) -> None:
        under_way = sum(len(answer.ids) for answer in self.running) / self.decoder.sampling.max_new_tokens
        self.at_step((self.done + under_way) / self.total)


def _slack(columns: int) -> int:
    return min(SLACK_MAX, columns // 4)
