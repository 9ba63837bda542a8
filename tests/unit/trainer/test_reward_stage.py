"""The rewardModel stage: what it learns, writes and reports, what does not change its numbers, and what is read back."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.stagerun import StageRun
from plumbline_trainer.data.encode import encode_rows
from plumbline_trainer.data.loading import load_rows
from plumbline_trainer.data.rows import Message
from plumbline_trainer.engine import reward_pass
from plumbline_trainer.engine.values import fresh_heads, score_values
from plumbline_trainer.errors import InputError, Interrupted
from plumbline_trainer.models.policy import load_policy
from plumbline_trainer.models.reward import RewardModel, load_reward_model
from plumbline_trainer.stages import reward_model
from safetensors.torch import load_file
from support.ranks import run_ranks
from support.tiny import make_model
from support.trainer import manifest_of, output_folder, output_of, run_in_process, stage_context, stage_run, write_jsonl
from support.training_data import phrase, training_run

LORA = {"rank": 4}
SETTINGS: dict[str, Any] = {"globalBatch": 6, "learningRate": 3e-3, "tokensPerBatch": 512}


def learnable(kind: str, count: int = 90) -> list[dict[str, Any]]:
    """Better answers hold more of the word true; lengths say nothing."""
    rng = random.Random(5)

    def answer(goodness: int) -> str:
        words = ["true"] * goodness + ["side"] * (2 - goodness) + phrase(rng, 1, 6).split()
        rng.shuffle(words)
        return " ".join(words)

    rows: list[dict[str, Any]] = []
    for number in range(count):
        prompt = f"{number}: {phrase(rng, 1, 6)}"
        if kind == "ranked":
            rows.append({"prompt": prompt, "completions": [answer(goodness) for goodness in (2, 1, 0)]})
        else:
            rows.append({"prompt": prompt, "chosen": answer(2), "rejected": answer(0)})
    return rows


def reward_run(folder: Path, kind: str = "preference", **settings: Any) -> StageRun:
    rows = learnable(kind)
    data = folder / f"{kind}-{len(rows)}.jsonl"
    if not data.exists():
        write_jsonl(data, rows)
    return training_run(folder, "rewardModel", form=kind, rows=len(rows), **{**SETTINGS, **settings})


def succeed(folder: Path, run: StageRun) -> dict[str, float]:
    result, code = run_in_process(folder, run)
    assert code == 0, result.message
    assert len(result.metrics) <= 20
    return dict(manifest_of(run).metrics)


def weights_of(run: StageRun, name: str = "*.safetensors") -> dict[str, torch.Tensor]:
    return {
        f"{path.name}/{key}": tensor
        for path in sorted(output_folder(run).glob(name))
        for key, tensor in load_file(path).items()
    }


def loaded(folder: Path, run: StageRun, **options: Any) -> RewardModel:
    reader = stage_context(folder / "reader", stage_run(folder))
    return load_reward_model(reader, output_of(run), **{"precision": "float32", "device": "cpu", **options})


def assert_close(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    assert weights.keys() == others.keys()
    total = sum(float(tensor.double().square().sum()) for tensor in weights.values())
    gap = sum(float((weights[name] - others[name]).double().square().sum()) for name in weights)
    assert math.sqrt(gap / total) <= rtol


@pytest.mark.parametrize(("kind", "lora"), [("preference", LORA), ("preference", None), ("ranked", LORA)])
def test_it_learns_and_says_how_well(tmp_path: Path, kind: str, lora: dict[str, Any] | None) -> None:
    rate = 1e-2 if lora else 1e-3
    run = reward_run(tmp_path, kind, lora=lora, evaluation=0.2, test=0.2, epochs=6, learningRate=rate)
    metrics = succeed(tmp_path, run)
    start = math.log(6) if kind == "ranked" else math.log(2)
    assert metrics["evalLossStart"] == pytest.approx(start, abs=0.4)
    assert metrics["evalLoss"] < 0.7 * metrics["evalLossStart"]
    assert metrics["accuracy"] > 0.8
    assert metrics["accuracy.lower"] > 0.5
    assert metrics["plainPath"] == 0
    manifest = manifest_of(run)
    assert manifest.kind == "rewardModel"
    assert {key: manifest.meta[key] for key in ("form", "heads", "pooling", "maxLength")} == {
        "form": "adapter" if lora else "full",
        "heads": 1,
        "pooling": "last",
        "maxLength": 1024,
    }
    assert {file.path for file in manifest.files} >= {"heads.safetensors", "reward_model.json", "evaluation.json"}
    assert weights_of(run, "heads.safetensors")["heads.safetensors/weight"].dtype == torch.float32
    found = json.loads((output_folder(run) / "evaluation.json").read_text())
    assert found["split"] == "test"
    assert found["accuracy"]["prompts"] == found["rows"]
    assert found["pairs"] == found["rows"] * (3 if kind == "ranked" else 1)
    assert sum(item["weight"] for item in found["calibration"]["bins"]) == pytest.approx(1)
    assert set(found["length"]) == {"pearson", "spearman"}


def test_the_evaluation_split_serves_where_there_is_no_test_split(tmp_path: Path) -> None:
    run = reward_run(tmp_path, lora=LORA, evaluation=0.3, maxSteps=2)
    metrics = succeed(tmp_path, run)
    assert json.loads((output_folder(run) / "evaluation.json").read_text())["split"] == "evaluation"
    assert metrics["accuracy"] == pytest.approx(metrics["evalRewardAccuracy"])


def test_without_held_out_rows_nothing_is_claimed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = reward_run(tmp_path, lora=LORA, maxSteps=2)
    context = stage_context(tmp_path, run)
    context.log.propagate = True
    output = reward_model.run(context)
    assert output is not None
    assert "accuracy" not in output.metrics
    assert not (output.folder / "evaluation.json").exists()
    assert "no rows are held out" in caplog.text


@pytest.mark.parametrize("lora", [LORA, None])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")],
)
def test_the_saved_artifact_scores_the_same_bits(
    tmp_path: Path, lora: dict[str, Any] | None, dtype: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores that were measured are those that later stages get, also where storage or reading rounds weights."""
    measured: list[Any] = []
    real = reward_pass._values

    def kept(run: Any, scorer: Any, rows: Any, what: str) -> Any:
        values = real(run, scorer, rows, what)
        measured.append((rows, values))
        return values

    monkeypatch.setattr(reward_pass, "_values", kept)
    run = reward_run(
        tmp_path,
        lora=lora,
        test=0.3,
        dtype=dtype,
        stage={"heads": 2},
        maxSteps=4,
        learningRate=1e-2,
        precision=precision,
    )
    succeed(tmp_path, run)
    model = loaded(tmp_path, run, tokens_per_batch=512, precision=precision)
    assert model.scorer.path == "fast"
    assert not any(parameter.requires_grad for parameter in model.scorer.parameters())
    for rows, values in measured:
        again = score_values(model.scorer, rows, tokens_per_batch=512)
        assert all(torch.equal(one, other) for one, other in zip(again, values, strict=True))
    flat = torch.cat(measured[0][1]).double()
    assert model.config.mean == pytest.approx(flat.mean(dim=0).tolist())
    assert model.config.std == pytest.approx(flat.std(dim=0, correction=0).tolist())


