"""Identity of work: which job counts, which number the next attempt has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from plumbline_api.fingerprint import digest_of
from plumbline_api.record import RunRecord
from plumbline_api.stagerun import StageOutcome
from plumbline_api.status import StageStatus

from plumbline_operator.snapshot import JobView, Snapshot

STEERING_FIELDS = ("suspend", "retry", "ttlAfterFinished")
"""Fields of the spec that steer a run and change nothing of what it computes."""
LIVE_PHASES = frozenset({"Queued", "Running", "Suspended"})
"""Phases of a stage that has an attempt under way."""


def spec_digest(body: dict[str, Any]) -> str:
    """Digest of the spec as it is stored, without the fields that only steer the run."""
    spec = body.get("spec")
    given = spec if isinstance(spec, dict) else {}
    return digest_of({key: value for key, value in given.items() if key not in STEERING_FIELDS})


def record_identity(record: RunRecord) -> str:
    """Identity of what a record resolves to, the same for generations that differ in steering fields only."""
    wire = record.to_wire()
    del wire["pipeline"]["generation"]
    return digest_of(wire)


def finalize_identity(record: str, outcomes: Sequence[StageOutcome]) -> str:
    """Identity of a report, given that of the record: it is written again when anything that it tells has changed."""
    return digest_of({"record": record, "outcomes": [item.to_wire() for item in outcomes]})


def is_over(job: JobView) -> bool:
    """Whether a job has ended and nothing of it can write any more."""
    return job.state in ("succeeded", "failed") and not job.active


def attempts_of(snapshot: Snapshot, *, roles: Iterable[str], stage: str, fingerprint: str) -> list[JobView]:
    """Our attempts at one piece of work, in order of their numbers."""
    wanted = frozenset(roles)
    found = (
        job
        for job in snapshot.jobs
        if job.owned and job.role in wanted and job.stage == stage and job.fingerprint == fingerprint
    )
    return sorted(found, key=lambda job: job.attempt)


def next_attempt(entry: StageStatus, attempts: Sequence[JobView]) -> int:
    """The number after every one that is known to have been used."""
    return max([entry.attempt, *(job.attempt for job in attempts)]) + 1


def is_accounted(entry: StageStatus, job: JobView) -> bool:
    """Whether the status already tells how this attempt ended."""
    return job.attempt < entry.attempt or (job.attempt == entry.attempt and entry.phase not in LIVE_PHASES)


def is_foreign(snapshot: Snapshot, name: str) -> bool:
    """Whether something that is not ours holds a name that we need."""
    return name in snapshot.foreign_names or any(job.name == name and not job.owned for job in snapshot.jobs)
