"""What a Job's pods tell: how the attempt ended, or why it does not start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from plumbline_api.stagerun import StageResult

from plumbline_operator.jobs import JobFacts
from plumbline_operator.podtemplate import CONTAINER
from plumbline_operator.policies.clock import parse_time, shorten
from plumbline_operator.snapshot import PodFailure

INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
STARTING_REASONS = frozenset({"ContainerCreating", "PodInitializing"})
"""What every pod goes through; told only when it takes long."""
SLOW_START = timedelta(seconds=60)
NO_PODS = timedelta(seconds=15)
MESSAGE_MAX = 1024

Pod = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Evidence:
    """How an attempt ended, as far as its pods told; never changes once a Job has ended."""

    result: StageResult | None
    failure: PodFailure | None
    started: datetime | None = None
    """When its last pod started; None where no pod is left to tell."""

    @property
    def is_lost(self) -> bool:
        """Whether no result can be read any more."""
        return self.result is None


@dataclass(frozen=True, slots=True)
class Wait:
    """Why no pod runs."""

    reason: str
    message: str


def read_evidence(job: JobFacts, pods: Sequence[Pod]) -> Evidence:
    """How a finished Job's attempt ended.

    Success: the message of rank 0. Failure: the pod that ended first, because the others of a group fail in its wake.
    """
    ended = sorted((pod for pod in pods if _finished(pod) is not None or _is_failed(pod)), key=_order)
    started = max((start for pod in pods if (start := _started(pod)) is not None), default=None)
    if job.state == "succeeded":
        chosen = [pod for pod in ended if pod.get("status", {}).get("phase") == "Succeeded"]
        first = min(chosen, key=_index, default=None)
        return Evidence(result=_result(first) if first is not None else None, failure=None, started=started)
    if job.failed_reason == "DeadlineExceeded":
        failure = PodFailure(reason="DeadlineExceeded", message=job.failed_message)
        return Evidence(result=None, failure=failure, started=started)
    failed = [pod for pod in ended if pod.get("status", {}).get("phase") != "Succeeded"]
    if not failed:
        # Nobody is left to ask: the pod was deleted, or its node is gone.
        return Evidence(result=None, failure=PodFailure(disrupted=True, message=job.failed_message), started=started)
    # One pod may have been replaced after a disruption: its last replacement counts. Of a group, a rank that vanished
    # is what the others failed of.
    culprit = failed[0] if job.nodes > 1 else failed[-1]
    failure = _failure(culprit)
    if len({_index(pod) for pod in pods}) < job.nodes:
        failure = replace(failure, disrupted=True)
    return Evidence(result=_result(culprit), failure=failure, started=started)


def read_wait(job: JobFacts, pods: Sequence[Pod], now: datetime) -> Wait | None:
    """Why a Job that waits has no running pod; None where it is only starting."""
    live = [pod for pod in pods if is_pending(pod)]
    if not live:
        if any(pod.get("status", {}).get("phase") in ("Running", "Succeeded") for pod in pods):
            return None  # it runs, or has just ended and is about to be counted
        since = job.started or job.created
        if not job.suspended and since is not None and now - since > NO_PODS:
            words = f"no pod could be made; a quota or a policy may forbid it: kubectl describe job {job.name}"
            return Wait("NoPods", words)
        return None
    waits = [wait for pod in sorted(live, key=_index) if (wait := _wait(pod, now)) is not None]
    return waits[0] if waits else None


def is_pending(pod: Pod) -> bool:
    """Whether a pod has yet to start."""
    return "deletionTimestamp" not in pod["metadata"] and pod.get("status", {}).get("phase") in ("Pending", None)


def started_of(pods: Sequence[Pod]) -> datetime | None:
    """When the pods that run now started: from then on they hold what they asked for."""
    return max(
        (start for pod in pods if pod.get("status", {}).get("phase") == "Running" and (start := _started(pod))),
        default=None,
    )


def _wait(pod: Pod, now: datetime) -> Wait | None:
    status = pod.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return Wait(
                condition.get("reason") or "Unschedulable", shorten(condition.get("message") or "", MESSAGE_MAX)
            )
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (container.get("state") or {}).get("waiting")
        if waiting and waiting.get("reason") and waiting["reason"] not in STARTING_REASONS:
            return Wait(waiting["reason"], shorten(waiting.get("message") or "", MESSAGE_MAX))
    since = _started(pod)
    if since is not None and now - since > SLOW_START:
        name = pod["metadata"]["name"]
        return Wait(
            "ContainerCreating",
            f"the container is not made yet: a large image is being pulled, or a volume is missing: "
            f"kubectl describe pod {name}",
        )
    return None


def _result(pod: Pod) -> StageResult | None:
    terminated = _terminated(pod)
    message = terminated.get("message") if terminated is not None else None
    return StageResult.from_message(message) if message else None


def _failure(pod: Pod) -> PodFailure:
    status = pod.get("status") or {}
    terminated = _terminated(pod) or {}
    code = terminated.get("exitCode")
    reason = status.get("reason") or terminated.get("reason")
    message = status.get("message") or _disruption(pod).get("message") or ""
    if not message and terminated.get("reason") in ("StartError", "ContainerCannotRun"):
        message = terminated.get("message") or ""
    return PodFailure(
        exit_code=code if isinstance(code, int) else None,
        reason=reason,
        disrupted=_is_disrupted(pod) or (code is None and "deletionTimestamp" in pod["metadata"]),
        message=shorten(message, MESSAGE_MAX),
    )


def _terminated(pod: Pod) -> dict[str, Any] | None:
    for container in (pod.get("status") or {}).get("containerStatuses") or []:
        if container.get("name") == CONTAINER:
            found = (container.get("state") or {}).get("terminated")
            return dict(found) if found else None
    return None


def _disruption(pod: Pod) -> dict[str, Any]:
    for condition in (pod.get("status") or {}).get("conditions") or []:
        if condition.get("type") == "DisruptionTarget" and condition.get("status") == "True":
            return dict(condition)
    return {}


def _is_disrupted(pod: Pod) -> bool:
    return bool(_disruption(pod))


def _is_failed(pod: Pod) -> bool:
    return bool((pod.get("status") or {}).get("phase") == "Failed")


def _finished(pod: Pod) -> datetime | None:
    text = (_terminated(pod) or {}).get("finishedAt")
    return parse_time(text) if text else None


def _started(pod: Pod) -> datetime | None:
    text = (pod.get("status") or {}).get("startTime")
    return parse_time(text) if text else None


def _index(pod: Pod) -> int:
    text = str((pod["metadata"].get("annotations") or {}).get(INDEX_ANNOTATION, "0"))
    return int(text) if text.isdigit() else 0


def _order(pod: Pod) -> tuple[datetime, int]:
    moment = _finished(pod) or parse_time(pod["metadata"]["creationTimestamp"])
    return (moment, _index(pod))
