"""Attention over packed blocks, plugged into any transformers model through its attention interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from plumbline_trainer.engine.joined import Piece, can_join, joined_attention
from plumbline_trainer.engine.segments import Block, Segment, SegmentPlan
from plumbline_trainer.engine.varlen import takes, varlen_attention

SEGMENTS = "plumbline_segments"
"""Name under which the attention is registered; transformers builds no mask of its own for it."""


WASTE_MAX = 22_000
"""Scores of a block that may be computed in vain before its segments are taken one by one; measured on a CPU, where
the further calls cost about as much as so many scores."""


class FastPathError(Exception):
    """The model asks for something that packed attention does not do; the caller goes the plain way and says so."""


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_plan: SegmentPlan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed sequence, block by block.

    Args:
        module: The attention layer.
        query: [1, heads, T, d].
        key: [1, key heads, T, d].
        value: [1, key heads, T, d].
        attention_mask: None; transformers makes none for this attention.
        segment_plan: Blocks of the packed sequence.
        scaling: Factor on the scores; None: 1/√d.
        dropout: Must be 0.
        sliding_window: A token sees at most so many tokens, itself included.
        softcap: Scores s become softcap·tanh(s/softcap).
        others: What the model hands to every attention; sinks and position biases are refused.

    Returns:
        [1, T, heads, d] and None for the attention weights.

    Raises:
        FastPathError: if the layer needs what is not done here.
    """
    if segment_plan is None:
        raise FastPathError(f"{type(module).__name__} does not pass the segment plan on to its attention")
    if attention_mask is not None:
        raise FastPathError(f"{type(module).__name__} brings an attention mask of its own")
    if dropout:
        raise FastPathError(f"{type(module).__name__} drops attention weights at random")
    unknown = [name for name in ("s_aux", "position_bias", "relative_position_bias") if others.get(name) is not None]
    if unknown or not getattr(module, "is_causal", True):
        raise FastPathError(f"{type(module).__name__} needs {', '.join(unknown) or 'attention in both directions'}")
    if segment_plan.length != query.shape[2]:
        raise FastPathError(f"{type(module).__name__} attends over a sequence of another length")
    if segment_plan.keeps is not None:
        segment_plan.keeps.keep(module, key, value)
    if softcap is None and segment_plan.behind is None and can_join(query, key, value):
        return joined_attention(query, key, value, _pieces(segment_plan, sliding_window, query), scaling), None
    if softcap is None and takes(query, value):
        found = varlen_attention(module, query, key, value, segment_plan, scaling=scaling, window=sliding_window)
        return found, None
    lengths = segment_plan.lengths
    outputs = [
        _attend(
            q,
            *_with_past(module, k, v, block, segment_plan),
            block,
            segment_plan,
            scaling=scaling,
            window=sliding_window,
            softcap=softcap,
        )
        for q, k, v, block in zip(
            torch.split(query, lengths, 2),
            torch.split(key, lengths, 2),
            torch.split(value, lengths, 2),
            segment_plan.blocks,
            strict=True,
        )
    ]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return joined, None


def _pieces(plan: SegmentPlan, window: int | None, query: Tensor) -> list[Piece]:
    """Who sees what in a sequence before which nothing stands."""
    found = []
    for block in plan.blocks:
        tokens = range(block.start, block.start + block.length)
        windowed = window is not None and window < block.length
        if not windowed and _goes_by_segment(block):
            found += [
                Piece(
                    queries=segment.queries,
                    keys=(segment.context, segment.queries) if segment.context else (segment.queries,),
                    mask=_segment_mask(plan, segment, query),
                )
                for segment in block.segments
                if segment.queries
            ]
        else:
            mask = None
            if windowed or not block.is_causal:
                mask = plan.mask(block, window=window if windowed else None, dtype=query.dtype, device=query.device)
            found.append(Piece(queries=tokens, keys=(tokens,), mask=mask))
    return found


