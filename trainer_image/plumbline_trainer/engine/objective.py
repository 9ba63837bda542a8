"""What a stage minimises, in a form that adds up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.packing import PackedBatch
from plumbline_trainer.losses.likelihood import negative_log_likelihood

if TYPE_CHECKING:
    from plumbline_trainer.engine.ahead import FirstBatches


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


@runtime_checkable
class LooksAhead(Protocol):
    """An objective that must see all rows of a step before it can say what the loss of one is."""

    def look_ahead(self, rows: Sequence[Encoded], first: FirstBatches | None = None) -> None:
        """Called on every rank alike before the first loss of a step or an evaluation is asked for.

        Args:
            rows: All rows of the step or the evaluation, on all ranks, in the plan's order.
            first: Of a step, what has been through the model already.
        """
        ...


class TokenLikelihood:
    """Mean −log p over the tokens that carry loss; rows count by their weight."""

    def size(self, row: Encoded) -> float:
        """Weight times scored tokens."""
        return row.weight * scored_tokens(row)

    def sums(self, batch: PackedBatch, scores: Tensor) -> dict[str, Tensor]:
        """Only the loss."""
        return {"loss": negative_log_likelihood(scores, token_weights(batch))}


def token_weights(batch: PackedBatch) -> Tensor:
    """Weight of each scored token, [N]: that of its row."""
    device = batch.weights.device
    counts = torch.tensor([len(answer.scored) for answer in batch.answers], device=device)
    owners = torch.tensor([answer.row for answer in batch.answers], device=device)
    return batch.weights[owners].repeat_interleave(counts)


def scored_tokens(row: Encoded) -> int:
    """Tokens of a row that carry loss and have something before them."""
    return sum(
        sum(1 for index, scored in enumerate(response.mask) if scored and (index > 0 or row.prompt))
        for response in row.responses
    )


def row_tokens(row: Encoded) -> int:
    """Tokens of a row, its prompt once."""
    return len(row.prompt) + sum(len(response.ids) for response in row.responses)
