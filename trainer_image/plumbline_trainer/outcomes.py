"""From how the ranks ended to how the attempt ended: pure."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plumbline_api.stagerun import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED, EXIT_TRANSIENT, StageResult

EXIT_INTERNAL = 1
EXIT_KILLED = 137
OUT_OF_MEMORY = "OutOfMemory"
OUT_OF_MEMORY_REMEDY = (
    "Lower training.tokensPerBatch (evaluate.tokensPerBatch), set training.gradientCheckpointing, use lora, "
    "or raise resources.memory"
)


@dataclass(frozen=True, slots=True)
class Said:
    """What a rank left in its report."""

    result: StageResult
    exit_code: int
    accelerated: bool


@dataclass(frozen=True, slots=True)
class RankReport:
    """How a rank ended."""

    rank: int
    exit_code: int
    """Of the process; negative for a signal."""
    killed: bool
    """Whether the launcher killed it."""
    ended: float
    seconds: float
    said: Said | None

    @property
    def succeeded(self) -> bool:
        """Whether it ended as a rank should."""
        return self.exit_code == 0 and self.said is not None and self.said.result.outcome == "Succeeded"

    @property
    def stopped(self) -> bool:
        """Whether it stopped on SIGTERM after a checkpoint."""
        return self.exit_code == EXIT_STOPPED and self.said is not None


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the attempt ended."""

    result: StageResult
    exit_code: int


def failure(reason: str, message: str) -> StageResult:
    """The result of an attempt that failed."""
    return StageResult(outcome="Failed", reason=reason, message=message)


def write_report(path: Path, result: StageResult, exit_code: int, *, accelerated: bool) -> None:
    """Leave a rank's result for the launcher."""
    document = {"result": result.to_wire(), "exitCode": exit_code, "accelerated": accelerated}
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(document), encoding="utf-8")
    partial.replace(path)


def read_report(path: Path) -> Said | None:
    """A rank's result; None where it left none."""
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        result = StageResult.model_validate(document["result"])
        return Said(result, int(document["exitCode"]), bool(document["accelerated"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def judge(
    reports: Sequence[RankReport], *, nodes: int = 1, out_of_memory: bool | None = None, last_output: str = ""
) -> Verdict:
    """How an attempt ended.

    Args:
        reports: one per rank of this node.
        nodes: nodes of the stage, to scale the accelerator time.
        out_of_memory: whether the kernel killed a process for memory meanwhile; None if it does not tell.
        last_output: what was printed last.
    """
    gpu_seconds = round(nodes * sum(r.seconds for r in reports if r.said is not None and r.said.accelerated), 3)
    verdict = _judge(reports, out_of_memory, last_output)
    return Verdict(verdict.result.model_copy(update={"gpu_seconds": gpu_seconds}), verdict.exit_code)


def _judge(reports: Sequence[RankReport], out_of_memory: bool | None, last_output: str) -> Verdict:
    if all(report.succeeded for report in reports):
        said = reports[0].said
        assert said is not None
        return Verdict(said.result, EXIT_DONE)
    first = reports[0]
    if first.succeeded and first.said is not None and first.said.result.manifest_digest is not None:
        # The output is committed: what befell the others while they took leave changes nothing.
        return Verdict(first.said.result, EXIT_DONE)
    own = [r for r in reports if not r.succeeded and not r.stopped and not r.killed]
    if not own:
        return _judge_stopped(reports)
    cause = min(own, key=lambda r: (_rank_of_cause(r), r.ended, r.rank))
    if cause.said is not None and cause.said.result.outcome != "Succeeded":
        return Verdict(cause.said.result, cause.said.exit_code)
    return _judge_silent(cause, out_of_memory, last_output)


def _rank_of_cause(report: RankReport) -> int:
    """A rank that names its reason tells more than one that lost its peers, whichever the launcher saw first."""
    if report.exit_code == -signal.SIGKILL:
        return 0
    if report.said is None:
        return 2
    return {EXIT_BAD_INPUT: 0, EXIT_INTERNAL: 1}.get(report.said.exit_code, 2)


def _judge_stopped(reports: Sequence[RankReport]) -> Verdict:
    """Every rank stopped, was done, or was killed by the launcher after the grace period."""
    spoken = [r for r in reports if r.stopped]
    killed = [r for r in reports if r.killed]
    if spoken and not killed:
        said = spoken[0].said
        assert said is not None
        return Verdict(said.result, EXIT_STOPPED)
    names = ", ".join(str(r.rank) for r in killed or reports)
    message = (
        f"rank {names} did not stop within the grace period and was killed; the next attempt goes on from the last "
        "checkpoint. A longer terminationGracePeriod of the runtime gives it time for one more"
    )
    return Verdict(failure("GracePeriodExceeded", message), EXIT_TRANSIENT)


def _judge_silent(report: RankReport, out_of_memory: bool | None, last_output: str) -> Verdict:
    """A rank that ended without a word."""
    said = f" Last output: {last_output}" if last_output else ""
    if report.exit_code == -signal.SIGKILL:
        if out_of_memory is False:
            message = f"rank {report.rank} was killed from outside (SIGKILL), not for memory.{said}"
            return Verdict(failure("RankKilled", message), EXIT_TRANSIENT)
        certain = "ran out of memory and was killed" if out_of_memory else "was killed, most likely for memory"
        return Verdict(failure(OUT_OF_MEMORY, f"rank {report.rank} {certain}. {OUT_OF_MEMORY_REMEDY}"), EXIT_KILLED)
    if report.exit_code < 0:
        name = signal.Signals(-report.exit_code).name
        message = f"rank {report.rank} crashed ({name}).{said}"
        return Verdict(failure("TrainerError", message), EXIT_INTERNAL)
    message = f"rank {report.rank} ended with exit code {report.exit_code} and left no result.{said}"
    return Verdict(failure("TrainerError", message), EXIT_INTERNAL)