def _goes_by_segment(block: Block) -> bool:
    return not block.is_causal and not block.past and wasted_scores(block) > WASTE_MAX


def _segment_mask(plan: SegmentPlan, segment: Segment, query: Tensor) -> Tensor | None:
    """Of a response behind its prompt: SDPA aligns a causal mask with the first key. None for what stands alone."""
    if not segment.context:
        return None
    size = len(segment.queries)
    part = Block(start=0, prompt=len(segment.context), responses=(size,))
    return plan.mask(part, window=None, dtype=query.dtype, device=query.device)[-size:]


def _with_past(module: nn.Module, key: Tensor, value: Tensor, block: Block, plan: SegmentPlan) -> tuple[Tensor, Tensor]:
    """A block's keys and values behind those of its past."""
    if not block.past:
        return key, value
    assert plan.behind is not None
    before, values_before = plan.behind.of(module, block.past)
    return torch.cat([before, key], 2), torch.cat([values_before, value], 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: Block,
    plan: SegmentPlan,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of one block: [1, heads, L, d] over [1, key heads, past + L, d] … → [1, L, heads, d]."""
    windowed = window is not None and window < len(block.past) + block.length
    if softcap is None and not windowed and _goes_by_segment(block):
        return _attend_by_segment(query, key, value, block, plan, scaling=scaling)
    mask: Tensor | None = None
    if softcap is not None or windowed or not block.is_causal:
        mask = plan.mask(block, window=window if windowed else None, dtype=query.dtype, device=query.device)
    if softcap is not None:
        return _softcapped(query, key, value, mask, scaling=scaling, softcap=softcap)
    return _fused(query, key, value, mask, scaling=scaling)


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float | None) -> Tensor:
    """Fused attention, causal where no mask is given: [1, heads, L, d] … → [1, L, heads, d]."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.device.type != "cpu" and mask is not None:
        # With a mask and grouped heads CUDA falls back to the unfused kernel; repeated heads keep the fused one.
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1
    )
    return output.transpose(1, 2)


def wasted_scores(block: Block) -> int:
    """Scores between different responses, or of prompt with responses, that one masked product computes in vain."""
    useful = block.prompt**2 + sum(length * (block.prompt + length) for length in block.responses)
    return block.length**2 - useful


def _attend_by_segment(
    query: Tensor, key: Tensor, value: Tensor, block: Block, plan: SegmentPlan, *, scaling: float | None
) -> Tensor:
    """The prompt by itself, then each response over the prompt and itself."""
    sizes = [block.prompt, *block.responses]
    queries, keys, values = (torch.split(tensor, sizes, 2) for tensor in (query, key, value))
    outputs = []
    for index, segment in enumerate(block.segments):
        if not segment.queries:
            continue
        k = torch.cat([keys[0], keys[index]], 2) if segment.context else keys[index]
        v = torch.cat([values[0], values[index]], 2) if segment.context else values[index]
        outputs.append(_fused(queries[index], k, v, _segment_mask(plan, segment, query), scaling=scaling))
    return torch.cat(outputs, dim=1)


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2)


def register() -> None:
    """Make the attention known to transformers; calling it again changes nothing."""
    AttentionInterface.register(SEGMENTS, segment_attention)


@contextmanager
def attention_of(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Run a model with another attention implementation for a while."""
    configs = _attention_configs(model)
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = implementation
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def choose_attention(model: PreTrainedModel, implementation: str) -> None:
    """Run a model with another attention implementation from now on."""
    for config in _attention_configs(model):
        config._attn_implementation = implementation


def _attention_configs(model: PreTrainedModel) -> list[Any]:
    """Every configuration object that a layer of the model asks for its attention implementation."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


def plain_implementation(model: PreTrainedModel) -> str:
    """The implementation of transformers that is right for a model without packing.

    SDPA cannot cap scores, so models that do need the eager one.
    """
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None or not getattr(model, "_supports_sdpa", False):
        return "eager"
    return "sdpa"
