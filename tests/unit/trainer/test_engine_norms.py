"""Norms in one node: the same bits forward, the same gradient, fewer tensors kept; others are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plumbline_trainer.engine.lowrank import in_one_piece
from plumbline_trainer.engine.norms import can_be_one, is_root_mean_square
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


def norm_of(width: int = 16, seed: int = 0) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(width, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(width, generator=torch.Generator().manual_seed(seed)))
    norm.weight.requires_grad_(False)
    return norm


def result_of(norm: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, int]:
    """Output, gradient of the input, and bytes kept for the backward pass."""
    x = x.detach().requires_grad_()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = norm(x)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    return y.detach(), gradient, sum(kept.values())


@pytest.mark.parametrize("shape", [(7, 16), (1, 5, 16), (2, 3, 4, 16)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_the_same_as_the_classs_own(shape: tuple[int, ...], scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x, upstream = scale * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    norm = norm_of()
    wanted, wanted_gradient, _ = result_of(norm, x, upstream)
    with in_one_piece(norm):
        found, gradient, _ = result_of(norm, x, upstream)
    assert torch.equal(found, wanted)
    exact = result_of(norm.double(), x.double(), upstream.double())[1]
    assert float((gradient - exact).norm() / exact.norm()) < 1e-6
    assert float((wanted_gradient - exact).norm() / exact.norm()) < 1e-6


def test_the_output_alone_is_kept() -> None:
    norm, x = norm_of(256), torch.randn(64, 256)
    with in_one_piece(norm):
        _, _, kept = result_of(norm, x, torch.ones_like(x))
    assert kept == 4 * (64 * 256 + 64 + 256), "output, a factor per token, the weight"


def test_a_weight_of_zero_cannot_be_divided_by() -> None:
    norm = norm_of()
    assert can_be_one(norm)
    with torch.no_grad():
        norm.weight[3] = 0.0
    assert not can_be_one(norm)


@pytest.mark.parametrize("how", ["trained", "bfloat16", "autocast"])
def test_what_it_is_not_made_for_takes_the_classs_own_way(how: str) -> None:
    norm = norm_of()
    norm.weight.requires_grad_(how == "trained")
    x = torch.randn(5, 16, dtype=torch.bfloat16 if how == "bfloat16" else torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        wanted = norm(x)
        with in_one_piece(norm):
            found = norm(x)
    assert torch.equal(found, wanted)
    assert "RootMeanSquare" not in type(found.grad_fn).__name__


@pytest.mark.parametrize("kind", [LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm])
def test_relatives_are_known(kind: Any) -> None:
    assert is_root_mean_square(kind.forward)


@pytest.mark.parametrize("kind", [Gemma2RMSNorm, nn.LayerNorm, nn.Linear, GPTNeoXForCausalLM])
def test_others_are_not(kind: Any) -> None:
    assert not is_root_mean_square(kind.forward)
