"""How a pass ends: where the run stands, the status to write, events, and when to look again."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from plumbline_api.names import FINALIZE, PREFLIGHT
from plumbline_api.quantities import parse_duration
from plumbline_api.status import PipelineStatus, StageStatus, Usage

from plumbline_operator.draft import Draft, name_of_record
from plumbline_operator.policies import summary
from plumbline_operator.policies.acceptance import Refused
from plumbline_operator.policies.announcements import announcements
from plumbline_operator.policies.clock import format_time, parse_time
from plumbline_operator.policies.conditions import ENDED, Situation, conditions_for
from plumbline_operator.policies.identity import is_over
from plumbline_operator.policies.progress import hold_until, same_but_usage, with_progress
from plumbline_operator.policies.usage import gpu_hours
from plumbline_operator.settings import PlanSettings
from plumbline_operator.snapshot import DeletePipeline, Plan, PlannedEvent, Snapshot, SuspendStage
from plumbline_operator.stageruns import report_uri


def refusal(snapshot: Snapshot, settings: PlanSettings, now: datetime, refused: Refused) -> Plan:
    """The plan for a spec that is not accepted: say why and leave everything else as it is.

    Attempts of a generation before go on; a corrected spec finds them, or stops them.
    """
    old, generation = snapshot.status, _generation(snapshot)
    conditions = conditions_for(
        Situation.REFUSED,
        old.conditions,
        generation=generation,
        reason=refused.reason,
        message=refused.message,
        report_message="",
        now=now,
    )
    new = old.model_copy(
        update={
            "observed_generation": generation,
            "phase": "Refused",
            "conditions": conditions,
            "progress": None,
            "eta": None,
            "completion_time": None,
        }
    )
    events = announcements(old, new, situation=Situation.REFUSED, stages=[], message=refused.message)
    # A runtime may appear or change without a change of ours.
    requeue = None if refused.reason == "InvalidSpec" else settings.runtime_poll_seconds
    return Plan(status=new if new != old else None, events=tuple(events) if new != old else (), requeue_after=requeue)


def conclude(draft: Draft) -> Plan:
    """The plan of an accepted spec."""
    views = {view.job: view for view in draft.snapshot.progress}
    for name, entry in draft.entries.items():
        draft.entries[name] = with_progress(entry, views.get(entry.job or ""), draft.now)
    situation = _situation(draft)
    new, message = _status(draft, situation)
    old = draft.old
    if situation in ENDED and _is_due_for_deletion(draft, new):
        return Plan(actions=(*draft.actions, DeletePipeline()))
    status: PipelineStatus | None = new
    events: Sequence[PlannedEvent] = ()
    if new == old or same_but_usage(old, new):
        status = None
    else:
        held = hold_until(old, new, draft.settings.progress_interval_seconds)
        if held is not None and held > draft.now:
            status = None
            draft.wakes.append(held)
        else:
            stages = [*draft.stages, *(draft.entries[n] for n in (PREFLIGHT, FINALIZE) if n in draft.entries)]
            events = announcements(old, new, situation=situation, stages=stages, message=message)
    wake = min(draft.wakes, default=None)
    return Plan(
        actions=tuple(draft.actions),
        status=status,
        events=(*draft.events, *events) if status is not None else (),
        requeue_after=None if wake is None else max((wake - draft.now).total_seconds(), 0.0),
    )


def _situation(draft: Draft) -> Situation:
    finalize = draft.entries.get(FINALIZE)
    stages, preflight = draft.stages, draft.entries[PREFLIGHT]
    has_failed = preflight.phase == "Failed" or any(entry.phase == "Failed" for entry in stages)
    if finalize is not None and finalize.phase in ("Succeeded", "Failed"):
        if finalize.phase == "Succeeded":
            return Situation.FAILED if has_failed else Situation.SUCCEEDED
        return Situation.FAILED_UNREPORTED if has_failed else Situation.SUCCEEDED_UNREPORTED
    if draft.suspended:
        asked = {action.job for action in draft.actions if isinstance(action, SuspendStage)}
        busy = any(
            job.owned and not is_over(job) and (job.active or job.deleting or job.name in asked)
            for job in draft.snapshot.jobs
        )
        return Situation.SUSPENDING if busy else Situation.SUSPENDED
    if finalize is not None:
        return Situation.FINALIZING
    return Situation.STAGES if preflight.phase == "Succeeded" else Situation.PREFLIGHT


def _status(draft: Draft, situation: Situation) -> tuple[PipelineStatus, str]:
    old, record, stages = draft.old, draft.record, draft.stages
    preflight, finalize = draft.entries[PREFLIGHT], draft.entries.get(FINALIZE)
    ended = situation in ENDED
    failure = summary.failure_words([preflight, *stages])
    reason, message = failure or (situation.value, _message(draft, situation))
    if failure is not None and not ended and situation is not Situation.FINALIZING:
        message = f"{message}; other stages go on"
    is_reported = finalize is not None and finalize.phase == "Succeeded"
    report = report_uri(record) if is_reported else None
    live = [job for job in draft.snapshot.jobs if job.owned and job.state == "running" and not is_over(job)]
    former = draft.former_gpu_seconds
    told = {entry.job for entry in draft.entries.values() if entry.reason in ("Suspending", "Suspended")}
    hours = gpu_hours(draft.entries.values(), (job for job in live if job.name not in told), former, draft.now)
    generation = _generation(draft.snapshot)
    new = old.model_copy(
        update={
            "observed_generation": generation,
            "phase": summary.phase_of(situation, is_started=preflight.attempt > 0),
            "stage": summary.stage_column(situation, stages),
            "progress": summary.progress_column(stages),
            "eta": None if ended else summary.eta(stages),
            "record": name_of_record(record),
            "runtime": record.runtime_name,
            "inputs": draft.pins,
            "stages": [preflight, *stages, *([finalize] if finalize is not None else [])],
            "conditions": conditions_for(
                situation,
                old.conditions,
                generation=generation,
                reason=reason,
                message=message,
                report_message=report or _report_problem(finalize),
                now=draft.now,
            ),
            "usage": Usage(gpu_hours=hours, former_gpu_seconds=round(former, 3) if former else None),
            "model": summary.last_model(record, draft.entries),
            "report": report,
            "retry_nonce": draft.retry_nonce,
            "start_time": old.start_time or format_time(draft.now),
            "completion_time": (old.completion_time or format_time(draft.now)) if ended else None,
        }
    )
    return new, message


def _message(draft: Draft, situation: Situation) -> str:
    stages = draft.stages
    if situation in ENDED:
        cached = sum(entry.cached for entry in stages)
        return f"{len(stages)} stages succeeded, {cached} of them found in storage"
    if situation is not Situation.STAGES:
        return ""
    parts = []
    for phase, words in (("Running", "runs"), ("Queued", "queued"), ("Pending", "waiting")):
        names = [entry.name for entry in stages if entry.phase == phase]
        if names:
            parts.append(f"{words}: {', '.join(names)}")
    return "; ".join(parts)


def _report_problem(finalize: StageStatus | None) -> str:
    if finalize is None or finalize.phase != "Failed":
        return ""
    again = "The outcome stands; to write the report again, set spec.retry with stage: finalize"
    return f"{finalize.reason}: {finalize.message}. {again}"


def _is_due_for_deletion(draft: Draft, new: PipelineStatus) -> bool:
    ttl = draft.pipeline.spec.ttl_after_finished
    if ttl is None or new.completion_time is None:
        return False
    due = parse_time(new.completion_time) + timedelta(seconds=parse_duration(ttl))
    if draft.old.completion_time is None or due > draft.now:
        draft.wakes.append(due)
        return False
    return True


def _generation(snapshot: Snapshot) -> int | None:
    metadata = snapshot.body.get("metadata")
    generation = metadata.get("generation") if isinstance(metadata, dict) else None
    return generation if isinstance(generation, int) else None
