"""From Jobs and pods as the API server shows them to facts, evidence and reasons to wait."""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from plumbline_api.stagerun import StageResult
from plumbline_operator.jobs import JobFacts, read_job
from plumbline_operator.pods import read_evidence, read_wait, started_of

NOW = datetime(2026, 1, 1, 13, 0, 0, tzinfo=UTC)
JOB: dict[str, Any] = {
    "metadata": {
        "name": "run-sft-0123456789",
        "namespace": "team-a",
        "uid": "job-1",
        "resourceVersion": "41",
        "creationTimestamp": "2026-01-01T12:00:00Z",
        "labels": {
            "plumbline.dev/role": "stage",
            "plumbline.dev/pipeline-uid": "alp-1",
            "plumbline.dev/pipeline": "run",
            "plumbline.dev/stage": "sft",
        },
        "annotations": {
            "plumbline.dev/attempt": "3",
            "plumbline.dev/fingerprint": "f" * 64,
            "plumbline.dev/stage": "sft",
        },
        "ownerReferences": [{"kind": "AlignmentPipeline", "name": "run", "uid": "alp-1", "controller": True}],
    },
    "spec": {
        "parallelism": 2,
        "template": {"spec": {"containers": [{"resources": {"limits": {"memory": "4Gi", "nvidia.com/gpu": "4"}}}]}},
    },
}


def facts(status: dict[str, Any] | None = None, **changes: Any) -> JobFacts:
    job = copy.deepcopy(JOB) | {"status": status or {}}
    job["spec"] |= changes.pop("spec", {})
    job["metadata"] |= changes
    found = read_job(job)
    assert found is not None
    return found


def condition(type_: str, **fields: Any) -> dict[str, Any]:
    return {"type": type_, "status": "True", "lastTransitionTime": "2026-01-01T12:30:00Z", **fields}


def test_a_job_is_read_in_full() -> None:
    job = facts({"active": 2, "ready": 2, "startTime": "2026-01-01T12:00:05Z"})
    assert (job.role, job.stage, job.attempt, job.fingerprint) == ("stage", "sft", 3, "f" * 64)
    assert (job.nodes, job.gpus, job.key, job.owner_uid) == (2, 8, ("team-a", "run"), "alp-1")
    assert (job.state, job.active, job.suspended, job.deleting) == ("running", True, False, False)
    assert job.started == datetime(2026, 1, 1, 12, 0, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("status", "state", "active", "ending"),
    [
        ({}, "waiting", False, False),
        ({"active": 2}, "waiting", True, False),
        ({"active": 2, "ready": 1}, "running", True, False),
        ({"uncountedTerminatedPods": {"succeeded": ["p"]}}, "running", False, True),
        ({"succeeded": 1, "conditions": [condition("SuccessCriteriaMet")]}, "running", False, True),
        ({"terminating": 1}, "running", True, True),
        ({"active": 1, "failed": 1}, "waiting", True, False),
        ({"conditions": [condition("FailureTarget")], "terminating": 1}, "running", True, True),
        ({"conditions": [condition("Complete")], "completionTime": "2026-01-01T12:29:00Z"}, "succeeded", False, False),
        ({"conditions": [condition("Failed", reason="BackoffLimitExceeded")]}, "failed", False, False),
        ({"conditions": [{"type": "Failed", "status": "False"}]}, "waiting", False, False),
    ],
)
def test_state(status: dict[str, Any], state: str, active: bool, ending: bool) -> None:
    job = facts(status)
    assert (job.state, job.active, job.is_ending) == (state, active, ending)


def test_the_end_of_a_failed_job_is_when_its_condition_turned() -> None:
    job = facts({"conditions": [condition("Failed", reason="DeadlineExceeded", message="too long")]})
    assert job.finished == datetime(2026, 1, 1, 12, 30, tzinfo=UTC)
    assert (job.failed_reason, job.failed_message) == ("DeadlineExceeded", "too long")


