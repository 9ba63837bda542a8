"""Reads, and nothing else: from what is known and what has to be asked for to the Snapshot that `plan` decides on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from plumbline_api.errors import ManifestError, Problem
from plumbline_api.names import LABEL_PIPELINE_UID, LABEL_STAGE
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.record import RunRecord
from plumbline_api.runtime import AlignmentRuntime
from plumbline_api.status import PipelineStatus
from pydantic import ValidationError

from plumbline_operator.cache import Cache
from plumbline_operator.errors import NotFoundError
from plumbline_operator.jobs import JobFacts
from plumbline_operator.kube import JOBS, PODS, Kube
from plumbline_operator.pods import Evidence, Pod, Wait, is_pending, read_evidence, read_wait, started_of
from plumbline_operator.record import ForeignRecordError, RecordStore
from plumbline_operator.refusals import Refusals
from plumbline_operator.snapshot import JobView, ProgressView, Snapshot

logger = logging.getLogger(__name__)

LABEL_JOB_NAME = "batch.kubernetes.io/job-name"
LABEL_JOB_UID = "batch.kubernetes.io/controller-uid"


@dataclass(slots=True)
class _Memory:
    """What pods of a Job told; kept as long as the Job."""

    evidence: Evidence | None = None
    started: datetime | None = None
    """When the pods of the current run started."""
    run: datetime | None = None
    """The run of the Job that `started` speaks of: a resumed Job starts anew."""
    wait: Wait | None = None
    asked_at: float | None = None
    """When its pods were last asked why they wait (monotonic seconds)."""


@dataclass(frozen=True, slots=True)
class Observation:
    """A snapshot and when some of it should be looked at again."""

    snapshot: Snapshot
    look_again: float | None
    """Seconds after which pods that wait are asked again."""


@dataclass(slots=True)
class Observer:
    """Builds snapshots. It remembers what pods told of Jobs that have ended, because pods do not live for ever."""

    kube: Kube
    cache: Cache
    records: RecordStore
    progress: Callable[[str], Iterable[ProgressView]]
    """Latest progress of a pipeline's jobs, by pipeline uid."""
    refusals: Refusals
    poll_seconds: float = 10.0
    clock: Callable[[], float] = time.monotonic
    _memory: dict[str, _Memory] = field(default_factory=dict)

    async def observe(self, body: dict[str, Any], now: datetime) -> Observation:
        """Everything that is known of a pipeline.

        Raises:
            ApiError: if something that is needed cannot be read.
        """
        metadata = body["metadata"]
        namespace, name, uid = metadata["namespace"], metadata["name"], metadata["uid"]
        pipeline, problems = _parse(body)
        status = _status(body)
        deleting = "deletionTimestamp" in metadata
        if deleting:
            return Observation(
                Snapshot(
                    body=body,
                    pipeline=pipeline,
                    problems=problems,
                    status=status,
                    record=None,
                    runtime=None,
                    runtime_problem=None,
                    place="cluster",
                    deleting=True,
                ),
                None,
            )
        record: RunRecord | None = None
        previous: RunRecord | None = None
        generation = int(metadata["generation"])
        try:
            record = await self.records.load(namespace=namespace, pipeline=name, uid=uid, generation=generation)
            if record is None and generation > 1:
                previous = await self.records.load_before(namespace=namespace, uid=uid, generation=generation)
        except ForeignRecordError as error:
            problems = (*problems, Problem("", str(error)))
        runtime, runtime_problem = self._runtime(pipeline, record)
        facts = self.cache.jobs_of(uid)
        is_settled = status.completion_time is not None and status.observed_generation == generation
        look_again = await self._ask_pods(namespace, uid, facts, now, is_settled=is_settled)
        jobs = [self._view(job) for job in facts]
        known = {job.name for job in facts}
        jobs += [view for view in self.refusals.views(namespace, uid) if view.name not in known]
        foreign = await self._foreign(namespace, uid)
        waits = [wait for wait in (look_again, self.refusals.next_try(uid)) if wait is not None]
        return Observation(
            Snapshot(
                body=body,
                pipeline=pipeline,
                problems=problems,
                status=status,
                record=record,
                runtime=runtime,
                runtime_problem=runtime_problem,
                place="cluster",
                jobs=tuple(jobs),
                progress=tuple(self.progress(uid)),
                twins=self.cache.running_fingerprints(namespace, but_of=uid),
                foreign_names=foreign,
                previous=previous,
            ),
            min(waits, default=None),
        )

    def next_look(self, uid: str) -> float | None:
        """Seconds until the pods of a pipeline's waiting Jobs are asked why; None where none waits."""
        moment = self.clock()
        return min((self._wait_left(job, moment) for job in _waiting(self.cache.jobs_of(uid))), default=None)

    def forget_jobs(self) -> None:
        """Drop what was remembered of Jobs that are gone."""
        alive = set(self.cache.job_uids())
        for uid in [uid for uid in self._memory if uid not in alive]:
            del self._memory[uid]

    def _runtime(
        self, pipeline: AlignmentPipeline | None, record: RunRecord | None
    ) -> tuple[AlignmentRuntime | None, str | None]:
        if record is not None and record.runtime_name is not None:
            return self.cache.runtime(record.runtime_name)
        if pipeline is not None and pipeline.spec.runtime_ref is not None:
            return self.cache.runtime(pipeline.spec.runtime_ref.name)
        return self.cache.default_runtime()

    async def _foreign(self, namespace: str, uid: str) -> frozenset[str]:
        """Names of ours that something else still holds; looked up again, because owners do clear them."""
        for name in self.refusals.foreign(namespace, uid):
            try:
                await self.kube.get(JOBS, name, namespace)
            except NotFoundError:
                self.refusals.forget(namespace, name)
        return frozenset(self.refusals.foreign(namespace, uid))

    # Pods.

    async def _ask_pods(
        self, namespace: str, uid: str, jobs: list[JobFacts], now: datetime, *, is_settled: bool
    ) -> float | None:
        """Read pods where a Job's own status does not tell enough; returns when to look at waiting ones again."""
        ended = [] if is_settled else [job for job in jobs if job.is_finished and self._recall(job).evidence is None]
        running = [job for job in jobs if job.state == "running" and self._lacks_start(job)]
        waiting = _waiting(jobs)
        for job in jobs:
            if job.state == "running":
                self._recall(job).asked_at = None  # should it wait again, that is another wait
        moment = self.clock()
        due = [job for job in waiting if self._wait_left(job, moment) <= 0]
        asked = [*ended, *running, *due]
        if asked:
            pods = await self._pods(namespace, uid, asked)
            for job in ended:
                self._recall(job).evidence = read_evidence(job, pods.get(job.uid, []))
            for job in running:
                memory = self._recall(job)
                memory.started, memory.run = started_of(pods.get(job.uid, [])), job.started
            for job in due:
                memory = self._recall(job)
                memory.wait, memory.asked_at = read_wait(job, pods.get(job.uid, []), now), moment
                if any(is_pending(pod) for pod in pods.get(job.uid, [])):
                    memory.started = None  # a replacement has not started yet
        return min((self._wait_left(job, moment) for job in waiting), default=None)

    async def _pods(self, namespace: str, uid: str, jobs: list[JobFacts]) -> dict[str, list[Pod]]:
        """Pods by the uid of their Job: of the one Job, else of all of the pipeline in one request."""
        labels = f"{LABEL_JOB_NAME}={jobs[0].name}" if len(jobs) == 1 else f"{LABEL_PIPELINE_UID}={uid},{LABEL_STAGE}"
        found: dict[str, list[Pod]] = {}
        async for page in self.kube.pages(PODS, namespace, labels):
            for pod in page.items:
                job_uid = (pod["metadata"].get("labels") or {}).get(LABEL_JOB_UID)
                if job_uid is not None:
                    found.setdefault(job_uid, []).append(pod)
        return found

    def _recall(self, job: JobFacts) -> _Memory:
        return self._memory.setdefault(job.uid, _Memory())

    def _lacks_start(self, job: JobFacts) -> bool:
        memory = self._recall(job)
        return memory.started is None or memory.run != job.started

    def _is_running(self, job: JobFacts) -> bool:
        """Whether its pods run.

        Between the end of a container and its count by the Job no pod is ready for a second; it does not wait again.
        """
        if job.state != "waiting":
            return job.state == "running"
        return job.active and not job.suspended and not self._lacks_start(job)

    def _wait_left(self, job: JobFacts, moment: float) -> float:
        """Seconds until the pods of a waiting Job are asked (again): not at once, for most start soon."""
        memory = self._recall(job)
        if memory.asked_at is None:
            memory.asked_at = moment - self.poll_seconds / 2
        return memory.asked_at + self.poll_seconds - moment

    def _view(self, job: JobFacts) -> JobView:
        memory = self._recall(job)
        evidence = memory.evidence if job.is_finished else None
        started = memory.started if memory.run == job.started else None
        if evidence is not None:
            started = evidence.started or started or job.started
        state = "running" if self._is_running(job) else job.state
        waits = memory.wait if state == "waiting" and not job.suspended else None
        return JobView(
            name=job.name,
            role=job.role,
            stage=job.stage,
            fingerprint=job.fingerprint,
            attempt=job.attempt,
            state=state,
            owned=job.owner_uid == job.pipeline_uid,
            suspended=job.suspended,
            deleting=job.deleting,
            active=job.active,
            nodes=job.nodes,
            gpus=job.gpus,
            created=job.created,
            started=started,
            finished=job.finished,
            result=evidence.result if evidence is not None else None,
            result_lost=evidence is not None and evidence.is_lost,
            failure=evidence.failure if evidence is not None else None,
            waiting_reason=waits.reason if waits is not None else None,
            waiting_message=waits.message if waits is not None else "",
        )


def _waiting(jobs: Iterable[JobFacts]) -> list[JobFacts]:
    """Jobs that may run and have no running pod."""
    return [job for job in jobs if job.state == "waiting" and not job.suspended and not job.deleting]


def _parse(body: dict[str, Any]) -> tuple[AlignmentPipeline | None, tuple[Problem, ...]]:
    try:
        return AlignmentPipeline.parse(body), ()
    except ManifestError as error:
        return None, tuple(error.problems)


def _status(body: dict[str, Any]) -> PipelineStatus:
    try:
        return PipelineStatus.model_validate(body.get("status") or {})
    except ValidationError as error:
        metadata = body["metadata"]
        logger.error(
            "the status of %s/%s was not written by this version and is made anew: %s",
            metadata["namespace"],
            metadata["name"],
            error.errors(include_url=False)[:3],
        )
        return PipelineStatus()
