"""How an attempt ended, and what follows: never again, again and counted, again for free, or the inputs first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plumbline_api.stagerun import EXIT_BAD_INPUT, EXIT_STOPPED

from plumbline_operator.snapshot import JobView, PodFailure

Consequence = Literal["final", "counted", "free", "recover"]
"""final: never retried. counted: retried while `retries` allow. free: retried at no charge. recover: inputs first."""

FINAL_REASONS = frozenset(
    {
        "BadInput",
        "InvalidSpec",
        "StorageDenied",
        "InputChanged",
        "OutOfMemory",
        "RuntimeTooOld",
        "NotAllowed",
        "DiskFull",
        "Timeout",
        "Aborted",
    }
)
"""Reasons that another attempt cannot mend, for results without an exit code beside them."""
_OUT_OF_MEMORY = (
    "the container was killed because it used more memory than its limit. Raise resources.memory of the stage, "
    "or lower training.tokensPerBatch (evaluate.tokensPerBatch), then retry"
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from an attempt that did not succeed."""

    consequence: Consequence
    reason: str
    message: str


def judge_failure(job: JobView, *, timeout_seconds: int | None) -> Verdict:
    """The verdict on an attempt that ended without success. Its result is either there or lost."""
    failure = job.failure or PodFailure()
    if failure.reason == "DeadlineExceeded":
        limit = "its timeout" if timeout_seconds is None else f"its timeout of {timeout_seconds} s"
        return Verdict(
            "final",
            "Timeout",
            f"attempt {job.attempt} ran longer than {limit}. Raise timeout of the stage and retry: it goes on from its "
            "last checkpoint",
        )
    if job.result is not None:
        return _judge_result(job, failure)
    return _judge_pod(job, failure)


def _judge_result(job: JobView, failure: PodFailure) -> Verdict:
    result = job.result
    assert result is not None
    if result.outcome == "Stopped":
        return Verdict("free", "Interrupted", result.message or "the pod was stopped; it wrote a checkpoint")
    reason = result.reason if result.outcome == "Failed" else "TrainerError"
    message = result.message
    if result.outcome == "Succeeded":
        message = f"the trainer reported success, but its process failed ({_ending(failure)})"
    if reason == "InputMissing":
        return Verdict("recover", reason, message)
    if failure.exit_code == EXIT_BAD_INPUT or reason in FINAL_REASONS:
        return Verdict("final", reason, message)
    return Verdict("free" if failure.disrupted else "counted", reason, message)


def _judge_pod(job: JobView, failure: PodFailure) -> Verdict:
    said = f": {failure.message}" if failure.message else ""
    if failure.reason == "OOMKilled":
        return Verdict("final", "OutOfMemory", _OUT_OF_MEMORY)
    if failure.reason == "Evicted" and "exceed" in failure.message.lower():
        return Verdict(
            "final",
            "DiskFull",
            f"the pod was evicted{said}. Ask the owners of the runtime for more ephemeralStorage",
        )
    if failure.disrupted:
        return Verdict("free", "Preempted", f"the pod of attempt {job.attempt} was preempted, drained or deleted{said}")
    if failure.exit_code == EXIT_STOPPED:
        return Verdict("free", "Interrupted", f"the pod of attempt {job.attempt} was stopped{said}")
    if failure.exit_code == EXIT_BAD_INPUT:
        return Verdict("final", "BadInput", f"the trainer refused its input; its message is lost, see its log{said}")
    return Verdict(
        "counted",
        "PodFailed",
        f"attempt {job.attempt} ended ({_ending(failure)}) and left no message{said}; its log may tell more",
    )


def _ending(failure: PodFailure) -> str:
    parts = [f"exit code {failure.exit_code}"] if failure.exit_code is not None else []
    parts += [failure.reason] if failure.reason else []
    return ", ".join(parts) or "for an unknown reason"
