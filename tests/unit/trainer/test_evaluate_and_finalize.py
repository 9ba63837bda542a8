"""Evaluate and finalize over a tiny pipeline: figures by hand, records, the documents of a run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from plumbline_api.layout import pipeline_root
from plumbline_api.names import FINALIZE
from plumbline_api.stagerun import StageOutcome, StageRun
from plumbline_trainer.data.encode import encode_rows
from plumbline_trainer.data.loading import load_rows
from plumbline_trainer.models.loading import load_base
from plumbline_trainer.report.words import number
from support import tiny, trainer

QUESTIONS = [
    {"instruction": f"Name {n} {what}.", "output": f"{what.capitalize()}: {n} of them. That is all."}
    for n in ("two", "three", "four", "five", "six")
    for what in ("fruits", "tools", "stones", "towns")
]
PAIRS = [
    {"prompt": row["instruction"], "chosen": row["output"].partition(".")[0] + ".", "rejected": row["output"]}
    for row in QUESTIONS
]
EVALUATE = {
    "suites": [
        {"perplexity": {"dataset": "questions"}},
        {"preferenceAccuracy": {"dataset": "pairs"}},
        {
            "winRate": {
                "dataset": "questions",
                "judge": {"rule": {"maxWords": 8}},
                "prompts": 8,
                "generation": {"maxNewTokens": 12},
            }
        },
        {"samples": {"dataset": "questions", "prompts": 3, "generation": {"maxNewTokens": 12}}},
        {"perplexity": {"dataset": "pairs", "split": "train", "limit": 5}},
    ]
}


def manifest(folder: Path, **evaluate):
    trainer.write_jsonl(folder / "questions.jsonl", QUESTIONS)
    trainer.write_jsonl(folder / "pairs.jsonl", PAIRS)
    tiny.save_model(folder / "base", "llama", seed=2)
    training = {"epochs": 1, "globalBatch": 8, "learningRate": 5e-3, "maxLength": 128}
    return {
        "apiVersion": "plumbline.dev/v1alpha1",
        "kind": "AlignmentPipeline",
        "metadata": {"name": "small"},
        "spec": {
            "model": {"source": f"file://{folder}/base"},
            "datasets": [
                {"name": "questions", "source": f"file://{folder}/questions.jsonl", "split": {"test": 0.4}},
                {"name": "pairs", "source": f"file://{folder}/pairs.jsonl", "split": {"test": 0.4}},
            ],
            "seed": 3,
            "stages": [
                {"name": "sft", "sft": {"dataset": "questions", "lora": {"rank": 4}, "training": training}},
                {"name": "dpo", "dpo": {"dataset": "pairs", "lora": {"rank": 4}, "training": training}},
                {"name": "final", "merge": {}},
                {"name": "exam", "evaluate": EVALUATE | evaluate},
            ],
        },
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The whole pipeline, run once: (pipeline, results by stage)."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline = trainer.LocalPipeline(manifest(folder), folder)
    result, code = trainer.run_in_process(folder / "preflight", pipeline.preflight())
    assert code == 0, result.message
    pipeline.pins = pins_of(pipeline)
    results = {}
    for stage in ("sft", "dpo", "final", "exam"):
        results[stage], code = trainer.run_in_process(folder / stage, pipeline.stage(stage))
        assert code == 0, results[stage].message
    return pipeline, results


def documents(pipeline) -> Path:
    identity = pipeline.record.pipeline
    root = pipeline_root(pipeline.record.storage.uri, identity.namespace, identity.name, identity.uid)
    return Path(root.removeprefix("file://"))


def pins_of(pipeline):
    plan = json.loads((documents(pipeline) / "plan.json").read_text())
    return [item["digest"] for item in plan["inputs"]]


def report_of(pipeline):
    return json.loads((trainer.output_folder(pipeline.stage("exam")) / "report.json").read_text())


def test_figures_are_named_ordered_and_complete(done):
    _, results = done
    metrics = results["exam"].metrics
    assert list(metrics)[:4] == ["perplexity", "preferenceAccuracy", "winRate", "perplexity.pairs"]
    assert set(metrics) >= {"perplexity.lower", "perplexity.upper", "perplexity.baseline", "winRate.lower"}
    assert len(metrics) <= 20
    for name in ("perplexity", "preferenceAccuracy", "winRate"):
        assert metrics[f"{name}.lower"] <= metrics[name] <= metrics[f"{name}.upper"]


def test_perplexity_and_accuracy_are_those_of_the_plain_model(done, tmp_path):
    pipeline, results = done
    report = report_of(pipeline)
    model, tokenizer = load_base(trainer.output_folder(pipeline.stage("final")), "float32")
    perplexity, accuracy = report["suites"][0], report["suites"][1]
    context = trainer.stage_context(tmp_path, pipeline.stage("exam"))
    questions = load_rows(context, context.input("suites.0.dataset"), "test")
    assert {row.id for row in questions} == {record["id"] for record in perplexity["records"]}
    loss = tokens = 0.0
    for row in encode_rows(questions, tokenizer, method="completion", max_length=256).rows:
        ids = torch.tensor([row.prompt + row.responses[0].ids])
        with torch.no_grad():
            scores = torch.log_softmax(model(ids).logits[0].double(), -1)
        places = range(len(row.prompt), ids.shape[1])
        loss -= sum(float(scores[k - 1, ids[0, k]]) for k in places)
        tokens += len(places)
    assert perplexity["tokens"] == tokens
    assert results["exam"].metrics["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)
    right = [1.0 if r["margin"] > 0 else 0.5 if r["margin"] == 0 else 0.0 for r in accuracy["records"]]
    assert results["exam"].metrics["preferenceAccuracy"] == pytest.approx(sum(right) / len(right))
    assert all(r["chosen"] != r["rejected"] for r in accuracy["records"])


def test_evaluation_reads_only_held_out_rows_and_marks_what_was_trained_on(done):
    pipeline, _ = done
    suites = report_of(pipeline)["suites"]
    assert [suite.get("inSample") for suite in suites] == [None, None, None, None, ["dataset"]]
    assert suites[4]["rows"] == 5
    train = {r["id"] for r in suites[4]["records"]}
    assert not train & {r["id"] for r in suites[1]["records"]}


def test_answers_are_shared_between_suites_and_ordered_by_change(done):
    pipeline, _ = done
    wins, samples = report_of(pipeline)["suites"][2:4]
    answers = {record["id"]: record["policy"] for record in wins["records"]}
    assert len(samples["records"]) == 3
    assert all(answers[record["id"]] == record["policy"] for record in samples["records"])
    for suite in (wins, samples):
        changes = [record["change"] for record in suite["records"]]
        assert changes == sorted(changes, reverse=True)
    assert wins["wins"] + wins["ties"] + wins["losses"] == len(wins["records"])
    assert wins["judge"]["text"] == "answers in at most 8 words"


def test_a_second_evaluation_gives_the_same_bytes_and_says_its_path(done, tmp_path, capsys):
    pipeline, _ = done
    first = trainer.output_folder(pipeline.stage("exam"))
    run = pipeline.stage("exam").model_copy(update={"fingerprint": "f" * 64})
    result, code = trainer.run_in_process(tmp_path, run)
    assert code == 0, result.message
    said = capsys.readouterr().err
    for name in ("final", "base"):
        assert f"INFO {name}: fast path: differences to the plain path: loss " in said
    assert (trainer.output_folder(run) / "report.json").read_bytes() == (first / "report.json").read_bytes()


def test_a_policy_against_itself_ties(done, tmp_path):
    pipeline, _ = done
    run = pipeline.stage("exam")
    policy = run.inputs[0]
    inputs = [policy.model_copy(update={"role": i.role}) if i.role == "baseline" else i for i in run.inputs]
    run = run.model_copy(update={"inputs": inputs, "fingerprint": "e" * 64})
    result, code = trainer.run_in_process(tmp_path, run)
    assert code == 0, result.message
    assert result.metrics["winRate"] == 0.5
    assert result.metrics["winRate.lower"] < 0.5 < result.metrics["winRate.upper"]
    assert result.metrics["perplexity"] == result.metrics["perplexity.baseline"]


def test_a_model_judges_in_both_orders(done, tmp_path):
    pipeline, _ = done
    suites = [
        {
            "winRate": {
                "dataset": "questions",
                "judge": {"model": {"source": f"file://{pipeline.folder}/base"}},
                "prompts": 6,
                "generation": {"maxNewTokens": 6, "temperature": 1.0},
            }
        }
    ]
    run = pipeline.stage("exam")
    judge = trainer.external(
        "suites.0.judge", f"file://{pipeline.folder}/base", name="judge/exam/0", kind="policy"
    ).model_copy(update={"digest": pipeline.pins[0]})
    inputs = [i for i in run.inputs if not i.role.startswith("suites.")]
    inputs += [next(i for i in run.inputs if i.role == "suites.0.dataset"), judge]
    run = run.model_copy(
        update={
            "inputs": inputs,
            "parameters": run.parameters | {"suites": suites},
            "fingerprint": "d" * 64,
        }
    )
    result, code = trainer.run_in_process(tmp_path, run)
    assert code == 0, result.message
    assert 0 <= result.metrics["winRate.firstPreferred"] <= 1
    report = json.loads((trainer.output_folder(run) / "report.json").read_text())
    assert report["suites"][0]["inSample"] == ["judge"]
    assert {r["outcome"] for r in report["suites"][0]["records"]} <= {0.0, 0.25, 0.5, 0.75, 1.0}


def test_an_empty_split_is_named(done, tmp_path):
    pipeline, _ = done
    run = pipeline.stage("exam")
    suites = [{"perplexity": {"dataset": "questions", "split": "evaluation"}}]
    run = run.model_copy(update={"parameters": run.parameters | {"suites": suites}, "fingerprint": "c" * 64})
    result, code = trainer.run_in_process(tmp_path, run)
    assert code == 2
    assert 'suites[0].perplexity: the evaluation split of dataset "questions" has no rows' in result.message


def finalize(pipeline, folder, outcomes):
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
    result, code = trainer.run_in_process(folder, run)
    assert code == 0, result.message
    return documents(pipeline)


def outcome(pipeline, name, phase="Succeeded", **values):
    run = pipeline.stage(name)
    fingerprint = None if phase in ("Skipped", "Pending") else run.fingerprint
    return StageOutcome(name=name, type=run.type, phase=phase, fingerprint=fingerprint, attempts=1, **values)


def test_documents_of_a_run_that_succeeded(done, tmp_path):
    pipeline, results = done
    outcomes = [StageOutcome(name="preflight", type="preflight", phase="Succeeded", seconds=6.0, attempts=1)]
    outcomes += [outcome(pipeline, name, seconds=61.0, gpu_seconds=0.0) for name in ("sft", "dpo", "final", "exam")]
    folder = finalize(pipeline, tmp_path, outcomes)

    lineage = json.loads((folder / "lineage.json").read_text())
    stages = {stage["name"]: stage for stage in lineage["stages"]}
    for name, before in (("dpo", "sft"), ("final", "dpo")):
        parent = next(parent for parent in stages[name]["parents"] if parent["role"] == "model")
        assert parent["manifestDigest"] == stages[before]["manifest"]
    assert lineage["model"]["stage"] == "final"
    assert lineage["inputs"][0]["sha256"] == pipeline.pins[0]
    assert lineage["evaluations"][0]["metrics"]["perplexity"] == results["exam"].metrics["perplexity"]

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["columns"] == ["base", "final"]
    rows = {row["metric"]: row for row in summary["rows"]}
    assert set(rows) == {"winRate", "preferenceAccuracy", "perplexity", "perplexity.pairs"}
    assert rows["perplexity"]["values"]["final"]["value"] == results["exam"].metrics["perplexity"]
    assert rows["perplexity"]["values"]["base"]["value"] == results["exam"].metrics["perplexity.baseline"]
    assert "base" not in rows["winRate"]["values"]
    assert rows["winRate"]["judge"] == "rule “answers in at most 8 words”"

    card = (folder / "model-card.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "unknown"
    assert header["tags"] == ["plumbline", "sft", "dpo"]
    assert len(header["model-index"][0]["results"]) == 4

    page = (folder / "report.html").read_text()
    assert page.count("<figure>") == 4
    assert "4 min 10 s" in page
    assert "in-sample" in page
    for sign in ("<script", "http://", "src=", "<link", "@import", "url(http"):
        assert sign not in page.replace('xmlns="http://www.w3.org', "").replace('xmlns:xlink="http://www.w3.org', ""), (
            sign
        )
    assert str(pipeline.folder) in page  # where the result lies


def test_what_was_found_in_storage_costs_nothing_and_says_what_it_cost_once(done, tmp_path):
    pipeline, results = done
    names = ("sft", "dpo", "final", "exam")
    folder = finalize(pipeline, tmp_path, [outcome(pipeline, name, cached=True) for name in names])
    page = (folder / "report.html").read_text()
    once = sum(results[name].tokens for name in names)
    assert "<dt>time of all stages</dt><dd>none</dd>" in page
    assert "<dt>tokens</dt><dd>none</dd>" in page
    assert "<dt>found in storage</dt><dd>4 of 4 stages</dd>" in page
    assert f"<dt>tokens of those, once</dt><dd>{number(once)}</dd>" in page


def test_documents_of_a_run_that_failed(done, tmp_path):
    pipeline, _ = done
    words = "78.9 GiB needed, 79.2 there. Try <b>training.tokensPerBatch: 8192</b>"
    outcomes = [
        outcome(pipeline, "sft", seconds=10.0),
        outcome(pipeline, "dpo", "Failed", reason="OutOfMemory", message=words, seconds=5.0),
        outcome(pipeline, "final", "Skipped", reason="DependencyFailed", message="dpo failed"),
        outcome(pipeline, "exam", "Skipped"),
    ]
    folder = finalize(pipeline, tmp_path, outcomes)
    page = (folder / "report.html").read_text()
    assert "It did not finish: dpo failed after 1 of 4 stages were done." in page
    assert "OutOfMemory" in page
    assert "Try &lt;b&gt;training.tokensPerBatch" in page
    assert page.index("OutOfMemory") < page.index("What was trained from what")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["succeeded"], summary["rows"], summary["model"]["stage"]) == (False, [], "sft")


def test_documents_of_a_run_of_which_little_is_left(done, tmp_path):
    """Damaged and missing pieces are named, and everything else is told all the same."""
    pipeline, _ = done
    report = trainer.output_folder(pipeline.stage("exam")) / "report.json"
    kept = report.read_bytes()
    plan = documents(pipeline) / "plan.json"
    planned = plan.read_bytes()
    try:
        report.write_bytes(kept[:-2] + b" }")
        plan.write_bytes(b"{")
        folder = finalize(pipeline, tmp_path, [outcome(pipeline, n) for n in ("sft", "dpo", "final", "exam")])
        page = (folder / "report.html").read_text()
        assert "Could not be read: the figures of exam" in page
        assert "nothing was measured" in page
    finally:
        report.write_bytes(kept)
        plan.write_bytes(planned)


def test_preflight_failure_is_on_the_first_screen(done, tmp_path):
    pipeline, _ = done
    outcomes = [
        StageOutcome(
            name="preflight",
            type="preflight",
            phase="Failed",
            reason="BadInput",
            message='pairs.jsonl line 3: "chosen" is a number, text expected',
            attempts=1,
        ),
        *(outcome(pipeline, name, "Skipped") for name in ("sft", "dpo", "final", "exam")),
    ]
    page = (finalize(pipeline, tmp_path, outcomes) / "report.html").read_text()
    assert "preflight failed after 0 of 4 stages were done" in page
    assert "&#34;chosen&#34; is a number" in page


def test_finalize_is_light():
    code = "import sys, plumbline_trainer.stages.finalize; print('torch' in sys.modules, 'transformers' in sys.modules)"
    paths = ":".join(str(trainer.REPOSITORY / name) for name in ("operator", "trainer_image"))
    found = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": paths}, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["False", "False"]
