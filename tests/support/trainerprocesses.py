"""The trainers of pods as processes of this machine, to be killed as the kernel or a power cut would."""

from __future__ import annotations

import contextlib
import json
import signal

import psutil
from plumbline_api.stagerun import STAGE_ENV


def find_trainers(uid: str, stage: str, program: str) -> list[psutil.Process]:
    """Processes of a stage of the pipeline with this uid that run `program` (`launcher` or `worker`)."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ValueError, KeyError):
            if not any(program in word for word in process.cmdline()):
                continue
            told = json.loads(process.environ()[STAGE_ENV])
            if told["pipeline"]["uid"] == uid and told["stage"] == stage:
                found.append(process)
    return found


def kill_first_process(uid: str, stage: str) -> None:
    """SIGKILL for process 1 of the stage's container: nobody is left to write a message."""
    launchers = find_trainers(uid, stage, "plumbline-trainer")
    assert launchers, f"no launcher of stage {stage} runs on this machine"
    first = min(launchers, key=lambda process: process.create_time())
    first.send_signal(signal.SIGKILL)


def kill_worker(uid: str, stage: str) -> None:
    """SIGKILL for the rank: the launcher lives and says so."""
    [worker] = find_trainers(uid, stage, "plumbline_trainer.worker")
    worker.send_signal(signal.SIGKILL)
