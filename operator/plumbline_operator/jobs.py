"""What is kept of a Job: a few facts, never its manifest (a StageRun alone may have 96 KiB)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast, get_args

from plumbline_api.names import (
    ANNOTATION_ATTEMPT,
    ANNOTATION_FINGERPRINT,
    ANNOTATION_STAGE,
    LABEL_PIPELINE,
    LABEL_PIPELINE_UID,
    LABEL_ROLE,
    LABEL_STAGE,
)
from plumbline_api.stagerun import Role

from plumbline_operator.policies.clock import parse_time
from plumbline_operator.snapshot import JobState

ROLES: frozenset[str] = frozenset(get_args(Role))
Key = tuple[str, str]
"""Namespace and name of a pipeline."""


@dataclass(frozen=True, slots=True)
class JobFacts:
    """A Job as the API server last showed it."""

    name: str
    namespace: str
    uid: str
    resource_version: int
    owner_uid: str | None
    """UID of the controlling owner."""
    owner_name: str | None
    pipeline_uid: str
    """From its label: the pipeline that it claims to belong to."""
    role: Role
    stage: str
    fingerprint: str
    attempt: int
    state: JobState
    suspended: bool
    deleting: bool
    active: bool
    nodes: int
    gpus: int
    created: datetime | None
    started: datetime | None
    """When its current run began (a resumed Job starts anew), pods not yet scheduled included."""
    finished: datetime | None
    failed_reason: str | None = None
    """Reason of the condition Failed, such as DeadlineExceeded."""
    failed_message: str = ""
    is_ending: bool = False
    """Whether its pods have ended and its own end is about to follow."""

    @property
    def key(self) -> Key | None:
        """The pipeline whose controller reference it carries."""
        return (self.namespace, self.owner_name) if self.owner_name is not None else None

    @property
    def is_finished(self) -> bool:
        """Whether its end is final."""
        return self.state in ("succeeded", "failed")


def read_job(job: dict[str, Any]) -> JobFacts | None:
    """The facts of a Job; None for one that is not an attempt of ours (its labels or annotations are not there)."""
    metadata, spec, status = job["metadata"], job.get("spec") or {}, job.get("status") or {}
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    role, uid = labels.get(LABEL_ROLE), labels.get(LABEL_PIPELINE_UID)
    attempt = str(annotations.get(ANNOTATION_ATTEMPT, ""))
    if role not in ROLES or not uid or not attempt.isdigit():
        return None
    owner = controller_of(metadata)
    is_ours = owner is not None and owner.get("kind") == "AlignmentPipeline"
    failed = _condition(status, "Failed")
    complete = _condition(status, "Complete")
    nodes = int(spec.get("parallelism") or 1)
    ended = complete or failed
    return JobFacts(
        name=metadata["name"],
        namespace=metadata["namespace"],
        uid=metadata["uid"],
        resource_version=int(metadata["resourceVersion"]),
        owner_uid=owner["uid"] if owner is not None and is_ours else None,
        owner_name=owner["name"] if owner is not None and is_ours else labels.get(LABEL_PIPELINE),
        pipeline_uid=uid,
        role=cast(Role, role),
        stage=annotations.get(ANNOTATION_STAGE) or labels.get(LABEL_STAGE) or "",
        fingerprint=annotations.get(ANNOTATION_FINGERPRINT, ""),
        attempt=int(attempt),
        state=_state(status, complete=complete is not None, failed=failed is not None),
        is_ending=ended is None and _is_ending(status),
        suspended=bool(spec.get("suspend")),
        deleting="deletionTimestamp" in metadata,
        active=bool(status.get("active")) or bool(status.get("terminating")),
        nodes=nodes,
        gpus=nodes * _gpus(spec),
        created=_time(metadata.get("creationTimestamp")),
        started=_time(status.get("startTime")),
        finished=_time(status.get("completionTime") or (ended or {}).get("lastTransitionTime")),
        failed_reason=(failed or {}).get("reason"),
        failed_message=(failed or {}).get("message") or "",
    )


def controller_of(metadata: dict[str, Any]) -> dict[str, Any] | None:
    """The owner that controls an object."""
    return next((ref for ref in metadata.get("ownerReferences") or [] if ref.get("controller")), None)


def _condition(status: dict[str, Any], type_: str) -> dict[str, Any] | None:
    for item in status.get("conditions") or []:
        if item.get("type") == type_ and item.get("status") == "True":
            return dict(item)
    return None


def _state(status: dict[str, Any], *, complete: bool, failed: bool) -> JobState:
    if complete:
        return "succeeded"
    if failed:
        return "failed"
    # Between the end of its pods and its own a Job has no ready pod any more; it must not look as if it waited.
    return "running" if status.get("ready") or _is_ending(status) else "waiting"


def _is_ending(status: dict[str, Any]) -> bool:
    uncounted = status.get("uncountedTerminatedPods") or {}
    signs = (
        status.get("succeeded"),
        status.get("failed"),
        status.get("terminating"),
        uncounted.get("succeeded"),
        uncounted.get("failed"),
        _condition(status, "FailureTarget"),
        _condition(status, "SuccessCriteriaMet"),
    )
    return not status.get("active") and any(signs)


def _gpus(spec: dict[str, Any]) -> int:
    """Accelerators of one pod: whatever extended resources its containers are limited to."""
    found = 0
    for container in spec.get("template", {}).get("spec", {}).get("containers") or []:
        limits = (container.get("resources") or {}).get("limits") or {}
        found += sum(int(count) for name, count in limits.items() if "/" in name and str(count).isdigit())
    return found


def _time(text: str | None) -> datetime | None:
    return parse_time(text) if text else None
