"""Events for people, written beside the passes: status has said it all before, so an event may come late or be lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from plumbline_api.base import GROUP_VERSION

from plumbline_operator.errors import ApiError
from plumbline_operator.kube import EVENTS, Kube, Manifest
from plumbline_operator.snapshot import PlannedEvent

logger = logging.getLogger(__name__)

NOTE_MAX = 1024
REPORTER = "plumbline.dev/operator"
WAITING_MAX = 2000


@dataclass(slots=True)
class Announcer:
    """Writes events in order, one at a time, so that a crowd of them does not delay what matters."""

    kube: Kube
    identity: str = "plumbline"
    _waiting: asyncio.Queue[Manifest] = field(default_factory=lambda: asyncio.Queue(WAITING_MAX))

    def announce(self, pipeline: dict[str, Any], events: Sequence[PlannedEvent]) -> None:
        """Have events written about a pipeline (its metadata is given)."""
        now = datetime.now(UTC)
        for number, event in enumerate(events):
            try:
                self._waiting.put_nowait(self._render(pipeline, event, now, number))
            except asyncio.QueueFull:
                logger.warning("event %s is dropped: %d wait already", event.reason, WAITING_MAX)

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self.write_next()

    async def write_next(self) -> None:
        """Write the next event; wait for one if there is none."""
        event = await self._waiting.get()
        try:
            await self.kube.create(EVENTS, event, event["metadata"]["namespace"])
        except ApiError as error:
            logger.warning("event %s is lost: %s", event["reason"], error)

    def _render(self, pipeline: dict[str, Any], event: PlannedEvent, now: datetime, number: int) -> Manifest:
        stamp = int(now.timestamp() * 1e6) + number
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": f"{pipeline['name']}.{stamp:x}", "namespace": pipeline["namespace"]},
            "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "reportingController": REPORTER,
            "reportingInstance": self.identity[:128],
            "action": "Reconcile",
            "type": event.type,
            "reason": event.reason[:128],
            "note": event.message.encode()[:NOTE_MAX].decode(errors="ignore"),
            "regarding": {
                "apiVersion": GROUP_VERSION,
                "kind": "AlignmentPipeline",
                "name": pipeline["name"],
                "namespace": pipeline["namespace"],
                "uid": pipeline["uid"],
                "resourceVersion": pipeline["resourceVersion"],
            },
        }
