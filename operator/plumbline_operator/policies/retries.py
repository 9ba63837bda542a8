"""When the next attempt may start, and what a user's `spec.retry` resets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from plumbline_api.names import FINALIZE, PREFLIGHT
from plumbline_api.pipeline import Retry
from plumbline_api.status import StageStatus

from plumbline_operator.policies.ordering import Order
from plumbline_operator.settings import PlanSettings
from plumbline_operator.snapshot import JobView

FREE_AT_ONCE = 3
"""Attempts lost to the cluster that are made up for at once; later ones wait too, lest they spin."""
CHANGED_INPUTS = frozenset({"InputChanged", "BadInput"})
"""Reasons after which a retry looks at the external inputs again."""


def backoff_seconds(count: int, settings: PlanSettings) -> float:
    """The wait after so many failures."""
    if count <= 0:
        return 0.0
    return min(settings.backoff_base_seconds * 2.0 ** min(count - 1, 30), settings.backoff_cap_seconds)


def next_start(*, attempt: int, failures: int, last: JobView | None, settings: PlanSettings) -> datetime | None:
    """When the attempt after a failed one may start; None for at once. Measured from the end of the failed one."""
    if last is None or last.state != "failed" or last.finished is None:
        return None
    wait = backoff_seconds(failures, settings) or backoff_seconds(attempt - failures - FREE_AT_ONCE, settings)
    return last.finished + timedelta(seconds=wait) if wait else None


@dataclass(frozen=True, slots=True)
class RetryEffect:
    """What a request to retry does."""

    reset: frozenset[str] = frozenset()
    """Stages (preflight and finalize among them) that start again."""
    ignored: str | None = None
    """Why it does nothing, in words; None where it does something or has nothing to say."""


def retry_effect(request: Retry, entries: Mapping[str, StageStatus], order: Order) -> RetryEffect:
    """What a new request resets: the named failed stage and the failed ones after it, or every failed stage.

    Skipped stages need no reset: they wait again as soon as nothing before them has failed.
    """
    failed = {name for name, entry in entries.items() if entry.phase == "Failed"}
    if request.stage is None:
        chosen = set(failed)
    else:
        entry = entries.get(request.stage)
        if entry is None:
            known = ", ".join([PREFLIGHT, *order.names, FINALIZE])
            return RetryEffect(ignored=f'there is no stage "{request.stage}" to retry. Stages: {known}')
        if entry.phase not in ("Failed", "Skipped"):
            return RetryEffect(ignored=_why_not(request.stage, entry.phase))
        after = set(order.names) if request.stage == PREFLIGHT else order.dependants(request.stage)
        chosen = failed & {request.stage, *after}
        if not chosen:
            blockers = ", ".join(sorted(failed & order.ancestors(request.stage)) or sorted(failed))
            return RetryEffect(ignored=f"{request.stage} was skipped because {blockers} failed; retry that instead")
    if any(entries[name].reason in CHANGED_INPUTS for name in chosen):
        chosen.add(PREFLIGHT)
    return RetryEffect(reset=frozenset(chosen))


def _why_not(stage: str, phase: str) -> str:
    if phase == "Succeeded":
        remedy = "To compute it again change it, or set its cache to false"
        return f"{stage} has succeeded, there is nothing to retry. {remedy}"
    return f"{stage} has not failed (it is {phase.lower()}), there is nothing to retry"
