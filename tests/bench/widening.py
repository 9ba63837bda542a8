"""Linear layers that hold bfloat16 weights and widen them for each product, against layers that hold float32.

python -m tests.bench widening
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from bench.products import ROUNDS, SHAPES, copies_of, ratio
from plumbline_trainer.models.stored_linear import widened
from torch import Tensor

TOKENS = (1, 16, 64, 256, 512)
HELD = {name: shape for name, shape in SHAPES.items() if shape[0] < 10_000}
"""The head is not held so."""


def measure(tokens: Sequence[int] = TOKENS, rounds: int = ROUNDS) -> list[dict[str, str]]:
    """A row per number of tokens: how many times as fast as with float32 weights, per weight."""
    generator = torch.Generator().manual_seed(1)
    weights = {name: copies_of(torch.randn(shape, generator=generator)) for name, shape in HELD.items()}
    rows = []
    with torch.no_grad():
        for count in tokens:
            row = {"tokens": str(count)}
            for name, wide in weights.items():
                x = torch.randn(count, wide[0].shape[1], generator=generator)
                narrow = [weight.bfloat16() for weight in wide]
                row[name] = f"{ratio((partial(F.linear, x), wide), (partial(_product, x), narrow), rounds):.2f}×"
            rows.append(row)
    return rows


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, widened(weight, x))


def notes() -> list[str]:
    """What the table needs beside it."""
    return [f"Columns are weights [out, in]; activations are float32; {torch.get_num_threads()} threads."]
