"""Label smoothing and the KL to the start, on both paths and in whole stages; trap 5 by its name."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.methods import Dpo, RewardModel, Sft
from plumbline_api.training import Lora, TrainingStage
from plumbline_trainer.engine.optimizer import named_trainables as trainables
from plumbline_trainer.engine.packing import pack
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.models.adapters import adapters_disabled, attach_lora
from pydantic import ValidationError
from safetensors.torch import load_file
from support.chains import train_by_hand
from support.encoded import make_completion
from support.ranks import run_ranks
from support.tiny import make_model
from support.trainer import base_model, manifest_of, output_folder, output_of, run_in_process
from support.training_data import training_run


def moved_model(style: Any) -> Any:
    """A model whose adapter has left its start."""
    model = attach_lora(make_model(style), Lora(rank=3), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in trainables(model).items():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("style", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_fast_and_plain_agree(style: Any, smoothing: float) -> None:
    model = moved_model(style)
    rng = random.Random(1)
    batch = pack([make_completion(rng, prompt, length, share=0.7) for prompt, length in ((4, 5), (0, 7), (9, 1))])
    found = {}
    for path in ("fast", "plain"):
        scores, divergences = Scorer(model, path=path).with_divergence(batch, smoothing)  # type: ignore[arg-type]
        alone = Scorer(model, path=path)(batch, smoothing)  # type: ignore[arg-type]
        assert torch.allclose(scores, alone, atol=1e-6)
        assert divergences.min().item() > 0
        loss = -scores.sum() + 0.7 * divergences.sum()
        gradients = torch.autograd.grad(loss, list(trainables(model).values()))
        found[path] = scores.detach(), divergences.detach(), torch.cat([g.flatten() for g in gradients])
    for fast, plain in zip(found["fast"], found["plain"], strict=True):
        assert float((fast - plain).norm()) <= 1e-4 * float(plain.norm())


def test_no_divergence_from_itself() -> None:
    model = moved_model("llama")
    batch = pack([make_completion(random.Random(1), 4, 5)])
    with adapters_disabled(model), torch.no_grad():
        _, divergences = Scorer(model).with_divergence(batch)
    assert float(divergences.abs().max()) < 1e-6


@pytest.mark.parametrize("style", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("lora", [True, False])
def test_a_reference_of_its_own(style: Any, lora: bool) -> None:
    """Fast and plain, and the definition; where all weights are trained, the head is among them."""
    model = moved_model(style) if lora else make_model(style, seed=4).requires_grad_(True)
    reference = Scorer(make_model(style, seed=7)).requires_grad_(False)
    rng = random.Random(1)
    rows = [make_completion(rng, prompt, length, share=0.7) for prompt, length in ((4, 5), (0, 7), (9, 1))]
    batch = pack(rows)
    found = {}
    for path in ("fast", "plain"):
        reference.path = path  # type: ignore[assignment]
        scores, divergences = Scorer(model, path=path).with_divergence(batch, 0.0, reference)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(-scores.sum() + 0.7 * divergences.sum(), list(trainables(model).values()))
        found[path] = scores.detach(), divergences.detach(), torch.cat([g.flatten() for g in gradients])
    for fast, plain in zip(found["fast"], found["plain"], strict=True):
        assert float((fast - plain).norm()) <= 1e-4 * float(plain.norm())
    row = rows[0]
    ids = torch.tensor([[*row.prompt, *row.responses[0].ids]])
    with torch.no_grad():
        p, q = (torch.log_softmax(one(input_ids=ids).logits[0].double(), 1) for one in (model, reference.model))
    wanted = (q.exp() * (q - p)).sum(1)[[len(row.prompt) - 1 + k for k, own in enumerate(row.responses[0].mask) if own]]
    torch.testing.assert_close(found["fast"][1][: len(wanted)].double(), wanted, rtol=1e-4, atol=1e-5)


SETTINGS: dict[str, Any] = {"lora": {"rank": 4}, "rows": 15, "globalBatch": 5, "epochs": 3, "learningRate": 1e-2}


def run_with(folder: Path, **stage: Any) -> dict[str, float]:
    run = training_run(folder, "sft", evaluation=0.2, stage=stage, **SETTINGS)
    result, code = run_in_process(folder, run)
    assert code == 0, result.message
    return dict(manifest_of(run).metrics)


def test_a_coefficient_keeps_the_policy_near_its_start(tmp_path: Path) -> None:
    weak = run_with(tmp_path / "weak", kl={"coefficient": 1e-6})
    strong = run_with(tmp_path / "strong", kl={"coefficient": 10.0})
    plain = run_with(tmp_path / "plain")
    assert strong["kl"] < 0.1 * weak["kl"]
    assert "kl" not in plain
    assert weak["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert strong["loss"] > plain["loss"]


@pytest.mark.parametrize("type_", ["orpo", "simpo", "cpo", "rrhf", "awr"])
def test_answers_are_held_near_the_start_too(tmp_path: Path, type_: str) -> None:
    """The mean is over tokens of all answers, however a step is cut, whatever the stage's own loss counts."""
    found = {}
    for name, coefficient, tokens in (("weak", 1e-6, 4096), ("strong", 30.0, 4096), ("cut", 30.0, 64)):
        folder = tmp_path / name
        run = training_run(folder, type_, stage={"kl": {"coefficient": coefficient}}, tokensPerBatch=tokens, **SETTINGS)
        result, code = run_in_process(folder, run)
        assert code == 0, result.message
        found[name] = manifest_of(run).metrics
    assert found["strong"]["kl"] < 0.3 * found["weak"]["kl"]
    assert found["cut"]["kl"] == pytest.approx(found["strong"]["kl"], rel=1e-2)
    assert found["cut"]["loss"] == pytest.approx(found["strong"]["loss"], rel=1e-3)


