"""Rows to packed batches: no padding, no leaks between rows, each prompt once for all its responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from plumbline_trainer.data.encode import Encoded, EncodedResponse
from plumbline_trainer.engine.segments import Block, KeptKeys, SegmentPlan


@dataclass(frozen=True, slots=True)
class Answer:
    """One response within a packed batch."""

    row: int
    """Index of its row in the batch."""
    response: EncodedResponse
    scored: range
    """Its entries among the batch's scored tokens."""
    offsets: tuple[int, ...]
    """Index in the response of each scored token."""
    read: range = range(0)
    """Its entries among the positions at which scalar heads are read."""


@dataclass(frozen=True, slots=True)
class Context:
    """The scored tokens of a row that belong to no response's own tokens."""

    row: int
    """Index of the row in the batch."""
    scored: range
    """Their entries among the batch's scored tokens."""
    places: tuple[int, ...]
    """Index of each in prompt and first response together."""


@dataclass(frozen=True)
class PackedBatch:
    """Rows laid out as one sequence of T tokens, of which N are scored: those of answers, then those of contexts."""

    rows: tuple[Encoded, ...]
    input_ids: Tensor
    """[1, T]"""
    position_ids: Tensor
    """[1, T]"""
    plan: SegmentPlan
    sources: Tensor
    """[N] index in T of the position whose output predicts the scored token."""
    targets: Tensor
    """[N] token ids."""
    answers: tuple[Answer, ...]
    """Every response of every row, in order; their `scored` ranges tile the beginning of N."""
    weights: Tensor
    """[rows] float32."""
    reads: Tensor
    """[R] index in T of the positions at which scalar heads are read; the answers' `read` ranges tile R."""
    contexts: tuple[Context, ...] = ()
    """One per row whose context is scored; their `scored` ranges tile the end of N."""

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return int(self.input_ids.shape[1])

    def sum_by_answer(self, values: Tensor) -> Tensor:
        """Sum of per-token values over each response: [N] → [answers].

        Sums are taken range by range, so that they do not depend on what else is in the batch.
        """
        counts = [len(answer.scored) for answer in self.answers]
        parts = torch.split(values[: sum(counts)], counts)
        return torch.stack([part.sum() for part in parts])

    def sum_by_context(self, values: Tensor) -> Tensor:
        """Sum of per-token values over each row's context, 0 where it is not scored: [N] → [rows]."""
        sums = [values.new_zeros(())] * len(self.rows)
        for context in self.contexts:
            sums[context.row] = values[context.scored.start : context.scored.stop].sum()
        return torch.stack(sums)

    @cached_property
    def answer_tokens(self) -> Tensor:
        """Scored tokens of each response, at least 1, [answers] float32."""
        counts = [float(max(len(answer.scored), 1)) for answer in self.answers]
        return torch.tensor(counts, device=self.weights.device)

    @cached_property
    def context_tokens(self) -> Tensor:
        """Scored tokens of each row's context, [rows] float32."""
        counts = [0.0] * len(self.rows)
        for context in self.contexts:
            counts[context.row] = float(len(context.scored))
        return torch.tensor(counts, device=self.weights.device)


def inputs_needed(response: EncodedResponse) -> int:
    """Tokens of a response that must go through the model: those before its last scored token, and those read."""
    last = next((index for index in reversed(range(len(response.mask))) if response.mask[index]), 0)
    return max(last, max(response.reads, default=-1) + 1)


def response_lengths(row: Encoded) -> list[int]:
    """Tokens of each response that must go through the model."""
    lengths = [inputs_needed(response) for response in row.responses]
    if row.score_context:
        lengths[0] = max(len(row.responses[0].ids) - 1, 0)
    return lengths


def packed_length(row: Encoded) -> int:
    """Tokens that a row takes in a packed batch."""
    return len(row.prompt) + sum(response_lengths(row))


def pack(rows: Sequence[Encoded], device: torch.device | str = "cpu") -> PackedBatch:
    """Lay rows out as one sequence.

    A token is scored where its response's mask says so and something stands before it, and around the first response
    where the row scores its context. Of a response, what comes after the last scored token and the last position that
    is read is left out, because nothing looks at it.
    """
    ids: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    reads: list[int] = []
    blocks: list[Block] = []
    answers: list[Answer] = []
    for index, row in enumerate(rows):
        start = len(ids)
        ids.extend(row.prompt)
        lengths = response_lengths(row)
        for response, needed in zip(row.responses, lengths, strict=True):
            begin = len(ids)
            offsets = tuple(k for k, scored in enumerate(response.mask) if scored and (k > 0 or row.prompt))
            first = len(targets)
            for offset in offsets:
                sources.append(begin + offset - 1 if offset > 0 else start + len(row.prompt) - 1)
                targets.append(response.ids[offset])
            ids.extend(response.ids[:needed])
            read = range(len(reads), len(reads) + len(response.reads))
            # −1 is the last token of the prompt, which several responses may share.
            reads.extend(begin + offset if offset >= 0 else start + len(row.prompt) - 1 for offset in response.reads)
            answers.append(Answer(index, response, range(first, len(targets)), offsets, read))
        blocks.append(Block(start=start, prompt=len(row.prompt), responses=tuple(lengths)))
    contexts: list[Context] = []
    for index, (row, block) in enumerate(zip(rows, blocks, strict=True)):
        if row.score_context:
            places, sequence = context_places(row), [*row.prompt, *row.responses[0].ids]
            contexts.append(Context(row=index, scored=range(len(targets), len(targets) + len(places)), places=places))
            # Prompt and first response lie one behind the other.
            sources.extend(block.start + place - 1 for place in places)
            targets.extend(sequence[place] for place in places)
    plan = SegmentPlan(tuple(block for block in blocks if block.length))
    return PackedBatch(
        rows=tuple(rows),
        input_ids=torch.tensor([ids], dtype=torch.long, device=device),
        position_ids=torch.tensor([plan.positions()], dtype=torch.long, device=device),
        plan=plan,
        sources=torch.tensor(sources, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        answers=tuple(answers),
        weights=torch.tensor([row.weight for row in rows], dtype=torch.float32, device=device),
        reads=torch.tensor(reads, dtype=torch.long, device=device),
        contexts=tuple(contexts),
    )


def keeping(batch: PackedBatch) -> PackedBatch:
    """The same batch; on the fast path every layer leaves its keys in `plan.keeps`."""
    return replace(batch, plan=replace(batch.plan, keeps=KeptKeys()))


def pack_behind(
    rows: Sequence[Encoded], pasts: Sequence[range], keys: KeptKeys, device: torch.device | str = "cpu"
) -> PackedBatch:
    """Lay out rows whose beginnings have been through the model.

    Args:
        rows: What is left of each row; none is without tokens.
        pasts: Where in the sequence whose keys were kept each row's beginning lies.
        keys: The kept keys.
        device: Where the model is.
    """
    batch = pack(rows, device)
    blocks = [replace(block, past=past) for block, past in zip(batch.plan.blocks, pasts, strict=True)]
    plan = SegmentPlan(tuple(blocks), behind=keys)
    return replace(batch, plan=plan, position_ids=torch.tensor([plan.positions()], dtype=torch.long, device=device))


def context_places(row: Encoded) -> tuple[int, ...]:
    """Index in prompt and first response of every token but the very first that is not the response's own."""
    prompt = len(row.prompt)
    others = (prompt + k for k, own in enumerate(row.responses[0].mask) if not own)
    return tuple(place for place in (*range(prompt), *others) if place > 0)
