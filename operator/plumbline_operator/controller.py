"""One pass over one pipeline: observe, plan, apply."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from plumbline_api.status import PipelineStatus

from plumbline_operator.apply import Applied, Applier
from plumbline_operator.cache import Cache
from plumbline_operator.errors import ApiError, NotFoundError, ReobserveError, UnsettledError
from plumbline_operator.jobs import Key
from plumbline_operator.kube import PIPELINES, Kube
from plumbline_operator.metrics import Metrics
from plumbline_operator.observe import Observer
from plumbline_operator.plan import plan
from plumbline_operator.settings import PlanSettings
from plumbline_operator.snapshot import Plan, Snapshot

logger = logging.getLogger(__name__)

ROUNDS_MAX = 8
"""Fresh looks within one pass before the queue's wait is taken."""


def utc_now() -> datetime:
    """The time."""
    return datetime.now(UTC)


@dataclass(slots=True)
class Controller:
    """Reconciles pipelines. Level-triggered: what caused the call does not matter."""

    kube: Kube
    cache: Cache
    observer: Observer
    applier: Applier
    settings: PlanSettings
    metrics: Metrics
    now: Callable[[], datetime] = utc_now

    async def reconcile(self, key: Key) -> float | None:
        """One pass; returns the seconds after which to look again, None where only a change can matter.

        Raises:
            ApiError: if the API server cannot be reached or refuses.
            UnsettledError: if the world changed under every look.
        """
        begun = time.perf_counter()
        try:
            return await self._reconcile(key)
        finally:
            self.metrics.reconcile_seconds.observe(time.perf_counter() - begun)

    async def _reconcile(self, key: Key) -> float | None:
        is_fresh = False
        reason = ""
        for _ in range(ROUNDS_MAX):
            body = await self._body(key, fresh=is_fresh)
            if body is None:
                return None
            now = self.now()
            observation = await self.observer.observe(body, now)
            decided = plan(observation.snapshot, self.settings, now)
            if decided.actions and not is_fresh:
                # What was seen may be older than a suspension, an edit or a deletion: look before acting.
                is_fresh = True
                if await self._has_moved(key, body):
                    reason = "the pipeline was changed"
                    continue
            seen_end = self.cache.latest_end(body["metadata"]["uid"])
            try:
                applied = await self.applier.apply(decided, observation.snapshot)
            except ReobserveError as stale:
                logger.debug("%s/%s: looking again: %s", *key, stale)
                reason, is_fresh = str(stale), True
                continue
            self._count(decided, observation.snapshot, applied, seen_end)
            asked = [decided.requeue_after, observation.look_again]
            if decided.actions:
                # Of a Job that was started or resumed and whose pod cannot start, nothing more is told.
                asked.append(self.observer.next_look(body["metadata"]["uid"]))
            return min((wait for wait in asked if wait is not None), default=None)
        raise UnsettledError(f"{key[0]}/{key[1]} changed under {ROUNDS_MAX} looks in a row; last: {reason}")

    async def _body(self, key: Key, *, fresh: bool) -> dict[str, Any] | None:
        if fresh:
            await self._read(key)
        stored = self.cache.pipeline(key)
        return stored.body() if stored is not None else None

    async def _has_moved(self, key: Key, body: dict[str, Any]) -> bool:
        """Whether the pipeline is another than the one that was observed."""
        await self._read(key)
        stored = self.cache.pipeline(key)
        return stored is None or stored.resource_version != int(body["metadata"]["resourceVersion"])

    async def _read(self, key: Key) -> None:
        namespace, name = key
        try:
            self.cache.put_pipeline(await self.kube.get(PIPELINES, name, namespace))
        except NotFoundError:
            if (stored := self.cache.pipeline(key)) is not None:
                self.cache.drop_pipeline(key, stored.uid)

    def _count(self, decided: Plan, snapshot: Snapshot, applied: Applied, seen_end: float | None) -> None:
        if decided.status is not None:
            self.metrics.count_transitions(snapshot.status, decided.status)
        if applied.started:
            self.metrics.jobs_started.inc(len(applied.started))
            if seen_end is not None and _hands_over(snapshot.status, decided.status):
                self.metrics.handover_seconds.observe(time.monotonic() - seen_end)

    def note_failure(self, key: Key, error: BaseException) -> None:
        """A pass failed; the queue tries again."""
        if isinstance(error, ApiError):
            reason = error.reason or (str(error.status) if error.status else "Unreachable")
            logger.warning("%s/%s: %s", *key, error)
        elif isinstance(error, UnsettledError):
            reason = "Unsettled"
            logger.warning("%s", error)
        elif isinstance(error, TimeoutError):
            reason = "Timeout"
            logger.warning("%s/%s: the pass took too long and was given up", *key)
        else:
            reason = "Bug"
            logger.error("%s/%s: this is a defect of the operator, please report it", *key, exc_info=error)
        self.metrics.reconcile_errors.labels(reason).inc()


def _hands_over(old: PipelineStatus, new: PipelineStatus | None) -> bool:
    """Whether a stage has just succeeded; a start after a wait of ours says nothing about speed."""
    before = {entry.name: entry.phase for entry in old.stages}
    return new is not None and any(
        entry.phase == "Succeeded" and before.get(entry.name) != "Succeeded" for entry in new.stages
    )
