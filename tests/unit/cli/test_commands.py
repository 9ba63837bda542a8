import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.commands import CommandLine
from support.local_runs import FAKE_COMMAND, pipeline_body, write_manifest


@pytest.fixture
def plumbline(monkeypatch, capsys):
    monkeypatch.setattr("plumbline_cli.local.launch.trainer_command", lambda: FAKE_COMMAND)
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def manifest(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_manifest(tmp_path)


def behave(folder: Path, behaviour: dict) -> None:
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "runs" / "behaviour.json").write_text(json.dumps(behaviour))


def test_run_shows_stages_and_results_and_is_quick_the_second_time(plumbline, manifest):
    first = plumbline("run", manifest)
    assert first.code == 0, first.err
    lines = first.out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("✔")] == [
        f"✔ {name}" for name in ("preflight", "sft", "dpo", "final", "finalize")
    ]
    assert "✔ done in" in first.out
    assert "model   runs/default/merge/" in first.out
    assert "report  runs/default/pipelines/demo/" in first.out
    second = plumbline("run", manifest)
    assert second.code == 0
    assert "✔ all 3 stages found in storage" in second.out


def test_run_as_json_is_one_document_with_the_status(plumbline, manifest):
    ended = plumbline("run", manifest, "-o", "json")
    document = json.loads(ended.out)
    assert document["kind"] == "AlignmentPipeline"
    assert document["status"]["phase"] == "Succeeded"
    assert "sft: " in ended.err, "people still see what goes on"


def test_a_failed_run_says_what_failed_in_the_words_of_status_and_how_to_go_on(plumbline, manifest):
    words = 'data/prefs.jsonl line 3: "chosen" is a number, text expected'
    behave(manifest.parent, {"dpo": {"fail": ["BadInput", words, 2]}})
    ended = plumbline("run", manifest)
    assert ended.code == 1
    assert f"✘ dpo failed. BadInput: {words}" in unwrapped(ended.out)
    assert f"go on with: plumbline run {manifest.name}" in unwrapped(ended.out)
    status = plumbline("status", manifest)
    assert status.code == 0
    assert words in unwrapped(status.out)
    waited = plumbline("wait", manifest)
    assert waited.code == 1
    assert words in unwrapped(waited.err)


def test_status_wait_logs_and_report_read_a_local_run_by_file_and_by_name(plumbline, manifest):
    plumbline("run", manifest)
    by_file, by_name = plumbline("status", manifest), plumbline("status", "demo", "--storage", "runs")
    assert by_file.code == by_name.code == 0
    assert by_file.out == by_name.out
    assert "demo · Succeeded" in by_file.out
    assert json.loads(plumbline("status", manifest, "-o", "json").out)["status"]["phase"] == "Succeeded"
    assert yaml.safe_load(plumbline("status", manifest, "-o", "yaml").out)["metadata"]["name"] == "demo"
    assert plumbline("wait", manifest, "--timeout", "5s").out.strip() == "demo succeeded"
    assert plumbline("logs", manifest, "sft").out == "sft attempt 1 begins\n"
    assert plumbline("logs", manifest, "sft", "--tail", "0").out == ""
    assert json.loads(plumbline("logs", manifest, "sft", "-o", "json").out) == {"lines": ["sft attempt 1 begins"]}
    assert plumbline("logs", manifest, "sft", "-o", "json", "--follow").code == 2
    report = plumbline("report", manifest)
    assert report.code == 0
    assert report.out.strip().endswith("report.html")
    saved = manifest.parent / "copy.html"
    assert plumbline("report", manifest, "--save", saved).code == 0
    assert saved.read_text() == "<p>report</p>"
    unsaved = plumbline("report", manifest, "--save", "/nowhere/copy.html")
    assert (unsaved.code, unsaved.err.strip()) == (2, "--save /nowhere/copy.html: No such file or directory")


def test_what_is_not_there_is_code_3_with_a_remedy(plumbline, manifest):
    ended = plumbline("status", manifest)
    assert ended.code == 3
    assert "there is no local run of demo" in ended.err
    assert "plumbline run FILE" in ended.err
    assert plumbline("validate", "none.yaml").code == 3
    plumbline("run", manifest)
    logs = plumbline("logs", manifest, "sftt")
    assert logs.code == 3
    assert "there is no log of sftt" in logs.err
    assert "sft (attempt 1)" in logs.err


