"""What a stage minimises, in a form that adds up over micro-batches and ranks."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.packing import PackedBatch
from plumbline_trainer.losses.likelihood import negative_log_likelihood


class Objective(Protocol):
    """A loss and its figures as sums over rows.

    A step's loss is Σ `sums()["loss"]` ÷ Σ `size()`, both over all rows of the step on all ranks, so that neither
    accumulation nor the number of ranks changes it. Every other figure is the same kind of mean.
    """

    def size(self, row: Encoded) -> float:
        """What a row adds to the normaliser."""
        ...

    def sums(self, batch: PackedBatch, scores: Tensor) -> dict[str, Tensor]:
        """Sums over a batch: `loss`, which carries the gradient, and figures that do not. Rows of weight 0 add nothing.

        Args:
            batch: The batch that was scored.
            scores: [N] log-probabilities of its scored tokens.
        """
        ...


class TokenLikelihood:
    """Mean −log p over the tokens that carry loss; rows count by their weight."""

    def size(self, row: Encoded) -> float:
        """Weight times scored tokens."""
        return row.weight * scored_tokens(row)

    def sums(self, batch: PackedBatch, scores: Tensor) -> dict[str, Tensor]:
        """Only the loss."""
        counts = torch.tensor([len(answer.scored) for answer in batch.answers], device=scores.device)
        owners = torch.tensor([answer.row for answer in batch.answers], device=scores.device)
        weights = batch.weights[owners].repeat_interleave(counts)
        return {"loss": negative_log_likelihood(scores, weights)}


def scored_tokens(row: Encoded) -> int:
    """Tokens of a row that carry loss and have something before them."""
    return sum(
        sum(1 for index, scored in enumerate(response.mask) if scored and (index > 0 or row.prompt))
        for response in row.responses
    )


def row_tokens(row: Encoded) -> int:
    """Tokens of a row, its prompt once."""
    return len(row.prompt) + sum(len(response.ids) for response in row.responses)
