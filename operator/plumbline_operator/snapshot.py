"""What `plan` sees and what it decides: values only, the same for a cluster and for a laptop.

`observe` (cluster) or the local runner builds a `Snapshot`; `plan` turns it into a `Plan`; `apply` or the local runner
carries it out. Nothing here knows kopf, kubernetes or a process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from plumbline_api.errors import Problem
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.record import RunRecord
from plumbline_api.runtime import AlignmentRuntime
from plumbline_api.stagerun import Role, StageResult, StageRun
from plumbline_api.stages import Resources, RuntimeClass
from plumbline_api.status import PipelineStatus, Progress

CPU_ONLY = Resources(gpus_per_node=0)

JobState = Literal["waiting", "running", "succeeded", "failed"]


@dataclass(frozen=True, slots=True)
class PodFailure:
    """What the cluster says about a pod that died without a result of its own."""

    exit_code: int | None = None
    reason: str | None = None
    """Such as OOMKilled, Error, DeadlineExceeded, Evicted."""
    disrupted: bool = False
    """The pod was preempted, drained or deleted (condition DisruptionTarget, or it vanished)."""
    message: str = ""


@dataclass(frozen=True, slots=True)
class JobView:
    """One attempt at a stage: a Job on a cluster, a process on a laptop."""

    name: str
    role: Role
    stage: str
    fingerprint: str
    attempt: int
    state: JobState
    """waiting: created, no pod runs yet. succeeded and failed are final."""
    owned: bool = True
    """Whether our pipeline object owns it; a foreign object under our name is never adopted."""
    suspended: bool = False
    deleting: bool = False
    active: bool = False
    """Whether a process of it may still be writing."""
    nodes: int = 1
    gpus: int = 0
    """Accelerators that it holds while it runs, over all nodes."""
    created: datetime | None = None
    started: datetime | None = None
    finished: datetime | None = None
    result: StageResult | None = None
    """From the termination message; None where none could be read (yet)."""
    result_lost: bool = False
    """The job has ended and no message can be read any more: the pod is gone or its message is empty."""
    failure: PodFailure | None = None
    waiting_reason: str | None = None
    """Why no pod runs: Unschedulable, WaitingForQuota, ImagePullBackOff, CreateContainerConfigError, …"""
    waiting_message: str = ""


@dataclass(frozen=True, slots=True)
class ProgressView:
    """The latest progress report of a running job."""

    job: str
    progress: Progress
    metrics: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that is known when a decision is made."""

    body: dict[str, object] = field(hash=False)
    """The object as it is stored: apiVersion, kind, metadata (name, namespace, uid, generation), spec."""
    pipeline: AlignmentPipeline | None
    """The parsed object; None where it does not parse."""
    problems: tuple[Problem, ...]
    """Why it does not parse; empty where it does."""
    status: PipelineStatus
    """Status as last written."""
    record: RunRecord | None
    """The record of the current generation, if it has been frozen."""
    runtime: AlignmentRuntime | None
    """The runtime as it is now; None where there is none. Once there is a record: the one that the record names, so
    that permissions are checked against it; before that: the referenced or default one."""
    runtime_problem: str | None
    """Why there is no runtime, in words, where one is needed."""
    place: Literal["cluster", "local"]
    jobs: tuple[JobView, ...] = ()
    """Every job of this pipeline, of any generation and role, and foreign objects under our names (owned=False)."""
    progress: tuple[ProgressView, ...] = ()
    twins: frozenset[str] = frozenset()
    """Fingerprints that another pipeline of the namespace is computing right now."""
    foreign_names: frozenset[str] = frozenset()
    """Job names of ours that something else holds (create answered AlreadyExists)."""
    deleting: bool = False
    previous: RunRecord | None = None
    """The record of the newest generation before this one, where `record` is None: an edit that only suspends, resumes,
    retries or sets a time to live goes on with it."""


@dataclass(frozen=True, slots=True)
class FreezeRecord:
    """Write the record of a generation (once; it never changes).

    It comes first among the actions; where it finds another record in place the pass ends and the world is looked at
    again, because every other action derives from the record.
    """

    record: RunRecord


@dataclass(frozen=True, slots=True)
class StartStage:
    """Start one attempt. Where its Job is there already and is ours, the pass ends and the world is looked at again."""

    run: StageRun
    job: str
    runtime_class: RuntimeClass = "cpu"
    """Which pod pieces of the runtime it takes."""
    resources: Resources = CPU_ONLY
    """What its pods ask for; with the number of accelerators resolved."""
    timeout_seconds: int | None = None
    """Longest time of the attempt."""


@dataclass(frozen=True, slots=True)
class StopStage:
    """Stop an attempt and forget it (delete the Job in the foreground, so that it is seen until its pods are gone;
    SIGTERM and wait for a process)."""

    job: str
    reason: str


@dataclass(frozen=True, slots=True)
class SuspendStage:
    """Suspend or resume an attempt in place: it writes a checkpoint, its pod goes, its Job stays."""

    job: str
    suspend: bool


@dataclass(frozen=True, slots=True)
class DeletePipeline:
    """The time to live after the end is over: delete the pipeline object."""


Action = FreezeRecord | StartStage | StopStage | SuspendStage | DeletePipeline


@dataclass(frozen=True, slots=True)
class PlannedEvent:
    """An event for people; written after the status is."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now. Carrying out an empty plan writes nothing."""

    actions: tuple[Action, ...] = ()
    status: PipelineStatus | None = None
    """The status to write; None where it would not change."""
    events: tuple[PlannedEvent, ...] = ()
    requeue_after: float | None = None
    """Seconds after which to look again even if nothing happens (back-off, time to live)."""
