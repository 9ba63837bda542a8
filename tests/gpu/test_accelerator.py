"""The trainer on a CUDA device: the same numbers as on the CPU, both precisions, four bits. Minutes on one device."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.training import Lora
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.packing import pack
from plumbline_trainer.engine.pathcheck import choose_path
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.models.adapters import attach_lora
from support.encoded import make_completion, make_pair
from support.tiny import make_model
from support.trainer import manifest_of, run_in_process
from support.training_data import training_run

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
