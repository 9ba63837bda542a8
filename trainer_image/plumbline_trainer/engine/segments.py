"""Which token of a packed sequence attends to which."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Derived = TypeVar("Derived")


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens: they see the context (the prompt) whole and themselves causally, nothing else."""

    queries: range
    context: range
    past: int = 0
    """Tokens before the context that another pass has computed."""

    @property
    def positions(self) -> range:
        """Position of each token in the sequence it belongs to."""
        start = self.past + len(self.context)
        return range(start, start + len(self.queries))


@dataclass(frozen=True, slots=True)
class Block:
    """The tokens of one row in a packed sequence: a prompt, then each response's tokens."""

    start: int
    prompt: int
    responses: tuple[int, ...]
    past: range = range(0)
    """Where, in a packed sequence whose keys were kept, the tokens lie that stand before the block and that it sees."""

    @property
    def length(self) -> int:
        """Tokens of the block."""
        return self.prompt + sum(self.responses)

    @property
    def is_causal(self) -> bool:
        """Whether every token sees all tokens before it in the block, and nothing else."""
        return sum(1 for length in self.responses if length) <= 1 and not self.past

    @property
    def segments(self) -> Iterator[Segment]:
        """The prompt, then the responses."""
        prompt = range(self.start, self.start + self.prompt)
        yield Segment(queries=prompt, context=range(self.start, self.start), past=len(self.past))
        at = prompt.stop
        for length in self.responses:
            yield Segment(queries=range(at, at + length), context=prompt, past=len(self.past))
            at += length


class KeptKeys:
    """Keys and values of a packed sequence, layer by layer, for tokens of a later pass that stand behind some of it.

    They carry no gradient, and are those that the backward pass of attention holds anyway.
    """

    def __init__(self) -> None:
        self._layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._open, self._twice = True, False

    @property
    def usable(self) -> bool:
        """Whether every layer that attends has left its keys, once."""
        return bool(self._layers) and not self._twice

    def keep(self, layer: nn.Module, key: Tensor, value: Tensor) -> None:
        """Keep what a layer attends over, [1, key heads, T, d] each, unless the pass is over."""
        if self._open:
            self._twice |= layer in self._layers
            self._layers[layer] = key.detach(), value.detach()

    def close(self) -> None:
        """The pass is over: layers that run again in the backward pass leave nothing."""
        self._open = False

    def of(self, layer: nn.Module, place: range) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer at some places."""
        key, value = self.whole(layer)
        return key[:, :, place.start : place.stop], value[:, :, place.start : place.stop]

    def whole(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [1, key heads, T, d] each."""
        return self._layers[layer]

    def forget(self) -> None:
        """Let go of everything."""
        self._layers.clear()


@dataclass(frozen=True)
class SegmentPlan:
    """The blocks of a packed sequence, in order and without gaps. Blocks never see each other.

    What attention derives from it is kept as long as the plan, because every layer asks for the same.
    """

    blocks: tuple[Block, ...]
    keeps: KeptKeys | None = field(default=None, compare=False)
    """Where every layer leaves its keys."""
    behind: KeptKeys | None = field(default=None, compare=False)
    """Keys of what stands before the blocks that have a past."""
    _derived: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

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
        """Additive mask of a block, [length, past + length]: 0 where the row may see the column, else −inf.

        Args:
            block: Block of this plan.
            window: A token sees at most so many tokens, itself included; None: all before it.
            dtype: Floating-point type of the attention scores.
            device: Device of the attention scores.
        """
        key = (len(block.past), block.prompt, block.responses, window, dtype, device)
        return self.derived(key, lambda: visibility_mask(block, window).to(device=device, dtype=dtype))

    def derived(self, key: Hashable, make: Callable[[], Derived]) -> Derived:
        """What a key stands for, made when it is first asked for."""
        if key not in self._derived:
            self._derived[key] = make()
        found: Derived = self._derived[key]
        return found


def visibility_mask(block: Block, window: int | None = None) -> Tensor:
    """Additive float32 mask of one block on the CPU, [length, past + length]."""
    past = len(block.past)
    owner = torch.repeat_interleave(
        torch.arange(len(block.responses) + 1), torch.tensor([block.prompt, *block.responses])
    )  # 0 for prompt tokens, j + 1 for tokens of response j
    segments = list(block.segments)
    position = torch.tensor([p for segment in segments for p in segment.positions], dtype=torch.long)
    # What is past stands before the prompt and is seen like it.
    columns = torch.cat([torch.arange(past), position])
    owners = torch.cat([torch.zeros(past, dtype=owner.dtype), owner])
    distance = position[:, None] - columns[None, :]
    visible = (distance >= 0) & ((owners[None, :] == owner[:, None]) | (owners[None, :] == 0))
    if window is not None:
        visible &= distance < window
    return torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))
