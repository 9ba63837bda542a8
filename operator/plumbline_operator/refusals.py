"""What the API server would not let us create: names that something else holds, and Jobs that it refused.

Kept in memory only. An operator that starts again tries again and is told again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from plumbline_operator.policies.clock import shorten
from plumbline_operator.snapshot import JobView, StartStage

MESSAGE_MAX = 1024


@dataclass(frozen=True, slots=True)
class _Refused:
    pipeline_uid: str
    view: JobView
    retry_at: float


@dataclass(slots=True)
class Refusals:
    """Refused and foreign Jobs by namespace and name."""

    retry_seconds: float = 60.0
    clock: Callable[[], float] = time.monotonic
    _refused: dict[tuple[str, str], _Refused] = field(default_factory=dict)
    _foreign: dict[tuple[str, str], str] = field(default_factory=dict)

    def note_foreign(self, namespace: str, name: str, pipeline_uid: str) -> None:
        """Something that is not ours has the name of a Job."""
        self._foreign[namespace, name] = pipeline_uid

    def note_refused(self, start: StartStage, message: str) -> None:
        """The API server refused to create a Job: a quota, a policy, an invalid field.

        Until the next try it is shown as a Job that waits, with the server's own words: the remedy is the tenant's or
        the platform team's, and no attempt has been spent.
        """
        run = start.run
        view = JobView(
            name=start.job,
            role=run.role,
            stage=run.stage,
            fingerprint=run.fingerprint,
            attempt=run.attempt,
            state="waiting",
            nodes=run.nodes,
            waiting_reason="JobRefused",
            waiting_message=shorten(f"the API server refuses the Job: {message}", MESSAGE_MAX),
        )
        retry_at = self.clock() + self.retry_seconds
        self._refused[run.pipeline.namespace, start.job] = _Refused(run.pipeline.uid, view, retry_at)

    def forget(self, namespace: str, name: str) -> None:
        """The name is free again, or the Job is there."""
        self._foreign.pop((namespace, name), None)
        self._refused.pop((namespace, name), None)

    def forget_pipeline(self, pipeline_uid: str) -> None:
        """A pipeline is gone."""
        self._refused = {key: item for key, item in self._refused.items() if item.pipeline_uid != pipeline_uid}
        self._foreign = {key: uid for key, uid in self._foreign.items() if uid != pipeline_uid}

    def foreign(self, namespace: str, pipeline_uid: str) -> list[str]:
        """Names of a pipeline's Jobs that something else holds."""
        return [name for (place, name), uid in self._foreign.items() if uid == pipeline_uid and place == namespace]

    def views(self, namespace: str, pipeline_uid: str) -> list[JobView]:
        """Refused Jobs whose next try is not due yet."""
        now = self.clock()
        return [
            item.view
            for (place, _), item in self._refused.items()
            if item.pipeline_uid == pipeline_uid and place == namespace and item.retry_at > now
        ]

    def next_try(self, pipeline_uid: str) -> float | None:
        """Seconds until the next try."""
        now = self.clock()
        waits = [item.retry_at - now for item in self._refused.values() if item.pipeline_uid == pipeline_uid]
        return min((wait for wait in waits if wait > 0), default=None)
