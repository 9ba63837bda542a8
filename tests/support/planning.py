"""A tiny world for `plan`: jobs that a test moves, a clock that a test sets, and builders for pipelines.

`World.reconcile` observes, plans and applies, as the operator and the local runner do.
"""

from __future__ import annotations

import base64
import hashlib
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from plumbline_api.errors import ManifestError, Problem
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.record import RunRecord
from plumbline_api.runtime import AlignmentRuntime
from plumbline_api.stagerun import PreflightFindings, StageResult, StageRun
from plumbline_api.status import PipelineStatus, Progress
from plumbline_operator.plan import plan
from plumbline_operator.settings import PlanSettings
from plumbline_operator.snapshot import (
    DeletePipeline,
    FreezeRecord,
    JobView,
    Plan,
    PlannedEvent,
    PodFailure,
    ProgressView,
    Snapshot,
    StartStage,
    StopStage,
    SuspendStage,
)

START = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
SETTINGS = PlanSettings(operator_version="0.1.0")

FOUR_STAGES: list[dict[str, Any]] = [
    {"name": "sft", "sft": {"dataset": "tickets", "lora": {"rank": 8}}},
    {"name": "dpo", "dpo": {"dataset": "prefs", "lora": {"rank": 8}}},
    {"name": "final", "merge": {}},
    {"name": "exam", "evaluate": {"suites": [{"perplexity": {"dataset": "held"}}]}},
]
ONE_STAGE: list[dict[str, Any]] = [{"name": "sft", "sft": {"dataset": "tickets"}}]
FORK: list[dict[str, Any]] = [
    {"name": "base", "pretrain": {"dataset": "manuals"}},
    {"name": "left", "model": "base", "sft": {"dataset": "tickets"}},
    {"name": "right", "model": "base", "sft": {"dataset": "tickets", "training": {"epochs": 2}}},
    {"name": "join", "model": "left", "after": ["right"], "merge": {}},
]


def pipeline_body(stages: list[dict[str, Any]] | None = None, **spec: Any) -> dict[str, Any]:
    """A pipeline object as the API server stores it."""
    return {
        "apiVersion": "plumbline.dev/v1alpha1",
        "kind": "AlignmentPipeline",
        "metadata": {"name": "support", "namespace": "team-a", "uid": "u-1", "generation": 1},
        "spec": {
            "model": {"source": "s3://models/tiny"},
            "storage": {"uri": "s3://bucket/root", "endpoint": "https://s3.example", "secretName": "s3-credentials"},
            "datasets": [
                {"name": "manuals", "source": "s3://corpus/manuals.jsonl", "format": "text"},
                {"name": "tickets", "source": "s3://corpus/tickets.jsonl"},
                {"name": "prefs", "source": "s3://corpus/prefs.jsonl", "format": "preference"},
                {"name": "held", "source": "s3://corpus/held.jsonl", "role": "test"},
            ],
            "stages": deepcopy(FOUR_STAGES if stages is None else stages),
            **deepcopy(spec),
        },
    }


def runtime_body(**spec: Any) -> dict[str, Any]:
    """A runtime object."""
    return {
        "apiVersion": "plumbline.dev/v1alpha1",
        "kind": "AlignmentRuntime",
        "metadata": {"name": "gpu"},
        "spec": {
            "image": "registry.example/plumbline-trainer@sha256:" + "ab" * 32,
            "accelerator": {"resourceName": "nvidia.com/gpu", "memory": "80Gi"},
            "classes": {"train": {"gpusPerNode": 2, "cpu": "8", "memory": "64Gi"}},
            **deepcopy(spec),
        },
    }


def input_digest(uri: str, content: str = "") -> str:
    """What preflight of this world returns for an input."""
    raw = hashlib.sha256(f"{uri}{content}".encode()).digest()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def succeeded(**fields: Any) -> StageResult:
    """A result of an attempt that succeeded."""
    given = {"outcome": "Succeeded", "reason": "Completed", "manifest_digest": "d" * 64, "gpu_seconds": 20.0}
    return StageResult.model_validate(given | fields)


def failed(reason: str, message: str = "it broke", **fields: Any) -> StageResult:
    """A result of an attempt that failed."""
    return StageResult.model_validate({"outcome": "Failed", "reason": reason, "message": message} | fields)


