"""From how ranks ended to how the attempt ended."""

from __future__ import annotations

import pytest
from plumbline_api.stagerun import StageResult
from plumbline_trainer.outcomes import RankReport, Said, failure, judge

DONE = StageResult(outcome="Succeeded", reason="Completed", manifest_digest="a" * 64)
PEER = StageResult(outcome="Succeeded", reason="Completed")
STOPPED = StageResult(outcome="Stopped", reason="Interrupted", last_step=12)


def rank(
    number: int,
    result: StageResult | None,
    code: int,
    *,
    exit_code: int | None = None,
    killed: bool = False,
    ended: float = 0.0,
) -> RankReport:
    said = None if result is None else Said(result, code, accelerated=number < 2)
    return RankReport(number, code if exit_code is None else exit_code, killed, ended, 10.0, said)


BAD = failure("BadInput", "no such dataset")
OOM = failure("OutOfMemory", "out of memory")
NETWORK = failure("StorageUnavailable", "connection reset")
CRASH = failure("TrainerError", "internal error")


@pytest.mark.parametrize(
    ("reports", "code", "outcome", "reason"),
    [
        ([rank(0, DONE, 0), rank(1, PEER, 0)], 0, "Succeeded", "Completed"),
        ([rank(0, STOPPED, 143), rank(1, STOPPED, 143)], 143, "Stopped", "Interrupted"),
        ([rank(0, BAD, 2), rank(1, BAD, 2)], 2, "Failed", "BadInput"),
        # The cause, not the peer that lost its connection to it, even if that one was seen first.
        ([rank(0, CRASH, 1, ended=1.0), rank(1, OOM, 2, ended=1.1)], 2, "Failed", "OutOfMemory"),
        ([rank(0, NETWORK, 75, ended=1.0), rank(1, CRASH, 1, ended=1.1)], 1, "Failed", "TrainerError"),
        ([rank(0, None, 0, exit_code=-9, killed=True), rank(1, BAD, 2)], 2, "Failed", "BadInput"),
        ([rank(0, None, 0, exit_code=-9), rank(1, CRASH, 1)], 137, "Failed", "OutOfMemory"),
        ([rank(0, None, 0, exit_code=-11)], 1, "Failed", "TrainerError"),
        ([rank(0, None, 0, exit_code=1)], 1, "Failed", "TrainerError"),
        ([rank(0, None, 0, exit_code=0)], 1, "Failed", "TrainerError"),
        ([rank(0, None, 0, exit_code=-9, killed=True)], 75, "Failed", "GracePeriodExceeded"),
        ([rank(0, STOPPED, 143), rank(1, None, 0, exit_code=-9, killed=True)], 75, "Failed", "GracePeriodExceeded"),
        # Committed is committed.
        ([rank(0, DONE, 0), rank(1, None, 0, exit_code=-6)], 0, "Succeeded", "Completed"),
        ([rank(0, DONE, 0), rank(1, STOPPED, 143)], 0, "Succeeded", "Completed"),
    ],
)
def test_the_cause_decides(reports: list[RankReport], code: int, outcome: str, reason: str) -> None:
    verdict = judge(reports)
    assert (verdict.exit_code, verdict.result.outcome, verdict.result.reason) == (code, outcome, reason)


def test_a_kill_that_was_not_for_memory_is_transient() -> None:
    killed = [rank(0, None, 0, exit_code=-9)]
    assert judge(killed, out_of_memory=False).exit_code == 75
    assert judge(killed, out_of_memory=False).result.reason == "RankKilled"
    assert judge(killed, out_of_memory=True).exit_code == 137
    assert "tokensPerBatch" in judge(killed, out_of_memory=True).result.message


def test_accelerator_time_counts_every_rank_of_every_node() -> None:
    reports = [rank(0, DONE, 0), rank(1, PEER, 0), rank(2, PEER, 0)]
    assert judge(reports, nodes=3).result.gpu_seconds == 60.0


def test_an_unexplained_end_quotes_the_last_output() -> None:
    assert (
        "Fatal Python error"
        in judge([rank(0, None, 0, exit_code=-11)], last_output="Fatal Python error").result.message
    )
