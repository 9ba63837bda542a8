"""The trainer on a CUDA device: the same numbers as on the CPU, both precisions, four bits. Minutes on one device."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.training import Lora
from plumbline_trainer.engine.attention import segment_attention
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.lowrank import in_one_piece
from plumbline_trainer.engine.packing import pack
from plumbline_trainer.engine.pathcheck import choose_path
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.segments import Block, KeptKeys, SegmentPlan
from plumbline_trainer.engine.varlen import takes
from plumbline_trainer.models.adapters import attach_lora
from support.encoded import make_completion, make_pair
from support.tiny import make_model
from support.trainer import manifest_of, run_in_process
from support.training_data import training_run
from torch import nn

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; `make test` runs these where there is one"
)

STYLES = ["llama", "qwen2", "gemma2", "gpt2"]


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """No TensorFloat-32: its 10 bits would hide a wrong mask."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def adapted(style: Any) -> Any:
    """A model whose adapter has left its start."""
    model = attach_lora(make_model(style, seed=1), Lora(rank=4), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return model


def some_rows() -> list[Any]:
    rng = random.Random(1)
    return [
        make_pair(rng, 20, 9, 5),
        make_completion(rng, 0, 30),
        make_pair(rng, 3, 1, 17),
        make_completion(rng, 40, 12, share=0.5),
    ]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("style", STYLES)
def test_fast_and_plain_agree(style: Any, precision: Any) -> None:
    model = adapted(style).to("cuda")
    scorer = Scorer(model, precision=precision)
    scorer.eval()
    choice = choose_path(scorer, some_rows(), scorer.trainables(), tokens=4096, ranks=Ranks(device="cuda"))
    assert choice.path == "fast", choice.reason


@pytest.mark.parametrize("window", [None, 16, 400])
@pytest.mark.parametrize("key_heads", [1, 2, 8])
def test_one_call_for_all_blocks(window: Any, key_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable-length kernel against float32, block by block: pairs, single answers, many answers, a past."""
    layer, keys, generator = nn.Linear(1, 1), KeptKeys(), torch.Generator("cuda").manual_seed(3)
    blocks = [
        Block(0, 130, (70, 40, 9)),
        Block(249, 0, (65,)),
        Block(314, 20, (33,)),
        Block(367, 5, (8, 1), past=range(7, 90)),
    ]
    plan = SegmentPlan(tuple(blocks), behind=keys)

    def draw(heads: int, length: int) -> torch.Tensor:
        return torch.randn(1, heads, length, 64, generator=generator, device="cuda")

    keys.keep(layer, draw(key_heads, 100), draw(key_heads, 100))
    given = [draw(heads, plan.length).requires_grad_() for heads in (8, key_heads, key_heads)]
    upstream = torch.randn(1, plan.length, 8, 64, generator=generator, device="cuda")
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [tensor.to(dtype) for tensor in given]
        assert takes(inputs[0], inputs[2]) == (dtype == torch.bfloat16)
        output, _ = segment_attention(layer, *inputs, None, segment_plan=plan, sliding_window=window, scaling=0.2)
        found.append([output.detach().float(), *torch.autograd.grad(output.float(), given, upstream)])
    for there, exact in zip(*found, strict=True):
        assert float((there - exact).norm()) <= 2e-2 * float(exact.norm())


def test_a_norm_in_one_kernel() -> None:
    scorer = Scorer(make_model("llama", seed=1).to("cuda", torch.bfloat16), precision="bfloat16")
    norm = scorer.model.model.norm
    x = torch.randn(7, norm.weight.shape[0], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    exact = torch.nn.functional.rms_norm(x.float(), norm.weight.shape, norm.weight.float(), norm.variance_epsilon)
    with in_one_piece(scorer.model):
        found = norm(x)
    assert found.grad_fn is not None
    assert "Rms" in type(found.grad_fn).__name__, found.grad_fn
    assert float((found - exact).norm()) <= 1e-2 * float(exact.norm())


@pytest.mark.parametrize("path", ["fast", "plain"])
@pytest.mark.parametrize("style", STYLES)
def test_scores_and_gradients_are_those_of_the_cpu(style: Any, path: Any) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = adapted(style).to(device)
        scores = Scorer(model, path=path)(pack(some_rows(), device))
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(scores.mean(), trained)
        found.append((scores.detach().cpu(), torch.cat([gradient.flatten().cpu() for gradient in gradients])))
    for there, here in zip(found[1], found[0], strict=True):
        assert float((there - here).norm()) <= 1e-4 * float(here.norm())


@pytest.mark.parametrize("type_", ["pretrain", "sft", "rewardModel", "dpo", "kto", "orpo", "rrhf", "awr"])
def test_a_stage_gives_the_numbers_of_the_cpu(tmp_path: Path, type_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {}
    for device in ("cuda", "cpu"):
        if device == "cpu":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        folder = tmp_path / device
        run = training_run(folder, type_, lora={"rank": 4}, globalBatch=8, epochs=2, learningRate=3e-3, evaluation=0.25)
        result, code = run_in_process(folder, run)
        assert code == 0, result.message
        losses[device] = manifest_of(run).metrics
    assert losses["cuda"]["plainPath"] == 0
    for name in ("loss", "evalLoss", "evalLossStart"):
        assert losses["cuda"][name] == pytest.approx(losses["cpu"][name], rel=1e-3), name


@pytest.mark.parametrize("lora", [{"rank": 4}, None])
@pytest.mark.parametrize("again", [False, True])
def test_bfloat16_learns(tmp_path: Path, lora: dict[str, int] | None, again: bool) -> None:
    run = training_run(tmp_path, "sft", lora=lora, globalBatch=4, epochs=4, learningRate=3e-3, evaluation=0.25)
    training = run.parameters["training"] | {"precision": "bfloat16", "gradientCheckpointing": again}
    run = run.model_copy(update={"parameters": run.parameters | {"training": training}})
    result, code = run_in_process(tmp_path, run)
    assert code == 0, result.message
    metrics = manifest_of(run).metrics
    assert metrics["plainPath"] == 0
    assert metrics["evalLoss"] < metrics["evalLossStart"]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes")
@pytest.mark.parametrize("type_", ["sft", "dpo", "rewardModel"])
def test_four_bits_learn(tmp_path: Path, type_: str) -> None:
    lora = {"rank": 4, "quantization": "nf4"}
    run = training_run(tmp_path, type_, lora=lora, globalBatch=4, epochs=4, learningRate=3e-3, evaluation=0.25)
    result, code = run_in_process(tmp_path, run)
    assert code == 0, result.message
    metrics = manifest_of(run).metrics
    assert metrics["evalLoss"] < metrics["evalLossStart"]


@pytest.mark.parametrize("type_", ["grpo", "ppo", "rloo"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_stage_that_samples_ends_well(tmp_path: Path, type_: str, precision: str) -> None:
    stage = {"rewards": [{"rule": "keywords", "keywords": ["a"]}], "rollout": {"maxNewTokens": 8}}
    run = training_run(tmp_path, type_, lora={"rank": 4}, stage=stage, globalBatch=4, maxSteps=2)
    training = run.parameters["training"] | {"precision": precision}
    run = run.model_copy(update={"parameters": run.parameters | {"training": training}})
    result, code = run_in_process(tmp_path, run)
    assert code == 0, result.message