def test_a_job_of_another_owner_is_not_ours() -> None:
    foreign = facts(ownerReferences=[{"kind": "AlignmentPipeline", "name": "run", "uid": "alp-2", "controller": True}])
    assert foreign.owner_uid != foreign.pipeline_uid
    orphan = facts(ownerReferences=[])
    assert orphan.owner_uid is None
    other_kind = facts(ownerReferences=[{"kind": "CronJob", "name": "run", "uid": "alp-1", "controller": True}])
    assert other_kind.owner_uid is None


def test_a_job_without_our_marks_is_passed_over() -> None:
    assert read_job(copy.deepcopy(JOB) | {"metadata": JOB["metadata"] | {"annotations": {}}}) is None
    assert read_job(copy.deepcopy(JOB) | {"metadata": JOB["metadata"] | {"labels": {}}}) is None


def pod(index: int = 0, *, phase: str = "Failed", minute: int = 20, **fields: Any) -> dict[str, Any]:
    terminated: dict[str, Any] = {
        "exitCode": fields.pop("exit_code", 0 if phase == "Succeeded" else 1),
        "reason": fields.pop("ended", "Error"),
        "finishedAt": f"2026-01-01T12:{minute:02}:00Z",
        "message": fields.pop("says", ""),
    }
    state = {"terminated": terminated} if phase in ("Succeeded", "Failed") else fields.pop("state", {})
    metadata = {
        "name": f"pod-{index}",
        "creationTimestamp": "2026-01-01T12:00:00Z",
        "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
        **fields.pop("metadata", {}),
    }
    status = {
        "phase": phase,
        "startTime": "2026-01-01T12:01:00Z",
        "containerStatuses": [{"name": "trainer", "state": state}],
        **fields,
    }
    return {"metadata": metadata, "status": status}


def result(outcome: str = "Succeeded", **fields: Any) -> str:
    return StageResult.model_validate({"outcome": outcome, "reason": "Completed"} | fields).to_message()


SUCCEEDED = {"conditions": [condition("Complete")]}
FAILED = {"conditions": [condition("Failed", reason="BackoffLimitExceeded")]}
ONE = {"parallelism": 1}
DISRUPTED = {"conditions": [condition("DisruptionTarget", message="preempted by a higher priority")]}


def test_success_is_told_by_rank_0() -> None:
    pods = [
        pod(1, phase="Succeeded", says=result(message="from rank 1"), minute=10),
        pod(0, phase="Succeeded", says=result(message="from rank 0")),
    ]
    evidence = read_evidence(facts(SUCCEEDED), pods)
    assert evidence.result is not None
    assert evidence.result.message == "from rank 0"
    assert evidence.failure is None
    assert evidence.started == datetime(2026, 1, 1, 12, 1, tzinfo=UTC)


@pytest.mark.parametrize("says", ["", "not json", '{"outcome": "Maybe"}', "{" * 5000])
def test_a_message_that_is_no_result_counts_as_lost(says: str) -> None:
    evidence = read_evidence(facts(SUCCEEDED, spec=ONE), [pod(phase="Succeeded", says=says)])
    assert evidence.is_lost


def test_success_without_a_pod_is_lost() -> None:
    assert read_evidence(facts(SUCCEEDED), []).is_lost


def test_the_rank_that_failed_first_is_what_the_others_failed_of() -> None:
    pods = [
        pod(0, minute=21, says=result("Failed", reason="Transient", message="peer lost"), exit_code=75),
        pod(1, minute=20, exit_code=137, ended="OOMKilled"),
    ]
    evidence = read_evidence(facts(FAILED), pods)
    assert evidence.failure is not None
    assert (evidence.failure.reason, evidence.failure.exit_code) == ("OOMKilled", 137)
    assert evidence.result is None


def test_a_rank_that_vanished_is_a_disruption() -> None:
    evidence = read_evidence(facts(FAILED), [pod(0, says=result("Failed", reason="Transient"), exit_code=75)])
    assert evidence.failure is not None
    assert evidence.failure.disrupted


def test_failure_with_the_trainers_words() -> None:
    says = result("Failed", reason="BadInput", message="line 7")
    evidence = read_evidence(facts(FAILED, spec=ONE), [pod(says=says, exit_code=2)])
    assert evidence.result is not None
    assert (evidence.result.reason, evidence.result.message) == ("BadInput", "line 7")
    assert evidence.failure is not None
    assert (evidence.failure.exit_code, evidence.failure.disrupted) == (2, False)


