"""Events: what changed between the status before and the status after, told once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from plumbline_api.online import ABORTED_REASON
from plumbline_api.status import PipelineStatus, StageStatus

from plumbline_operator.policies.clock import shorten
from plumbline_operator.policies.conditions import FAILED, Situation
from plumbline_operator.snapshot import PlannedEvent

EVENT_MESSAGE_MAX = 1024
QUIET = ("WaitingForQueue", "Stopping", "Resuming")
"""Reasons to wait that need nobody's attention."""


def announcements(
    old: PipelineStatus, new: PipelineStatus, *, situation: Situation, stages: Sequence[StageStatus], message: str
) -> list[PlannedEvent]:
    """Events for every transition between two states of a run."""
    events: list[PlannedEvent] = []
    before = {entry.name: entry for entry in old.stages}
    if _turned(old, new, "Accepted", "True"):
        events.append(PlannedEvent("Normal", "Accepted", "the spec is accepted and its record is frozen"))
    elif situation is Situation.REFUSED and _said(old, "Accepted") != _said(new, "Accepted"):
        events.append(PlannedEvent("Warning", "Refused", message))
    for entry in stages:
        events.extend(_of_stage(before.get(entry.name), entry))
    if _turned(old, new, "Suspended", "True"):
        events.append(PlannedEvent("Normal", "Suspended", "nothing runs until spec.suspend is false again"))
    elif _is(old, "Suspended") and not _is(new, "Suspended"):
        events.append(PlannedEvent("Normal", "Resumed", "the run goes on"))
    if _turned(old, new, "Succeeded", "True"):
        events.append(PlannedEvent("Normal", "Succeeded", message))
    elif situation in FAILED and _turned(old, new, "Failed", "True"):
        events.append(PlannedEvent("Warning", "Failed", message))
    return [PlannedEvent(e.type, e.reason, shorten(e.message, EVENT_MESSAGE_MAX)) for e in events]


def _of_stage(before: StageStatus | None, entry: StageStatus) -> Iterator[PlannedEvent]:
    attempt = before.attempt if before is not None and before.fingerprint == entry.fingerprint else 0
    phase = before.phase if before is not None and before.fingerprint == entry.fingerprint else "Pending"
    if entry.phase == "Queued" and entry.attempt > attempt:
        yield PlannedEvent("Normal", "StageStarted", f"{entry.name}: attempt {entry.attempt} as {entry.job}")
    if entry.phase == "Succeeded" and phase != "Succeeded":
        found = "found in storage" if entry.cached else "succeeded"
        yield PlannedEvent("Normal", "StageSucceeded", f"{entry.name}: {found}")
        if entry.reason == ABORTED_REASON:
            yield PlannedEvent("Warning", "StageAborted", f"{entry.name}: {entry.message}")
    elif entry.phase == "Failed" and phase != "Failed":
        yield PlannedEvent("Warning", "StageFailed", f"{entry.name}: {entry.reason}: {entry.message}")
    elif entry.phase == "Pending" and entry.reason and (entry.failures > (before.failures if before else 0)):
        yield PlannedEvent("Warning", "StageRetried", f"{entry.name}: {entry.reason}: {entry.message}")
    elif entry.phase == "Queued" and entry.message and entry.reason not in (*QUIET, before.reason if before else None):
        yield PlannedEvent("Warning", entry.reason or "Queued", f"{entry.name}: {entry.message}")


def _is(status: PipelineStatus, type_: str) -> bool:
    condition = status.condition(type_)
    return condition is not None and condition.status == "True"


def _said(status: PipelineStatus, type_: str) -> tuple[str, str] | None:
    condition = status.condition(type_)
    return None if condition is None else (condition.reason, condition.message)


def _turned(old: PipelineStatus, new: PipelineStatus, type_: str, value: str) -> bool:
    was, is_ = old.condition(type_), new.condition(type_)
    return is_ is not None and is_.status == value and (was is None or was.status != value)
