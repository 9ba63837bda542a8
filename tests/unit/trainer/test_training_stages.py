"""Training stages: what they write, what they report, what does not change their numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.stagerun import StageRun
from plumbline_trainer.engine import objective
from safetensors.torch import load_file
from support.ranks import run_ranks
from support.trainer import base_model, manifest_of, output_folder, output_of, run_in_process
from support.training_data import training_run

LORA = {"rank": 4}


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


@pytest.mark.parametrize(
    ("type_", "lora"),
    [
        *((type_, lora) for type_ in ("pretrain", "sft", "dpo") for lora in (LORA, None)),
        *((type_, LORA) for type_ in ("orpo", "simpo", "cpo", "rrhf", "awr")),
        ("orpo", None),
    ],
)
def test_a_stage_learns_and_writes_a_policy(tmp_path: Path, type_: str, lora: dict[str, Any] | None) -> None:
    run = training_run(
        tmp_path, type_, lora=lora, evaluation=0.25, globalBatch=4, epochs=4, learningRate=3e-3, tokensPerBatch=256
    )
    metrics = succeed(tmp_path, run)
    if type_ == "simpo":  # preferences are random here: without a likelihood nothing carries over to other rows
        first = next(line["metrics"]["loss"] for line in curve(run, tmp_path) if "loss" in line["metrics"])
        assert metrics["loss"] < 0.8 * first
    else:
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
    if type_ not in ("pretrain", "sft", "awr"):
        # cpo compares sums, in which the lengths of these random answers outweigh what twenty steps can do.
        assert metrics["rewardAccuracy"] > 0.5 or type_ == "cpo"
        assert bool([*tmp_path.rglob("references")]) == (type_ == "dpo"), "only dpo has a reference pass"


@pytest.mark.parametrize(
    "fields",
    [
        {"loss": "ipo"},
        {"loss": "robust", "labelSmoothing": 0.1},
        {"loss": "apoZero", "lengthNormalized": True, "sftWeight": 0.5},
    ],
    ids=lambda fields: fields["loss"],
)
def test_dpo_takes_its_loss_from_the_manifest(tmp_path: Path, fields: dict[str, Any]) -> None:
    """The first loss is the one of policy and reference that agree, plus the likelihood where it has a weight."""
    run = training_run(tmp_path, "dpo", lora=LORA, globalBatch=4, maxSteps=1, stage=fields)
    succeed(tmp_path, run)
    first = curve(run, tmp_path)[0]["metrics"]
    agreeing = {"ipo": 25.0, "robust": math.log(2), "apoZero": 1.0}[fields["loss"]]
    assert first["loss"] == pytest.approx(agreeing + fields.get("sftWeight", 0) * first.get("sftLoss", 0), rel=1e-5)
    assert ("sftLoss" in first) == ("sftWeight" in fields)


def test_orpo_learns_prompts_too_unless_told_otherwise(tmp_path: Path) -> None:
    likelihoods = []
    for tokens in ("all", "completion"):
        folder = tmp_path / tokens
        run = training_run(folder, "orpo", lora=LORA, globalBatch=4, maxSteps=1, stage={"sftOn": tokens})
        succeed(folder, run)
        likelihoods.append(curve(run, folder)[0]["metrics"]["sftLoss"])
    assert likelihoods[0] != pytest.approx(likelihoods[1], rel=1e-3)


@pytest.mark.parametrize("type_", ["orpo", "simpo", "cpo", "rrhf"])
def test_rows_without_room_for_an_answer_are_dropped_and_counted(tmp_path: Path, type_: str) -> None:
    short = training_run(tmp_path, type_, lora=LORA, globalBatch=4, maxSteps=1, maxLength=64)
    metrics = succeed(tmp_path, short)
    assert metrics["droppedRows"] > 0
    assert metrics["rows"] + metrics["droppedRows"] == 24
    none = training_run(tmp_path, type_, lora=LORA, globalBatch=4, maxSteps=1, maxLength=8)
    result, code = run_in_process(tmp_path, none)
    assert code == 2
    assert "none of 24 rows has a token left to learn from within 8 tokens" in result.message
    assert "Raise training.maxLength" in result.message


def test_rrhf_learns_from_every_ranked_answer(tmp_path: Path) -> None:
    run = training_run(tmp_path, "rrhf", lora=LORA, form="ranked", rows=12, globalBatch=4, learningRate=1e-2, epochs=8)
    metrics = succeed(tmp_path, run)
    losses = [line["metrics"]["loss"] for line in curve(run, tmp_path) if "loss" in line["metrics"]]
    assert losses[-1] < losses[0]
    assert metrics["rows"] == 12
    pairs = training_run(tmp_path, "dpo", lora=LORA, form="ranked", rows=12, globalBatch=4, epochs=8)
    assert metrics["tokens"] > succeed(tmp_path, pairs)["tokens"], "dpo takes the best and the worst only"


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


RPO = {"loss": "ipo", "beta": 0.5, "sftWeight": 0.5}


@pytest.mark.parametrize(
    ("type_", "lora", "stage"),
    [
        ("sft", LORA, {}),
        ("sft", None, {}),
        ("dpo", LORA, {}),
        ("pretrain", LORA, {}),
        ("dpo", LORA, RPO),
        ("orpo", LORA, {}),
        ("rrhf", LORA, {}),
        ("awr", LORA, {"beta": 0.5}),
    ],
)
def test_accumulation_does_not_change_the_result(
    tmp_path: Path, type_: str, lora: dict[str, Any] | None, stage: dict[str, Any]
) -> None:
    """One micro-batch per step, or one row each: the same losses and weights to 1e-5 in float32."""
    results = []
    for budget in (4096, 64):
        folder = tmp_path / str(budget)
        run = training_run(
            folder,
            type_,
            lora=lora,
            stage=stage,
            globalBatch=8,
            maxSteps=3,
            epochs=9,
            learningRate=1e-3,
            tokensPerBatch=budget,
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


@pytest.mark.parametrize(
    ("type_", "lora", "stage"),
    [
        ("sft", LORA, {}),
        ("dpo", LORA, {}),
        ("sft", None, {}),
        ("dpo", LORA, RPO),
        ("orpo", LORA, {}),
        ("awr", LORA, {}),
    ],
)
def test_two_ranks_do_not_change_the_result(
    tmp_path: Path, type_: str, lora: dict[str, Any] | None, stage: dict[str, Any]
) -> None:
    results = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run = training_run(
            folder,
            type_,
            lora=lora,
            stage=stage,
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