def test_no_pod_left_is_a_disruption() -> None:
    evidence = read_evidence(facts(FAILED, spec=ONE), [])
    assert evidence.failure is not None
    assert evidence.failure.disrupted


def test_preempted_and_evicted_pods_say_so() -> None:
    evidence = read_evidence(facts(FAILED, spec=ONE), [pod(**DISRUPTED, exit_code=143)])
    assert evidence.failure is not None
    assert (evidence.failure.disrupted, evidence.failure.message) == (True, "preempted by a higher priority")
    evicted = pod(reason="Evicted", message="The node was low on resource: ephemeral-storage")
    evidence = read_evidence(facts(FAILED, spec=ONE), [evicted])
    assert evidence.failure is not None
    assert evidence.failure.reason == "Evicted"
    assert "ephemeral-storage" in evidence.failure.message


def test_after_a_replaced_pod_the_last_one_counts() -> None:
    pods = [
        pod(minute=10, **DISRUPTED, exit_code=143),
        pod(minute=40, says=result("Failed", reason="BadInput"), exit_code=2),
    ]
    evidence = read_evidence(facts(FAILED, spec=ONE), pods)
    assert evidence.result is not None
    assert evidence.result.reason == "BadInput"
    assert evidence.failure is not None
    assert not evidence.failure.disrupted


def test_a_deadline_is_the_jobs_own_reason() -> None:
    job = facts({"conditions": [condition("Failed", reason="DeadlineExceeded", message="was active longer")]})
    evidence = read_evidence(job, [pod(exit_code=143)])
    assert evidence.failure is not None
    assert evidence.failure.reason == "DeadlineExceeded"


def test_why_a_pod_waits() -> None:
    job = facts({"active": 1, "startTime": "2026-01-01T12:00:00Z"}, spec=ONE)
    unschedulable = {
        "conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes: no GPU"}
        ]
    }
    wait = read_wait(job, [pod(phase="Pending", **unschedulable)], NOW)
    assert wait is not None
    assert (wait.reason, wait.message) == ("Unschedulable", "0/3 nodes: no GPU")
    image = pod(phase="Pending", state={"waiting": {"reason": "ImagePullBackOff", "message": "not found"}})
    wait = read_wait(job, [image], NOW)
    assert wait is not None
    assert wait.reason == "ImagePullBackOff"


def test_a_pod_that_has_just_been_made_needs_no_reason() -> None:
    job = facts({"active": 1, "startTime": "2026-01-01T12:00:00Z"}, spec=ONE)
    creating = pod(phase="Pending", state={"waiting": {"reason": "ContainerCreating"}})
    early = datetime(2026, 1, 1, 12, 1, 30, tzinfo=UTC)
    assert read_wait(job, [creating], early) is None
    slow = read_wait(job, [creating], early + timedelta(minutes=2))
    assert slow is not None
    assert "kubectl describe pod pod-0" in slow.message


def test_a_job_without_pods_says_so_after_a_while() -> None:
    job = facts({"startTime": "2026-01-01T12:00:00Z"}, spec=ONE)
    assert read_wait(job, [], datetime(2026, 1, 1, 12, 0, 5, tzinfo=UTC)) is None
    wait = read_wait(job, [], NOW)
    assert wait is not None
    assert wait.reason == "NoPods"


def test_a_pod_that_has_ended_is_no_reason_to_wait() -> None:
    job = facts({"active": 1, "ready": 0, "startTime": "2026-01-01T12:00:00Z"}, spec=ONE)
    assert read_wait(job, [pod(phase="Succeeded")], NOW) is None
    assert read_wait(job, [pod(phase="Running")], NOW) is None


def test_accelerators_are_held_from_when_the_pods_started() -> None:
    assert started_of([pod(phase="Running"), pod(phase="Pending")]) == datetime(2026, 1, 1, 12, 1, tzinfo=UTC)
    assert started_of([pod(phase="Pending")]) is None
