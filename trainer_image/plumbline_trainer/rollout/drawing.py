"""Drawing tokens: one uniform number each, keyed by what it is for, put through the inverse distribution function."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_BLOCK = 256
"""Tokens of the vocabulary that are summed together before the one that is drawn is looked for."""
_CPU_NUMBERS = 100_000
"""At a time, so that they stay in a core's cache from one operation to the next: two rows of a vocabulary of 50,000."""


def uniform_draws(seed: int, row_id: str, count: int, answer: int = 0) -> np.ndarray:
    """Numbers in [0, 1) for the steps of one answer: a function of seed, row and number of the answer.

    A larger count begins with what a smaller one gives.
    """
    # The first answer has the key that evaluation has always had; the others' keys begin differently.
    key = f"generate/{seed}/{row_id}" if answer == 0 else f"answer/{answer}/{seed}/{row_id}"
    raw = np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big")).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(logits: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """Take the first token whose cumulated probability is above its uniform number.

    The sums are float64. Blocks are summed first and only the one that is hit is cumulated token by token: a row's
    result does not depend on the other rows.

    Args:
        logits: [B, V].
        temperature: probabilities are softmax(logits/temperature); above 0.
        uniforms: [B] float64 in [0, 1).

    Returns:
        [B] ids.
    """
    rows, vocabulary = logits.shape
    at_once = max(1, _CPU_NUMBERS // vocabulary)
    if logits.device.type == "cpu" and rows > at_once:
        parts = [slice(first, first + at_once) for first in range(0, rows, at_once)]
        return torch.cat([draw(logits[part], temperature, uniforms[part]) for part in parts])
    scaled = logits.double()
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)).div_(temperature).exp_()
    blocks = -(-vocabulary // _BLOCK)
    if blocks * _BLOCK > vocabulary:
        scaled = torch.nn.functional.pad(scaled, (0, blocks * _BLOCK - vocabulary))
    weights = scaled.view(rows, blocks, _BLOCK)
    cumulated = weights.sum(dim=-1).cumsum(dim=-1)
    wanted = uniforms[:, None] * cumulated[:, -1:]
    block = _first_above(cumulated, wanted)
    before = torch.where(block > 0, cumulated.gather(1, (block - 1).clamp(min=0)), torch.zeros_like(wanted))
    within = weights[torch.arange(rows, device=logits.device), block[:, 0]].cumsum(dim=-1)
    return (block * _BLOCK + _first_above(within, wanted - before)).flatten()


def _first_above(sums: Tensor, wanted: Tensor) -> Tensor:
    """[B, 1] places of the first sum above what is wanted; where rounding leaves none, of the last that grows."""
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(sums, wanted, right=True), last)