@dataclass
class World:
    """Jobs, one pipeline object, one clock."""

    body: dict[str, Any] = field(default_factory=pipeline_body)
    runtime: AlignmentRuntime | None = field(default_factory=lambda: AlignmentRuntime.parse(runtime_body()))
    runtime_problem: str | None = None
    settings: PlanSettings = SETTINGS
    place: str = "cluster"
    now: datetime = START
    status: PipelineStatus = field(default_factory=PipelineStatus)
    records: dict[int, RunRecord] = field(default_factory=dict)
    jobs: dict[str, JobView] = field(default_factory=dict)
    runs: dict[str, StageRun] = field(default_factory=dict)
    starts: list[StartStage] = field(default_factory=list)
    events: list[PlannedEvent] = field(default_factory=list)
    progress: dict[str, ProgressView] = field(default_factory=dict)
    twins: frozenset[str] = frozenset()
    foreign: frozenset[str] = frozenset()
    contents: str = ""
    in_storage: set[str] = field(default_factory=set)
    """Names of stages that preflight finds in storage."""
    writes: int = 0
    is_deleted: bool = False

    def snapshot(self) -> Snapshot:
        """What is seen now."""
        body = deepcopy(self.body)
        pipeline: AlignmentPipeline | None = None
        problems: tuple[Problem, ...] = ()
        try:
            pipeline = AlignmentPipeline.parse(body)
        except ManifestError as error:
            problems = tuple(error.problems)
        generation = body["metadata"]["generation"]
        earlier = [number for number in self.records if number < generation]
        return Snapshot(
            body=body,
            pipeline=pipeline,
            problems=problems,
            status=PipelineStatus.model_validate(self.status.to_wire()),
            record=self.records.get(generation),
            previous=self.records[max(earlier)] if earlier else None,
            runtime=self.runtime,
            runtime_problem=self.runtime_problem,
            place=self.place,  # type: ignore[arg-type]
            jobs=tuple(self.jobs.values()),
            progress=tuple(self.progress.values()),
            twins=self.twins,
            foreign_names=self.foreign,
        )

    def plan(self, snapshot: Snapshot | None = None) -> Plan:
        """What would be done now."""
        return plan(snapshot or self.snapshot(), self.settings, self.now)

    def reconcile(self, snapshot: Snapshot | None = None) -> Plan:
        """One pass. A second one at the same moment must find nothing to do."""
        decided = self.plan(snapshot)
        self.apply(decided)
        return decided

    def settle(self) -> Plan:
        """Passes until nothing is left to do at this moment; the first plan is returned."""
        first = self.reconcile()
        for _ in range(5):
            again = self.reconcile()
            if not again.actions and again.status is None:
                assert not again.events
                return first
        raise AssertionError(f"the world does not come to rest: {again}")

    def apply(self, decided: Plan) -> bool:
        """Carry a plan out; False where it met a world that it did not know (nothing after that is done)."""
        for action in decided.actions:
            if not self._do(action):
                return False
        if decided.status is not None:
            self.writes += 1
            self.status = decided.status
        self.events += decided.events
        return True

    def _do(self, action: Any) -> bool:
        self.writes += 1
        if isinstance(action, FreezeRecord):
            generation = action.record.pipeline.generation
            return self.records.setdefault(generation, action.record) == action.record
        if isinstance(action, StartStage):
            if action.job in self.jobs:
                return False
            self.starts.append(action)
            self.runs[action.job] = action.run
            gpus = (action.resources.gpus_per_node or 0) * action.resources.nodes
            self.jobs[action.job] = JobView(
                name=action.job,
                role=action.run.role,
                stage=action.run.stage,
                fingerprint=action.run.fingerprint,
                attempt=action.run.attempt,
                state="waiting",
                nodes=action.run.nodes,
                gpus=gpus,
                created=self.now,
            )
        elif isinstance(action, StopStage):
            if action.job in self.jobs:
                self.change(action.job, deleting=True)
        elif isinstance(action, SuspendStage):
            if action.job not in self.jobs:
                return False
            self.change(action.job, suspended=action.suspend)
        elif isinstance(action, DeletePipeline):
            self.is_deleted = True
        return True

    # What the cluster does.

    def change(self, job: str, **changes: Any) -> None:
        """Set fields of a job."""
        self.jobs[job] = replace(self.jobs[job], **changes)

    def later(self, seconds: float) -> None:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)

    def live(self) -> list[JobView]:
        """Jobs that have not ended."""
        return [job for job in self.jobs.values() if job.owned and job.state in ("waiting", "running")]

    def job(self, stage: str, role: str | None = None) -> JobView:
        """The newest job of a stage."""
        found = [j for j in self.jobs.values() if j.stage == stage and j.owned and (role is None or j.role == role)]
        return found[-1]

    def run(self, stage: str) -> None:
        """A pod of the stage's newest job starts."""
        job = self.job(stage)
        self.change(job.name, state="running", active=True, started=self.now, waiting_reason=None, waiting_message="")

    def default_result(self, job: JobView) -> StageResult:
        """The result of an attempt at which nothing goes wrong."""
        if job.role != "preflight":
            return succeeded(metrics={"loss": 1.5}, gpu_seconds=20.0 if job.gpus else 0.0)
        record = self.runs[job.name].record
        assert record is not None
        digests = [input_digest(item.uri, self.contents) for item in record.external_inputs]
        bits = "".join("1" if stage.name in self.in_storage else "0" for stage in record.stages)
        return succeeded(
            manifest_digest=None, gpu_seconds=0.0, preflight=PreflightFindings(digests=digests, cached=bits)
        )

    def end(self, stage: str, result: StageResult | None = None, **fields: Any) -> None:
        """The stage's newest attempt ends; by default it succeeds."""
        job = self.job(stage)
        result = result or (None if fields.get("result_lost") or fields.get("failure") else self.default_result(job))
        state = "succeeded" if result is not None and result.outcome == "Succeeded" else "failed"
        given: dict[str, Any] = {
            "state": state,
            "active": False,
            "started": job.started or self.now,
            "finished": self.now,
            "result": result,
        }
        self.change(job.name, **(given | fields))

    def crash(self, stage: str, **failure: Any) -> None:
        """The stage's newest attempt dies without a result."""
        self.end(stage, failure=PodFailure(**failure), result_lost=True, state="failed")

    def vanish(self, job: str) -> None:
        """A job object is gone, with its pods."""
        del self.jobs[job]

    def reap(self) -> None:
        """Jobs that are being deleted are gone."""
        for job in [job for job in self.jobs.values() if job.deleting]:
            self.vanish(job.name)

    def report(self, stage: str, percentage: int, *, finish: str | None = None, **metrics: str) -> None:
        """A running trainer reports."""
        job = self.job(stage)
        progress = Progress(percentage=percentage, finish_time=finish, last_update_time="2026-01-01T12:00:00Z")
        self.progress[job.name] = ProgressView(job.name, progress, tuple(metrics.items()))

    def edit(self, **spec: Any) -> None:
        """The user edits the spec."""
        self.body["spec"] |= deepcopy(spec)
        self.body["metadata"]["generation"] += 1

    def go(self, *stages: str) -> None:
        """Reconcile, then run and end each stage successfully, reconciling after each."""
        self.settle()
        for stage in stages:
            self.run(stage)
            self.settle()
            self.later(10)
            self.end(stage)
            self.settle()

    # What people see.

    def phases(self) -> dict[str, str]:
        """Phase by stage."""
        return {entry.name: entry.phase for entry in self.status.stages}

    def entry(self, stage: str) -> Any:
        """The status of a stage."""
        return self.status.stage_named(stage)

    def condition(self, type_: str) -> Any:
        """A condition."""
        return self.status.condition(type_)

    def event_reasons(self) -> list[str]:
        """Reasons of all events so far."""
        return [event.reason for event in self.events]


def starts(plan: Plan) -> list[str]:
    """Names of the stages that a plan starts."""
    return [action.run.stage for action in plan.actions if hasattr(action, "run")]


def finished(stages: list[dict[str, Any]] | None = None, **spec: Any) -> World:
    """A run that has ended well."""
    world = World(pipeline_body(stages, **spec))
    names = [stage["name"] for stage in world.body["spec"]["stages"]]
    world.go("preflight", *names, "finalize")
    assert world.status.phase == "Succeeded"
    return world
