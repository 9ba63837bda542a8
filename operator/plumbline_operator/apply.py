"""Writes, and nothing else: carries a Plan out in an order in which dying after any write does no harm.

Record, stops, suspensions, starts, deletion; then one status; then events. Every write is safe to repeat: names are
derived, deletions name a uid, the status names the version that it was derived from.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from plumbline_api.record import RunRecord
from plumbline_api.status import PipelineStatus

from plumbline_operator.announcer import Announcer
from plumbline_operator.cache import Cache
from plumbline_operator.errors import (
    AlreadyExistsError,
    ConflictError,
    NotFoundError,
    RefusedError,
    ReobserveError,
)
from plumbline_operator.jobs import controller_of
from plumbline_operator.kube import JOBS, PIPELINES, SERVICES, Kube, Manifest
from plumbline_operator.record import RecordStore
from plumbline_operator.refusals import Refusals
from plumbline_operator.rendering import RenderSettings, render_job, render_service
from plumbline_operator.snapshot import (
    Action,
    DeletePipeline,
    FreezeRecord,
    Plan,
    Snapshot,
    StartStage,
    StopStage,
    SuspendStage,
)
from plumbline_operator.statuspatch import merge_patch

logger = logging.getLogger(__name__)

ORDER = (FreezeRecord, StopStage, SuspendStage, StartStage, DeletePipeline)


@dataclass(frozen=True, slots=True)
class Applied:
    """What a pass has written."""

    started: tuple[str, ...] = ()
    """Jobs that this pass created."""


@dataclass(slots=True)
class Applier:
    """Carries plans out."""

    kube: Kube
    cache: Cache
    records: RecordStore
    refusals: Refusals
    rendering: RenderSettings
    announcer: Announcer

    async def apply(self, plan: Plan, snapshot: Snapshot) -> Applied:
        """Carry a plan out.

        Raises:
            ReobserveError: if the world is not as the snapshot shows it; what has been written so far stands.
            ApiError: if the API server cannot be reached or refuses.
        """
        record = snapshot.record
        started: list[str] = []
        for action in sorted(plan.actions, key=lambda item: ORDER.index(type(item))):
            if isinstance(action, FreezeRecord):
                record = action.record
            if await self._carry_out(action, snapshot, record):
                assert isinstance(action, StartStage)
                started.append(action.job)
        if plan.status is not None:
            await self._write_status(snapshot, plan.status)
        self.announcer.announce(_metadata(snapshot), plan.events)
        return Applied(tuple(started))

    async def _carry_out(self, action: Action, snapshot: Snapshot, record: RunRecord | None) -> bool:
        """One action; True where it created a Job."""
        namespace, uid = _place(snapshot)
        if isinstance(action, FreezeRecord):
            await self.records.freeze(action.record)
        elif isinstance(action, StopStage):
            await self._stop(action, namespace)
        elif isinstance(action, SuspendStage):
            await self._suspend(action, namespace)
        elif isinstance(action, StartStage):
            assert record is not None, "a stage starts from a record"
            await self._start(action, namespace, uid, record)
            return True
        else:
            await self._delete_pipeline(snapshot, namespace, uid)
        return False

    async def _start(self, action: StartStage, namespace: str, uid: str, record: RunRecord) -> None:
        service = render_service(action)
        try:
            if service is not None:
                await self._create_service(service, namespace, uid)
            job = await self.kube.create(JOBS, render_job(action, record, self.rendering), namespace)
        except AlreadyExistsError:
            await self._look_at_namesake(action.job, namespace, uid)
            raise ReobserveError(f"Job {action.job} is there already") from None
        except RefusedError as error:
            self.refusals.note_refused(action, error.detail)
            raise ReobserveError(f"Job {action.job} is refused: {error.detail}") from error
        self.refusals.forget(namespace, action.job)
        self.cache.put_job(job)

    async def _create_service(self, service: Manifest, namespace: str, uid: str) -> None:
        name = service["metadata"]["name"]
        try:
            await self.kube.create(SERVICES, service, namespace)
        except AlreadyExistsError:
            there = await self.kube.get(SERVICES, name, namespace)
            owner = controller_of(there["metadata"])
            if owner is None or owner.get("uid") != uid:
                raise RefusedError(
                    f"a Service {name} is there that does not belong to this pipeline; it is left alone. Delete it",
                    status=409,
                ) from None

    async def _look_at_namesake(self, name: str, namespace: str, uid: str) -> None:
        """Whose Job is it that has the name: ours, made by a pass that we do not remember, or something else?"""
        try:
            there = await self.kube.get(JOBS, name, namespace)
        except NotFoundError:
            return
        owner = controller_of(there["metadata"])
        if owner is not None and owner.get("uid") == uid:
            self.cache.put_job(there)
        else:
            self.refusals.note_foreign(namespace, name, uid)

    async def _stop(self, action: StopStage, namespace: str) -> None:
        job = self.cache.job(namespace, action.job)
        if job is None:
            self.refusals.forget(namespace, action.job)
            return
        try:
            answer = await self.kube.delete(JOBS, action.job, namespace, uid=job.uid, propagation="Foreground")
        except NotFoundError:
            self.cache.drop_job(namespace, action.job, job.uid)
            return
        except ConflictError as error:
            await self._refresh_job(action.job, namespace)
            raise ReobserveError(f"Job {action.job} is another one by now") from error
        logger.info("%s/%s: stopped: %s", namespace, action.job, action.reason)
        if answer.get("kind") == "Job":
            self.cache.put_job(answer)

    async def _suspend(self, action: SuspendStage, namespace: str) -> None:
        job = self.cache.job(namespace, action.job)
        if job is None:
            raise ReobserveError(f"Job {action.job} is gone")
        patch = {"metadata": {"uid": job.uid}, "spec": {"suspend": action.suspend}}
        try:
            self.cache.put_job(await self.kube.patch(JOBS, action.job, namespace, patch))
        except NotFoundError:
            self.cache.drop_job(namespace, action.job, job.uid)
            raise ReobserveError(f"Job {action.job} is gone") from None
        except ConflictError as error:
            await self._refresh_job(action.job, namespace)
            raise ReobserveError(f"Job {action.job} is another one by now") from error

    async def _refresh_job(self, name: str, namespace: str) -> None:
        known = self.cache.job(namespace, name)
        try:
            self.cache.put_job(await self.kube.get(JOBS, name, namespace))
        except NotFoundError:
            if known is not None:
                self.cache.drop_job(namespace, name, known.uid)

    async def _delete_pipeline(self, snapshot: Snapshot, namespace: str, uid: str) -> None:
        metadata = _metadata(snapshot)
        try:
            await self.kube.delete(
                PIPELINES, metadata["name"], namespace, uid=uid, resource_version=metadata["resourceVersion"]
            )
        except NotFoundError:
            self.cache.drop_pipeline((namespace, metadata["name"]), uid)
        except ConflictError as error:
            raise ReobserveError("the pipeline was changed while its time to live ended") from error

    async def _write_status(self, snapshot: Snapshot, status: PipelineStatus) -> None:
        metadata, stored = _metadata(snapshot), snapshot.body.get("status")
        patch = merge_patch(stored if isinstance(stored, dict) else {}, status.to_wire())
        if not patch:
            return
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "status": patch}
        try:
            answer = await self.kube.patch(PIPELINES, metadata["name"], metadata["namespace"], body, "status")
        except ConflictError as error:
            raise ReobserveError("the pipeline was changed meanwhile") from error
        except NotFoundError as error:
            self.cache.drop_pipeline((metadata["namespace"], metadata["name"]), metadata["uid"])
            raise ReobserveError("the pipeline is gone") from error
        self.cache.put_pipeline(answer)


def _metadata(snapshot: Snapshot) -> dict[str, Any]:
    metadata = snapshot.body["metadata"]
    assert isinstance(metadata, dict)
    return metadata


def _place(snapshot: Snapshot) -> tuple[str, str]:
    metadata = _metadata(snapshot)
    return metadata["namespace"], metadata["uid"]
