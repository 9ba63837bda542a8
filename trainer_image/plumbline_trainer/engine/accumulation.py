"""Gradients of a step's mean loss, micro-batch by micro-batch, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.packing import PackedBatch, dummy_of, pack, packed_length
from plumbline_trainer.engine.schedule import cut_step

Measured = tuple[Tensor, dict[str, Tensor]]
"""What is minimised, as a sum over a micro-batch that carries the gradient; and sums of figures."""


def accumulate(
    rows: Sequence[Encoded],
    measure: Callable[[int, PackedBatch], Measured],
    *,
    size: float,
    tokens_per_batch: int,
    ranks: Ranks,
) -> dict[str, float]:
    """Add the gradients of Σ minimised ÷ size for this rank's share of the rows.

    Args:
        rows: All rows of the step, on all ranks.
        measure: Given the number of a micro-batch on this rank, and the micro-batch.
        size: Normaliser of the step, over all ranks.
        tokens_per_batch: Token budget of a micro-batch.
        ranks: Processes that share the step; all run equally many micro-batches, filled up with rows of weight zero.

    Returns:
        Every figure's sum over all rows and ranks ÷ size.
    """
    share = cut_step([packed_length(row) for row in rows], budget=tokens_per_batch, ranks=ranks.size)[ranks.rank]
    totals: dict[str, float] = {}
    for number, members in enumerate(share):
        batch = pack([rows[index] for index in members] or [dummy_of(rows[0])], ranks.device)
        minimised, figures = measure(number, batch)
        torch.autograd.backward(minimised / size)
        for name, value in figures.items():
            totals[name] = totals.get(name, 0.0) + float(value.detach())
    return {name: value / size for name, value in ranks.sum_floats(totals).items()}