def test_the_log_of_a_stage_that_was_found_in_storage_is_that_of_an_earlier_call(plumbline, manifest):
    plumbline("run", manifest)
    plumbline("run", manifest)
    ended = plumbline("logs", manifest, "sft")
    assert ended.out == "sft attempt 1 begins\n"
    assert "its log of an earlier one" in ended.err
    assert plumbline("logs", manifest).out.startswith("finalize attempt 1 begins")


def test_mistakes_are_code_2_and_never_a_traceback(plumbline, manifest, tmp_path):
    body = pipeline_body()
    body["spec"]["stages"][1]["dpo"]["dataset"] = "questions"
    write_manifest(tmp_path, body)
    for command in ("validate", "plan", "run"):
        ended = plumbline(command, manifest)
        assert ended.code == 2, command
        message = '"questions" holds instruction rows'
        assert f"{manifest}:" in ended.err, command
        assert message in ended.err, command
        assert "Traceback" not in ended.err
    assert not (tmp_path / "runs").exists(), "nothing is written for a manifest that does not hold"


def test_validate_prints_problems_for_programs_too(plumbline, manifest, tmp_path):
    good = plumbline("validate", manifest, "-o", "json")
    assert good.code == 0
    assert json.loads(good.out) == {"valid": True, "problems": [], "remarks": []}
    body = pipeline_body()
    body["spec"]["sed"] = 3
    write_manifest(tmp_path, body)
    bad = plumbline("validate", manifest, "-o", "json")
    assert bad.code == 2
    [problem] = json.loads(bad.out)["problems"]
    assert problem["path"] == "spec.sed"
    assert problem["message"].endswith("Did you mean seed?")
    assert problem["line"] > 0


def test_validate_looks_at_every_file(plumbline, manifest, tmp_path):
    ended = plumbline("validate", "none.yaml", tmp_path, manifest, "-o", "json")
    assert ended.code == 2
    assert [problem["message"] for problem in json.loads(ended.out)["problems"]] == [
        "there is no such file",
        "this is a folder; name the manifest file in it",
    ]
    assert plumbline("validate", "none.yaml", manifest).code == 3


def test_storage_and_namespace_stay_where_they_belong(plumbline, manifest, tmp_path):
    (tmp_path / "file").write_text("")
    ended = plumbline("run", manifest, "--storage", tmp_path / "file")
    assert ended.code == 2
    assert "file is a file; results need a folder. Name one with --storage" in ended.err
    ended = plumbline("run", manifest, "-n", "../../elsewhere")
    assert ended.code == 2
    assert 'metadata.namespace: "../../elsewhere" must be small letters' in ended.err
    assert not (tmp_path / "runs").exists()


def test_plan_tells_what_runs_and_leaves_no_run_behind(plumbline, manifest, tmp_path):
    first = plumbline("plan", manifest)
    assert first.code == 0, first.err
    assert [line.split()[:3] for line in first.out.splitlines() if "▶" in line] == [
        ["sft", "▶", "runs"],
        ["dpo", "▶", "runs"],
        ["final", "▶", "runs"],
    ]
    assert "3 stages to run" in first.out
    assert plumbline("status", manifest).code == 3
    plumbline("run", manifest)
    second = plumbline("plan", manifest)
    assert "every stage is in storage" in second.out
    assert [stage["action"] for stage in json.loads(plumbline("plan", manifest, "-o", "json").out)["stages"]] == [
        "cached"
    ] * 3
    behave(tmp_path, {"preflight": {"fail": ["BadInput", "prefs.jsonl: no such file", 2]}})
    failed = plumbline("plan", manifest)
    assert failed.code == 2
    assert "preflight BadInput: prefs.jsonl: no such file" in failed.out


def test_wait_ends_with_124_when_time_runs_out(plumbline, manifest, tmp_path):
    (tmp_path / "runs").mkdir()
    behave(tmp_path, {"sft": {"steps": 5000}})
    command = [
        sys.executable,
        "-c",
        "import plumbline_cli.local.launch as launch, sys; from support.local_runs import FAKE_COMMAND;"
        "launch.trainer_command = lambda: FAKE_COMMAND;"
        f"sys.argv = ['plumbline', 'run', {str(manifest)!r}]; from plumbline_cli.main import main; main()",
    ]
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    run = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert run.stdout is not None
        for line in run.stdout:
            if line.decode().startswith("▶ sft"):
                break
        waited = plumbline("wait", manifest, "--timeout", "300ms")
        assert waited.code == 124
        assert "has not ended after 300ms" in waited.err
        assert "sft" in plumbline("status", manifest).out
        again = plumbline("run", manifest)
        assert again.code == 2
        assert f"is being run already by process {run.pid}" in again.err
    finally:
        run.terminate()
        run.communicate(timeout=30)
    assert run.returncode == 130
    stopped = plumbline("wait", manifest)
    assert stopped.code == 1
    assert "nobody runs demo right now" in stopped.err
    assert "it goes on with: plumbline run" in plumbline("status", manifest).err


