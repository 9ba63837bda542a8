"""Conditions. The truth table is docs/conditions.md; a test compares the two."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Literal

from plumbline_api.status import Condition

from plumbline_operator.policies.clock import format_time, shorten

Truth = Literal["True", "False", "Unknown"]


class Situation(StrEnum):
    """Where a run stands; each is one row of the truth table."""

    REFUSED = "Refused"
    PREFLIGHT = "Preflight"
    STAGES = "Stages"
    SUSPENDING = "Suspending"
    SUSPENDED = "Suspended"
    FINALIZING = "Finalizing"
    SUCCEEDED = "Succeeded"
    SUCCEEDED_UNREPORTED = "SucceededUnreported"
    FAILED = "Failed"
    FAILED_UNREPORTED = "FailedUnreported"


CONDITION_TYPES = (
    "Accepted",
    "Running",
    "Suspended",
    "Reported",
    "Reconciling",
    "Stalled",
    "Succeeded",
    "Failed",
    "Ready",
)
"""In the order in which they are written; those that say how a run ended come last."""

_T: Truth = "True"
_F: Truth = "False"
_U: Truth = "Unknown"
TRUTH_TABLE: dict[Situation, tuple[Truth, ...]] = {
    #                             Acc Run Sus Rep Rec Sta Suc Fai Rea
    Situation.REFUSED: (_F, _F, _F, _U, _F, _T, _U, _U, _F),
    Situation.PREFLIGHT: (_T, _T, _F, _U, _T, _F, _U, _U, _F),
    Situation.STAGES: (_T, _T, _F, _U, _T, _F, _U, _U, _F),
    Situation.SUSPENDING: (_T, _T, _F, _U, _T, _F, _U, _U, _F),
    Situation.SUSPENDED: (_T, _F, _T, _U, _T, _F, _U, _U, _F),
    Situation.FINALIZING: (_T, _T, _F, _U, _T, _F, _U, _U, _F),
    Situation.SUCCEEDED: (_T, _F, _F, _T, _F, _F, _T, _F, _T),
    Situation.SUCCEEDED_UNREPORTED: (_T, _F, _F, _F, _F, _F, _T, _F, _T),
    Situation.FAILED: (_T, _F, _F, _T, _F, _T, _F, _T, _F),
    Situation.FAILED_UNREPORTED: (_T, _F, _F, _F, _F, _T, _F, _T, _F),
}
ENDED = frozenset({Situation.SUCCEEDED, Situation.SUCCEEDED_UNREPORTED, Situation.FAILED, Situation.FAILED_UNREPORTED})
FAILED = frozenset({Situation.FAILED, Situation.FAILED_UNREPORTED})
UNREPORTED = frozenset({Situation.SUCCEEDED_UNREPORTED, Situation.FAILED_UNREPORTED})


def conditions_for(
    situation: Situation,
    old: Sequence[Condition],
    *,
    generation: int | None,
    reason: str,
    message: str,
    report_message: str,
    now: datetime,
) -> list[Condition]:
    """All conditions of a situation.

    Args:
        situation: Row of the truth table.
        old: Conditions as last written; the time of a transition is kept where the status is the same.
        generation: Generation that they speak of.
        reason: Why a run was refused or failed; else ignored.
        message: What was seen and what to do about it.
        report_message: Where the report lies, or why there is none.
        now: Time of this pass.
    """
    before = {condition.type: condition for condition in old}
    found: list[Condition] = []
    for type_, status in zip(CONDITION_TYPES, TRUTH_TABLE[situation], strict=True):
        known = before.get(type_)
        since = known.last_transition_time if known is not None and known.status == status else format_time(now)
        why, words = _words(type_, situation, reason, message, report_message)
        found.append(
            Condition(
                type=type_,
                status=status,
                reason=why,
                message=shorten(words, 32768),
                observed_generation=generation,
                last_transition_time=since,
            )
        )
    return found


def _words(type_: str, situation: Situation, reason: str, message: str, report_message: str) -> tuple[str, str]:
    """Reason and message of one condition; messages only where they help."""
    bad = situation in FAILED or situation is Situation.REFUSED
    if type_ == "Accepted":
        return (reason, message) if situation is Situation.REFUSED else ("Accepted", "")
    if type_ == "Reported":
        words = report_message if situation in ENDED else ""
        if situation in UNREPORTED:
            return "ReportFailed", words
        return ("Reported" if situation in ENDED else "InProgress", words)
    if type_ in ("Failed", "Stalled", "Ready") and bad:
        return reason, message
    if type_ == "Succeeded" and situation in FAILED:
        return "Failed", message
    if situation in ENDED or bad:
        return situation.value.removesuffix("Unreported"), ""
    if type_ in ("Running", "Reconciling"):
        return situation.value, message
    if type_ == "Suspended":
        is_asked = situation in (Situation.SUSPENDED, Situation.SUSPENDING)
        return (situation.value if is_asked else "NotSuspended"), ""
    return "InProgress", ""
