"""Attention of all pieces in one node against PyTorch's own, piece by piece and as one masked product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from plumbline_trainer.engine import attention
from plumbline_trainer.engine.joined import Piece, can_join, joined_attention
from plumbline_trainer.engine.segments import Block, SegmentPlan
from torch import Tensor, nn


def tensors(length: int, heads: int = 4, key_heads: int = 2, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(1, heads, length, width), (1, key_heads, length, width), (1, key_heads, length, width)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def plan_of(*rows: tuple[int, tuple[int, ...]]) -> SegmentPlan:
    blocks, start = [], 0
    for prompt, responses in rows:
        blocks.append(Block(start=start, prompt=prompt, responses=responses))
        start += blocks[-1].length
    return SegmentPlan(tuple(blocks))


class Layer(nn.Module):
    is_causal = True


def result_of(plan: SegmentPlan, given: list[Tensor], **settings: Any) -> tuple[Tensor, list[Tensor]]:
    output, _ = attention.segment_attention(Layer(), *given, None, segment_plan=plan, **settings)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    return output.detach(), list(torch.autograd.grad(output, given, upstream))


rows = st.tuples(st.integers(0, 12), st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)).filter(
    lambda row: row[0] + sum(row[1]) > 0
)


@given(some=st.lists(rows, min_size=1, max_size=4), by_segment=st.booleans(), window=st.sampled_from([None, 3, 50]))
def test_the_same_as_piece_by_piece(
    some: list[tuple[int, tuple[int, ...]]], by_segment: bool, window: int | None
) -> None:
    plan = plan_of(*some)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "WASTE_MAX", -1 if by_segment else 10**9)
        found, gradients = result_of(plan, tensors(plan.length), sliding_window=window, scaling=0.3)
        patch.setattr(attention, "can_join", lambda *_: False)
        wanted, expected = result_of(plan, tensors(plan.length), sliding_window=window, scaling=0.3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_output_alone_is_kept_beside_what_goes_in() -> None:
    plan = plan_of((30, (20, 25)), (10, (15,)), (0, (12,)))
    given_, kept = tensors(plan.length), {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = attention.segment_attention(Layer(), *given_, None, segment_plan=plan)[0]
    inputs = sum(tensor.untyped_storage().nbytes() for tensor in given_)
    sums = 4 * 4 * plan.length
    assert sum(kept.values()) == inputs + output.untyped_storage().nbytes() + sums


def test_a_mask_of_its_own_is_a_masked_product() -> None:
    given_ = tensors(11)
    mask = torch.zeros(6, 11).masked_fill_(torch.rand(6, 11, generator=torch.Generator().manual_seed(3)) < 0.4, -1e9)
    pieces = [Piece(range(5), (range(5),), None), Piece(range(5, 11), (range(5), range(5, 11)), mask)]
    query, key, value = given_
    found = joined_attention(query, key, value, pieces, None)
    first = F.scaled_dot_product_attention(
        query[:, :, :5], key[:, :, :5], value[:, :, :5], is_causal=True, enable_gqa=True
    )
    rest = F.scaled_dot_product_attention(query[:, :, 5:], key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found, torch.cat([first, rest], 2).transpose(1, 2), rtol=0, atol=1e-6)


def test_what_the_kernel_does_not_take_goes_the_other_way() -> None:
    query, key, value = tensors(5)
    assert can_join(query, key, value)
    assert not can_join(query, key, torch.randn(1, 2, 5, 16))
    assert not can_join(query.bfloat16(), key.bfloat16(), value.bfloat16())
    with torch.no_grad():
        assert not can_join(query, key, value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_join(query, key, value)