def test_messages_are_scored_as_rows_are(tmp_path: Path) -> None:
    """By message, in any order, each prompt once; and centred and scaled by the training rows."""
    run = reward_run(tmp_path, lora=LORA, test=0.3, stage={"heads": 3}, maxSteps=6)
    succeed(tmp_path, run)
    model = loaded(tmp_path, run)
    context = stage_context(tmp_path / "again", run)
    rows = load_rows(context, context.input("dataset"), "test")
    encoded = encode_rows(rows, model.tokenizer, method="score", max_length=1024).rows
    values = score_values(model.scorer, encoded, tokens_per_batch=4096)
    dialogues = [(*row.prompt, answer.messages[0]) for answer_index in (1, 0) for row in rows
                 for answer in [row.responses[answer_index]]]  # fmt: skip
    scores = model.score(dialogues)
    assert scores.shape == (2 * len(rows), 3)
    expected = torch.stack([*(value[1] for value in values), *(value[0] for value in values)])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    train = load_rows(context, context.input("dataset"), "train")
    everything = [(*row.prompt, answer.messages[0]) for row in train for answer in row.responses]
    given = model.score(everything)
    assert given.mean(dim=0).tolist() == pytest.approx(model.config.mean, abs=1e-3)
    assert given.std(dim=0, correction=0).tolist() == pytest.approx(model.config.std, rel=1e-3)
    assert model.score([]).shape == (0, 3)
    with pytest.raises(InputError, match="must end with an answer"):
        model.score([[Message("user", "Why?")]])
    with pytest.raises(InputError, match=r"training\.maxLength"):
        model.score([[Message("user", "Why? " * 2000), Message("assistant", "So.")]])


