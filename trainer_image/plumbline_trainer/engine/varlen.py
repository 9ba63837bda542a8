"""Attention of a whole packed sequence in one call of a variable-length kernel, on a GPU in half precision.

Block by block a layer takes a dozen small kernels per row, and launching them takes longer than running them. The
kernel takes sequences of queries, each over a sequence of keys of its own, and lets the last query see every key: a
response over its prompt's keys and its own is such a sequence. Keys that several responses share are laid out once for
each of them; no mask is made and no score is computed in vain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from plumbline_trainer.engine.segments import Block, SegmentPlan

WIDEST = 256
"""Largest width of a head that the kernel takes."""
OLDEST = (8, 0)
"""First compute capability that it runs on."""


@dataclass(frozen=True, slots=True)
class Run:
    """Queries that lie one behind the other, and the keys they see: the last of them all, each before it one less."""

    queries: range
    keys: tuple[range, ...]
    """Places in the packed sequence, in the order of their positions; the queries themselves come last."""
    past: range = range(0)
    """Places before those, in the sequence whose keys were kept."""

    @property
    def seen(self) -> int:
        """Keys of the run."""
        return len(self.past) + sum(len(part) for part in self.keys)


@dataclass(frozen=True)
class Layout:
    """Runs as the kernel takes them."""

    keys: Tensor | None
    """[K] index of each key in the packed sequence, those of kept keys behind its end. None: all, as they lie."""
    query_ends: Tensor
    """[runs + 1] int32, from 0."""
    key_ends: Tensor
    """[runs + 1] int32, from 0."""
    most_queries: int
    most_keys: int


def runs_of(block: Block) -> Iterator[Run]:
    """The runs of a block, in order: prompt and first response, then each further response behind the prompt."""
    prompt = range(block.start, block.start + block.prompt)
    at = prompt.stop
    first = True
    for length in filter(None, block.responses):
        own = range(at, at + length)
        if first:
            own = range(block.start, own.stop)
            yield Run(queries=own, keys=(own,), past=block.past)
        else:
            yield Run(queries=own, keys=(prompt, own), past=block.past)
        first, at = False, own.stop
    if first and prompt:
        yield Run(queries=prompt, keys=(prompt,), past=block.past)


def layout_of(plan: SegmentPlan, device: torch.device) -> Layout:
    """The runs of all blocks."""
    runs = [run for block in plan.blocks for run in runs_of(block)]
    length = plan.length
    apart = any(run.past or len(run.keys) > 1 for run in runs)
    places = [
        place
        for run in runs
        for part in (range(length + run.past.start, length + run.past.stop), *run.keys)
        for place in part
    ]
    return Layout(
        keys=torch.tensor(places, device=device) if apart else None,
        query_ends=_ends([len(run.queries) for run in runs], device),
        # Also where it says the same it is another tensor: for one and the same PyTorch takes cuDNN, which makes a plan
        # for every new length, and that takes longer than a step.
        key_ends=_ends([run.seen for run in runs], device),
        most_queries=max(len(run.queries) for run in runs),
        most_keys=max(run.seen for run in runs),
    )


def _ends(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)


def takes(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes such tensors, [1, heads, T, d] each, in the type that autocast gives them."""
    return (
        query.device.type == "cuda"
        and computed_in(query) in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] <= WIDEST
        and query.shape[-1] % 8 == 0
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device) >= OLDEST
    )


def computed_in(query: Tensor) -> torch.dtype:
    """The type in which attention computes: autocast's where it is on, as with PyTorch's own attention."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SegmentPlan,
    *,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attention of a packed sequence.

    Args:
        module: The attention layer.
        query: [1, heads, T, d].
        key: [1, key heads, T, d].
        value: [1, key heads, T, d].
        plan: Blocks of the sequence.
        scaling: Factor on the scores; None: 1/√d.
        window: A token sees at most so many tokens, itself included; None: all before it.

    Returns:
        [1, T, heads, d].
    """
    layout = plan.derived((layout_of, query.device), lambda: layout_of(plan, query.device))
    if plan.behind is not None and any(block.past for block in plan.blocks):
        before, values_before = plan.behind.whole(module)
        key, value = torch.cat([key, before.to(key.dtype)], 2), torch.cat([value, values_before.to(value.dtype)], 2)
    dtype = computed_in(query)
    q, k, v = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    if layout.keys is not None:
        k, v = k.index_select(0, layout.keys), v.index_select(0, layout.keys)
    output = varlen_attn(
        q,
        k,
        v,
        layout.query_ends,
        layout.key_ends,
        layout.most_queries,
        layout.most_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]
