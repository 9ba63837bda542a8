"""Attention of all pieces of a packed sequence as one node, on a CPU.

Piece by piece, autograd keeps every piece's output, the keys that a response shares with its prompt once more, and the
layer behind keeps the outputs joined. Here each output is written to its place in the joined one, and that alone is
kept; keys and values are put together again in the backward pass. The kernel is the one that PyTorch's attention takes
on a CPU, whose two halves have names of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


@dataclass(frozen=True)
class Piece:
    """Tokens that attend together."""

    queries: range
    keys: tuple[range, ...]
    """What they see, the tokens themselves last."""
    mask: Tensor | None
    """[queries, keys], added to the scores; None where a token sees all keys up to its own place."""


def can_join(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes these and there is a backward pass to keep something for."""
    return (
        torch.is_grad_enabled()
        and query.requires_grad
        and query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.float32
        and query.shape[-1] == value.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and hasattr(torch.ops.aten, FORWARD)
        and hasattr(torch.ops.aten, BACKWARD)
    )


def joined_attention(
    query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[Piece], scaling: float | None
) -> Tensor:
    """Attention of pieces that tile the sequence in order.

    Args:
        query: [1, heads, T, d].
        key: [1, key heads, T, d].
        value: [1, key heads, T, d].
        pieces: Who sees what.
        scaling: Factor on the scores; None: 1/√d.

    Returns:
        [1, T, heads, d].
    """
    result = _Joined.apply(query, key, value, tuple(pieces), scaling)
    assert isinstance(result, Tensor)
    return result


def _part(tensor: Tensor, places: Sequence[range]) -> Tensor:
    """Some places of [1, heads, T, d], one behind the other."""
    parts = [tensor[:, :, place.start : place.stop] for place in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, pieces: tuple[Piece, ...], scaling: float | None
    ) -> Tensor:
        kernel = getattr(torch.ops.aten, FORWARD)
        _, heads, length, width = query.shape
        joined = query.new_empty(1, length, heads, width)
        sums = []
        for piece in pieces:
            q, k, v = _part(query, [piece.queries]), _part(key, piece.keys), _part(value, piece.keys)
            output, logs = kernel(q, k, v, 0.0, piece.mask is None, attn_mask=piece.mask, scale=scaling)
            joined[:, piece.queries.start : piece.queries.stop] = output.transpose(1, 2)
            sums.append(logs)
        ctx.save_for_backward(query, key, value, joined, *sums)
        ctx.pieces, ctx.scaling = pieces, scaling
        return joined

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        kernel = getattr(torch.ops.aten, BACKWARD)
        query, key, value, joined, *sums = ctx.saved_tensors
        gradient, output = upstream[0].transpose(1, 2), joined.transpose(1, 2)
        to_query, to_key, to_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for piece, logs in zip(ctx.pieces, sums, strict=True):
            own = [piece.queries]
            q, k, v = _part(query, own), _part(key, piece.keys), _part(value, piece.keys)
            found = kernel(
                _part(gradient, own),
                q,
                k,
                v,
                _part(output, own),
                logs,
                0.0,
                piece.mask is None,
                attn_mask=piece.mask,
                scale=ctx.scaling,
            )
            to_query[:, :, piece.queries.start : piece.queries.stop] = found[0]
            sizes = [len(place) for place in piece.keys]
            for total, parts in ((to_key, found[1]), (to_value, found[2])):
                for place, part in zip(piece.keys, torch.split(parts, sizes, dim=2), strict=True):
                    total[:, :, place.start : place.stop] += part
        return to_query, to_key, to_value, None, None