def test_an_ensemble_differs_by_head_on_one_backbone(tmp_path: Path) -> None:
    run = reward_run(tmp_path, lora=LORA, test=0.3, stage={"heads": 3}, maxSteps=8)
    metrics = succeed(tmp_path, run)
    weight = weights_of(run, "heads.safetensors")["heads.safetensors/weight"]
    assert weight.shape == (3, 64)
    assert (weight[0] - weight[1]).norm() > 0.1
    assert metrics["disagreement"] > 0
    assert len(weights_of(run, "adapter*.safetensors")) == len(weights_of(run)) - 1, "one adapter for all heads"


@pytest.mark.parametrize(("kind", "lora"), [("preference", LORA), ("ranked", LORA), ("preference", None)])
def test_accumulation_does_not_change_the_result(tmp_path: Path, kind: str, lora: dict[str, Any] | None) -> None:
    """Trap 5: one micro-batch per step, or one row each: the same losses and weights to 1e-5 in float32."""
    results = []
    for budget in (4096, 64):
        folder = tmp_path / str(budget)
        run = reward_run(
            folder, kind, lora=lora, globalBatch=4, maxSteps=3, learningRate=1e-3, tokensPerBatch=budget,
            stage={"heads": 2, "centring": 0.01},
        )  # fmt: skip
        results.append((succeed(folder, run), weights_of(run)))
    (one, weights), (other, others) = results
    assert one["tokens"] == other["tokens"]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert_close(weights, others)


@pytest.mark.parametrize(("kind", "lora"), [("ranked", LORA), ("preference", None)])
def test_two_ranks_do_not_change_the_result(tmp_path: Path, kind: str, lora: dict[str, Any] | None) -> None:
    """Trap 6. The ranks get unequal shares, and in the last step of an epoch one has nothing to do."""
    results = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run = reward_run(
            folder, kind, lora=lora, evaluation=0.2, test=0.2, globalBatch=5, maxSteps=12, learningRate=1e-3,
            tokensPerBatch=128, stage={"heads": 2}, processes=processes,
        )  # fmt: skip
        run_ranks(folder, run)
        results.append((manifest_of(run).metrics, weights_of(run)))
    (one, weights), (other, others) = results
    for name in ("loss", "evalLoss", "accuracy", "calibrationError", "rewardMean", "rewardStd", "disagreement"):
        assert one[name] == pytest.approx(other[name], rel=1e-4), name
    assert one["tokens"] == other["tokens"]
    assert_close(weights, others)


