"""Watches over pipelines, their Jobs and runtimes.

Only `on.event` handlers: kopf then needs no finalizer, writes no annotation and keeps no state of its own on objects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import kopf
from plumbline_api.base import API_GROUP, API_VERSION
from plumbline_api.names import LABEL_MANAGED_BY, MANAGED_BY

from plumbline_operator.cache import Cache
from plumbline_operator.jobs import Key

ENDING_SECONDS = 2.0


@dataclass(slots=True)
class Watcher:
    """Feeds the cache and the queue from watches."""

    cache: Cache
    enqueue: Callable[[Key, float], None]
    """Asks for a pass after so many seconds."""
    on_job_gone: Callable[[str, str], None] = lambda namespace, name: None
    on_pipeline_gone: Callable[[str], None] = lambda uid: None

    def register(self, registry: kopf.OperatorRegistry) -> None:
        """Make the handlers known to kopf."""
        kopf.on.event(API_GROUP, API_VERSION, "alignmentpipelines", registry=registry)(self.pipeline_event)
        kopf.on.event(API_GROUP, API_VERSION, "alignmentruntimes", registry=registry)(self.runtime_event)
        kopf.on.event("batch", "v1", "jobs", registry=registry, labels={LABEL_MANAGED_BY: MANAGED_BY})(self.job_event)

    async def pipeline_event(self, event: kopf.RawEvent, **_: Any) -> None:
        """A pipeline has come, changed or gone."""
        body = cast("dict[str, Any]", event["object"])
        metadata = body["metadata"]
        key = (metadata["namespace"], metadata["name"])
        if event["type"] == "DELETED":
            self.cache.drop_pipeline(key, metadata["uid"])
            self.on_pipeline_gone(metadata["uid"])
        elif self.cache.put_pipeline(body):
            self.enqueue(key, 0.0)

    async def job_event(self, event: kopf.RawEvent, **_: Any) -> None:
        """A Job of ours has come, changed or gone."""
        body = cast("dict[str, Any]", event["object"])
        metadata = body["metadata"]
        if event["type"] == "DELETED":
            facts = self.cache.drop_job(metadata["namespace"], metadata["name"], metadata["uid"])
            self.on_job_gone(metadata["namespace"], metadata["name"])
        else:
            facts = self.cache.put_job(body)
        if facts is not None and facts.key is not None and self.cache.pipeline(facts.key) is not None:
            # A Job whose pods have ended ends itself within milliseconds: a pass in between would only be in the way.
            self.enqueue(facts.key, ENDING_SECONDS if facts.is_ending and not facts.suspended else 0.0)

    async def runtime_event(self, event: kopf.RawEvent, **_: Any) -> None:
        """A runtime has come, changed or gone: pipelines that wait for one, or are refused by one, look again."""
        body = cast("dict[str, Any]", event["object"])
        metadata = body["metadata"]
        if event["type"] == "DELETED":
            self.cache.drop_runtime(metadata["name"], metadata["uid"])
        elif not self.cache.put_runtime(body):
            return
        for key in self.cache.pipeline_keys():
            self.enqueue(key, 0.0)
