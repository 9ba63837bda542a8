"""The operator's process: wires the parts together and runs them until one ends or a signal comes."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import kopf
from plumbline_api.names import FINALIZER

from plumbline_operator.announcer import Announcer
from plumbline_operator.apply import Applier
from plumbline_operator.cache import Cache
from plumbline_operator.certificates import (
    ServerCertificate,
    load_certificate,
    make_certificate,
    reload_certificate,
)
from plumbline_operator.configuration import OperatorSettings, software_version
from plumbline_operator.connection import LoginError, kopf_credentials, login
from plumbline_operator.controller import Controller
from plumbline_operator.handlers.stateless import NoDiffBase, NoProgress
from plumbline_operator.handlers.watching import Watcher
from plumbline_operator.health import Health, serve_health, serve_metrics
from plumbline_operator.jobs import Key
from plumbline_operator.kube import HttpKube
from plumbline_operator.metrics import Metrics
from plumbline_operator.observe import Observer
from plumbline_operator.progress import ProgressServer, ProgressStore
from plumbline_operator.queue import Backoff, WorkQueue
from plumbline_operator.record import RecordStore
from plumbline_operator.refusals import Refusals
from plumbline_operator.rendering import RenderSettings
from plumbline_operator.resync import JOB_SELECTOR, Resync
from plumbline_operator.tokens import TokenChecker

logger = logging.getLogger(__name__)

CERTIFICATE_REREAD_SECONDS = 300.0
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def kopf_settings() -> kopf.OperatorSettings:
    """How kopf watches. It writes nothing: no finalizer, no annotation, no event."""
    settings = kopf.OperatorSettings()
    settings.persistence.finalizer = FINALIZER
    settings.persistence.progress_storage = NoProgress()
    settings.persistence.diffbase_storage = NoDiffBase()
    settings.persistence.consistency_timeout = 10
    settings.watching.inactivity_timeout = 70
    settings.watching.server_timeout, settings.watching.client_timeout = 240, 300
    settings.watching.connect_timeout, settings.watching.reconnect_backoff = 10, 1.0
    settings.watching.chunk_size = 500
    settings.watching.label_selectors["batch", "v1", "jobs"] = JOB_SELECTOR
    settings.networking.request_timeout, settings.networking.connect_timeout = 30, 5
    settings.networking.error_backoffs = (1, 1, 2, 3, 5, 8, 13, 21)
    settings.queueing.worker_limit, settings.queueing.idle_timeout = None, 5
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.process.ultimate_exiting_timeout = 25
    # Kinds and namespaces are known beforehand: neither CRDs nor namespaces have to be watched, or be readable.
    settings.scanning.disabled = True
    return settings


class Operator:
    """One process's parts."""

    def __init__(self, settings: OperatorSettings) -> None:
        self.settings = settings
        self.kopf_settings = kopf_settings()
        self.metrics = Metrics()
        self.kube = HttpKube(
            login(self.kopf_settings),
            timeout_seconds=settings.request_timeout_seconds,
            agent=f"plumbline-operator/{software_version()}",
            observer=self.metrics.count_request,
        )
        self.cache = Cache()
        self.progress = ProgressStore()
        self.refusals = Refusals(retry_seconds=settings.refused_poll_seconds)
        self.is_ready = False
        records = RecordStore(self.kube)
        self.observer = Observer(
            self.kube,
            self.cache,
            records,
            self.progress.of,
            self.refusals,
            poll_seconds=settings.waiting_poll_seconds,
        )
        self.certificate = self._certificate()
        rendering = RenderSettings(
            progress_url=settings.progress_base_url,
            progress_audience=settings.progress_audience,
            progress_ca_pem=self.certificate.authority_pem if self.certificate is not None else None,
        )
        self.announcer = Announcer(self.kube, settings.identity)
        applier = Applier(self.kube, self.cache, records, self.refusals, rendering, self.announcer)
        self.controller = Controller(self.kube, self.cache, self.observer, applier, settings.plan, self.metrics)
        self.queue: WorkQueue[Key] = WorkQueue(
            self.controller.reconcile,
            workers=settings.workers,
            backoff=Backoff(settings.error_backoff_seconds, settings.error_backoff_cap_seconds),
            timeout_seconds=settings.pass_timeout_seconds,
            on_error=self.controller.note_failure,
        )
        self.resync = Resync(
            self.kube,
            self.cache,
            self.metrics,
            self.queue.add,
            settings.resync_seconds,
            on_listed=self.observer.forget_jobs,
        )
        self.watcher = Watcher(self.cache, self.queue.add, self.progress.forget_job, self._forget_pipeline)

    async def run(self) -> None:
        """Serve until SIGTERM; an error of any part ends the process, and the cluster starts it again."""
        settings = self.settings
        self.metrics.watch_queue(self.queue.depth, self.queue.stalled_seconds, lambda: len(self.cache.pipeline_keys()))
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.kube.close)
            health = Health(self.stalled_seconds, settings.stall_seconds, lambda: self.is_ready)
            for runner in (
                await serve_health(health, settings.bind_address, settings.health_port),
                await serve_metrics(self.metrics, settings.bind_address, settings.metrics_port),
            ):
                stack.push_async_callback(runner.cleanup)
            await self.resync.first()
            parts: list[Coroutine[Any, Any, None]] = [
                self.queue.run(),
                self.announcer.run(),
                self.resync.run(),
                self._watch(),
            ]
            if self.certificate is not None:
                checker = TokenChecker(self.kube, self.cache, settings.progress_audience)
                server = ProgressServer(checker, self.progress, self.queue.add, self.metrics)
                runner = await server.serve(settings.bind_address, settings.progress_port, self.certificate.context)
                stack.push_async_callback(runner.cleanup)
                if settings.tls_folder is not None:
                    parts.append(self._renew_certificate(self.certificate, settings.tls_folder))
            self.is_ready = True
            logger.info("ready: %d pipelines, %d workers", len(self.cache.pipeline_keys()), settings.workers)
            await _until_first_ends(parts)

    def stalled_seconds(self) -> float:
        """How long there has been no sign of life that there should have been."""
        since_listing = time.monotonic() - self.resync.last_try
        return max(self.queue.stalled_seconds(), since_listing - self.settings.resync_seconds * 1.1)

    async def _watch(self) -> None:
        registry = kopf.OperatorRegistry()
        self.watcher.register(registry)

        async def authenticate(**_: Any) -> kopf.ConnectionInfo:
            return kopf_credentials(self.kopf_settings)

        kopf.on.login(registry=registry)(authenticate)
        await kopf.operator(registry=registry, settings=self.kopf_settings, clusterwide=True, standalone=True)

    async def _renew_certificate(self, certificate: ServerCertificate, folder: Path) -> None:
        while True:
            await asyncio.sleep(CERTIFICATE_REREAD_SECONDS)
            try:
                reload_certificate(certificate, folder)
            except OSError as error:  # ssl.SSLError is one
                logger.error("the certificate in %s cannot be read; the one in use stays: %s", folder, error)

    def _certificate(self) -> ServerCertificate | None:
        if self.settings.progress_base_url is None:
            logger.info("no progress service: neither PLUMBLINE_SERVICE_NAME nor PLUMBLINE_PROGRESS_URL is set")
            return None
        if self.settings.tls_folder is not None:
            return load_certificate(self.settings.tls_folder)
        url = self.settings.progress_url
        host = url.split("//", 1)[-1].split("/", 1)[0].rsplit(":", 1)[0].strip("[]") if url else ""
        return make_certificate(host or self.settings.progress_host)

    def _forget_pipeline(self, uid: str) -> None:
        self.progress.forget_pipeline(uid)
        self.refusals.forget_pipeline(uid)


async def _until_first_ends(parts: list[Coroutine[Any, Any, None]]) -> None:
    """Run until one part ends (the watch does on SIGTERM), then end the others; its error is ours."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def main() -> int:
    """Run the operator; the exit code says whether it was asked to end."""
    try:
        settings = OperatorSettings.from_environment()
        logging.basicConfig(level=settings.log_level.upper(), format=LOG_FORMAT, stream=sys.stderr)
    except ValueError as error:
        sys.stderr.write(f"plumbline-operator: {error}\n")
        return 2
    logging.getLogger("kopf").setLevel(max(logging.getLogger().level, logging.WARNING))
    logging.getLogger("aiohttp").setLevel(logging.WARNING)
    try:
        asyncio.run(_run(settings))
    except LoginError as error:
        sys.stderr.write(f"plumbline-operator: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


async def _run(settings: OperatorSettings) -> None:
    await Operator(settings).run()
