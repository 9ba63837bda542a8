"""Trainers of the local runner as forks of the test process: no second import of torch, so that a stage takes a second.

Everything else is real: plan, runner, state, storage, the stage itself, its result and its termination message. What the
launcher adds (ranks, signals, the guard) has tests of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import torch  # noqa: F401  # for the forks
from plumbline_api.stagerun import StageRun
from plumbline_cli.local.launch import trainer_environment
from plumbline_cli.local.process import StageProcess
from plumbline_cli.local.state import RunFolder
from plumbline_trainer.context import StopSignal
from plumbline_trainer.launcher import record, write_termination
from plumbline_trainer.storage.objects import open_store
from plumbline_trainer.transcript import Transcript
from plumbline_trainer.worker import execute, make_context, make_log


class ForkedStage(StageProcess):
    """One attempt in a fork, as the runner looks at it."""

    def __init__(self, run: StageRun, environment: dict[str, str], scratch: Path, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._fork = multiprocessing.get_context("fork").Process(
            target=_attempt, args=(run, environment, scratch, log), daemon=True
        )
        self._fork.start()

    @property
    def pid(self) -> int:
        assert self._fork.pid is not None
        return self._fork.pid

    def poll(self) -> int | None:
        self._fork.join(0)
        return self._fork.exitcode

    def wait(self, timeout: float) -> int | None:
        self._fork.join(timeout)
        return self._fork.exitcode

    def terminate(self) -> None:
        self.kill()  # a test that stops a stage uses the real launcher

    def kill(self) -> None:
        self._fork.kill()
        self._fork.join()


class ForkingLauncher:
    """Starts attempts as forks."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def __call__(self, run: StageRun, job: str) -> StageProcess:
        files = self._folder.job(job)
        for stale in (files.termination, files.progress):
            stale.unlink(missing_ok=True)
        files.scratch.mkdir(parents=True)
        return ForkedStage(run, trainer_environment(os.environ, run, files), files.scratch, files.log)


def _attempt(run: StageRun, environment: dict[str, str], scratch: Path, log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
    os.chdir(scratch)
    # As it travels to a real trainer.
    run = StageRun.from_json(run.to_json())
    context = make_context(run, scratch=scratch, stop=StopSignal(), log=make_log(), environment=environment)
    result, code = execute(context)
    record(open_store(run.storage), run, 0, result, Transcript())
    write_termination(environment, result)
    sys.stderr.flush()
    os._exit(code)
