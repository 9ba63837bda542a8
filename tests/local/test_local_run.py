"""The command, the planner and the real trainer on this machine: no cluster, no mock."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.examples import copy_example, plumbline

DECLARED = ["domain", "sft", "dpo", "final", "exam"]

# Seconds on a machine of its own; a busy one needs patience.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    return copy_example("03-tiny", tmp_path_factory.mktemp("tiny") / "example")


def trainers_started(folder: Path, pipeline: str = "tiny") -> list[str]:
    [state] = folder.glob(f"runs/default/pipelines/{pipeline}/*/state.json")
    return [job["stage"] for job in json.loads(state.read_text())["jobs"]]


def test_the_tiny_chain_runs_whole_then_from_storage_then_what_was_damaged(example):
    planned = plumbline("plan", "pipeline.yaml", "-o", "json", cwd=example)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    forecast = json.loads(planned.stdout)
    assert [stage["action"] for stage in forecast["stages"]] == ["run"] * 5
    assert forecast["stages"][1]["estimate"]["steps"] == 6

    first = plumbline("run", "pipeline.yaml", cwd=example)
    assert first.returncode == 0, first.stdout + first.stderr
    assert trainers_started(example) == ["preflight", *DECLARED, "finalize"]
    assert "perplexity" in first.stdout
    model = next(line.split()[1] for line in first.stdout.splitlines() if line.strip().startswith("model "))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (example / model).iterdir()}
    report = next(line.split()[1] for line in first.stdout.splitlines() if line.strip().startswith("report "))
    assert (example / report).read_text().lstrip().lower().startswith("<!doctype html")

    second = plumbline("run", "pipeline.yaml", cwd=example)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "all 5 stages found in storage" in second.stdout
    assert not set(trainers_started(example)) & set(DECLARED), "nothing was trained"

    weights = example / model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    third = plumbline("run", "pipeline.yaml", cwd=example)
    assert third.returncode == 0, third.stdout + third.stderr
    started = trainers_started(example)
    assert "final" in started, "one flipped byte is a miss"
    assert not {"domain", "sft", "dpo"} & set(started)


def test_branches_are_merged_and_trained_on(tmp_path):
    """examples/07-merging: several policies for one stage, in the planner, on the way to the trainer and in the record."""
    example = copy_example("07-merging", tmp_path / "example")
    declared = ["domain", "short", "kind", "blend", "arc", "polish", "exam"]
    first = plumbline("run", "pipeline.yaml", cwd=example)
    assert first.returncode == 0, first.stdout + first.stderr
    started = trainers_started(example, "merging")
    assert sorted(started) == sorted(["preflight", *declared, "finalize"])
    assert max(map(started.index, ("short", "kind"))) < min(map(started.index, ("blend", "arc")))
    [lineage] = example.glob("runs/default/pipelines/merging/*/lineage.json")
    stages = {stage["name"]: stage for stage in json.loads(lineage.read_text())["stages"]}
    assert [(parent["role"], parent["name"]) for parent in stages["blend"]["parents"]] == [
        ("models.0", "short"),
        ("models.1", "kind"),
        ("base", "domain"),
    ]
    assert [part["share"] for part in stages["blend"]["meta"]["models"]] == pytest.approx([2 / 3, 1 / 3])
    assert stages["blend"]["metrics"]["logitKl.kind"] > 0
    assert stages["arc"]["metrics"]["models"] == 2
    assert stages["polish"]["meta"]["base"]["name"] == "blend"
    report = next(line.split()[1] for line in first.stdout.splitlines() if line.strip().startswith("report "))
    text = (example / report).read_text()
    assert "Merging 2 models by ties" in text
    assert "DoRA rank 4, model.norm whole" in text
    card = next(example.glob("runs/default/pipelines/merging/*/model-card.md")).read_text()
    assert "| blend | merge | short + kind |" in card

    second = plumbline("run", "pipeline.yaml", cwd=example)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "all 7 stages found in storage" in second.stdout

    # Another weight is other work for the merge and what comes after it, not for the branches.
    manifest = (example / "pipeline.yaml").read_text()
    (example / "pipeline.yaml").write_text(manifest.replace("weight: 2", "weight: 3"))
    third = plumbline("run", "pipeline.yaml", cwd=example)
    assert third.returncode == 0, third.stdout + third.stderr
    assert set(trainers_started(example, "merging")) & set(declared) == {"blend", "polish", "exam"}


def test_ctrl_c_stops_after_a_checkpoint_and_the_next_call_resumes(example):
    manifest = (example / "pipeline.yaml").read_text().replace("name: tiny", "name: stopped")
    # Another seed is other work: nothing of the run above is in storage. Many steps leave time to interrupt.
    manifest = manifest.replace("seed: 7", "seed: 8").replace("maxSteps: 6", "maxSteps: 400")
    manifest = manifest.replace("epochs: 9", "epochs: 200")
    (example / "stopped.yaml").write_text(manifest)
    command = [sys.executable, "-m", "plumbline_cli.main", "run", "stopped.yaml"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    run = subprocess.Popen(
        command, cwd=example, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert run.stdout is not None
    output = []
    for line in run.stdout:
        output.append(line)
        if line.startswith("▶ sft: step"):
            run.send_signal(signal.SIGINT)
            break
    output.append(run.communicate(timeout=300)[0])
    assert run.returncode == 130, "".join(output)
    assert "goes on from its last checkpoint with: plumbline run stopped.yaml" in "".join(output)

    again = plumbline("run", "stopped.yaml", cwd=example)
    assert again.returncode == 0, again.stdout + again.stderr
    [state] = example.glob("runs/default/pipelines/stopped/*/state.json")
    jobs = {job["stage"]: job for job in json.loads(state.read_text())["jobs"]}
    assert "domain" not in jobs, "it was finished before, and found in storage"
    assert 0 < jobs["sft"]["result"]["firstStep"] < jobs["sft"]["result"]["lastStep"] == 400


def test_a_bad_row_is_named_by_plan_before_anything_trains(example, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(example, folder, ignore=shutil.ignore_patterns("runs"))
    data = folder / "data" / "preferences.jsonl"
    lines = data.read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), "chosen": 3})
    data.write_text("\n".join(lines))
    ended = plumbline("plan", "pipeline.yaml", cwd=folder)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    words = " ".join(ended.stdout.split())
    assert "preferences.jsonl" in words
    assert "line 3" in words
    assert "Traceback" not in ended.stdout + ended.stderr
