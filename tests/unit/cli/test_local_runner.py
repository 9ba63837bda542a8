import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plumbline_cli.exits import CommandError
from plumbline_cli.local.lock import RunLock, is_locked
from support.local_runs import Recorder, make_runner, open_run, pipeline_body, starts, write_manifest


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_manifest(tmp_path)


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("did not happen in time")
        time.sleep(0.01)  # polling with a deadline


def stages_started(storage: Path) -> list[str]:
    return [line["stage"] for line in starts(storage)]


def test_stages_run_in_order_and_the_run_succeeds(manifest, storage):
    session = open_run(manifest, storage)
    status = make_runner(session).run()
    assert status.phase == "Succeeded"
    assert stages_started(storage) == ["preflight", "sft", "dpo", "final", "finalize"]
    assert status.model is not None
    assert status.model.stage == "final"
    assert {entry.name: entry.phase for entry in status.stages} == dict.fromkeys(
        ["preflight", "sft", "dpo", "final", "finalize"], "Succeeded"
    )
    on_disk = session.folder.load()
    assert on_disk is not None
    assert on_disk.status == status
    assert json.loads(session.folder.record_file.read_text())["pipeline"]["name"] == "demo"
    assert list(session.folder.path.rglob("scratch")) == []


def test_second_call_starts_no_training(manifest, storage):
    make_runner(open_run(manifest, storage)).run()
    (storage / "starts.jsonl").unlink()
    status = make_runner(open_run(manifest, storage)).run()
    assert status.phase == "Succeeded"
    assert stages_started(storage) == ["preflight", "finalize"]
    assert all(status.stage_named(name).cached for name in ("sft", "dpo", "final"))


def test_edit_raises_generation_and_runs_only_what_changed(manifest, storage):
    make_runner(open_run(manifest, storage)).run()
    (storage / "starts.jsonl").unlink()
    body = pipeline_body()
    body["spec"]["stages"][1]["dpo"]["beta"] = 0.2
    write_manifest(manifest.parent, body)
    session = open_run(manifest, storage)
    assert session.state.generation == 2
    make_runner(session).run()
    assert stages_started(storage) == ["preflight", "dpo", "final", "finalize"]


def test_cache_false_computes_again_after_a_success(tmp_path, storage):
    manifest = write_manifest(tmp_path, pipeline_body(cache=False))
    first = open_run(manifest, storage)
    make_runner(first).run()
    (storage / "starts.jsonl").unlink()
    second = open_run(manifest, storage)
    assert second.folder.uid != first.folder.uid
    make_runner(second).run()
    assert "sft" in stages_started(storage)


def test_interrupt_stops_after_a_checkpoint_and_the_next_call_goes_on_from_it(manifest, storage):
    recorder = Recorder()
    runner = make_runner(open_run(manifest, storage, {"sft": {"steps": 60}}), recorder)

    def interrupt_midway(view):
        live = view.live.get("sft")
        if live is not None and live.progress_percentage and not runner.interrupted:
            runner.interrupt()

    recorder.on_view = interrupt_midway
    status = runner.run()
    assert status.phase == "Suspended"
    assert runner.state.interrupted
    [job] = [job for job in runner.state.jobs if job.stage == "sft"]
    assert job.result is not None
    assert job.result.outcome == "Stopped"
    stopped_at = job.result.last_step
    assert 0 < stopped_at < 60

    again = make_runner(open_run(manifest, storage, {"sft": {"steps": 60}}))
    assert again.run().phase == "Succeeded"
    [job] = [job for job in again.state.jobs if job.stage == "sft"]
    assert job.result is not None
    assert job.result.first_step == stopped_at
    assert stages_started(storage).count("preflight") == 2


def test_second_interrupt_kills_at_once(manifest, storage):
    recorder = Recorder()
    runner = make_runner(open_run(manifest, storage, {"sft": {"steps": 5000, "deaf": True}}), recorder)

    def interrupt_twice(view):
        if "sft" in view.live:
            runner.interrupt()

    recorder.on_view = interrupt_twice
    runner.run()
    pid = next(line["pid"] for line in starts(storage) if line["stage"] == "sft")
    until(lambda: not _is_alive(pid))