def test_margins_change_the_loss(tmp_path: Path) -> None:
    losses = []
    for margin in (0.0, 2.0):
        folder = tmp_path / str(margin)
        run = reward_run(folder, lora=LORA, maxSteps=1)
        write_jsonl(folder / "preference-90.jsonl", [{**row, "margin": margin} for row in learnable("preference")])
        losses.append(succeed(folder, run)["loss"])
    assert losses[1] > losses[0] + 1


def test_centring_keeps_rewards_around_zero(tmp_path: Path) -> None:
    spans = []
    for centring in (None, 1.0):
        folder = tmp_path / str(centring)
        stage = {} if centring is None else {"centring": centring}
        run = reward_run(folder, lora=LORA, epochs=4, learningRate=1e-2, stage=stage)
        spans.append(abs(succeed(folder, run)["rewardMean"]))
    assert spans[1] < 0.5 * spans[0]


@pytest.mark.parametrize(
    "stage",
    [
        {"lora": {"rank": 4, "rsLora": True}, "freeze": {"layers": 1, "modules": ["mlp"]}},
        {"lora": {"rank": 4, "dora": True, "targets": ["q_proj", "down_proj"]}},
        {
            "lora": {"rank": 4, "modulesToSave": ["embed_tokens", "lm_head", "norm"]},
            "freeze": {"modules": ["layers.0"]},
        },
    ],
    ids=["rsLora and freeze", "dora", "saved modules"],
)
def test_every_kind_of_adapter_scores_the_same_bits_when_read_back(
    tmp_path: Path, stage: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []
    real = reward_pass._values

    def kept(run: Any, scorer: Any, rows: Any, what: str) -> Any:
        measured.append((rows, real(run, scorer, rows, what)))
        return measured[-1][1]

    monkeypatch.setattr(reward_pass, "_values", kept)
    run = reward_run(tmp_path, test=0.3, stage=stage, style="qwen", maxSteps=4, learningRate=1e-2)
    succeed(tmp_path, run)
    model = loaded(tmp_path, run, tokens_per_batch=512)
    for rows, values in measured:
        again = score_values(model.scorer, rows, tokens_per_batch=512)
        assert all(torch.equal(one, other) for one, other in zip(again, values, strict=True))


def test_all_ranks_measure_the_selected_weights(tmp_path: Path) -> None:
    """Training goes astray after its best evaluation: what is measured is what is yielded, on every rank."""
    run = reward_run(
        tmp_path, lora=LORA, evaluation=0.3, maxSteps=6, learningRate=0.3, selectBest=True, evaluateEverySteps=1,
        processes=2,
    )  # fmt: skip
    run_ranks(tmp_path, run)
    metrics = manifest_of(run).metrics
    assert metrics["selectedStep"] < 6
    assert metrics["accuracy"] == pytest.approx(metrics["evalRewardAccuracy"])
    model = loaded(tmp_path, run)
    context = stage_context(tmp_path / "again", run)
    rows = load_rows(context, context.input("dataset"), "train")
    scores = model.score([(*row.prompt, answer.messages[0]) for row in rows for answer in row.responses])
    assert metrics["rewardMean"] == pytest.approx(float(scores.mean()), rel=1e-3, abs=1e-3)
    assert metrics["rewardStd"] == pytest.approx(float(scores.std(correction=0)), rel=1e-3)


def test_l2sp_holds_the_model_and_not_new_heads(tmp_path: Path) -> None:
    """Heads begin at random: there is nothing in them to hold."""
    moved = []
    for strength in (None, 1e4):
        folder = tmp_path / str(strength)
        run = reward_run(folder, lora=LORA, maxSteps=4, learningRate=1e-2, **({"l2sp": strength} if strength else {}))
        metrics = succeed(folder, run)
        assert ("l2sp" in metrics) == bool(strength)
        weights = weights_of(run)
        change = sum(
            float((weights[name.replace("lora_A", "lora_B")] @ weights[name]).square().sum())
            for name in weights
            if "lora_A" in name
        )
        moved.append((change, weights["heads.safetensors/weight"]))
    (free, heads), (held, other) = moved
    assert held < 0.1 * free
    start = fresh_heads(make_model("llama"), 1, 3).weight.detach()
    assert (other - start).norm() > 0.5 * (heads - start).norm()


def test_stopped_while_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps are done and rounded weights are in the checkpoint: the next attempt takes no step and ends the same."""
    settings: dict[str, Any] = {"evaluation": 0.2, "test": 0.2, "dtype": "bfloat16", "maxSteps": 3}
    whole = reward_run(tmp_path / "whole", **settings)
    figures = succeed(tmp_path / "whole", whole)

    run = reward_run(tmp_path / "stopped", **settings)
    context = stage_context(tmp_path / "stopped" / "one", run)
    real = reward_pass._values

    def stopping(training: Any, scorer: Any, rows: Any, what: str) -> Any:
        context.stop.request()
        return real(training, scorer, rows, what)

    with monkeypatch.context() as patch:
        patch.setattr(reward_pass, "_values", stopping)
        with pytest.raises(Interrupted) as caught:
            reward_model.run(context)
    assert caught.value.step == 3
    result, code = run_in_process(tmp_path / "stopped" / "two", run)
    assert code == 0, result.message
    assert (result.first_step, result.last_step) == (3, 3)
    again = manifest_of(run).metrics
    timing = {"tokensPerSecond"}
    assert {k: v for k, v in again.items() if k not in timing} == {k: v for k, v in figures.items() if k not in timing}
    assert all(torch.equal(one, weights_of(whole)[name]) for name, one in weights_of(run).items())


def test_it_starts_from_the_merged_policy_and_the_policy_stays(tmp_path: Path) -> None:
    sft = training_run(tmp_path, "sft", lora=LORA, globalBatch=4, learningRate=1e-2, epochs=2)
    succeed(tmp_path, sft)
    run = reward_run(tmp_path, lora=LORA, test=0.3, maxSteps=3)
    run = run.model_copy(update={"inputs": [output_of(sft), run.inputs[1]], "fingerprint": "f" * 64})
    succeed(tmp_path, run)
    policy = load_policy(stage_context(tmp_path / "policy", run), run.inputs[0], precision="float32", device="cpu")
    assert manifest_of(run).meta["startDigest"] == policy.lineage.merged_digest
    assert loaded(tmp_path, run).score([[Message("user", "a"), Message("assistant", "b")]]).shape == (1, 1)


class TestMisuse:
    def test_a_reward_model_is_no_policy(self, tmp_path: Path) -> None:
        run = reward_run(tmp_path, lora=LORA, maxSteps=1)
        succeed(tmp_path, run)
        reader = stage_context(tmp_path / "reader", stage_run(tmp_path))
        with pytest.raises(InputError, match="yields a rewardModel, no policy"):
            load_policy(reader, output_of(run), precision="float32", device="cpu")

    def test_a_policy_is_no_reward_model(self, tmp_path: Path) -> None:
        run = training_run(tmp_path, "sft", lora=LORA, globalBatch=4, maxSteps=1)
        succeed(tmp_path, run)
        with pytest.raises(InputError, match="yields a policy, a rewardModel is needed"):
            loaded(tmp_path, run)

    def test_heads_that_do_not_fit_are_refused(self, tmp_path: Path) -> None:
        """The manifest's checksums find damage; this finds a writer that was wrong."""
        run = reward_run(tmp_path, lora=LORA, maxSteps=1)
        succeed(tmp_path, run)
        from plumbline_trainer.models import reward

        folder = output_folder(run)
        document = json.loads((folder / reward.CONFIG).read_text())
        (folder / reward.CONFIG).write_text(json.dumps({**document, "heads": 2}))
        with pytest.raises(InputError, match="1 heads where 2 are declared"):
            reward._read(folder, "reward")