@pytest.mark.parametrize("lora", [{"rank": 4}, None])
def test_a_stage_stays_near_the_base_model_it_does_not_start_from(tmp_path: Path, lora: dict[str, int] | None) -> None:
    """After another stage, with an adapter and with all weights: the reference is in memory beside the policy."""
    found = {}
    for coefficient in (1e-6, 5.0):
        folder = tmp_path / f"{coefficient}"
        base = training_run(
            folder,
            "sft",
            evaluation=0.2,
            stage={"kl": {"coefficient": coefficient, "baseModel": True}},
            lora=lora,
            rows=15,
            globalBatch=5,
            epochs=3,
            learningRate=1e-2 if lora else 1e-3,
        )
        earlier = train_by_hand(folder, "earlier", base.inputs[0], seed=1, size=0.05)
        inputs = [output_of(earlier), base.inputs[1], base_model(base.inputs[0].uri or "", "kl.reference")]
        run = base.model_copy(update={"inputs": inputs})
        result, code = run_in_process(folder, run)
        assert code == 0, result.message
        found[coefficient] = dict(manifest_of(run).metrics)
    assert found[1e-6]["kl"] > 1e-3, "the stage starts away from its reference"
    assert found[5.0]["kl"] < 0.7 * found[1e-6]["kl"]


def test_smoothed_labels_train_but_do_not_evaluate(tmp_path: Path) -> None:
    smooth, plain = run_with(tmp_path / "smooth", labelSmoothing=0.3), run_with(tmp_path / "plain")
    assert smooth["evalLossStart"] == plain["evalLossStart"]
    assert smooth["loss"] > plain["loss"] + 0.1


def test_kl_needs_an_adapter_to_switch_off() -> None:
    with pytest.raises(ValidationError, match=r"set lora, name the policy .* or hold the weights with ewc"):
        Sft.model_validate({"dataset": "a", "kl": {}})
    for named in ({"reference": "other"}, {"baseModel": True}):
        Sft.model_validate({"dataset": "a", "kl": named})
        Sft.model_validate({"dataset": "a", "kl": named, "lora": {"modulesToSave": ["norm"]}})


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        (Sft, {"kl": {}, "lora": {"modulesToSave": ["norm"]}}, r"kl .* lora\.modulesToSave are trained beside it"),
        (Sft, {"kl": {"reference": "a", "baseModel": True}}, r"baseModel takes spec\.model; leave one of the two out"),
        (Sft, {"ewc": {"dataset": "b"}, "lora": {"dora": True}}, r"ewc .* lora\.dora .* Leave one of the two out"),
        (Sft, {"ewc": {"dataset": "b"}, "lora": {"quantization": "nf4"}}, r"ewc .* lora\.quantization leaves none"),
        (Sft, {"training": {"l2sp": 0.1}, "lora": {"dora": True}}, r"training\.l2sp .* lora\.dora"),
        (RewardModel, {"training": {"l2sp": 0.1}, "lora": {"dora": True}}, r"training\.l2sp .* lora\.dora"),
        (Dpo, {"lora": {"dropout": 0.1}}, r"lora\.dropout: 0\.1, but only pretrain and sft drop at random"),
        (RewardModel, {"lora": {"dropout": 0.1}}, r"lora\.dropout: 0\.1, but only pretrain and sft drop at random"),
    ],
)
def test_what_would_not_be_heard_is_refused(kind: type[TrainingStage], fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        kind.model_validate({"dataset": "a", **fields})


@pytest.mark.parametrize("type_", ["sft", "dpo"])
def test_trap_5_accumulation_by_token_and_by_example(tmp_path: Path, type_: str) -> None:
    """Four rows at once and one at a time are the same step, though rows differ in tokens: by token, or by pair."""
    found = []
    stage = {"kl": {"coefficient": 0.5}, "labelSmoothing": 0.1} if type_ == "sft" else {}
    for name, budget, processes in (("four", 4096, 1), ("one", 64, 1), ("two ranks", 64, 2), ("four ranks", 64, 4)):
        folder = tmp_path / name
        run = training_run(
            folder,
            type_,
            lora={"rank": 4},
            globalBatch=4,
            maxSteps=3,
            learningRate=1e-2,
            tokensPerBatch=budget,
            processes=processes,
            stage=stage,
        )
        run_ranks(folder, run)
        found.append((manifest_of(run).metrics, load_file(next(output_folder(run).glob("*.safetensors")))))
    metrics, weights = found[0]
    for other, others in found[1:]:
        for name in ("loss", "kl") if type_ == "sft" else ("loss", "rewardMargin"):
            assert other[name] == pytest.approx(metrics[name], rel=1e-4)
        gap = sum(float((tensor - others[name]).double().square().sum()) for name, tensor in weights.items())
        assert math.sqrt(gap) < 1e-4
