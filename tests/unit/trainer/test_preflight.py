"""Preflight in this process, on a tiny model and small files."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from plumbline_api.record import fingerprints
from plumbline_api.stagerun import StageResult
from plumbline_trainer.context import StageOutput
from plumbline_trainer.storage.manifests import commit_output
from support import tiny
from support.trainer import LocalPipeline, output_folder, run_in_process, stage_context, write_jsonl


def rows(count: int = 40, start: int = 0) -> list[dict[str, str]]:
    return [{"instruction": f"Say {i}", "output": f"It is {i}."} for i in range(start, start + count)]


def pairs(count: int = 40) -> list[dict[str, str]]:
    return [{"prompt": f"Say {i}", "chosen": f"It is {i}.", "rejected": f"No {i}."} for i in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / "base")


def pipeline(folder: Path, model: Path, stages: list[dict[str, Any]] | None = None, **q: Any) -> LocalPipeline:
    if not (folder / "q.jsonl").exists():
        write_jsonl(folder / "q.jsonl", rows())
        write_jsonl(folder / "p.jsonl", pairs())
    training = {"globalBatch": 8, "maxLength": 64}
    datasets = [
        {"name": "q", "source": f"file://{folder}/q.jsonl", "split": {"test": 0.2}} | q,
        {"name": "p", "source": f"file://{folder}/p.jsonl", "split": {"test": 0.2}},
    ]
    body = {
        "apiVersion": "plumbline.dev/v1alpha1",
        "kind": "AlignmentPipeline",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"source": f"file://{model}"},
            "datasets": datasets,
            "stages": stages
            or [
                {"name": "sft", "sft": {"dataset": "q", "lora": {"rank": 4}, "training": training | {"epochs": 2}}},
                {"name": "dpo", "dpo": {"dataset": "p", "lora": {"rank": 4}, "training": training}},
                {"name": "final", "merge": {}},
                {"name": "exam", "evaluate": {"suites": [{"perplexity": {"dataset": "q"}}]}},
            ],
        },
    }
    return LocalPipeline(body, folder)


def preflight(made: LocalPipeline, number: int = 1) -> tuple[StageResult, int]:
    scratch = made.folder / f"attempt-{number}"
    result, code = run_in_process(scratch, made.preflight())
    if result.preflight is not None:
        made.pins = [base64.urlsafe_b64decode(digest + "=").hex() for digest in result.preflight.digests]
    return result, code


def plan_of(made: LocalPipeline) -> dict[str, Any]:
    (path,) = (made.folder / "storage").rglob("plan.json")
    return dict(json.loads(path.read_text()))


def commit(made: LocalPipeline, name: str) -> Path:
    """Stand in for a stage: commit some output for it."""
    run = made.stage(name)
    folder = made.folder / f"made-{name}"
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_text(name)
    commit_output(stage_context(made.folder / f"scratch-{name}", run), StageOutput(folder, "policy"))
    return output_folder(run) / "weights"


def test_findings_are_pinned_counted_and_estimated(tmp_path: Path, model: Path) -> None:
    made = pipeline(tmp_path, model)
    result, code = preflight(made)
    assert code == 0, result
    assert result.preflight is not None
    assert result.preflight.cached == "0000"
    assert [len(pin) for pin in made.pins] == [64] * 3
    assert any("q: instruction, 40 rows" in note for note in result.preflight.notes)
    plan = plan_of(made)
    by_name = {item["name"]: item for item in plan["datasets"]}
    splits = by_name["q"]["splits"]
    assert splits["train"]["rows"] + splits["test"]["rows"] == 40
    assert 5 < splits["train"]["tokens"]["p50"] < 64
    facts = plan["models"]["model"]
    assert (facts["architecture"], facts["layers"], facts["hidden"]) == ("llama", 2, 64)
    assert {"keyValueHeads", "contextLength"} < set(facts), "JSON is in camelCase here as everywhere"
    assert {"badExamples", "equalPairs"} < set(by_name["q"])
    assert "fromCache" in plan["inputs"][0]
    sft = plan["stages"][0]
    assert sft["fingerprint"] == fingerprints(made.record, made.pins)["sft"]
    assert sft["estimate"]["steps"] == 2 * -(-splits["train"]["rows"] // 8)
    assert sft["estimate"]["gpuHours"] == "unknown"
    assert plan["stages"][2]["why"] == "not computed yet"
    assert not list((tmp_path / "storage").rglob("probes/*"))


def test_token_counts_are_those_that_training_takes(tmp_path: Path, model: Path) -> None:
    from plumbline_trainer.data.encode import encode_rows
    from plumbline_trainer.data.loading import load_rows
    from plumbline_trainer.models.loading import load_tokenizer

    made = pipeline(tmp_path, model)
    preflight(made)
    run = made.stage("sft")
    context = stage_context(tmp_path / "x", run)
    encoded = encode_rows(
        load_rows(context, run.inputs[1], "train"), load_tokenizer(model), method="completion", max_length=64
    )
    tokens = sum(len(row.prompt) + len(row.responses[0].ids) for row in encoded.rows)
    assert plan_of(made)["stages"][0]["estimate"]["tokens"] == pytest.approx(2 * tokens, rel=0.02)


def test_a_second_look_reads_nothing_again(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = preflight(pipeline(tmp_path, model))

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("plumbline_trainer.planning.datasets.load_dataset", forbidden)
    monkeypatch.setattr("plumbline_trainer.stages.preflight.local_tokenizer", forbidden)
    monkeypatch.setattr("plumbline_trainer.planning.facts._read", forbidden)
    monkeypatch.setattr("plumbline_trainer.storage.files.FileBackend.hash", forbidden)
    second, code = preflight(pipeline(tmp_path, model), 2)
    assert (second, code) == (first, 0)


def test_a_changed_source_is_pinned_anew(tmp_path: Path, model: Path) -> None:
    made = pipeline(tmp_path, model)
    preflight(made)
    before = list(made.pins)
    write_jsonl(tmp_path / "q.jsonl", rows(30))
    preflight(made, 2)
    assert [a == b for a, b in zip(before, made.pins, strict=True)] == [True, False, True]
    result, code = run_in_process(tmp_path / "stale", _with_pins(made, before).stage("sft"))
    assert (code, result.reason) == (2, "InputChanged"), result
    assert "q.jsonl" in result.message


def _with_pins(made: LocalPipeline, pins: list[str]) -> LocalPipeline:
    other = LocalPipeline(made.body, made.folder)
    other.pins = pins
    return other


def test_a_stage_is_a_hit_only_on_hits_and_one_flipped_byte_makes_it_a_miss(tmp_path: Path, model: Path) -> None:
    made = pipeline(tmp_path, model)
    preflight(made)
    files = {name: commit(made, name) for name in ("sft", "dpo", "final", "exam")}

    def cached(number: int) -> str:
        result, _ = preflight(made, number)
        assert result.preflight is not None
        return result.preflight.cached

    assert cached(2) == "1111"
    stat = files["final"].stat()
    files["final"].write_text("finaL")
    import os

    os.utime(files["final"], ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as rotting disks do
    assert cached(3) == "1100"
    assert [stage["why"] for stage in plan_of(made)["stages"]][2:] == [
        "weights is damaged",
        "an input is computed again",
    ]
    files["sft"].unlink()
    assert cached(4) == "0000"
    commit(made, "sft")
    assert cached(5) == "1000"
    assert plan_of(made)["stages"][1]["why"] == "it was made from other outputs of its inputs"


def test_formats_are_checked_once_they_are_known(tmp_path: Path, model: Path) -> None:
    made = pipeline(
        tmp_path, model, [{"name": "dpo", "dpo": {"dataset": "q"}}, {"name": "sft", "sft": {"dataset": "p"}}]
    )
    result, code = preflight(made)
    assert (code, result.reason) == (2, "BadInput")
    assert result.message == (
        'spec.stages[0].dpo.dataset: "q" holds instruction rows (instruction, input, output); dpo needs preference rows '
        "(prompt, chosen, rejected). Datasets that fit: p"
    )


def test_an_empty_split_is_named_with_the_remedy(tmp_path: Path, model: Path) -> None:
    write_jsonl(tmp_path / "q.jsonl", rows(3))
    write_jsonl(tmp_path / "p.jsonl", pairs())
    result, code = preflight(pipeline(tmp_path, model, split={"test": 0.0001}))
    assert code == 2
    assert result.message.startswith(
        'spec.stages[3].evaluate.suites[0].perplexity.dataset: "q" has no rows in its test split'
    )
    assert "(3 rows: 3 in train)" in result.message
    assert "datasets[].split.test" in result.message


def test_bad_rows_are_named_or_counted(tmp_path: Path, model: Path) -> None:
    write_jsonl(tmp_path / "q.jsonl", [*rows(), {"instruction": 7, "output": "x"}])
    write_jsonl(tmp_path / "p.jsonl", pairs())
    result, code = preflight(pipeline(tmp_path, model))
    assert code == 2
    assert result.message == (
        f'file://{tmp_path}/q.jsonl line 41: "instruction" is a number, text expected '
        "(1 bad row of 41; allow some with datasets[].maxBadRows)"
    )
    result, code = preflight(pipeline(tmp_path, model, maxBadRows=1), 2)
    assert code == 0
    assert result.preflight is not None
    assert any("1 bad row skipped" in note for note in result.preflight.notes)


def test_prompts_trained_on_and_tested_on_are_found(tmp_path: Path, model: Path) -> None:
    write_jsonl(tmp_path / "q.jsonl", rows())
    write_jsonl(tmp_path / "p.jsonl", [*pairs(4), {"prompt": "SAY  39", "chosen": "It is 39.", "rejected": "No."}])
    stages = [
        {"name": "sft", "sft": {"dataset": "q"}},
        {"name": "exam", "evaluate": {"suites": [{"preferenceAccuracy": {"dataset": "p"}}]}},
    ]
    made = pipeline(tmp_path, model, stages, split={"test": 0.0})
    made.body["spec"]["datasets"][1] = {"name": "p", "source": f"file://{tmp_path}/p.jsonl", "role": "test"}
    made = LocalPipeline(made.body, tmp_path)
    result, code = preflight(made)
    assert code == 0, result
    assert plan_of(made)["leaks"] == [{"trained": "q", "tested": "p", "count": 5, "of": 5}]
    assert result.preflight is not None
    assert result.preflight.notes[0] == "5 of 5 held-out prompts of p stand in the training rows of q"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("file:///nowhere/q.jsonl", "is not there"),
        ("file:///nowhere/*.jsonl", "no file matches"),
        ("s3://nowhere/q.jsonl", "nowhere"),
    ],
)
def test_a_missing_dataset_is_named(
    tmp_path: Path, model: Path, source: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    result, code = preflight(pipeline(tmp_path, model, source=source))
    assert (code, said in result.message) == (2, True), result


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "pytorch_model.bin").write_bytes(b"\x80\x04")
    result, code = preflight(pipeline(tmp_path, empty))
    assert code == 2
    assert "config.json and *.safetensors" in result.message
    assert "never loaded: convert them to safetensors" in result.message


def damaged(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    return folder


def test_files_of_two_models_are_told_apart(tmp_path: Path, model: Path) -> None:
    folder = damaged(model, tmp_path / "mixed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))
    result, code = preflight(pipeline(tmp_path, folder))
    assert code == 2
    assert "model.embed_tokens.weight has 24,576 numbers, config.json asks for 384 × 128" in result.message


def test_a_model_without_its_tokenizer_is_named(tmp_path: Path, model: Path) -> None:
    folder = damaged(model, tmp_path / "mute")
    (folder / "tokenizer.json").unlink()
    result, code = preflight(pipeline(tmp_path, folder))
    assert (code, result.message) == (2, "mute: it has no tokenizer. A tokenizer.json must lie beside the weights")


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    result, code = preflight(pipeline(tmp_path, tmp_path / "nowhere"))
    assert code == 2
    assert result.message.startswith(f'there is no model at "file://{tmp_path}/nowhere": no folder of that name')


def test_another_numerics_version_is_refused(tmp_path: Path, model: Path) -> None:
    made = pipeline(tmp_path, model)
    stages = [stage.model_copy(update={"numerics_version": 2}) for stage in made.record.stages]
    made.record = made.record.model_copy(update={"stages": stages})
    result, code = preflight(made)
    assert (code, result.reason) == (2, "RuntimeTooOld")


def test_the_findings_of_48_inputs_fit_a_termination_message(tmp_path: Path, model: Path) -> None:
    datasets, stages = [], []
    for number in range(47):
        write_jsonl(tmp_path / f"d{number}.jsonl", rows(3, start=100 * number))
        datasets.append({"name": f"data-{number}", "source": f"file://{tmp_path}/d{number}.jsonl"})
        stages.append({"name": f"s{number}", "sft": {"dataset": f"data-{number}"}})
    made = pipeline(tmp_path, model)
    made.body["spec"]["datasets"], made.body["spec"]["stages"] = datasets, stages
    made = LocalPipeline(made.body, tmp_path)
    result, code = preflight(made)
    assert code == 0, result
    message = StageResult.from_message(result.to_message())
    assert message is not None
    assert message.preflight is not None
    assert len(message.preflight.digests) == 48
