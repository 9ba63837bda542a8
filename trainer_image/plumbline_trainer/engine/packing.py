"""Rows to packed batches: no padding, no leaks between rows, each prompt once for all its responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plumbline_trainer.data.encode import Encoded, EncodedResponse
from plumbline_trainer.engine.segments import Block, SegmentPlan


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


@dataclass(frozen=True)
class PackedBatch:
    """Rows laid out as one sequence of T tokens, of which N are scored."""

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
    """Every response of every row, in order; their `scored` ranges tile N."""
    weights: Tensor
    """[rows] float32."""
    reads: Tensor
    """[R] index in T of the positions at which scalar heads are read; the answers' `read` ranges tile R."""

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return int(self.input_ids.shape[1])

    def sum_by_answer(self, values: Tensor) -> Tensor:
        """Sum of per-token values over each response: [N] → [answers].

        Sums are taken range by range, so that they do not depend on what else is in the batch.
        """
        parts = torch.split(values, [len(answer.scored) for answer in self.answers])
        return torch.stack([part.sum() for part in parts])


def inputs_needed(response: EncodedResponse) -> int:
    """Tokens of a response that must go through the model: those before its last scored token, and those read."""
    last = next((index for index in reversed(range(len(response.mask))) if response.mask[index]), 0)
    return max(last, max(response.reads, default=-1) + 1)


def packed_length(row: Encoded) -> int:
    """Tokens that a row takes in a packed batch."""
    return len(row.prompt) + sum(inputs_needed(response) for response in row.responses)


def pack(rows: Sequence[Encoded], device: torch.device | str = "cpu") -> PackedBatch:
    """Lay rows out as one sequence.

    A token is scored where its response's mask says so and something stands before it. Of a response, what comes after
    the last scored token and the last position that is read is left out, because nothing looks at it.
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
        lengths: list[int] = []
        for response in row.responses:
            begin = len(ids)
            needed = inputs_needed(response)
            offsets = tuple(k for k, scored in enumerate(response.mask) if scored and (k > 0 or row.prompt))
            first = len(targets)
            for offset in offsets:
                sources.append(begin + offset - 1 if offset > 0 else start + len(row.prompt) - 1)
                targets.append(response.ids[offset])
            ids.extend(response.ids[:needed])
            lengths.append(needed)
            read = range(len(reads), len(reads) + len(response.reads))
            reads.extend(begin + offset for offset in response.reads)
            answers.append(Answer(index, response, range(first, len(targets)), offsets, read))
        blocks.append(Block(start=start, prompt=len(row.prompt), responses=tuple(lengths)))
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
    )
