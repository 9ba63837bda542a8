"""Adapters merged for a rollout: the same function, and weights that nobody touched."""

from __future__ import annotations

import pytest
import torch
from plumbline_trainer.engine.lowrank import use_one_piece
from plumbline_trainer.models.adapters import adapters_disabled
from plumbline_trainer.rollout.merged import merged_adapters
from support import adapted, tiny

IDS = torch.tensor([[5, 9, 31, 44, 100, 7]])


def adapted_model(kind, style="llama", dtype=torch.float32):
    return adapted.attach_and_move(tiny.make_model(style, seed=1).to(dtype), adapted.lora_of(kind, style), 2, 0.2)


@torch.no_grad()
def logits_of(model):
    return model(IDS).logits


@pytest.mark.parametrize("style", tiny.STYLES)
@pytest.mark.parametrize("kind", adapted.KINDS)
def test_merged_layers_compute_the_same(kind, style):
    model = adapted_model(kind, style)
    expected = logits_of(model)
    with adapters_disabled(model):
        assert not torch.allclose(logits_of(model), expected, atol=1e-2)
    calls = []
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    layer.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
    with merged_adapters(model) as words:
        torch.testing.assert_close(logits_of(model), expected, atol=2e-5, rtol=1e-5)
    assert calls == []
    assert words == "adapter merged into a copy of the weights"
    logits_of(model)
    assert calls


def stopped_while_merged(model):
    with merged_adapters(model):
        logits_of(model)
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", adapted.KINDS)
@pytest.mark.parametrize("one_piece", [False, True])
def test_everything_is_as_before(kind, one_piece):
    model = adapted_model(kind)
    if one_piece:
        use_one_piece(model)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    graph = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        stopped_while_merged(model)
    for name, tensor in model.state_dict().items():
        place, kept = before[name]
        assert tensor.data_ptr() == place
        assert torch.equal(tensor, kept)
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == forwards
    assert [parameter.requires_grad for parameter in model.parameters()] == graph
    model(IDS).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


def test_narrow_weights_keep_their_adapter_apart_and_it_says_so():
    """A copy in bfloat16 would round a small delta away."""
    model = adapted_model("plain", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits_of(model)
        with merged_adapters(model) as words:
            assert torch.equal(logits_of(model), expected)
    assert words == "adapter computed beside the weights in 14 of 14 layers: their weights are bfloat16"


def test_a_base_of_another_kind_keeps_its_adapter_apart():
    """As a quantised one is: a subclass of the plain layer with weights of its own making."""

    class Other(torch.nn.Linear):
        pass

    model = adapted_model("plain")
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    layer.base_layer.__class__ = Other
    expected = logits_of(model)
    with merged_adapters(model) as words:
        torch.testing.assert_close(logits_of(model), expected, atol=2e-5, rtol=1e-5)
    assert words == "adapter computed beside the weights in 1 of 14 layers: their base is a Other"


def test_the_reference_is_sampled_without_the_adapter():
    model = adapted_model("plain")
    with adapters_disabled(model):
        expected = logits_of(model)
        with merged_adapters(model) as words:
            assert torch.equal(logits_of(model), expected)
    assert "switched off" in words


def test_a_model_without_adapter():
    with merged_adapters(tiny.make_model()) as words:
        assert words == "no adapter"
