"""Linear layers over a few tokens, as decoding has them: the turned product of `rollout/narrow.py` against torch's own.

python -m tests.bench products
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

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
Product = Callable[[Tensor], Tensor]
"""Of some rows and a weight."""
Side = tuple[Product, Sequence[Tensor]]
"""A product and the weights that it takes."""


def measure(tokens: Sequence[int] = TOKENS, rounds: int = ROUNDS) -> list[dict[str, str]]:
    """A row per number of tokens: how many times as fast as `F.linear`, per weight; medians of alternating rounds."""
    generator = torch.Generator().manual_seed(1)
    weights = {name: copies_of(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    rows = []
    with torch.no_grad():
        for count in tokens:
            row = {"tokens": str(count)}
            for name, copies in weights.items():
                x = torch.randn(count, copies[0].shape[1], generator=generator)
                ours: Product = partial(narrow_linear, x, bias=None)
                row[name] = f"{ratio((partial(F.linear, x), copies), (ours, copies), rounds):.2f}×"
            rows.append(row)
    return rows


def copies_of(weight: Tensor) -> list[Tensor]:
    """As many of a float32 weight as no cache holds."""
    return [weight.clone() for _ in range(max(1, APART // (4 * weight.numel())))]


def ratio(theirs: Side, ours: Side, rounds: int) -> float:
    """Seconds of theirs over seconds of ours, a median; one product with every weight of a side in each round."""
    found = []
    for _ in range(rounds):
        seconds = [_timed(*side) for side in (theirs, ours)]
        found.append(seconds[0] / seconds[1])
    return statistics.median(found)


def _timed(product: Product, weights: Sequence[Tensor]) -> float:
    started = time.perf_counter()
    for weight in weights:
        product(weight)
    return time.perf_counter() - started


def notes() -> list[str]:
    """What the table needs beside it."""
    return [
        f"Columns are weights [out, in] in float32; {torch.get_num_threads()} threads. Where ours is 1.00× it is `F.linear` "
        "itself: for one token, and beyond the limits in `rollout/narrow.py`."
    ]
