"""The state of a run while `plan` decides: starts from the status as written, ends as the status to write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from plumbline_api.names import FINALIZE, PREFLIGHT, record_name
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.record import RunRecord, StageRecord
from plumbline_api.record import fingerprints as stage_fingerprints
from plumbline_api.status import InputPin, PipelineStatus, StageStatus

from plumbline_operator.policies.acceptance import Accepted
from plumbline_operator.policies.findings import known_pins
from plumbline_operator.policies.identity import LIVE_PHASES, record_identity
from plumbline_operator.policies.ordering import Order, order_of, waiting_again
from plumbline_operator.policies.usage import held_gpu_seconds
from plumbline_operator.settings import PlanSettings
from plumbline_operator.snapshot import Action, JobView, PlannedEvent, Snapshot


@dataclass(slots=True)
class Draft:
    """One pass of `plan`. Local to it: nothing outlives the pass."""

    snapshot: Snapshot
    settings: PlanSettings
    now: datetime
    pipeline: AlignmentPipeline
    record: RunRecord
    order: Order
    identity: str
    """Fingerprint of preflight: what the record resolves to."""
    entries: dict[str, StageStatus]
    pins: list[InputPin]
    former_gpu_seconds: float
    actions: list[Action] = field(default_factory=list)
    events: list[PlannedEvent] = field(default_factory=list)
    wakes: list[datetime] = field(default_factory=list)
    cached: frozenset[str] | None = None
    """Stages that preflight found in storage, in the pass that reads its findings."""
    retry_nonce: str | None = None
    _fingerprints: tuple[list[str], dict[str, str]] | None = None

    @property
    def old(self) -> PipelineStatus:
        """Status as last written."""
        return self.snapshot.status

    @property
    def stages(self) -> list[StageStatus]:
        """Entries of the declared stages in declared order."""
        return [self.entries[stage.name] for stage in self.record.stages]

    @property
    def suspended(self) -> bool:
        """Whether the user wants nothing to run."""
        return self.pipeline.spec.suspend

    def update(self, name: str, **changes: object) -> None:
        """Change fields of an entry."""
        self.entries[name] = self.entries[name].model_copy(update=changes)

    def each(self, change: Callable[[StageStatus], StageStatus], *phases: str) -> None:
        """Change every declared stage that is in one of the phases."""
        for stage in self.record.stages:
            if self.entries[stage.name].phase in phases:
                self.entries[stage.name] = change(self.entries[stage.name])

    def fingerprints(self) -> dict[str, str] | None:
        """Fingerprints of the declared stages; None until preflight has pinned the inputs of this record."""
        if self.entries[PREFLIGHT].phase != "Succeeded":
            return None
        pins = known_pins(self.pins, self.record)
        if pins is None:
            return None
        if self._fingerprints is None or self._fingerprints[0] != pins:
            self._fingerprints = (pins, stage_fingerprints(self.record, pins))  # the costly part of a pass
        return self._fingerprints[1]

    def job_of(self, entry: StageStatus) -> JobView | None:
        """The job of an entry's current attempt, if it is seen."""
        return next((job for job in self.snapshot.jobs if job.owned and job.name == entry.job), None)


def begin(snapshot: Snapshot, settings: PlanSettings, now: datetime, accepted: Accepted) -> Draft:
    """The state to start from: entries of stages that the record holds, fresh ones for new stages.

    Where the record resolves to something else than the last one did, preflight runs again and what failed or was
    skipped waits for it; what succeeded or runs stays until the new fingerprints are known.
    """
    record, old = accepted.record, snapshot.status
    known = {entry.name: entry for entry in old.stages}
    identity = _identity(accepted, old, known.get(PREFLIGHT))
    entries: dict[str, StageStatus] = {}
    for stage in record.stages:
        entry = known.get(stage.name)
        entries[stage.name] = entry if entry is not None and entry.type == stage.type else _fresh(stage)
    preflight = known.get(PREFLIGHT)
    is_same = preflight is not None and preflight.fingerprint == identity
    entries[PREFLIGHT] = (
        preflight
        if preflight is not None and is_same
        else StageStatus(name=PREFLIGHT, type=PREFLIGHT, fingerprint=identity)
    )
    if FINALIZE in known:
        entries[FINALIZE] = known[FINALIZE]
    draft = Draft(
        snapshot=snapshot,
        settings=settings,
        now=now,
        pipeline=accepted.pipeline,
        record=record,
        order=order_of(record),
        identity=identity,
        entries=entries,
        pins=old.inputs if is_same else [],
        former_gpu_seconds=old.usage.former_gpu_seconds or 0.0,
        retry_nonce=old.retry_nonce,
    )
    for name, entry in known.items():
        if name not in (PREFLIGHT, FINALIZE) and entries.get(name) is not entry:
            draft.former_gpu_seconds += (entry.gpu_seconds or 0.0) + held_so_far(draft, entry)
    if not is_same:
        draft.each(waiting_again, "Failed", "Skipped")
    return draft


def name_of_record(record: RunRecord) -> str:
    """The name of the object that holds a record."""
    identity = record.pipeline
    return record_name(pipeline=identity.name, uid=identity.uid, generation=identity.generation)


def _identity(accepted: Accepted, old: PipelineStatus, preflight: StageStatus | None) -> str:
    """Fingerprint of preflight. A record never changes, so for one that the status knows it has been computed.

    Otherwise another version of the operator, whose records have another field, would run every preflight again.
    """
    is_known = not accepted.is_new and old.record == name_of_record(accepted.record)
    if is_known and preflight is not None and preflight.fingerprint is not None:
        return preflight.fingerprint
    return record_identity(accepted.record)


def held_so_far(draft: Draft, entry: StageStatus) -> float:
    """Accelerator seconds of an entry's attempt under way."""
    job = draft.job_of(entry)
    return held_gpu_seconds(job, draft.now) if job is not None and entry.phase in LIVE_PHASES else 0.0


def renewed(draft: Draft, stage: StageRecord, fingerprint: str, *, cached: bool) -> StageStatus:
    """The entry of a stage that has become other work; the accelerator time that it cost so far stays."""
    before = draft.entries[stage.name]
    spent = (before.gpu_seconds or 0.0) + held_so_far(draft, before)
    return _fresh(stage).model_copy(
        update={"fingerprint": fingerprint, "cached": cached, "gpu_seconds": round(spent, 3) if spent else None}
    )


def _fresh(stage: StageRecord) -> StageStatus:
    return StageStatus(name=stage.name, type=stage.type)