def test_how_to_go_on_names_everything_that_says_which_run_it_is(plumbline, manifest, tmp_path, monkeypatch):
    storage = tmp_path / "else where"
    plumbline("run", manifest, "--storage", storage, "--name", "other", "-n", "team")
    [state] = storage.glob("team/pipelines/other/*/state.json")
    document = json.loads(state.read_text())
    document["status"]["phase"] = "Running"
    state.write_text(json.dumps(document))
    told = plumbline("status", "other", "--storage", storage, "-n", "team").err
    monkeypatch.chdir("/")
    inside = f"{manifest} --name other --namespace team --storage '{storage}'"
    assert (
        f"it goes on with: plumbline run {inside}"
        in plumbline("status", "other", "--storage", storage, "-n", "team").err
    )
    assert "it goes on with: plumbline run" in told


def test_commands_for_a_cluster_refuse_a_file(plumbline, manifest):
    for command in ("suspend", "resume", "retry"):
        ended = plumbline(command, manifest)
        assert ended.code == 2
        assert "is a file. Name a pipeline on the cluster" in ended.err


def test_init_writes_what_validates_and_never_overwrites(plumbline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plumbline("init", "start", "--name", "mine").code == 0
    manifest = tmp_path / "start" / "pipeline.yaml"
    assert plumbline("validate", manifest).out.strip() == "valid: AlignmentPipeline mine"
    for dataset in yaml.safe_load(manifest.read_text())["spec"]["datasets"]:
        rows = (manifest.parent / dataset["source"]).read_text().splitlines()
        assert len(rows) == len({json.dumps(json.loads(row)) for row in rows}) >= 20
    before = manifest.read_text()
    again = plumbline("init", "start")
    assert again.code == 2
    assert "nothing was written" in again.err
    assert manifest.read_text() == before
    assert json.loads(plumbline("init", "third", "-o", "json").out) == {
        "manifest": "third/pipeline.yaml",
        "written": ["third/data/preferences.jsonl", "third/data/questions.jsonl", "third/pipeline.yaml"],
    }
    assert plumbline("init", "other", "--name", "Not_A_Name").code == 2
    assert not (tmp_path / "other").exists()


def test_version_and_the_name_of_the_plugin(plumbline):
    found = json.loads(plumbline("version", "-o", "json").out)
    assert found["api"] == "plumbline.dev/v1alpha1"
    assert (
        plumbline("version", "--help", program="/usr/bin/kubectl-plumbline")
        .out.split("Usage:")[1]
        .startswith(" kubectl plumbline version")
    )


def test_a_fault_of_ours_is_a_message_and_with_debug_a_traceback(plumbline, manifest, monkeypatch):
    monkeypatch.setattr("plumbline_cli.manifests.read_documents", lambda _file: 1 / 0)
    ended = plumbline("validate", manifest)
    assert ended.code == 1
    assert "unexpected ZeroDivisionError" in ended.err
    assert "--debug" in ended.err
    monkeypatch.setattr("sys.argv", ["plumbline", "--debug", "validate", str(manifest)])
    from plumbline_cli.main import main

    with pytest.raises(ZeroDivisionError):
        main()


def test_a_storage_that_cannot_be_written_is_named(plumbline, manifest, tmp_path):
    (tmp_path / "file").write_text("")
    ended = plumbline("run", manifest, "--storage", tmp_path / "file")
    assert ended.code == 2
    assert f"{tmp_path / 'file'}" in ended.err
    assert "Traceback" not in ended.err


def test_a_local_run_loads_neither_torch_nor_kopf_nor_kubernetes():
    code = (
        "import sys; import plumbline_cli.local.runner, plumbline_cli.local.session, plumbline_cli.display.ending;"
        "print([name for name in ('torch', 'kubernetes', 'boto3', 'kopf', 'plumbline_trainer') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_importing_the_command_loads_neither_torch_nor_kubernetes():
    code = (
        "import sys; import plumbline_cli.main; "
        "print([name for name in ('torch', 'kubernetes', 'boto3', 'kopf', 'pydantic', 'plumbline_trainer') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def unwrapped(text: str) -> str:
    return " ".join(text.split())
