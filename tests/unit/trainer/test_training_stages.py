"""Pretrain, sft and dpo as stages: what they write, what they report, what does not change their numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.stagerun import StageRun
from plumbline_trainer.engine import objective
from plumbline_trainer.stages import dpo as dpo_stage
from safetensors.torch import load_file
from support.ranks import run_ranks
from support.trainer import base_model, manifest_of, output_folder, output_of, run_in_process, stage_context
from support.training_data import training_run

LORA = {"rank": 4}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights_of(run: StageRun) -> dict[str, torch.Tensor]:
    return load_file(next(output_folder(run).glob("*.safetensors")))


def succeed(folder: Path, run: StageRun) -> dict[str, float]:
    result, code = run_in_process(folder, run)
    assert code == 0, result.message
    assert result.last_step == result.metrics["steps"]
    assert len(result.metrics) <= 20
    return dict(manifest_of(run).metrics)


def curve(run: StageRun, folder: Path) -> list[dict[str, Any]]:
    """Figures by step, as the progress reporter keeps them."""
    lines = (folder / "scratch" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("type_", ["pretrain", "sft", "dpo"])
@pytest.mark.parametrize("lora", [LORA, None])
def test_a_stage_learns_and_writes_a_policy(tmp_path: Path, type_: str, lora: dict[str, Any] | None) -> None:
    run = training_run(
        tmp_path, type_, lora=lora, evaluation=0.25, globalBatch=4, epochs=4, learningRate=3e-3, tokensPerBatch=256
    )
    metrics = succeed(tmp_path, run)
    assert metrics["evalLoss"] < metrics["evalLossStart"]
    assert metrics["plainPath"] == 0
    manifest = manifest_of(run)
    assert manifest.meta["form"] == ("adapter" if lora else "full")
    names = {file.path for file in manifest.files}
    assert names >= (
        {"adapter_config.json", "adapter_model.safetensors"} if lora else {"config.json", "tokenizer.json"}
    )
    if type_ == "dpo":
        assert metrics["evalLossStart"] == pytest.approx(math.log(2), abs=1e-5)
        assert metrics["rewardAccuracy"] > 0.5


SAVED = ["embed_tokens", "lm_head", "norm"]


@pytest.mark.parametrize("type_", ["sft", "dpo"])
@pytest.mark.parametrize("kind", [{"rsLora": True}, {"dora": True}, {"dora": True, "modulesToSave": SAVED}])
def test_every_kind_of_adapter_learns_on_the_fast_path(tmp_path: Path, type_: str, kind: dict[str, Any]) -> None:
    run = training_run(
        tmp_path, type_, lora=LORA | kind, evaluation=0.25, globalBatch=4, epochs=3, learningRate=3e-3, style="qwen2"
    )
    metrics = succeed(tmp_path, run)
    assert metrics["evalLoss"] < metrics["evalLossStart"]
    assert metrics["plainPath"] == 0
    if type_ == "dpo":  # The reference is the model with adapter and saved modules off.
        assert metrics["evalLossStart"] == pytest.approx(math.log(2), abs=1e-5)
    again = training_run(tmp_path, "sft", lora=LORA, evaluation=0.25, globalBatch=4, seed=4, style="qwen2")
    again = again.model_copy(update={"inputs": [output_of(run), again.inputs[1]], "fingerprint": "f" * 64})
    second = succeed(tmp_path / "again", again)
    if type_ == "sft":
        assert second["evalLossStart"] == pytest.approx(metrics["evalLoss"], rel=1e-5)


@pytest.mark.parametrize("lora", [LORA, None])
def test_frozen_layers_stay(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    frozen = {"freeze": {"layers": 1, "modules": ["embed_tokens", "layers.1.mlp"]}}
    run = training_run(tmp_path, "sft", lora=lora, stage=frozen, globalBatch=4, learningRate=3e-3)
    succeed(tmp_path, run)
    written = weights_of(run)
    if lora is not None:
        assert {name.split("layers.")[1].split(".lora_")[0] for name in written} == {
            f"1.self_attn.{name}_proj" for name in "qkvo"
        }
        return
    before = load_file(tmp_path / "model-llama-float32" / "model.safetensors")
    moved = {name for name in written if not torch.equal(written[name], before[name])}
    assert moved == {
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        *(f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"),
    }


def test_the_next_stage_starts_from_the_merged_adapter(tmp_path: Path) -> None:
    sft = training_run(tmp_path, "sft", lora=LORA, evaluation=0.3, globalBatch=4, learningRate=1e-2, epochs=2)
    first = succeed(tmp_path, sft)
    again = training_run(tmp_path, "sft", lora=LORA, evaluation=0.3, globalBatch=4, seed=4)
    again = again.model_copy(update={"inputs": [output_of(sft), again.inputs[1]], "fingerprint": "f" * 64})
    second = succeed(tmp_path, again)
    assert second["evalLossStart"] == pytest.approx(first["evalLoss"], rel=1e-5)


@pytest.mark.parametrize(("type_", "lora"), [("sft", LORA), ("sft", None), ("dpo", LORA), ("pretrain", LORA)])
def test_accumulation_does_not_change_the_result(tmp_path: Path, type_: str, lora: dict[str, Any] | None) -> None:
    """One micro-batch per step, or one row each: the same losses and weights to 1e-5 in float32."""
    results = []
    for budget in (4096, 64):
        folder = tmp_path / str(budget)
        run = training_run(
            folder, type_, lora=lora, globalBatch=8, maxSteps=3, epochs=9, learningRate=1e-3, tokensPerBatch=budget
        )
        metrics = succeed(folder, run)
        results.append((metrics, weights_of(run), curve(run, folder)))
    (one, weights, steps), (other, others, again) = results
    assert one["tokens"] == other["tokens"]
    for first, second in zip(steps, again, strict=True):
        assert first["metrics"]["loss"] == pytest.approx(second["metrics"]["loss"], rel=1e-5)
        assert first["metrics"]["gradientNorm"] == pytest.approx(second["metrics"]["gradientNorm"], rel=1e-4)
    assert_close(weights, others)


def assert_close(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    assert weights.keys() == others.keys()
    total = sum(float(tensor.double().square().sum()) for tensor in weights.values())
    gap = sum(float((weights[name] - others[name]).double().square().sum()) for name in weights)
    assert math.sqrt(gap / total) <= rtol


@pytest.mark.parametrize(("type_", "lora"), [("sft", LORA), ("dpo", LORA), ("sft", None)])
def test_two_ranks_do_not_change_the_result(tmp_path: Path, type_: str, lora: dict[str, Any] | None) -> None:
    results = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run = training_run(
            folder,
            type_,
            lora=lora,
            rows=15,
            evaluation=0.2,
            globalBatch=5,
            epochs=2,
            learningRate=1e-3,
            tokensPerBatch=128,
            processes=processes,
        )
        run_ranks(folder, run)
        results.append((manifest_of(run).metrics, weights_of(run)))
    (one, weights), (other, others) = results
    for name in ("loss", "evalLoss", "evalLossStart", "gradientNorm"):
        assert one[name] == pytest.approx(other[name], rel=1e-4 if name == "gradientNorm" else 1e-5)
    assert one["tokens"] == other["tokens"]
    assert_close(weights, others)


def test_more_ranks_than_rows_in_a_step(tmp_path: Path) -> None:
    """Ranks without a row run dummies of weight zero."""
    results = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run = training_run(folder, "dpo", lora=LORA, rows=3, globalBatch=1, learningRate=1e-3, processes=processes)
        run_ranks(folder, run)
        results.append((manifest_of(run).metrics["loss"], weights_of(run)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert_close(results[0][1], results[1][1])


def test_adapter_dropout_is_keyed_and_off_in_evaluation(tmp_path: Path) -> None:
    def run_with(name: str, dropout: float) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        folder = tmp_path / name
        run = training_run(
            folder,
            "sft",
            lora={"rank": 4, "dropout": dropout},
            evaluation=0.3,
            globalBatch=4,
            maxSteps=3,
            learningRate=1e-2,
        )
        return succeed(folder, run), weights_of(run)

    (one, weights), (two, again), (none, without) = run_with("a", 0.5), run_with("b", 0.5), run_with("c", 0.0)
    assert all(torch.equal(weights[name], again[name]) for name in weights), "the same seed drops the same"
    assert any(not torch.equal(weights[name], without[name]) for name in weights)
    assert one["evalLossStart"] == two["evalLossStart"] == none["evalLossStart"]


def test_dpo_never_drops_at_random(tmp_path: Path) -> None:
    results = []
    for dropout in (0.0, 0.5):
        folder = tmp_path / str(dropout)
        run = training_run(
            folder, "dpo", lora={"rank": 4, "dropout": dropout}, globalBatch=4, maxSteps=3, learningRate=1e-2
        )
        succeed(folder, run)
        results.append(weights_of(run))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_another_seed_gives_another_order_and_other_weights(tmp_path: Path) -> None:
    results = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        run = training_run(folder, "sft", lora=LORA, seed=seed, globalBatch=4, maxSteps=3)
        succeed(folder, run)
        results.append(weights_of(run))
    assert any(not torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_dpo_against_a_named_reference(tmp_path: Path) -> None:
    """Its own start as the named reference gives what the adapter switched off gives."""
    plain = training_run(tmp_path, "dpo", lora=LORA, globalBatch=4, maxSteps=3, learningRate=1e-3)
    succeed(tmp_path, plain)
    named = plain.model_copy(
        update={"inputs": [*plain.inputs, base_model(str(plain.inputs[0].uri), "reference")], "fingerprint": "e" * 64}
    )
    metrics = succeed(tmp_path, named)
    assert metrics["loss"] == pytest.approx(manifest_of(plain).metrics["loss"], rel=1e-5)

    other = training_run(tmp_path, "sft", lora=LORA, globalBatch=4, learningRate=1e-2)
    succeed(tmp_path, other)
    third = plain.model_copy(update={"inputs": [*plain.inputs, output_of(other, "reference")], "fingerprint": "d" * 64})
    assert abs(succeed(tmp_path, third)["rewardMargin"] - metrics["rewardMargin"]) > 1e-3


def test_a_reference_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    from support.tiny import save_model

    run = training_run(tmp_path, "dpo", lora=LORA, globalBatch=4, maxSteps=1)
    other = save_model(tmp_path / "other", template=False)
    run = run.model_copy(update={"inputs": [*run.inputs, base_model(f"file://{other}", "reference")]})
    result, code = run_in_process(tmp_path, run)
    assert code == 2
    assert "tokenizers" in result.message


def test_references_are_taken_from_storage_and_come_out_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plumbline_trainer.engine import reference_pass

    run = training_run(tmp_path, "dpo", lora=LORA, globalBatch=4, maxSteps=2, epochs=5)
    calls: list[int] = []
    real = reference_pass.score_rows

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(reference_pass, "score_rows", counted)

    def attempt(name: str) -> dict[str, bytes]:
        context = stage_context(tmp_path / name, run)
        assert dpo_stage.run(context) is not None
        kept = Path(context.run_root.removeprefix("file://")) / "references"
        return {path.name: path.read_bytes() for path in kept.iterdir()}

    first = attempt("one")
    assert len(calls) == 1
    assert attempt("two") == first
    assert len(calls) == 1, "taken from storage"
    root = Path(stage_context(tmp_path / "x", run).run_root.removeprefix("file://")) / "references"
    damaged = next(root.glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert attempt("three") == first, "computed again, to the same bits"
    assert len(calls) == 2


def test_a_wrong_reference_is_found_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the fast path scored the reference otherwise than the policy, the stage would go plain and say so."""
    from plumbline_trainer.engine import reference_pass

    real, paths = reference_pass.score_rows, []

    def shifted(model: Any, *args: Any, **kwargs: Any) -> Any:
        paths.append(model.path)
        scores = real(model, *args, **kwargs)
        return scores if model.path == "plain" else [[tokens - 0.01 for tokens in row] for row in scores]

    monkeypatch.setattr(reference_pass, "score_rows", shifted)
    run = training_run(tmp_path, "dpo", lora=LORA, globalBatch=4, maxSteps=1)
    assert succeed(tmp_path, run)["plainPath"] == 1
    assert paths == ["fast", "plain"]


