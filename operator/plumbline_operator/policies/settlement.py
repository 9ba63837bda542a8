"""From the attempts that are seen to the state of one stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from plumbline_api.evaluation import Gate
from plumbline_api.online import ABORTED_REASON
from plumbline_api.status import Output, StageStatus

from plumbline_operator.policies import gates as gate_policy
from plumbline_operator.policies.clock import format_time, shorten
from plumbline_operator.policies.failures import judge_failure
from plumbline_operator.policies.identity import LIVE_PHASES, is_accounted
from plumbline_operator.policies.retries import next_start
from plumbline_operator.policies.usage import attempt_gpu_seconds
from plumbline_operator.policies.waiting import STOPPING_WORDS, waiting_words
from plumbline_operator.settings import PlanSettings
from plumbline_operator.snapshot import JobView

SUSPENDING = "Suspending"
RESULT_LOST = "ResultLost"


@dataclass(frozen=True, slots=True)
class Rules:
    """What is asked of a stage."""

    retries: int
    gates: Sequence[Gate] = ()
    timeout_seconds: int | None = None
    output_uri: str | None = None
    """Where its manifest lies; None where it writes none."""
    needs_result: bool = True
    """Whether success without a readable result has to be looked up."""
    recoverable: bool = False
    """Whether it reads outputs of other stages, which can be computed again."""


@dataclass(frozen=True, slots=True)
class Settled:
    """A stage after everything that is seen has been counted."""

    entry: StageStatus
    wakes: tuple[datetime, ...] = ()
    """When to look again."""
    recover: bool = False
    """Whether the stages that it reads have to run once more."""
    finished: JobView | None = field(default=None)
    """The attempt that made it succeed, where that was counted just now."""


def settle(
    entry: StageStatus, attempts: Sequence[JobView], rules: Rules, settings: PlanSettings, now: datetime
) -> Settled:
    """Count every attempt that the status does not tell of yet, in order of their numbers."""
    settled = Settled(entry)
    for job in attempts:
        if not is_accounted(settled.entry, job):
            step = _settle_one(settled.entry, job, rules, settings, now)
            settled = replace(step, wakes=settled.wakes + step.wakes, recover=settled.recover or step.recover)
    entry = settled.entry
    if entry.phase in LIVE_PHASES and not any(job.attempt == entry.attempt for job in attempts):
        # Deleted by somebody, or a view of the world that is older than our own writing. The next attempt takes the
        # same number and so the same name: if the job is there after all, nothing starts twice.
        gone = {"phase": "Pending", "attempt": entry.attempt - 1, "job": None, "progress": None}
        note = {"reason": "JobGone", "message": f"the job of attempt {entry.attempt} is gone; it starts again"}
        settled = replace(settled, entry=entry.model_copy(update=gone | note))
    return settled


def _settle_one(entry: StageStatus, job: JobView, rules: Rules, settings: PlanSettings, now: datetime) -> Settled:
    changes: dict[str, object] = {"attempt": job.attempt, "job": job.name, "completion_time": None}
    if entry.start_time is None and job.started is not None:
        changes["start_time"] = format_time(job.started)
    entry = entry.model_copy(update=changes)
    if job.state in ("waiting", "running"):
        return Settled(_live(entry, job))
    lost = job.result is None and (job.result_lost or _is_overdue(job, settings, now))
    if job.active or (job.result is None and not lost):
        wake = (job.finished or now) + timedelta(seconds=settings.result_wait_seconds)
        return Settled(_live(entry, job), wakes=(wake,))
    spent = attempt_gpu_seconds(job)
    if spent:
        entry = entry.model_copy(update={"gpu_seconds": round((entry.gpu_seconds or 0.0) + spent, 3)})
    if job.state == "succeeded" and job.result is None and rules.needs_result:
        message = (
            f"attempt {job.attempt} is complete, but its message could not be read; its result is read from storage"
        )
        return Settled(_parked(entry, RESULT_LOST, message))
    if job.state == "succeeded" and (job.result is None or job.result.outcome == "Succeeded"):
        return _succeeded(entry, job, rules, now)
    return _failed(entry, job, rules, settings, now)


def _live(entry: StageStatus, job: JobView) -> StageStatus:
    """The words for an attempt under way."""
    if job.suspended and not job.active:
        # A queue suspends jobs, too: only a stage that we suspended says so.
        suspended = entry.phase == "Suspended" or entry.reason == SUSPENDING
        if suspended:
            return entry.model_copy(
                update={"phase": "Suspended", "reason": "Suspended", "message": None, "progress": None}
            )
    if job.state == "waiting":
        reason, message = waiting_words(job)
        return entry.model_copy(update={"phase": "Queued", "reason": reason, "message": message, "progress": None})
    if job.deleting:
        return entry.model_copy(update={"phase": "Running", "reason": "Stopping", "message": STOPPING_WORDS})
    if entry.phase == "Running" and entry.reason == SUSPENDING and job.suspended:
        return entry
    return entry.model_copy(update={"phase": "Running", "reason": None, "message": None})


def _is_overdue(job: JobView, settings: PlanSettings, now: datetime) -> bool:
    return job.finished is not None and now - job.finished >= timedelta(seconds=settings.result_wait_seconds)


def _parked(entry: StageStatus, reason: str, message: str) -> StageStatus:
    changes = {"phase": "Pending", "reason": reason, "message": shorten(message), "progress": None}
    return entry.model_copy(update=changes)


def _ended(
    entry: StageStatus, phase: str, reason: str, message: str | None, job: JobView, now: datetime
) -> StageStatus:
    return entry.model_copy(
        update={
            "phase": phase,
            "reason": reason,
            "message": shorten(message) if message else None,
            "completion_time": format_time(job.finished or now),
            "progress": None,
        }
    )


def _succeeded(entry: StageStatus, job: JobView, rules: Rules, now: datetime) -> Settled:
    result = job.result
    changes: dict[str, object] = {}
    metrics: dict[str, float] = {}
    if result is not None:
        metrics = result.metrics
        changes["metrics"] = gate_policy.written(metrics)
        changes["cached"] = entry.cached if job.role == "collect" else result.reused and job.attempt == 1
        if rules.output_uri is not None:
            changes["output"] = Output(uri=rules.output_uri, digest=result.manifest_digest)
    entry = entry.model_copy(update=changes)
    message = result.message if result is not None and result.message else None
    refusal = gate_policy.verdict(rules.gates, metrics, message or "")
    if refusal is not None:
        return Settled(_ended(entry, "Failed", *refusal, job, now))
    reason = "Cached" if entry.cached else "Completed"
    if gate_policy.is_aborted(metrics):
        reason = ABORTED_REASON
    return Settled(_ended(entry, "Succeeded", reason, message, job, now), finished=job)


def _failed(entry: StageStatus, job: JobView, rules: Rules, settings: PlanSettings, now: datetime) -> Settled:
    verdict = judge_failure(job, timeout_seconds=rules.timeout_seconds)
    if job.role == "collect":
        # The trainer is asked again: it finds its own manifest, or computes what is not there.
        counted = 0 if entry.cached else 1
        entry = entry.model_copy(update={"cached": False, "failures": entry.failures + counted})
        if entry.failures <= rules.retries:
            return Settled(_parked(entry, verdict.reason, f"the result could not be read back: {verdict.message}"))
        return Settled(_ended(entry, "Failed", verdict.reason, verdict.message, job, now))
    if verdict.consequence == "recover" and rules.recoverable and entry.recoveries < settings.recoveries_max:
        entry = entry.model_copy(update={"recoveries": entry.recoveries + 1})
        return Settled(_parked(entry, verdict.reason, f"{verdict.message}; it is computed again"), recover=True)
    if verdict.consequence in ("final", "recover"):
        return Settled(_ended(entry, "Failed", verdict.reason, verdict.message, job, now))
    if verdict.consequence == "counted":
        entry = entry.model_copy(update={"failures": entry.failures + 1})
        if entry.failures > rules.retries:
            tried = f" (attempt {job.attempt}; no retries left)" if rules.retries else ""
            return Settled(_ended(entry, "Failed", verdict.reason, f"{verdict.message}{tried}", job, now))
    if job.attempt >= settings.attempts_max:
        message = f"{verdict.message} (after {job.attempt} attempts it is not tried again)"
        return Settled(_ended(entry, "Failed", "TooManyAttempts", message, job, now))
    at = next_start(attempt=job.attempt, failures=entry.failures, last=job, settings=settings)
    when = f"; next attempt at {format_time(at)}" if at is not None else ""
    spent = f" (failure {entry.failures}, {rules.retries} retries allowed)" if verdict.consequence == "counted" else ""
    return Settled(_parked(entry, verdict.reason, f"{verdict.message}{spent}{when}"))
