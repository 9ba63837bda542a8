"""What starts, what is suspended and what goes on; the last step, finalize, among them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from plumbline_api.names import FINALIZE, PREFLIGHT
from plumbline_api.record import StageRecord
from plumbline_api.stagerun import StageOutcome, StageRun
from plumbline_api.status import Output, StageStatus

from plumbline_operator.draft import Draft, name_of_record
from plumbline_operator.policies.acceptance import permission_problems
from plumbline_operator.policies.clock import format_time, shorten
from plumbline_operator.policies.identity import (
    LIVE_PHASES,
    attempts_of,
    finalize_identity,
    is_foreign,
    is_over,
    next_attempt,
)
from plumbline_operator.policies.retries import next_start
from plumbline_operator.policies.settlement import SUSPENDING, Rules, settle
from plumbline_operator.policies.summary import TERMINAL_PHASES, outcomes_of
from plumbline_operator.policies.suspension import is_queued_elsewhere
from plumbline_operator.policies.twins import twin_of
from plumbline_operator.policies.usage import held_gpu_seconds
from plumbline_operator.snapshot import JobView, StartStage, StopStage, SuspendStage
from plumbline_operator.stageruns import finalize_run, output_uri, preflight_run, stage_run, start

STAGE_ROLES = ("preflight", "stage", "collect")


def suspend_attempts(draft: Draft, roles: Sequence[str] = STAGE_ROLES) -> None:
    """Suspend every attempt under way; nothing starts."""
    stopping = {action.job for action in draft.actions if isinstance(action, StopStage)}
    for job in draft.snapshot.jobs:
        if not job.owned or job.deleting or is_over(job) or job.name in stopping or job.role not in roles:
            continue
        queued = is_queued_elsewhere(job, draft.record)
        if not job.suspended:
            draft.actions.append(StopStage(job.name, "suspended") if queued else SuspendStage(job.name, suspend=True))
        entry = _entry_of(draft, job)
        if entry is None:
            continue  # of a generation before; it is stopped or goes on once this one is known
        changes: dict[str, object] = {"phase": "Suspended", "reason": "Suspended", "message": None, "progress": None}
        if job.active or not job.suspended:
            changes = {"reason": SUSPENDING, "message": None}
        held = held_gpu_seconds(job, draft.now)
        if held and not queued and not _was_told(draft, job):
            # A resumed Job counts from its resumption; one that is stopped is counted when it has ended.
            changes["gpu_seconds"] = round((entry.gpu_seconds or 0.0) + held, 3)
        draft.update(entry.name, **changes)


def resume_attempts(draft: Draft, roles: Sequence[str] = STAGE_ROLES) -> None:
    """Let go on what we suspended, unless it is about to turn out that other work is wanted."""
    fingerprints = draft.fingerprints() or {}
    for job in draft.snapshot.jobs:
        entry = _entry_of(draft, job)
        if entry is None or not job.owned or job.deleting or is_over(job) or not job.suspended:
            continue
        if job.role not in roles or not _was_told(draft, job) or is_queued_elsewhere(job, draft.record):
            continue
        if job.role in ("stage", "collect") and fingerprints.get(job.stage) != job.fingerprint:
            draft.update(entry.name, phase="Suspended", reason="Suspended", message=None, progress=None)
            continue
        draft.actions.append(SuspendStage(job.name, suspend=False))
        draft.update(entry.name, phase="Queued", reason="Resuming", message=None)


def _entry_of(draft: Draft, job: JobView) -> StageStatus | None:
    """The entry whose current attempt a job is."""
    entry = draft.entries.get(job.stage)
    return entry if entry is not None and entry.job == job.name and entry.phase in LIVE_PHASES else None


def _was_told(draft: Draft, job: JobView) -> bool:
    """Whether the written status says that we suspended this attempt; queues suspend jobs, too."""
    before = draft.old.stage_named(job.stage)
    return before is not None and before.job == job.name and before.reason in (SUSPENDING, "Suspended", "Resuming")


def start_preflight(draft: Draft) -> None:
    """Start preflight where it is due."""
    entry = draft.entries[PREFLIGHT]
    if entry.phase != "Pending":
        return
    attempts = attempts_of(draft.snapshot, roles=["preflight"], stage=PREFLIGHT, fingerprint=draft.identity)
    if _may_start(draft, entry, attempts, index=None):
        _start(
            draft, entry, preflight_run(draft.record, fingerprint=draft.identity, attempt=next_attempt(entry, attempts))
        )


def start_stages(draft: Draft) -> None:
    """Start every stage whose dependencies have succeeded, in parallel."""
    fingerprints = draft.fingerprints()
    if fingerprints is None:
        return
    pins = [pin.digest for pin in draft.pins]
    index_of = {stage.name: index for index, stage in enumerate(draft.record.stages)}
    for name in draft.order.names:
        entry, stage = draft.entries[name], draft.record.stage(name)
        if entry.phase != "Pending":
            continue
        waits_for = [other for other in draft.order.before[name] if draft.entries[other].phase != "Succeeded"]
        if waits_for:
            if entry.attempt == 0:
                draft.update(name, reason="WaitingForStages", message=f"waits for {', '.join(waits_for)}")
            continue
        if entry.cached and not stage.gates:
            _take_from_storage(draft, entry, stage)
            continue
        attempts = attempts_of(draft.snapshot, roles=["stage", "collect"], stage=name, fingerprint=fingerprints[name])
        if not _may_start(draft, entry, attempts, index=index_of[name]):
            continue
        role = "collect" if entry.cached or _is_result_lost(entry, attempts) else "stage"
        twin = _starting_twin(draft, fingerprints[name]) or twin_of(draft.snapshot, name, fingerprints[name])
        if role == "stage" and twin is not None:
            draft.update(name, reason="WaitingForTwin", message=f"{twin} computes the same work; its result is taken")
            draft.wakes.append(draft.now + timedelta(seconds=draft.settings.twin_poll_seconds))
            continue
        number = next_attempt(entry, attempts)
        _start(
            draft,
            entry,
            stage_run(
                draft.record,
                name,
                fingerprints=fingerprints,
                pins=pins,
                attempt=number,
                role="collect" if role == "collect" else "stage",
            ),
        )


def _starting_twin(draft: Draft, fingerprint: str) -> str | None:
    """The stage that starts the same work in this very pass."""
    for action in draft.actions:
        if isinstance(action, StartStage) and action.run.role == "stage" and action.run.fingerprint == fingerprint:
            return f"stage {action.run.stage} of this pipeline"
    return None


def wrap_up(draft: Draft) -> None:
    """Run finalize when every stage has ended; stop one that tells of an end that is no longer true."""
    is_due = draft.entries[PREFLIGHT].phase in ("Succeeded", "Failed") and all(
        entry.phase in TERMINAL_PHASES for entry in draft.stages
    )
    outcomes = outcomes_of(draft.stages)
    identity = _finalize_identity(draft, outcomes) if is_due else None
    for job in draft.snapshot.jobs:
        if (
            job.role == "finalize"
            and job.owned
            and not job.deleting
            and not is_over(job)
            and job.fingerprint != identity
        ):
            draft.actions.append(StopStage(job.name, "the run goes on"))
    if identity is None:
        draft.entries.pop(FINALIZE, None)
        return
    entry = draft.entries.get(FINALIZE)
    if entry is None or entry.fingerprint != identity:
        entry = StageStatus(name=FINALIZE, type=FINALIZE, fingerprint=identity)
    attempts = attempts_of(draft.snapshot, roles=["finalize"], stage=FINALIZE, fingerprint=identity)
    rules = Rules(
        retries=draft.settings.implicit_retries,
        timeout_seconds=draft.settings.implicit_timeout_seconds,
        needs_result=False,
    )
    settled = settle(entry, attempts, rules, draft.settings, draft.now)
    draft.entries[FINALIZE] = entry = settled.entry
    draft.wakes.extend(settled.wakes)
    if draft.suspended:
        suspend_attempts(draft, ("finalize",))
        return
    resume_attempts(draft, ("finalize",))
    if entry.phase == "Pending" and _may_start(draft, entry, attempts, index=None):
        pins = [pin.digest for pin in draft.pins]
        number = next_attempt(entry, attempts)
        run = finalize_run(draft.record, fingerprint=identity, pins=pins, outcomes=outcomes, attempt=number)
        _start(draft, entry, run)


def _finalize_identity(draft: Draft, outcomes: Sequence[StageOutcome]) -> str:
    """Identity of the report; the known one where it tells of the same stages, whoever computed it."""
    known, before = draft.entries.get(FINALIZE), draft.old
    same = all(before.stage_named(entry.name) == entry for entry in draft.stages)
    if known is not None and known.fingerprint is not None and same and before.record == name_of_record(draft.record):
        return known.fingerprint
    return finalize_identity(draft.identity, outcomes)


def _may_start(draft: Draft, entry: StageStatus, attempts: Sequence[JobView], *, index: int | None) -> bool:
    """Whether the next attempt may start now. Where not, the entry says why and a wake-up is set."""
    snapshot, settings = draft.snapshot, draft.settings
    roles = ("stage", "collect") if index is not None else (entry.name,)
    for job in snapshot.jobs:
        if job.owned and job.role in roles and job.stage == entry.name and not is_over(job):
            draft.update(entry.name, reason="WaitingForStop", message=f"waits until {job.name} has stopped")
            return False
    if snapshot.place == "cluster" and snapshot.runtime is None:
        message = snapshot.runtime_problem or "the runtime is gone"
        draft.update(entry.name, reason="NoRuntime", message=shorten(message))
        draft.wakes.append(draft.now + timedelta(seconds=settings.runtime_poll_seconds))
        return False
    problems = permission_problems(snapshot, draft.pipeline, index)
    if problems:
        _fail(draft, entry, "NotAllowed", "\n".join(str(problem) for problem in problems))
        return False
    last = attempts[-1] if attempts and attempts[-1].attempt == entry.attempt else None
    at = next_start(attempt=entry.attempt, failures=entry.failures, last=last, settings=settings)
    if at is not None and at > draft.now:
        draft.wakes.append(at)
        return False
    return True


def _start(draft: Draft, entry: StageStatus, run: StageRun) -> None:
    action = start(run, draft.record, implicit_timeout=draft.settings.implicit_timeout_seconds)
    if is_foreign(draft.snapshot, action.job):
        message = (
            f"a job {action.job} is there that does not belong to this pipeline; it is left alone. "
            f"Delete or rename it, then retry {entry.name}"
        )
        draft.update(entry.name, attempt=run.attempt)
        _fail(draft, entry, "NameConflict", message)
        return
    draft.actions.append(action)
    changes = {"phase": "Queued", "attempt": run.attempt, "job": action.job, "reason": None, "message": None}
    draft.update(entry.name, **changes, completion_time=None, progress=None)


def _fail(draft: Draft, entry: StageStatus, reason: str, message: str) -> None:
    """Fail a stage without an attempt, and skip what waits for it."""
    ended = format_time(draft.now)
    draft.update(entry.name, phase="Failed", reason=reason, message=shorten(message), completion_time=ended)


def _take_from_storage(draft: Draft, entry: StageStatus, stage: StageRecord) -> None:
    assert entry.fingerprint is not None
    output = Output(uri=output_uri(draft.record, stage, entry.fingerprint))
    changes = {"phase": "Succeeded", "reason": "Cached", "message": None, "output": output}
    draft.update(entry.name, **changes, completion_time=format_time(draft.now))


def _is_result_lost(entry: StageStatus, attempts: Sequence[JobView]) -> bool:
    """Whether the last attempt is complete and left no message: its result lies in storage."""
    last = attempts[-1] if attempts else None
    return last is not None and last.attempt == entry.attempt and last.state == "succeeded" and last.result is None
