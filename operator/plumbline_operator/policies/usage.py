"""Accelerator time."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from plumbline_api.status import StageStatus

from plumbline_operator.snapshot import JobView


def attempt_gpu_seconds(job: JobView) -> float:
    """What an attempt that has ended used: its own account, else accelerators × wall time."""
    if job.result is not None and job.result.gpu_seconds > 0:
        return job.result.gpu_seconds
    return held_gpu_seconds(job, job.finished) if job.finished is not None else 0.0


def held_gpu_seconds(job: JobView, until: datetime) -> float:
    """Accelerators × time since the attempt started (or was resumed)."""
    if job.started is None or not job.gpus:
        return 0.0
    return job.gpus * max((until - job.started).total_seconds(), 0.0)


def gpu_hours(entries: Iterable[StageStatus], live: Iterable[JobView], former: float, now: datetime) -> float:
    """Accelerator hours of ended attempts, of attempts under way and of stages that the spec no longer holds."""
    seconds = former + sum(entry.gpu_seconds or 0.0 for entry in entries)
    seconds += sum(held_gpu_seconds(job, now) for job in live)
    return round(seconds / 3600.0, 3)
