"""Token log-probabilities of many rows, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.packing import PackedBatch, dummy_of, pack, packed_length
from plumbline_trainer.engine.pathcheck import choose_path
from plumbline_trainer.engine.schedule import fill_batches
from plumbline_trainer.engine.scorer import Scorer

Scores = list[list[Tensor]]
"""[row][response] → float32 CPU tensor, aligned with the response's ids; 0 where a token is not scored."""


def score_rows(
    model: PreTrainedModel | Scorer,
    encoded: Sequence[Encoded],
    *,
    tokens_per_batch: int,
    device: torch.device,
    precision: str = "float32",
    ranks: Ranks | None = None,
    at_batch: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score every response of every row.

    Args:
        model: A causal language model on the device, with or without an adapter, or a `Scorer` around one. For a bare
            model the fast path is first compared with the plain one on the first rows.
        encoded: Rows.
        tokens_per_batch: Token budget of one forward pass.
        device: Where the model is.
        precision: Type of activations.
        ranks: Processes that share the work; every one of them gets all results.
        at_batch: Called on every rank alike before each round of batches with batches done and batches in all; it may
            raise to stop.

    Returns:
        [row][response] → log-probabilities. They depend on the rows, the budget and the number of ranks only, so that
        the same call gives the same bits on a CPU.
    """
    ranks = ranks or Ranks()
    if isinstance(model, Scorer):
        scorer = model
    else:
        scorer = Scorer(model, precision=precision)
        scorer.eval()
        scorer.path = choose_path(scorer, encoded, {}, tokens=tokens_per_batch, ranks=ranks).path
    return _scored(encoded, lambda batch: scorer(batch)[None], 1, tokens_per_batch, device, ranks, at_batch)[0]


def score_entropies(
    scorer: Scorer,
    encoded: Sequence[Encoded],
    *,
    tokens_per_batch: int,
    device: torch.device,
    ranks: Ranks | None = None,
    at_batch: Callable[[int, int], None] | None = None,
) -> tuple[Scores, Scores]:
    """As `score_rows`, and beside each log-probability the entropy of the distribution that it was taken from."""

    def both(batch: PackedBatch) -> Tensor:
        return torch.stack(scorer.with_entropy(batch))

    scores, entropies = _scored(encoded, both, 2, tokens_per_batch, device, ranks or Ranks(), at_batch)
    return scores, entropies


def _scored(
    encoded: Sequence[Encoded],
    measure: Callable[[PackedBatch], Tensor],
    channels: int,
    tokens_per_batch: int,
    device: torch.device,
    ranks: Ranks,
    at_batch: Callable[[int, int], None] | None,
) -> list[Scores]:
    """Several numbers per scored token, measured as [channels, N], by row and response."""
    sizes = [[len(response.ids) for response in row.responses] for row in encoded]
    starts: list[list[int]] = []
    total = 0
    for row in sizes:
        starts.append([])
        for size in row:
            starts[-1].append(total)
            total += size
    flat = torch.zeros(channels, total, device=device if ranks.size > 1 else "cpu")
    for members, batch in shared_batches(encoded, tokens_per_batch, device, ranks, at_batch):
        with torch.no_grad():
            scores = measure(batch).to(flat.device)
        if not members:
            continue
        counts = [0] * len(members)
        for answer in batch.answers:
            start = starts[members[answer.row]][counts[answer.row]]
            counts[answer.row] += 1
            places = torch.tensor(answer.offsets, dtype=torch.long, device=flat.device) + start
            flat[:, places] = scores[:, answer.scored.start : answer.scored.stop]
    # Every place is written by one rank and zero on the others, so the sum is exact.
    ranks.sum_tensors([flat])
    flat = flat.cpu()
    return [
        [
            [channel[start : start + size].clone() for start, size in zip(*row, strict=True)]
            for row in zip(starts, sizes, strict=True)
        ]
        for channel in flat
    ]


def shared_batches(
    encoded: Sequence[Encoded],
    tokens_per_batch: int,
    device: torch.device,
    ranks: Ranks,
    at_batch: Callable[[int, int], None] | None,
) -> Iterator[tuple[list[int], PackedBatch]]:
    """This rank's batches, and the indices of the rows in each; `at_batch` is called on every rank alike.

    Every rank gets equally many: one that has nothing left gets a dummy, without indices.
    """
    batches = fill_batches([packed_length(row) for row in encoded], budget=tokens_per_batch)
    for done in range(0, len(batches), ranks.size):
        if at_batch is not None:
            at_batch(done, len(batches))
        mine = done + ranks.rank
        members = batches[mine] if mine < len(batches) else []
        yield members, pack([encoded[index] for index in members] or [dummy_of(encoded[0])], device)
