"""One rank of a stage: runs it, commits what it yields (rank 0), and leaves a report for the launcher."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from plumbline_api.stagerun import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_STOPPED,
    EXIT_TRANSIENT,
    METRICS_MAX,
    STAGE_ENV,
    StageResult,
    StageRun,
)

from plumbline_trainer.context import StageContext, StageOutput, StopSignal
from plumbline_trainer.errors import InputError, Interrupted, TransientError
from plumbline_trainer.launcher import SCRATCH_ENV
from plumbline_trainer.outcomes import EXIT_INTERNAL, OUT_OF_MEMORY, OUT_OF_MEMORY_REMEDY, failure, write_report
from plumbline_trainer.progress import ProgressReporter
from plumbline_trainer.storage.checkpoints import wait_for_uploads
from plumbline_trainer.storage.manifests import commit_output, finite
from plumbline_trainer.storage.objects import open_store

STAGES: dict[str, str] = {
    "preflight": "plumbline_trainer.stages.preflight",
    "collect": "plumbline_trainer.stages.collect",
    "finalize": "plumbline_trainer.stages.finalize",
    "pretrain": "plumbline_trainer.stages.pretrain",
    "sft": "plumbline_trainer.stages.sft",
    "rewardModel": "plumbline_trainer.stages.reward_model",
    "dpo": "plumbline_trainer.stages.dpo",
    "kto": "plumbline_trainer.stages.kto",
    "orpo": "plumbline_trainer.stages.orpo",
    "simpo": "plumbline_trainer.stages.simpo",
    "cpo": "plumbline_trainer.stages.cpo",
    "rrhf": "plumbline_trainer.stages.rrhf",
    "ppo": "plumbline_trainer.stages.ppo",
    "grpo": "plumbline_trainer.stages.grpo",
    "rloo": "plumbline_trainer.stages.rloo",
    "reinforce": "plumbline_trainer.stages.reinforce",
    "merge": "plumbline_trainer.stages.merge",
    "evaluate": "plumbline_trainer.stages.evaluate",
}
"""Module of each stage type and implicit step; imported when it is run."""


def main() -> None:
    """Entry point of a rank."""
    _die_with_launcher()
    environment = os.environ
    scratch = Path(environment[SCRATCH_ENV])
    rank = int(environment["RANK"])
    log = make_log()
    stop = StopSignal()

    def note(_number: int, _frame: FrameType | None) -> None:
        stop.request()

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher passes Ctrl-C on as SIGTERM
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    run = StageRun.from_json(environment[STAGE_ENV])
    context = make_context(run, scratch=scratch, stop=stop, log=log, environment=environment)
    result, code = execute(context)
    accelerated = "torch" in sys.modules and _uses_accelerator()
    write_report(scratch / f"rank-{rank}.json", result, code, accelerated=accelerated)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries (collectives, tokenizers) must not keep a rank from ending once its work is committed.
    os._exit(code)


def make_context(
    run: StageRun, *, scratch: Path, stop: StopSignal, log: logging.Logger, environment: Mapping[str, str]
) -> StageContext:
    """The context of a rank as the launcher's environment describes it."""
    rank = int(environment.get("RANK", "0"))
    store = open_store(run.storage)
    context = StageContext(
        run=run,
        store=store,
        progress=ProgressReporter(environment={}),
        stop=stop,
        scratch=scratch,
        rank=rank,
        local_rank=int(environment.get("LOCAL_RANK", "0")),
        world_size=int(environment.get("WORLD_SIZE", "1")),
        log=log,
    )
    if rank == 0:
        context.progress = ProgressReporter(
            store=store, run_root=context.run_root, scratch=scratch, environment=environment, log=log
        )
    return context


def execute(context: StageContext) -> tuple[StageResult, int]:
    """Run the stage and commit its output; its result and the exit code. Raises nothing."""
    run = context.run
    try:
        try:
            name = STAGES.get(run.type if run.role == "stage" else run.role)
            if name is None:
                raise InputError(f'this trainer has no stage type "{run.type}"', reason="RuntimeTooOld")
            output: StageOutput | None = importlib.import_module(name).run(context)
            wait_for_uploads(context)
            return finish(context, output), EXIT_DONE
        finally:
            context.progress.close()
    except Exception as error:
        return explain(context, error)


def finish(context: StageContext, output: StageOutput | None) -> StageResult:
    """Commit on rank 0, and say so."""
    if output is None:
        if context.is_main:
            raise RuntimeError(f"stage {context.run.type} yielded nothing on rank 0")
        return StageResult(outcome="Succeeded", reason="Completed")
    digest, metrics = output.manifest_digest, finite(output.metrics)
    if lost := sorted(set(output.metrics) - set(metrics)):
        context.log.warning("not finite and left out: %s", ", ".join(lost))
    if context.is_main and context.run.role == "stage":
        manifest, digest = commit_output(context, output)
        metrics = manifest.metrics
    return StageResult(
        outcome="Succeeded",
        reason="Completed",
        message=output.message,
        manifest_digest=digest,
        metrics=dict(list(metrics.items())[:METRICS_MAX]),
        tokens=output.tokens,
        first_step=output.first_step,
        last_step=output.last_step,
        preflight=output.preflight,
    )


def explain(context: StageContext, error: Exception) -> tuple[StageResult, int]:
    """What an exception means for the attempt: the result and the exit code of the stage contract."""
    if isinstance(error, Interrupted):
        try:
            wait_for_uploads(context)
        except (InputError, TransientError) as fault:
            return explain(context, fault)
        stopped = StageResult(outcome="Stopped", reason="Interrupted", message=str(error), last_step=error.step)
        return stopped, EXIT_STOPPED
    if isinstance(error, InputError):
        return failure(error.reason, str(error)), EXIT_BAD_INPUT
    if isinstance(error, TransientError):
        return failure(error.reason, str(error)), EXIT_TRANSIENT
    if is_out_of_memory(error):
        first = (str(error).strip().splitlines() or ["no memory is left"])[0]
        return failure(OUT_OF_MEMORY, f"out of memory: {first[:300]}. {OUT_OF_MEMORY_REMEDY}"), EXIT_BAD_INPUT
    if _is_connection_error(error):
        return failure("StorageUnavailable", f"{type(error).__name__}: {error}"), EXIT_TRANSIENT
    trace = "".join(traceback.format_exception(error))
    context.log.error("%s", trace.rstrip())
    last = trace.rstrip().splitlines()[-1]
    return failure("TrainerError", f"internal error in stage {context.run.stage}: {last}"), EXIT_INTERNAL


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the accelerator or beside it."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # The CPU allocator of torch says it only in words.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def _is_connection_error(error: Exception) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    botocore = sys.modules.get("botocore.exceptions")
    names = ("HTTPClientError", "ConnectionError", "ReadTimeoutError", "ResponseStreamingError")
    return botocore is not None and isinstance(error, tuple(getattr(botocore, name) for name in names))


def make_log() -> logging.Logger:
    """Plain lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("plumbline")
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    return log


def _uses_accelerator() -> bool:
    torch: Any = sys.modules["torch"]
    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())


def _die_with_launcher() -> None:
    """Have the kernel kill this rank if the launcher dies: it must not train on unseen, against its successor."""
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    main()
