"""Linear layers over a few tokens, as decoding has them: the turned product of `rollout/narrow.py` against torch's own.

python -m tests.bench products
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from plumbline_trainer.rollout.narrow import narrow_linear
from torch import Tensor

SHAPES = {
    "[576, 576]": (576, 576),
    "[1536, 576]": (1536, 576),
    "[576, 1536]": (576, 1536),
    "[49152, 576]": (49152, 576),
}
"""Weights [out, in] of SmolLM2-135M, the last one its head."""
TOKENS = (1, 2, 3, 4, 6, 8, 16, 32, 64, 128)
APART = 128 * 2**20
"""Bytes of weights that one timing goes through: copies that no cache holds, as a step of decoding goes through all layers."""
ROUNDS = 15


def measure(tokens: Sequence[int] = TOKENS, rounds: int = ROUNDS) -> list[dict[str, str]]:
    """A row per number of tokens: how many times as fast as `F.linear`, per weight; medians of alternating rounds."""
    generator = torch.Generator().manual_seed(1)
    weights = {name: _copies(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    rows = []
    with torch.no_grad():
        for count in tokens:
            row = {"tokens": str(count)}
            for name, copies in weights.items():
                x = torch.randn(count, copies[0].shape[1], generator=generator)
                row[name] = f"{ratio(x, copies, rounds):.2f}×"
            rows.append(row)
    return rows


def _copies(weight: Tensor) -> list[Tensor]:
    return [weight.clone() for _ in range(max(1, APART // (4 * weight.numel())))]


def ratio(x: Tensor, copies: Sequence[Tensor], rounds: int) -> float:
    """Seconds of `F.linear` over seconds of ours, one product with every copy of a weight."""
    sides: list[Callable[[Tensor], Tensor]] = [lambda weight: F.linear(x, weight), lambda w: narrow_linear(x, w, None)]
    found = []
    for _ in range(rounds):
        seconds = [_timed(side, copies) for side in sides]
        found.append(seconds[0] / seconds[1])
    return statistics.median(found)


def _timed(side: Callable[[Tensor], Tensor], copies: Sequence[Tensor]) -> float:
    started = time.perf_counter()
    for weight in copies:
        side(weight)
    return time.perf_counter() - started


def notes() -> list[str]:
    """What the table needs beside it."""
    return [
        f"Columns are weights [out, in] in float32; {torch.get_num_threads()} threads. Where ours is 1.00× it is `F.linear` "
        "itself: for one token, and beyond the limits in `rollout/narrow.py`."
    ]
