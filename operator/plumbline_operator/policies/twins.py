"""Twins: the same work under way elsewhere. Waiting for it costs less than doing it twice."""

from __future__ import annotations

from plumbline_operator.policies.identity import is_over
from plumbline_operator.snapshot import Snapshot


def twin_of(snapshot: Snapshot, stage: str, fingerprint: str) -> str | None:
    """Who computes the same work right now, in words; None where nobody does.

    Only an attempt that runs blocks, never one that waits: so two pipelines cannot wait for each other. If both start
    in the same moment both compute, and storage keeps the first result that is committed.
    """
    for job in snapshot.jobs:
        same = job.owned and job.role == "stage" and job.fingerprint == fingerprint and job.stage != stage
        if same and not is_over(job) and not (job.suspended and not job.active):
            return f"stage {job.stage} of this pipeline"
    return "another pipeline of the namespace" if fingerprint in snapshot.twins else None
