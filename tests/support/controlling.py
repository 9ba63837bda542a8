"""The operator's loop without a cluster: real controller, observer and applier over an API server in a dictionary."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from plumbline_api.stagerun import StageResult, StageRun
from plumbline_operator.announcer import Announcer
from plumbline_operator.apply import Applier
from plumbline_operator.cache import Cache
from plumbline_operator.controller import Controller
from plumbline_operator.kube import JOBS, PIPELINES, PODS, RUNTIMES
from plumbline_operator.metrics import Metrics
from plumbline_operator.observe import Observer
from plumbline_operator.progress import ProgressStore
from plumbline_operator.record import RecordStore
from plumbline_operator.refusals import Refusals
from plumbline_operator.rendering import RenderSettings
from plumbline_operator.resync import Resync
from plumbline_operator.settings import PlanSettings
from support.fakekube import FakeKube, Killed
from support.fakekubelet import Ending, ended, running, stage_run_of, succeeded
from support.pipelines import pipeline_body, runtime_body

START = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
NAMESPACE, NAME = "team-a", "assistant"
Manifest = dict[str, Any]


class Process:
    """One operator process: what it knows is lost when it dies."""

    def __init__(self, kube: FakeKube, now: Callable[[], datetime]) -> None:
        self.cache = Cache()
        self.progress = ProgressStore()
        self.metrics = Metrics()
        self.refusals = Refusals(retry_seconds=1000.0)
        records = RecordStore(kube)
        self.announcer = Announcer(kube)
        applier = Applier(kube, self.cache, records, self.refusals, RenderSettings(), self.announcer)
        self.observer = Observer(kube, self.cache, records, self.progress.of, self.refusals)
        settings = PlanSettings(operator_version="0.1.0")
        self.controller = Controller(kube, self.cache, self.observer, applier, settings, self.metrics, now)
        self.keys: set[tuple[str, str]] = set()
        self.resync = Resync(kube, self.cache, self.metrics, self.keys.add, 180.0)


@dataclass
class Cluster:
    """Jobs and pods that a test moves; a clock that it sets; an operator that it may kill."""

    kube: FakeKube = field(default_factory=FakeKube)
    now: datetime = START
    body: Manifest = field(default_factory=pipeline_body)
    key: tuple[str, str] = (NAMESPACE, NAME)

    def __post_init__(self) -> None:
        self.kube.add(RUNTIMES, runtime_body())
        self.kube.add(PIPELINES, self.body)
        self.process = self.boot()

    def boot(self) -> Process:
        """A new process that knows nothing."""
        self.process = Process(self.kube, lambda: self.now)
        return self.process

    async def reconcile(self) -> float | None:
        """List everything, then one pass, as after a long silence."""
        assert await self.process.resync.once()
        return await self.process.controller.reconcile(self.key)

    async def survive(self) -> bool:
        """A pass; a process that dies in it is started again. False where it died."""
        try:
            await self.reconcile()
        except Killed:
            self.boot()
            return False
        return True

    def later(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    @property
    def pipeline(self) -> Manifest:
        return copy.deepcopy(self.kube.objects["alignmentpipelines", *self.key])

    @property
    def status(self) -> Manifest:
        found: Manifest = self.pipeline.get("status") or {}
        return found

    def phases(self) -> dict[str, str]:
        return {entry["name"]: entry["phase"] for entry in self.status.get("stages", [])}

    def jobs(self) -> dict[str, Manifest]:
        """Jobs by stage, the newest of each."""
        found = sorted(self.kube.of(JOBS), key=lambda job: int(job["metadata"]["annotations"]["plumbline.dev/attempt"]))
        return {job["metadata"]["annotations"]["plumbline.dev/stage"]: job for job in found}

    def open_jobs(self) -> list[Manifest]:
        return [job for job in self.kube.of(JOBS) if not (job.get("status") or {}).get("conditions")]

    def run_pod(self, stage: str) -> StageRun:
        """The pod of a stage's newest Job runs."""
        job = self.jobs()[stage]
        run = self._pod(job, running())
        self._set(job, {"active": 1, "ready": 1, "startTime": self._time()})
        return run

    def end(self, stage: str, ending: Ending | None = None, *, with_pod: bool = True, reason: str = "") -> None:
        """The newest attempt at a stage ends; by default it succeeds."""
        job = self.jobs()[stage]
        run = run_of(job)
        chosen = ending or Ending(succeeded(run))
        if with_pod:
            self._pod(job, ended(chosen))
        type_ = "Complete" if chosen.exit_code == 0 else "Failed"
        condition = {"type": type_, "status": "True", "lastTransitionTime": self._time(), "reason": reason}
        self._set(job, {"active": 0, "ready": 0, "startTime": self._time(), "conditions": [condition]})

    def fail(self, stage: str, reason: str, message: str, exit_code: int = 1) -> None:
        result = StageResult(outcome="Failed", reason=reason, message=message)
        self.end(stage, Ending(result, exit_code=exit_code, reason="Error"), reason="BackoffLimitExceeded")

    def reap(self) -> None:
        """Jobs that are being deleted are gone, with their pods."""
        for job in self.kube.of(JOBS):
            metadata = job["metadata"]
            if "deletionTimestamp" in metadata:
                self.kube.remove(JOBS, metadata["name"], metadata["namespace"])
                for pod in self.kube.of(PODS):
                    if pod["metadata"]["labels"]["batch.kubernetes.io/controller-uid"] == metadata["uid"]:
                        self.kube.remove(PODS, pod["metadata"]["name"], metadata["namespace"])

    def edit(self, **spec: Any) -> None:
        def change(body: Manifest) -> None:
            body["spec"] |= copy.deepcopy(spec)
            body["metadata"]["generation"] += 1

        self.kube.change(PIPELINES, NAME, NAMESPACE, change)

    def _pod(self, job: Manifest, status: Manifest) -> StageRun:
        metadata, template = job["metadata"], job["spec"]["template"]
        labels = template["metadata"]["labels"] | {
            "batch.kubernetes.io/job-name": metadata["name"],
            "batch.kubernetes.io/controller-uid": metadata["uid"],
        }
        owner = {"kind": "Job", "name": metadata["name"], "uid": metadata["uid"], "controller": True}
        pod = {
            "metadata": {"name": f"{metadata['name']}-x", "labels": labels, "ownerReferences": [owner]},
            "spec": template["spec"],
            "status": status,
        }
        with contextlib.suppress(KeyError):
            self.kube.remove(PODS, pod["metadata"]["name"], metadata["namespace"])
        self.kube.add(PODS, pod, metadata["namespace"])
        return stage_run_of(pod)

    def _set(self, job: Manifest, status: Manifest) -> None:
        self.kube.change(
            JOBS, job["metadata"]["name"], job["metadata"]["namespace"], lambda body: body.update(status=status)
        )

    def _time(self) -> str:
        return self.now.strftime("%Y-%m-%dT%H:%M:%SZ")


def run_of(job: Manifest) -> StageRun:
    """What a Job's pods are told."""
    return stage_run_of({"spec": job["spec"]["template"]["spec"]})


async def finish(cluster: Cluster, passes: int = 60) -> None:
    """Let everything succeed until the run has ended; the operator may die on the way."""
    for _ in range(passes):
        while not await cluster.survive():
            pass
        if cluster.status.get("phase") in ("Succeeded", "Failed") and cluster.status.get("completionTime"):
            return
        for job in cluster.open_jobs():
            cluster.end(job["metadata"]["annotations"]["plumbline.dev/stage"])
        cluster.later(1)
    raise AssertionError(f"the run does not end: {cluster.phases()}")