def test_divergence_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = objective.TokenLikelihood.sums

    def exploding(self: Any, batch: Any, scores: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": real(self, batch, scores)["loss"] * float("inf")}

    monkeypatch.setattr(objective.TokenLikelihood, "sums", exploding)
    result, code = run_in_process(tmp_path, training_run(tmp_path, "sft", lora=LORA, globalBatch=4))
    assert code == 2
    assert result.reason == "Diverged"
    assert "training.learningRate" in result.message


def test_gradient_checkpointing_gives_the_same_weights(tmp_path: Path) -> None:
    results = []
    for on in (False, True):
        folder = tmp_path / str(on)
        run = training_run(
            folder, "dpo", lora=LORA, globalBatch=4, maxSteps=3, learningRate=1e-3, gradientCheckpointing=on
        )
        succeed(folder, run)
        results.append(weights_of(run))
    assert_close(*results)


def test_evaluations_on_the_way(tmp_path: Path) -> None:
    run = training_run(
        tmp_path, "sft", lora=LORA, evaluation=0.3, globalBatch=4, maxSteps=5, epochs=9, evaluateEverySteps=2
    )
    metrics = succeed(tmp_path, run)
    found = [line["step"] for line in curve(run, tmp_path) if "evalLoss" in line["metrics"]]
    assert found == [0, 2, 4, 5]
    assert metrics["evalLossBestStep"] in found
