"""Which token of a packed sequence attends to which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens: they see the context (the prompt) whole and themselves causally, nothing else."""

    queries: range
    context: range

    @property
    def positions(self) -> range:
        """Position of each token in the sequence it belongs to."""
        return range(len(self.context), len(self.context) + len(self.queries))


@dataclass(frozen=True, slots=True)
class Block:
    """The tokens of one row in a packed sequence: a prompt, then each response's tokens."""

    start: int
    prompt: int
    responses: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the block."""
        return self.prompt + sum(self.responses)

    @property
    def is_causal(self) -> bool:
        """Whether every token sees all tokens before it in the block."""
        return sum(1 for length in self.responses if length) <= 1

    @property
    def segments(self) -> Iterator[Segment]:
        """The prompt, then the responses."""
        prompt = range(self.start, self.start + self.prompt)
        yield Segment(queries=prompt, context=range(self.start, self.start))
        at = prompt.stop
        for length in self.responses:
            yield Segment(queries=range(at, at + length), context=prompt)
            at += length


@dataclass(frozen=True)
class SegmentPlan:
    """The blocks of a packed sequence, in order and without gaps. Blocks never see each other.

    Attention masks are derived from it and kept as long as the plan, because every layer asks for the same ones.
    """

    blocks: tuple[Block, ...]
    _masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each block."""
        return [block.length for block in self.blocks]

    @property
    def length(self) -> int:
        """Tokens of the packed sequence."""
        return sum(self.lengths)

    def positions(self) -> list[int]:
        """Position ids, [length]: each response goes on where its prompt ends."""
        return [position for block in self.blocks for segment in block.segments for position in segment.positions]

    def mask(self, block: Block, *, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Additive mask of a block, [length, length]: 0 where the row may see the column, else −inf.

        Args:
            block: Block of this plan.
            window: A token sees at most so many tokens, itself included; None: all before it.
            dtype: Floating-point type of the attention scores.
            device: Device of the attention scores.
        """
        key = (block.prompt, block.responses, window, dtype, device)
        found = self._masks.get(key)
        if found is None:
            found = self._masks[key] = visibility_mask(block, window).to(device=device, dtype=dtype)
        return found


def visibility_mask(block: Block, window: int | None = None) -> Tensor:
    """Additive float32 mask of one block on the CPU, [length, length]."""
    owner = torch.repeat_interleave(
        torch.arange(len(block.responses) + 1), torch.tensor([block.prompt, *block.responses])
    )  # 0 for prompt tokens, j + 1 for tokens of response j
    segments = list(block.segments)
    position = torch.tensor([p for segment in segments for p in segment.positions], dtype=torch.long)
    distance = position[:, None] - position[None, :]
    visible = (distance >= 0) & ((owner[None, :] == owner[:, None]) | (owner[None, :] == 0))
    if window is not None:
        visible &= distance < window
    return torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))
