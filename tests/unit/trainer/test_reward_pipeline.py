"""A reward model within a pipeline: found by preflight, used as a judge, told of in the report. DPO on ranked rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plumbline_api.layout import pipeline_root
from plumbline_api.names import FINALIZE
from plumbline_api.record import fingerprints
from plumbline_api.stagerun import StageOutcome, StageResult, StageRun
from plumbline_trainer.data.encode import encode_rows
from plumbline_trainer.data.loading import load_rows
from plumbline_trainer.data.rows import Message
from plumbline_trainer.engine.objective import row_tokens
from plumbline_trainer.evaluation.judges import judge_by_reward
from plumbline_trainer.models.loading import load_tokenizer
from plumbline_trainer.models.reward import load_reward_model
from support import tiny, trainer

STAGES = ("sft", "reward", "dpo", "exam")
TRAINING = {"epochs": 1, "globalBatch": 8, "learningRate": 5e-3, "maxLength": 128}


def manifest(folder: Path, judge: str = "reward") -> dict[str, Any]:
    questions = [
        {"instruction": f"Name {n} {what}.", "output": f"{what.capitalize()}: {n} of them."}
        for n in ("two", "three", "four", "five", "six")
        for what in ("fruits", "tools", "stones", "towns")
    ]
    ranked = [
        {"prompt": row["instruction"], "completions": [row["output"], "I do not know them.", "Why?"][: 2 + n % 2]}
        for n, row in enumerate(questions)
    ]
    trainer.write_jsonl(folder / "questions.jsonl", questions)
    trainer.write_jsonl(folder / "ranked.jsonl", ranked)
    if not (folder / "base").exists():
        tiny.save_model(folder / "base", seed=2)
    lora = {"lora": {"rank": 4}, "training": TRAINING}
    generation = {"maxNewTokens": 8}
    return {
        "apiVersion": "plumbline.dev/v1alpha1",
        "kind": "AlignmentPipeline",
        "metadata": {"name": "small"},
        "spec": {
            "model": {"source": f"file://{folder}/base"},
            "datasets": [
                {"name": "questions", "source": f"file://{folder}/questions.jsonl", "split": {"test": 0.4}},
                {"name": "ranked", "source": f"file://{folder}/ranked.jsonl", "split": {"test": 0.4}},
            ],
            "seed": 3,
            "stages": [
                {"name": "sft", "sft": {"dataset": "questions", **lora}},
                {"name": judge, "rewardModel": {"dataset": "ranked", "heads": 2, **lora}},
                {"name": "dpo", "dpo": {"dataset": "ranked", **lora}},
                {
                    "name": "exam",
                    "evaluate": {
                        "suites": [
                            {
                                "winRate": {
                                    "dataset": "questions",
                                    "judge": {"stage": judge},
                                    "prompts": 6,
                                    "generation": generation,
                                }
                            },
                            {"preferenceAccuracy": {"dataset": "ranked"}},
                        ]
                    },
                },
            ],
        },
    }


Done = tuple[trainer.LocalPipeline, dict[str, StageResult], Path]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The whole pipeline, run once."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline = trainer.LocalPipeline(manifest(folder), folder)
    result, code = trainer.run_in_process(folder / "preflight", pipeline.preflight())
    assert code == 0, result.message
    pipeline.pins = [item["digest"] for item in plan_of(pipeline)["inputs"]]
    results = {}
    for stage in STAGES:
        results[stage], code = trainer.run_in_process(folder / stage, pipeline.stage(stage))
        assert code == 0, results[stage].message
    return pipeline, results, folder


def documents(pipeline: trainer.LocalPipeline) -> Path:
    run = pipeline.record.pipeline
    root = pipeline_root(pipeline.record.storage.uri, run.namespace, run.name, run.uid)
    return Path(root.removeprefix("file://"))


def plan_of(pipeline: trainer.LocalPipeline) -> dict[str, Any]:
    return dict(json.loads((documents(pipeline) / "plan.json").read_text()))


def test_preflight_counts_the_tokens_of_all_answers(done: Done) -> None:
    pipeline, _, folder = done
    plan = plan_of(pipeline)
    context = trainer.stage_context(folder / "look", pipeline.stage("reward"))
    rows = load_rows(context, context.input("dataset"), "train")
    encoded = encode_rows(rows, load_tokenizer(folder / "base"), method="score", max_length=128).rows
    estimate = plan["stages"][1]["estimate"]
    assert estimate["steps"] == -(-len(rows) // 8)
    # Each answer is counted with its prompt, and as the longest one: an upper bound, and not far off.
    whole = sum(row_tokens(row) for row in encoded)
    assert whole <= estimate["tokens"] <= 2.5 * whole
    assert next(item for item in plan["datasets"] if item["name"] == "ranked")["format"] == "ranked"


def test_dpo_starts_from_the_policy_before_the_reward_model(done: Done) -> None:
    pipeline, _, _ = done
    parent = trainer.manifest_of(pipeline.stage("dpo")).parent("model")
    assert parent is not None
    assert parent.name == "sft"


def test_the_reward_model_judges_by_its_mean_reward(done: Done) -> None:
    pipeline, results, folder = done
    report = json.loads((trainer.output_folder(pipeline.stage("exam")) / "report.json").read_text())
    suite = report["suites"][0]
    assert suite["judge"] == {"kind": "reward", "text": "reward"}
    assert "inSample" not in suite, "the reward model took no part in the policy's training"
    run = pipeline.stage("exam")
    context = trainer.stage_context(folder / "judge", run)
    model = load_reward_model(context, context.input("suites.0.judge"), precision="float32", device="cpu")
    for record in suite["records"]:
        prompt = Message("user", record["prompt"])
        sides = [(prompt, Message("assistant", record[side])) for side in ("policy", "baseline")]
        policy, baseline = model.score(sides).mean(dim=1).tolist()
        assert record["outcome"] == (0.5 if policy == baseline else float(policy > baseline))
    outcomes = [record["outcome"] for record in suite["records"]]
    assert results["exam"].metrics["winRate"] == pytest.approx(sum(outcomes) / len(outcomes))


def test_verdicts_by_reward() -> None:
    verdicts = judge_by_reward([(2.0, 1.0), (1.0, 2.0), (1.0, 1.0)])
    assert [(v.outcome, v.reason) for v in verdicts] == [(1.0, "policy"), (0.0, "baseline"), (0.5, "equal")]


def test_report_and_card_tell_of_the_reward_model(done: Done, tmp_path: Path) -> None:
    pipeline, results, _ = done
    outcomes = [
        StageOutcome(
            name=name, type=pipeline.stage(name).type, phase="Succeeded", fingerprint=pipeline.stage(name).fingerprint
        )
        for name in STAGES
    ]
    run = StageRun(
        role="finalize",
        pipeline=pipeline.record.pipeline,
        stage=FINALIZE,
        type=FINALIZE,
        attempt=1,
        fingerprint="a" * 64,
        storage=pipeline.record.storage,
        record=pipeline.record,
        pins=pipeline.pins,
        outcomes=outcomes,
    )
    result, code = trainer.run_in_process(tmp_path, run)
    assert code == 0, result.message
    folder = documents(pipeline)
    page = (folder / "report.html").read_text()
    assert "Calibration, expected error" in page
    assert "accuracy on held-out rows" in page
    assert "judge: reward model “reward”" in page
    card = (folder / "model-card.md").read_text()
    accuracy = results["reward"].metrics["accuracy"]
    assert f"| reward | {100 * accuracy:.0f} % |" in card
    assert json.loads((folder / "lineage.json").read_text())["model"]["stage"] == "dpo"


def test_another_name_of_the_judge_is_not_new_work(tmp_path: Path) -> None:
    found = []
    for name in ("reward", "preference-model"):
        record = trainer.LocalPipeline(manifest(tmp_path, judge=name), tmp_path).record
        found.append(list(fingerprints(record, ["a" * 64] * len(record.external_inputs)).values()))
    assert found[0] == found[1]
