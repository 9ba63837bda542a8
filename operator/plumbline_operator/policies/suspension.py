"""Suspend and resume."""

from __future__ import annotations

from plumbline_api.record import RunRecord

from plumbline_operator.snapshot import JobView


def is_queued_elsewhere(job: JobView, record: RunRecord) -> bool:
    """Whether a queue (Kueue) decides when the job is suspended.

    Such a job is stopped when the user suspends the pipeline, because the queue would undo a suspension of ours; and
    it is never resumed by us, because that would jump the queue.
    """
    return job.role == "stage" and record.runtime is not None and record.runtime.queue_name is not None
