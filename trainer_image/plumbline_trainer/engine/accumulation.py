"""Gradients of a step's mean loss, micro-batch by micro-batch, over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.packing import PackedBatch, pack, packed_length
from plumbline_trainer.engine.schedule import cut_step

Sums = dict[str, Tensor]


def accumulate(
    rows: Sequence[Encoded],
    sums: Callable[[PackedBatch], Sums],
    *,
    size: float,
    tokens_per_batch: int,
    ranks: Ranks,
    dummy: Callable[[Encoded], Encoded],
) -> dict[str, float]:
    """Add the gradients of Σ loss ÷ size for this rank's share of the rows.

    Args:
        rows: All rows of the step, on all ranks.
        sums: Sums over a batch: `loss`, which carries the gradient, and figures that do not.
        size: Normaliser of the step, over all ranks.
        tokens_per_batch: Token budget of a micro-batch.
        ranks: Processes that share the step; all run equally many micro-batches.
        dummy: A row of weight zero made from a row, for a micro-batch without rows.

    Returns:
        Every figure's sum over all rows and ranks ÷ size.
    """
    share = cut_step([packed_length(row) for row in rows], budget=tokens_per_batch, ranks=ranks.size)[ranks.rank]
    totals: dict[str, float] = {}
    for members in share:
        batch = pack([rows[index] for index in members] or [dummy(rows[0])], ranks.device)
        found = sums(batch)
        torch.autograd.backward(found["loss"] / size)
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + float(value.detach())
    return {name: value / size for name, value in ranks.sum_floats(totals).items()}
