"""Memory of a training rank, in bytes: pure arithmetic, an estimate.

Weights as they lie in memory, 16 per trained weight (float32 weight, gradient and two AdamW moments), copies that
penalties hold, activations of one micro-batch, and a constant for the runtime. Activations per token and block: about
10 hidden vectors, the attention's projections and 3 vectors of the feed-forward width; where they are computed again
in the backward pass, one hidden vector per block and one block in full. Blocks below the lowest one in which something
learns keep nothing. Logits are made in chunks and do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RUNTIME_BYTES = 800 * 2**20
USABLE = 0.9
"""Share of a device's memory that an estimate may fill: the rest is for what it does not know, and for fragments."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What activations depend on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_size: int


@dataclass(frozen=True, slots=True)
class Weights:
    """What a rank holds besides activations."""

    frozen: int
    """Bytes of the weights that are not trained."""
    trained: int
    """Number of weights that are."""
    blocks: int
    """Blocks from the lowest in which something learns to the top."""
    held: int = 0
    """Bytes of what penalties hold."""


def sizes_of(config: Any) -> Sizes:
    """From the text configuration of a model."""
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    return Sizes(
        layers=int(config.num_hidden_layers),
        hidden=hidden,
        intermediate=int(getattr(config, "intermediate_size", None) or 4 * hidden),
        heads=heads,
        key_value_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_size=int(getattr(config, "head_dim", None) or hidden // heads),
    )


def training_memory(sizes: Sizes, weights: Weights, *, tokens: int, width: int, recomputed: bool) -> int:
    """Bytes of a rank.

    Args:
        sizes: Of the model.
        weights: What it holds.
        tokens: Of the largest micro-batch.
        width: Bytes of a number among the activations.
        recomputed: Whether activations are computed again in the backward pass.
    """
    block = activations_per_block(sizes)
    per_token = sizes.hidden * weights.blocks + block if recomputed else block * weights.blocks
    return RUNTIME_BYTES + weights.frozen + 16 * weights.trained + weights.held + tokens * per_token * width


def activations_per_block(sizes: Sizes) -> int:
    """Numbers that a block keeps per token."""
    projections = (2 * sizes.heads + 2 * sizes.key_value_heads) * sizes.head_size
    return 10 * sizes.hidden + projections + 3 * sizes.intermediate


def fits(need: int, limit: int | None) -> bool:
    """Whether an estimate leaves room on a device; where nobody knows the device, it does."""
    return limit is None or need <= USABLE * limit


def shown_bytes(count: int) -> str:
    """Such as `1.6 GiB`."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
