"""What a step's first micro-batch, already through the model, spares of a pass over rows with the same prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.packing import PackedBatch, pack_behind, packed_length
from plumbline_trainer.engine.schedule import fill_batches
from plumbline_trainer.engine.scorer import Scorer


@dataclass(frozen=True)
class FirstBatches:
    """The first micro-batch of every rank; its scores and its graph wait for what must be known before the loss is."""

    scorer: Scorer
    ranks: Ranks
    batch: PackedBatch
    """This rank's; its plan keeps keys."""
    members: Sequence[Sequence[int]]
    """[rank] → which rows of the step its micro-batch holds."""
    budget: int
    """Tokens of one forward pass."""

    def __post_init__(self) -> None:
        if self.batch.plan.keeps is not None:
            self.batch.plan.keeps.close()

    @property
    def rows(self) -> list[int]:
        """Rows of the step whose prompts need not be read again; none if the keys could not be kept."""
        keys = self.batch.plan.keeps
        if keys is None or not keys.usable:
            return []
        return [row for members in self.members for row in members]

    def totals(self, others: Sequence[Encoded]) -> list[Tensor]:
        """Log-probability of every answer in the place of the answers of `rows`, without gradient.

        The last token of each prompt is computed once more, because its output predicts the first token of an answer.

        Args:
            others: [rows of the step] each with the prompt of that row, or with what comes before the first scored
                token of a row without one.

        Returns:
            [rows] → [answers] float32 on the CPU, on every rank.
        """
        counts = [len(others[row].responses) for row in self.rows]
        flat = torch.zeros(sum(counts), device=self.ranks.device)
        keys = self.batch.plan.keeps
        assert keys is not None
        mine = self.members[self.ranks.rank]
        first = sum(len(others[row].responses) for members in self.members[: self.ranks.rank] for row in members)
        places = list(accumulate((len(others[row].responses) for row in mine), initial=first))
        starts = list(accumulate((packed_length(row) for row in self.batch.rows), initial=0))
        rests = [dataclasses.replace(others[row], prompt=others[row].prompt[-1:]) for row in mine]
        pasts = [
            range(start, start + max(len(others[row].prompt) - 1, 0)) for start, row in zip(starts, mine, strict=False)
        ]
        for chosen in fill_batches([packed_length(rest) for rest in rests], budget=self.budget):
            packed = pack_behind([rests[i] for i in chosen], [pasts[i] for i in chosen], keys, self.ranks.device)
            with torch.no_grad():
                found = packed.sum_by_answer(self.scorer(packed))
            for i, part in zip(chosen, torch.split(found, [len(rests[i].responses) for i in chosen]), strict=True):
                flat[places[i] : places[i] + len(part)] = part
        keys.forget()
        # Every place is written by one rank and zero on the others, so the sum is exact.
        self.ranks.sum_tensors([flat])
        return list(torch.split(flat.cpu(), counts))
