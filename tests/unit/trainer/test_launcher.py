"""The launcher as a process: exit codes, messages, signals, ranks. The stage is scripted, everything else is real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from plumbline_api.stagerun import STAGE_ENV, TERMINATION_LOG_ENV, StageResult, StageRun
from plumbline_trainer.context import StageOutput
from plumbline_trainer.launcher import launch as launch_here
from plumbline_trainer.storage.manifests import commit_output
from plumbline_trainer.threads import thread_settings
from support.trainer import (
    finish_launcher,
    launch,
    launch_environment,
    manifest_of,
    output_folder,
    output_of,
    stage_context,
    stage_run,
    start_launcher,
)

SCRIPT = '''
"""Stands in for plumbline_trainer.stages.pretrain in the ranks; put there before anything is imported."""
import sys
import types

def run(context):
    import os, signal, time
    from pathlib import Path
    from plumbline_trainer.context import StageOutput
    from plumbline_trainer.errors import InputError, Interrupted, TransientError
    from plumbline_trainer.storage.checkpoints import load_latest_checkpoint, save_checkpoint

    folder = Path(os.environ["TEST_FOLDER"])
    do = os.environ["TEST_DO"]
    print(f"rank {context.rank} of {context.world_size} does {do}")
    (folder / f"started-{context.rank}").write_text(str(os.getpid()))
    culprit = context.rank == context.world_size - 1
    if culprit and do == "bad-input":
        raise InputError("field x: y; do z", reason="BadInput")
    if culprit and do == "transient":
        raise TransientError("try again", reason="StorageUnavailable")
    if culprit and do == "bug":
        {}["no such key"]
    if culprit and do == "memory":
        raise MemoryError()
    if culprit and do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if culprit and do == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if culprit and do == "exit":
        print("the last words", flush=True)
        os._exit(3)
    if do != "succeed":
        checkpoint = load_latest_checkpoint(context)
        first = checkpoint.step if checkpoint else 0
        for step in range(first, 2000):
            if context.stop.requested and do != "deaf":
                if context.is_main:
                    saved = context.scratch / "saved"
                    saved.mkdir()
                    (saved / "x").write_text(str(step))
                    save_checkpoint(context, step, saved, {})
                raise Interrupted(step)
            time.sleep(0.02)
            (folder / f"step-{context.rank}").write_text(str(step))
    made = context.scratch / f"made-{context.rank}"
    made.mkdir()
    (made / "weights").write_text("w")
    return StageOutput(made, "policy", metrics={"loss": 1.5}, tokens=10, first_step=0, last_step=4)

stage = types.ModuleType("plumbline_trainer.stages.pretrain")
stage.run = run
sys.modules[stage.__name__] = stage
'''


@pytest.fixture
def scripted(tmp_path: Path) -> dict[str, str]:
    """Environment in which the stage pretrain does what TEST_DO says."""
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SCRIPT)
    given = launch_environment(stage_run(tmp_path), tmp_path)["PYTHONPATH"]
    return {"PYTHONPATH": f"{folder}{os.pathsep}{given}", "TEST_FOLDER": str(tmp_path)}


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def run_root(run: StageRun, tmp_path: Path) -> Path:
    return Path(stage_context(tmp_path, run).run_root.removeprefix("file://"))


@pytest.mark.parametrize("processes", [1, 2])
def test_success_is_committed_recorded_and_told(tmp_path: Path, scripted: dict[str, str], processes: int) -> None:
    run = stage_run(tmp_path, "pretrain", processes=processes)
    found = launch(run, tmp_path, **scripted, TEST_DO="succeed")
    assert found.exit_code == 0, found.output
    assert (found.result.outcome, found.result.metrics, found.result.tokens) == ("Succeeded", {"loss": 1.5}, 10)
    assert found.result.manifest_digest is not None
    assert (output_folder(run) / "weights").read_text() == "w"
    recorded = StageResult.model_validate_json((run_root(run, tmp_path) / "result.json").read_bytes())
    assert recorded == found.result
    log = (run_root(run, tmp_path) / "logs" / "attempt-1.txt").read_text()
    for rank in range(processes):
        assert f"{f'[rank {rank}] ' if processes > 1 else ''}rank {rank} of {processes} does succeed" in log
    assert not list(tmp_path.glob("plumbline-*")), "the scratch folder is left behind"


@pytest.mark.parametrize(
    ("do", "code", "reason", "said"),
    [
        ("bad-input", 2, "BadInput", "field x: y; do z"),
        ("transient", 75, "StorageUnavailable", "try again"),
        ("bug", 1, "TrainerError", "KeyError: 'no such key'"),
        ("memory", 2, "OutOfMemory", "tokensPerBatch"),
        ("segfault", 1, "TrainerError", "SIGSEGV"),
        ("exit", 1, "TrainerError", "the last words"),
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_the_rank_that_fails_says_why_and_takes_the_others_along(
    tmp_path: Path, scripted: dict[str, str], do: str, code: int, reason: str, said: str, processes: int
) -> None:
    run = stage_run(tmp_path, "pretrain", processes=processes)
    found = launch(run, tmp_path, **scripted, TEST_DO=do)
    assert (found.exit_code, found.result.outcome, found.result.reason) == (code, "Failed", reason), found.output
    assert said in found.result.message
    if do != "bug":
        assert "Traceback" not in found.output
    for rank in range(processes):
        assert not psutil.pid_exists(int((tmp_path / f"started-{rank}").read_text()))


def test_a_killed_rank_is_told_from_one_out_of_memory(tmp_path: Path, scripted: dict[str, str]) -> None:
    found = launch(stage_run(tmp_path, "pretrain"), tmp_path, **scripted, TEST_DO="kill")
    assert (found.exit_code, found.result.reason) in ((75, "RankKilled"), (137, "OutOfMemory")), found.output


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_ends_in_a_checkpoint_and_the_next_attempt_goes_on(
    tmp_path: Path, scripted: dict[str, str], processes: int
) -> None:
    run = stage_run(tmp_path, "pretrain", processes=processes)
    process = start_launcher(run, tmp_path, **scripted, TEST_DO="train")
    wait_for(lambda: all((tmp_path / f"step-{rank}").exists() for rank in range(processes)))
    process.send_signal(signal.SIGTERM)
    found = finish_launcher(process, tmp_path)
    assert (found.exit_code, found.result.outcome, found.result.reason) == (143, "Stopped", "Interrupted"), found.output
    step = found.result.last_step
    assert step is not None
    checkpoints = run_root(run, tmp_path) / "checkpoints"
    assert [path.name[:8] for path in checkpoints.iterdir()] == [f"{step:08d}"]

    again = start_launcher(run.model_copy(update={"attempt": 2}), tmp_path, **scripted, TEST_DO="train")
    wait_for(lambda: int((tmp_path / "step-0").read_text() or 0) > step)
    again.send_signal(signal.SIGINT)
    second = finish_launcher(again, tmp_path)
    assert second.exit_code == 143
    assert f"resuming from step {step}" in second.output


def test_a_rank_that_does_not_stop_is_killed_before_the_pod_is(tmp_path: Path, scripted: dict[str, str]) -> None:
    run = stage_run(tmp_path, "pretrain")
    process = start_launcher(run, tmp_path, **scripted, TEST_DO="deaf", PLUMBLINE_GRACE_SECONDS="2")
    wait_for(lambda: (tmp_path / "step-0").exists())
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    found = finish_launcher(process, tmp_path)
    assert (found.exit_code, found.result.reason) == (75, "GracePeriodExceeded")
    assert time.monotonic() - start < 20


def test_ranks_die_with_the_launcher(tmp_path: Path, scripted: dict[str, str]) -> None:
    process = start_launcher(stage_run(tmp_path, "pretrain", processes=2), tmp_path, **scripted, TEST_DO="train")
    wait_for(lambda: all((tmp_path / f"step-{rank}").exists() for rank in range(2)))
    ranks = [int((tmp_path / f"started-{rank}").read_text()) for rank in range(2)]
    process.kill()
    process.communicate()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in ranks))


def test_committed_work_is_not_done_again(tmp_path: Path, scripted: dict[str, str]) -> None:
    run = stage_run(tmp_path, "pretrain")
    first = launch(run, tmp_path, **scripted, TEST_DO="succeed")
    (tmp_path / "started-0").unlink()
    second = launch(run, tmp_path, **scripted, TEST_DO="bug")
    assert (second.exit_code, second.result.reused) == (0, True), second.output
    assert (second.result.manifest_digest, second.result.metrics) == (first.result.manifest_digest, {"loss": 1.5})
    assert not (tmp_path / "started-0").exists(), "a training process was started"


def test_damaged_work_is_done_again(tmp_path: Path, scripted: dict[str, str]) -> None:
    run = stage_run(tmp_path, "pretrain")
    launch(run, tmp_path, **scripted, TEST_DO="succeed")
    damaged = output_folder(run) / "weights"
    damaged.write_text("W")
    second = launch(run, tmp_path, **scripted, TEST_DO="succeed")
    assert (second.exit_code, second.result.reused) == (0, False)
    assert "weights is damaged" in second.output
    assert (output_folder(run) / "weights").read_text() == "w"
    assert output_folder(run) != damaged.parent


def test_work_on_inputs_that_were_computed_again_is_done_again(tmp_path: Path, scripted: dict[str, str]) -> None:
    parent = stage_context(tmp_path, stage_run(tmp_path, "sft"))
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "x").write_text("one")
    commit_output(parent, StageOutput(tmp_path / "made", "policy"))
    run = stage_run(tmp_path, "pretrain", inputs=[output_of(parent.run)])
    launch(run, tmp_path, **scripted, TEST_DO="succeed")
    before = manifest_of(run)
    parent.store.delete_prefix(parent.output_root)
    commit_output(parent, StageOutput(tmp_path / "made", "policy"))
    second = launch(run, tmp_path, **scripted, TEST_DO="succeed")
    assert (second.exit_code, second.result.reused) == (0, False)
    assert manifest_of(run).parents != before.parents
    third = launch(run, tmp_path, **scripted, TEST_DO="succeed")
    assert third.result.reused


def test_collect_reads_back_what_was_committed(tmp_path: Path, scripted: dict[str, str]) -> None:
    run = stage_run(tmp_path, "pretrain")
    first = launch(run, tmp_path, **scripted, TEST_DO="succeed")
    collect = run.model_copy(update={"role": "collect", "attempt": 2})
    found = launch(collect, tmp_path)
    assert found.exit_code == 0, found.output
    assert found.result.model_copy(update={"message": ""}) == first.result
    recorded = StageResult.model_validate_json((run_root(run, tmp_path) / "result.json").read_bytes())
    assert recorded == first.result


def test_collect_says_the_stages_own_failure_or_that_nothing_is_there(tmp_path: Path, scripted: dict[str, str]) -> None:
    run = stage_run(tmp_path, "pretrain")
    collect = run.model_copy(update={"role": "collect"})
    lost = launch(collect, tmp_path)
    assert (lost.exit_code, lost.result.reason) == (75, "ResultLost")
    launch(run, tmp_path, **scripted, TEST_DO="bad-input")
    found = launch(collect, tmp_path)
    assert (found.exit_code, found.result.message) == (2, "field x: y; do z")


@pytest.mark.parametrize(
    ("document", "reason", "said"),
    [
        ("", "BadInput", "is not JSON"),
        ("[]", "RuntimeTooOld", "contract version"),
        ('{"contractVersion": 99}', "RuntimeTooOld", "the operator 99"),
        ('{"contractVersion": 1, "stage": "x"}', "BadInput", "required, but not set"),
    ],
)
def test_a_document_it_does_not_understand_is_refused(tmp_path: Path, document: str, reason: str, said: str) -> None:
    path = tmp_path / "termination"
    assert launch_here({STAGE_ENV: document, TERMINATION_LOG_ENV: str(path)}) == 2
    result = StageResult.from_message(path.read_text())
    assert result is not None
    assert (result.outcome, result.reason) == ("Failed", reason)
    assert said in result.message


def test_another_numerics_version_is_refused(tmp_path: Path) -> None:
    run = stage_run(tmp_path, "sft").model_copy(update={"numerics_version": 99})
    path = tmp_path / "termination"
    assert launch_here({STAGE_ENV: run.to_json(), TERMINATION_LOG_ENV: str(path)}) == 2
    result = StageResult.from_message(path.read_text())
    assert result is not None
    assert result.reason == "RuntimeTooOld"
    assert "numerics version 99 of sft; this trainer has version 1" in result.message


def test_the_launcher_stays_small(tmp_path: Path) -> None:
    """It has to be there still when a rank has used the memory up."""
    code = "import sys, plumbline_trainer.launcher; print([m for m in sys.modules if m in ('torch', 'numpy', 'transformers')])"
    environment = launch_environment(stage_run(tmp_path), tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_threads_are_shared_and_rest_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plumbline_trainer.threads.available_cpus", lambda: 8)
    assert thread_settings({}, 1) == {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "10000"}
    assert thread_settings({"PLUMBLINE_STAGES_AT_ONCE": "2"}, 2)["OMP_NUM_THREADS"] == "2"
    assert thread_settings({"PLUMBLINE_STAGES_AT_ONCE": "16"}, 1)["OMP_NUM_THREADS"] == "1"
    assert thread_settings({"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}, 4) == {"OMP_NUM_THREADS": "3"}
    assert thread_settings({"GOMP_SPINCOUNT": "5"}, 1) == {"OMP_NUM_THREADS": "8"}