def test_failure_of_the_user_is_final_and_keeps_the_trainers_words(manifest, storage):
    behaviour = {"dpo": {"fail": ["BadInput", 'line 3: "chosen" is a number', 2]}}
    status = make_runner(open_run(manifest, storage, behaviour)).run()
    assert status.phase == "Failed"
    entry = status.stage_named("dpo")
    assert (entry.phase, entry.reason, entry.attempt) == ("Failed", "BadInput", 1)
    assert entry.message == 'line 3: "chosen" is a number'
    assert status.stage_named("final").phase == "Skipped"
    assert stages_started(storage)[-1] == "finalize"


def test_failed_run_is_taken_up_by_the_next_call(manifest, storage):
    make_runner(open_run(manifest, storage, {"dpo": {"fail": ["BadInput", "no", 2]}})).run()
    (storage / "starts.jsonl").unlink()
    status = make_runner(open_run(manifest, storage)).run()
    assert status.phase == "Succeeded"
    assert stages_started(storage) == ["preflight", "dpo", "final", "finalize"]


def test_killed_trainer_is_tried_again(manifest, storage):
    status = make_runner(open_run(manifest, storage, {"sft": {"dieOnAttempts": 1}})).run()
    assert status.phase == "Succeeded"
    assert status.stage_named("sft").attempt == 2
    assert [line["attempt"] for line in starts(storage) if line["stage"] == "sft"] == [1, 2]


def test_timeout_stops_a_stage(tmp_path, storage):
    manifest = write_manifest(tmp_path, pipeline_body(timeout="500ms"))
    session = open_run(manifest, storage, {"sft": {"steps": 5000}})
    status = make_runner(session).run()
    entry = status.stage_named("sft")
    assert (entry.phase, entry.reason) == ("Failed", "Timeout")


def test_independent_stages_wait_for_the_machine_unless_told_otherwise(tmp_path, storage):
    body = pipeline_body()
    body["spec"]["stages"].append({"name": "other", "model": "sft", "dpo": {"dataset": "prefs", "beta": 0.5}})
    manifest = write_manifest(tmp_path, body)

    def most_at_once(parallel: int, place: Path) -> int:
        recorder = Recorder()
        behaviour = {"dpo": {"steps": 40}, "other": {"steps": 40}}
        status = make_runner(open_run(manifest, place, behaviour), recorder, parallel=parallel).run()
        assert status.phase == "Succeeded"
        return max(len(view.live) for view in recorder.views)

    assert most_at_once(1, storage) == 1
    assert most_at_once(2, tmp_path / "more") == 2


def test_trainers_see_only_what_they_need_of_the_environment(manifest, storage, monkeypatch):
    monkeypatch.setenv("GITHUB_TOKEN", "secret")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    make_runner(open_run(manifest, storage)).run()
    environment = starts(storage)[0]["environment"]
    assert "GITHUB_TOKEN" not in environment
    assert {"AWS_REGION", "PATH", "PLUMBLINE_STAGE"} <= set(environment)


def test_killed_runner_leaves_no_trainer_behind(manifest, storage):
    storage.mkdir()
    (storage / "behaviour.json").write_text(json.dumps({"sft": {"steps": 5000}}))
    script = (
        "import sys; from pathlib import Path; from support.local_runs import *;"
        "from plumbline_cli.local.session import open_session;"
        f"make_runner(open_session({str(manifest)!r}, storage=Path({str(storage)!r}))).run()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    runner = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        until(lambda: (storage / "starts.jsonl").exists() and "sft" in stages_started(storage))
    finally:
        runner.send_signal(signal.SIGKILL)
        runner.wait()
    pid = next(line["pid"] for line in starts(storage) if line["stage"] == "sft")
    until(lambda: not _is_alive(pid))
    checkpoints = list(storage.rglob("checkpoint"))
    assert len(checkpoints) == 1, "the trainer was stopped in good order: it wrote its checkpoint"


def test_one_run_at_a_time_in_one_storage(tmp_path):
    lock = tmp_path / "lock"
    with RunLock(lock, "demo"):
        assert is_locked(lock)
        with (
            pytest.raises(CommandError, match=rf"demo is being run already by process {os.getpid()}"),
            RunLock(lock, "demo"),
        ):
            pass
    assert not is_locked(lock)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
