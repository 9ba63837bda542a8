"""Progress: what running stages report, and how often it is written down."""

from __future__ import annotations

from datetime import datetime, timedelta

from plumbline_api.stagerun import METRICS_MAX
from plumbline_api.status import Metric, PipelineStatus, StageStatus, Usage

from plumbline_operator.policies.clock import format_time, parse_time
from plumbline_operator.policies.identity import LIVE_PHASES
from plumbline_operator.snapshot import ProgressView


def with_progress(entry: StageStatus, view: ProgressView | None, now: datetime) -> StageStatus:
    """A running stage with its latest report. A report that says nothing new changes nothing."""
    if view is None or entry.phase != "Running" or view.job != entry.job:
        return entry
    metrics = [Metric(name=name[:128], value=value[:64]) for name, value in view.metrics[:METRICS_MAX]] or entry.metrics
    before = entry.progress
    same = (
        before is not None
        and (before.percentage, before.message, before.finish_time)
        == (view.progress.percentage, view.progress.message, view.progress.finish_time)
        and metrics == entry.metrics
    )
    if same:
        return entry
    progress = view.progress.model_copy(update={"last_update_time": format_time(now)})
    return entry.model_copy(update={"progress": progress, "metrics": metrics})


def hold_until(old: PipelineStatus, new: PipelineStatus, interval_seconds: float) -> datetime | None:
    """When a change of nothing but progress may be written; None where it may be written now.

    A stage's first estimate of its end is written at once: until then one sees only what it prepares, and a short stage
    would be over before it was seen to advance.
    """
    if _without_progress(old) != _without_progress(new) or _estimated(new) - _estimated(old):
        return None
    written = [parse_time(entry.progress.last_update_time) for entry in old.stages if entry.progress is not None]
    return max(written) + timedelta(seconds=interval_seconds) if written else None


def _estimated(status: PipelineStatus) -> set[tuple[str, int]]:
    """The stages' attempts whose end is estimated."""
    return {
        (entry.name, entry.attempt)
        for entry in status.stages
        if entry.progress is not None and entry.progress.finish_time is not None
    }


def same_but_usage(old: PipelineStatus, new: PipelineStatus) -> bool:
    """Whether nothing but the running sum of accelerator time differs; that alone is never worth a write."""
    return old.model_copy(update={"usage": new.usage}) == new


def _without_progress(status: PipelineStatus) -> PipelineStatus:
    stages = [
        entry.model_copy(update={"progress": None, "metrics": [] if entry.phase in LIVE_PHASES else entry.metrics})
        for entry in status.stages
    ]
    return status.model_copy(update={"stages": stages, "progress": None, "eta": None, "usage": Usage()})
