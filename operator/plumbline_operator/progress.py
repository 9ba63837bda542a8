"""The progress server: trainers post how far they have come; a pass writes it into status at its own pace.

Losing a report, or this server, loses nothing but a figure on the way.
"""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from aiohttp import web
from plumbline_api.stagerun import ProgressReport, TrainerStatus
from plumbline_api.status import Progress
from pydantic import ValidationError

from plumbline_operator.controller import utc_now
from plumbline_operator.errors import ApiError
from plumbline_operator.jobs import JobFacts, Key
from plumbline_operator.metrics import Metrics
from plumbline_operator.policies.clock import format_time
from plumbline_operator.snapshot import ProgressView
from plumbline_operator.tokens import (
    Bucket,
    BusyError,
    TokenChecker,
    UnauthenticatedError,
    UnauthorizedError,
)

logger = logging.getLogger(__name__)

ROUTE = "/v1alpha1/namespaces/{namespace}/jobs/{job}/progress"
BODY_MAX = 16 * 1024
REPORTS_PER_SECOND = 0.5
REPORTS_BURST = 5.0
JOBS_MAX = 10_000
RETRY_SECONDS = 5
BODY_SECONDS = 10.0


class ProgressStore:
    """The latest report of each Job, in memory only."""

    def __init__(self) -> None:
        self._views: OrderedDict[tuple[str, str], tuple[str, ProgressView]] = OrderedDict()

    def put(self, job: JobFacts, view: ProgressView) -> None:
        """Keep a report."""
        key = (job.namespace, job.name)
        self._views[key] = (job.pipeline_uid, view)
        self._views.move_to_end(key)
        while len(self._views) > JOBS_MAX:
            self._views.popitem(last=False)

    def of(self, pipeline_uid: str) -> list[ProgressView]:
        """The latest reports of a pipeline's Jobs."""
        return [view for uid, view in self._views.values() if uid == pipeline_uid]

    def forget_job(self, namespace: str, name: str) -> None:
        """A Job is gone."""
        self._views.pop((namespace, name), None)

    def forget_pipeline(self, pipeline_uid: str) -> None:
        """A pipeline is gone."""
        for key in [key for key, (uid, _) in self._views.items() if uid == pipeline_uid]:
            del self._views[key]


@dataclass(slots=True)
class ProgressServer:
    """Takes reports over HTTPS."""

    checker: TokenChecker
    store: ProgressStore
    enqueue: Callable[[Key], None]
    metrics: Metrics
    now: Callable[[], datetime] = utc_now
    _buckets: OrderedDict[str, Bucket] = field(default_factory=OrderedDict)

    async def serve(self, address: str, port: int, context: ssl.SSLContext) -> web.AppRunner:
        """Start the server; the caller cleans it up."""
        app = web.Application(client_max_size=BODY_MAX)
        app.router.add_post(ROUTE, self.take)
        app.router.add_route("*", "/{path:.*}", self.refuse)
        runner = web.AppRunner(app, access_log=None, keepalive_timeout=75)
        await runner.setup()
        await web.TCPSite(runner, address or None, port, ssl_context=context).start()
        return runner

    async def refuse(self, request: web.Request) -> web.Response:
        """Strangers learn nothing, not even which paths there are."""
        if not _bearer(request):
            return self._answer(401, "a bearer token is needed")
        return self._answer(404, "there is nothing here")

    async def take(self, request: web.Request) -> web.Response:
        """One report."""
        namespace, name = request.match_info["namespace"], request.match_info["job"]
        try:
            job = await self.checker.check(_bearer(request), namespace, name)
        except UnauthenticatedError as error:
            return self._answer(401, str(error))
        except UnauthorizedError as error:
            return self._answer(403, str(error))
        except BusyError as error:
            return self._answer(429, str(error), retry_after=math.ceil(error.seconds))
        except ApiError as error:
            logger.warning("a progress report of %s/%s cannot be checked: %s", namespace, name, error)
            return self._answer(503, "the token cannot be checked at the moment", retry_after=RETRY_SECONDS)
        if wait := self._bucket(job.uid).take():
            return self._answer(429, "one report every few seconds is enough", retry_after=math.ceil(wait))
        try:
            async with asyncio.timeout(BODY_SECONDS):
                report = ProgressReport.model_validate_json(await request.read())
        except web.HTTPRequestEntityTooLarge:
            return self._answer(413, f"a report has at most {BODY_MAX} bytes")
        except TimeoutError:
            return self._answer(408, "the report did not come")
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
            return self._answer(400, f"not a progress report: {problems}")
        self.store.put(job, view_of(job.name, report.trainer_status, self.now()))
        if job.key is not None:
            self.enqueue(job.key)
        return self._answer(204)

    def _bucket(self, job_uid: str) -> Bucket:
        bucket = self._buckets.get(job_uid)
        if bucket is None:
            bucket = self._buckets[job_uid] = Bucket(REPORTS_PER_SECOND, REPORTS_BURST, self.checker.clock)
            while len(self._buckets) > JOBS_MAX:
                self._buckets.popitem(last=False)
        return bucket

    def _answer(self, status: int, words: str = "", *, retry_after: int | None = None) -> web.Response:
        self.metrics.progress_reports.labels(str(status)).inc()
        headers = {"Retry-After": str(retry_after)} if retry_after is not None else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        body: dict[str, Any] = {"status": status, "headers": headers}
        return web.Response(**body) if status == 204 else web.json_response({"message": words}, **body)


def view_of(job: str, status: TrainerStatus, now: datetime) -> ProgressView:
    """A report as `plan` takes it: the time left becomes a time of day, which stays true without further writes."""
    left = status.estimated_remaining_seconds
    # More than a century is no estimate, and no time either.
    is_finite = left is not None and left < 3.2e9
    finish = format_time(now + timedelta(seconds=round(left))) if is_finite and left is not None else None
    progress = Progress(
        percentage=status.progress_percentage or 0,
        message=status.message,
        finish_time=finish,
        last_update_time=format_time(now),
    )
    return ProgressView(
        job=job, progress=progress, metrics=tuple((item["name"], item["value"]) for item in status.metrics)
    )


def _bearer(request: web.Request) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
