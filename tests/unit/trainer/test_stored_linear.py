"""Frozen linear layers that hold bfloat16 weights beside float32 activations: the numbers of float32 weights, bit for bit."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.methods import TRAINING_STAGES
from plumbline_trainer.engine import trained
from plumbline_trainer.engine.packing import pack
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.models import stored_linear
from plumbline_trainer.models.dtypes import holds_stored, place_weights
from plumbline_trainer.models.policy import load_policy
from plumbline_trainer.stages import dpo, reward_model, sft
from support.adapted import KINDS, attach_and_move, lora_of
from support.encoded import make_pair
from support.tiny import STYLES, Style, make_model, save_model
from support.trainer import base_model, stage_context, stage_run
from support.training_data import training_run
from torch import nn

ROWS = [make_pair(random.Random(number), 12, 6, 9) for number in range(3)]
STAGES = {"dpo": dpo, "rewardModel": reward_model, "sft": sft}


def placed(style: Style, *, stored: bool, tie: bool = True) -> Any:
    model = make_model(style, seed=1, tie=tie).bfloat16()
    place_weights(model, "float32", "cpu", stored=stored)
    return model


def measure(model: Any, path: Any) -> list[torch.Tensor]:
    scorer = Scorer(model, path=path)
    scores = scorer(pack(ROWS))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [scores.detach(), *torch.autograd.grad(scores.square().sum(), learned, allow_unused=True)]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["fast", "plain"])
def test_scores_and_gradients_are_those_of_widened_weights(style: Style, kind: str, path: str) -> None:
    narrow, wide = (
        measure(attach_and_move(placed(style, stored=stored), lora_of(kind, style), 2, size=0.1), path)
        for stored in (True, False)
    )
    assert len(narrow) == len(wide) > 1
    for one, other in zip(narrow, wide, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("path", ["fast", "plain"])
def test_layers_without_an_adapter(path: str) -> None:
    narrow, wide = (
        measure(attach_and_move(placed("qwen2", stored=stored), lora_of("plain", targets=["q_proj"]), 2), path)
        for stored in (True, False)
    )
    assert all(torch.equal(one, other) for one, other in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("tie", [True, False])
def test_linear_layers_alone_stay_narrow(tie: bool) -> None:
    model = placed("llama", stored=True, tie=tie)
    for name, parameter in model.named_parameters():
        inside = "_proj." in name
        assert parameter.dtype == (torch.bfloat16 if inside else torch.float32), name
    before, after = (sum(p.numel() * p.element_size() for p in m.parameters()) for m in (make_model(tie=tie), model))
    linear = sum(module.weight.numel() for name, module in model.named_modules() if name.endswith("_proj"))
    assert before - after == 2 * linear


def test_what_is_trained_whole_is_widened() -> None:
    model = attach_and_move(placed("llama", stored=True), lora_of("plain", modulesToSave=["v_proj"]), 2)
    weight = model.model.layers[0].self_attn.v_proj.weight
    assert weight.requires_grad
    assert weight.dtype == torch.float32
    wide = attach_and_move(placed("llama", stored=False), lora_of("plain", modulesToSave=["v_proj"]), 2)
    assert all(torch.equal(a, b) for a, b in zip(measure(model, "fast"), measure(wide, "fast"), strict=True))


def test_a_copy_computes_with_its_own_weights() -> None:
    model = placed("llama", stored=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    x = torch.ones(1, 64)
    assert not other.model.layers[0].mlp.up_proj(x).any()
    assert model.model.layers[0].mlp.up_proj(x).any()


def test_bfloat16_activations_take_the_weights_as_they_are() -> None:
    layer = placed("llama", stored=True).model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x.bfloat16()), nn.functional.linear(x.bfloat16(), layer.weight))


def test_a_weight_that_its_model_reads_is_found() -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
    from transformers.models.mamba.modeling_mamba import MambaForCausalLM
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersDenseActDense

    assert "wo" in stored_linear._weights_read(SwitchTransformersDenseActDense)
    assert "lm_head" in stored_linear._weights_read(MambaForCausalLM)
    assert not stored_linear._weights_read(LlamaMLP) | stored_linear._weights_read(LlamaAttention)


def test_a_weight_that_its_model_reads_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_linear, "_weights_read", lambda _: frozenset({"down_proj"}))
    layer = placed("llama", stored=True).model.layers[0].mlp
    assert (layer.down_proj.weight.dtype, layer.up_proj.weight.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("type_", sorted(STAGES))
def test_a_stage_trains_the_same_adapter(type_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests, kinds = [], []
    for name, stored in (("narrow", True), ("wide", False)):
        if not stored:
            monkeypatch.setattr(trained, "holds_stored", lambda *_, **__: False)
        real = load_policy

        def seen(*arguments: Any, _real: Any = real, **named: Any) -> Any:
            policy = _real(*arguments, **named)
            kinds.append(policy.model.model.layers[0].mlp.up_proj.weight.dtype)
            return policy

        monkeypatch.setattr(trained, "load_policy", seen)
        run = training_run(tmp_path, type_, lora={"rank": 4}, dtype="bfloat16", globalBatch=4, maxSteps=3)
        output = STAGES[type_].run(stage_context(tmp_path / name, run))
        assert output is not None
        digests.append(((output.folder / "adapter_model.safetensors").read_bytes(), output.meta))
        monkeypatch.setattr(trained, "load_policy", real)
    assert kinds == [torch.bfloat16, torch.float32]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("type_", "fields", "device", "held"),
    [
        ("sft", {}, "cpu", True),
        ("kto", {"lora": {"dora": True}}, "cpu", True),
        ("sft", {}, "cuda", False),
        ("sft", {"training": {"precision": "bfloat16"}}, "cpu", False),
        ("sft", {"lora": None}, "cpu", False),
        ("sft", {"ewc": {"dataset": "old"}}, "cpu", False),
        ("grpo", {"rewards": [{"rule": "length"}]}, "cpu", False),
    ],
)
def test_who_holds_them(type_: str, fields: dict[str, Any], device: str, held: bool) -> None:
    rows = "prompts" if type_ == "grpo" else "dataset"
    parameters = TRAINING_STAGES[type_].model_validate(
        {rows: "d", "lora": {}, "training": {"precision": "float32"}, **fields}
    )
    assert holds_stored(parameters, device=device) is held


def test_float32_models_stay_as_they_are(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    run = stage_run(tmp_path, "sft", inputs=[base_model(folder.as_uri())])
    context = stage_context(tmp_path / "run", run)
    policy = load_policy(context, context.input("model"), precision="float32", device="cpu", stored=True)
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32}
