"""Every rank learns all answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from plumbline_trainer.rollout.interface import Sampled

if TYPE_CHECKING:
    from plumbline_trainer.engine.distributed import Ranks


def share_answers(
    found: Mapping[int, Sequence[Sampled]], prompts: int, answers: int, max_new_tokens: int, ranks: Ranks
) -> list[list[Sampled]]:
    """Exchange answers as numbers: every rank fills its rows of one table, the sum is the whole of it.

    Args:
        found: this rank's answers by number of the prompt; every prompt is some rank's.
        prompts: of all ranks.
        answers: to each.
        max_new_tokens: longest answer.
        ranks: that exchange.

    Returns:
        By prompt, by answer.
    """
    table = torch.zeros((prompts * answers, max_new_tokens + 2), dtype=torch.long)
    for prompt, samples in found.items():
        for number, sampled in enumerate(samples):
            values = [len(sampled.ids), int(sampled.finished), *sampled.ids]
            table[prompt * answers + number, : len(values)] = torch.tensor(values)
    table = table.to(ranks.device)
    ranks.sum_tensors([table])
    rows = [Sampled(row[2 : 2 + row[0]], bool(row[1])) for row in table.tolist()]
    return [rows[first : first + answers] for first in range(0, len(rows), answers)]
