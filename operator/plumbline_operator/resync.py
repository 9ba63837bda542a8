"""The slow loop: list everything, take in what was missed, look at every pipeline again.

Watches can miss: an object that went while a watch was broken is never told of. What is listed here is the truth.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from plumbline_api.names import LABEL_MANAGED_BY, MANAGED_BY

from plumbline_operator.cache import Cache
from plumbline_operator.errors import ApiError, ExpiredError, NotFoundError
from plumbline_operator.jobs import Key
from plumbline_operator.kube import JOBS, PIPELINES, RUNTIMES, Kube
from plumbline_operator.metrics import Metrics

logger = logging.getLogger(__name__)

JOB_SELECTOR = f"{LABEL_MANAGED_BY}={MANAGED_BY}"
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 15.0


@dataclass(slots=True)
class Resync:
    """Lists runtimes, Jobs and pipelines, in this order: once a pipeline is known, so are its Jobs."""

    kube: Kube
    cache: Cache
    metrics: Metrics
    enqueue: Callable[[Key], None]
    interval_seconds: float
    on_listed: Callable[[], None] = lambda: None
    """Called after each complete listing."""
    last_try: float = field(default_factory=time.monotonic)
    """When the last listing ended, well or not (monotonic seconds): a sign of life."""

    async def first(self) -> None:
        """The first complete listing; tried until it succeeds. Nothing is decided before it has."""
        wait = FIRST_WAIT_SECONDS
        while not await self.once():
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(wait * 2, LONGEST_WAIT_SECONDS)

    async def run(self) -> None:
        """List again and again."""
        wait = self.interval_seconds
        while True:
            await asyncio.sleep(wait * random.uniform(0.9, 1.1))
            wait = self.interval_seconds if await self.once() else min(self.interval_seconds, LONGEST_WAIT_SECONDS)

    async def once(self) -> bool:
        """One listing; whether it was complete."""
        try:
            await self._list_runtimes()
            await self._list_jobs()
            await self._list_pipelines()
        except NotFoundError as error:
            logger.error(
                "the cluster does not know plumbline.dev/v1alpha1: install the CRDs (helm install with crds.enabled, "
                "or kubectl apply -f crds/): %s",
                error,
            )
            self.metrics.resyncs.labels("failed").inc()
            return False
        except ApiError as error:
            kind = "expired" if isinstance(error, ExpiredError) else "failed"
            logger.warning("listing failed and is tried again: %s", error)
            self.metrics.resyncs.labels(kind).inc()
            return False
        finally:
            self.last_try = time.monotonic()
        self.metrics.resyncs.labels("complete").inc()
        self.metrics.last_resync.set_to_current_time()
        self.on_listed()
        return True

    async def _list_runtimes(self) -> None:
        seen: list[str] = []
        version = 0
        async for page in self.kube.pages(RUNTIMES):
            version = page.resource_version
            for body in page.items:
                seen.append(body["metadata"]["uid"])
                self.cache.put_runtime(body)
        self.cache.forget_runtimes_but(seen, version)

    async def _list_jobs(self) -> None:
        seen: list[tuple[str, str, str]] = []
        version = 0
        async for page in self.kube.pages(JOBS, labels=JOB_SELECTOR):
            version = page.resource_version
            for body in page.items:
                metadata = body["metadata"]
                seen.append((metadata["namespace"], metadata["name"], metadata["uid"]))
                self.cache.put_job(body)
        self.cache.forget_jobs_but(seen, version)

    async def _list_pipelines(self) -> None:
        seen: list[str] = []
        version = 0
        async for page in self.kube.pages(PIPELINES):
            version = page.resource_version
            for body in page.items:
                seen.append(body["metadata"]["uid"])
                self.cache.put_pipeline(body)
        self.cache.forget_pipelines_but(seen, version)
        for key in self.cache.pipeline_keys():
            self.enqueue(key)
