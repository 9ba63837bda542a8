"""What the variable-length kernel is handed, with the kernel's arithmetic written out; `tests/gpu` runs the kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plumbline_trainer.engine import attention, varlen
from plumbline_trainer.engine.segments import Block, KeptKeys, SegmentPlan
from plumbline_trainer.engine.varlen import layout_of, runs_of
from torch import Tensor
from unit.trainer.test_engine_joined import Layer, plan_of, rows, tensors


def kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    most_queries: int,
    most_keys: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What PyTorch says of its kernel: of each sequence the last query sees the last key, the first ones go before."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert query_ends.dtype == key_ends.dtype == torch.int32
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    outputs = []
    for index in range(len(query_ends) - 1):
        q = query[query_ends[index] : query_ends[index + 1]]
        k, v = (tensor[key_ends[index] : key_ends[index + 1]] for tensor in (key, value))
        assert 0 < len(q) <= most_queries
        assert len(k) <= most_keys
        ahead = torch.arange(len(k))[None, :] - torch.arange(len(q))[:, None] - (len(k) - len(q))
        seen = ahead <= window_size[1]
        if window_size[0] >= 0:
            seen &= ahead >= -window_size[0]
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v))
    return torch.cat(outputs)


def result_of(plan: SegmentPlan, layer: Layer, inputs: list[Tensor], **settings: Any) -> tuple[Tensor, list[Tensor]]:
    output, weights = attention.segment_attention(layer, *inputs, None, segment_plan=plan, **settings)
    assert weights is None
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    return output.detach(), list(torch.autograd.grad(output, inputs, upstream))


def compare(plan: SegmentPlan, layer: Layer, **settings: Any) -> None:
    wanted, expected = result_of(plan, layer, tensors(plan.length), **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "can_join", lambda *_: False)
        patch.setattr(attention, "takes", lambda *_: True)
        patch.setattr(varlen, "varlen_attn", kernel)
        found, gradients = result_of(plan, layer, tensors(plan.length), **settings)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@given(some=st.lists(rows, min_size=1, max_size=4), window=st.sampled_from([None, 3, 50]))
def test_the_same_as_block_by_block(some: list[tuple[int, tuple[int, ...]]], window: int | None) -> None:
    compare(plan_of(*some), Layer(), sliding_window=window, scaling=0.3)


@given(some=st.lists(st.tuples(rows, st.integers(0, 7)), min_size=1, max_size=4), window=st.sampled_from([None, 2, 50]))
def test_keys_of_an_earlier_pass(some: list[tuple[tuple[int, tuple[int, ...]], int]], window: int | None) -> None:
    layer, keys, blocks, start = Layer(), KeptKeys(), [], 0
    _, key, value = tensors(13)
    keys.keep(layer, key, value)
    keys.close()
    for (prompt, responses), past in some:
        blocks.append(Block(start=start, prompt=prompt, responses=responses, past=range(4, 4 + past)))
        start += blocks[-1].length
    compare(SegmentPlan(tuple(blocks), behind=keys), layer, sliding_window=window)


def test_a_pair_is_two_runs() -> None:
    """Prompt and first answer are one sequence as they lie; only the prompt's keys are laid out again."""
    block = Block(start=5, prompt=3, responses=(2, 4))
    first, second = runs_of(block)
    assert (first.queries, first.keys) == (range(5, 10), (range(5, 10),))
    assert (second.queries, second.keys) == (range(10, 14), (range(5, 8), range(10, 14)))


def test_sequences_that_share_nothing_stay_as_they_lie() -> None:
    layout = layout_of(plan_of((3, (2,)), (0, (4,)), (5, ())), torch.device("cpu"))
    assert layout.keys is None
    assert layout.key_ends is not layout.query_ends
    assert layout.query_ends.tolist() == layout.key_ends.tolist() == [0, 5, 9, 14]


def test_a_layout_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SegmentPlan] = []
    real = varlen.layout_of
    monkeypatch.setattr(varlen, "layout_of", lambda plan, device: made.append(plan) or real(plan, device))
    monkeypatch.setattr(attention, "takes", lambda *_: True)
    monkeypatch.setattr(attention, "can_join", lambda *_: False)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    plan = plan_of((3, (2, 2)))
    for _ in range(3):
        attention.segment_attention(Layer(), *tensors(plan.length), None, segment_plan=plan)
    assert made == [plan]


def test_a_cpu_takes_other_ways() -> None:
    query, _, value = tensors(4)
    assert not varlen.takes(query.bfloat16(), value.bfloat16())
