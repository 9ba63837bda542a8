"""Prometheus metrics. Labels are bounded: never a name of a pipeline, a namespace or a Job."""

from __future__ import annotations

from collections.abc import Callable

from plumbline_api.status import PipelineStatus
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from plumbline_operator.configuration import software_version

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ENDED_PHASES = frozenset({"Succeeded", "Failed", "Skipped"})
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Everything that the operator counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self.reconcile_seconds = Histogram(
            "plumbline_reconcile_seconds", "Time of one pass over a pipeline", buckets=SECONDS, registry=registry
        )
        self.reconcile_errors = Counter(
            "plumbline_reconcile_errors", "Passes that failed, by kind of error", ["reason"], registry=registry
        )
        self.queue_depth = Gauge("plumbline_queue_depth", "Pipelines that wait for a pass", registry=registry)
        self.queue_stalled = Gauge(
            "plumbline_queue_stalled_seconds", "How long something was due and no pass ended", registry=registry
        )
        self.pipelines = Gauge("plumbline_pipelines", "Pipelines that are known", registry=registry)
        self.stages_ended = Counter(
            "plumbline_stages_ended", "Stages that ended, by type and outcome", ["type", "outcome"], registry=registry
        )
        self.runs_ended = Counter(
            "plumbline_pipelines_ended", "Pipelines that ended, by outcome", ["outcome"], registry=registry
        )
        self.jobs_started = Counter("plumbline_jobs_started", "Jobs that were created", registry=registry)
        self.handover_seconds = Histogram(
            "plumbline_handover_seconds",
            "From seeing a stage's Job end to the next one being created",
            buckets=SECONDS,
            registry=registry,
        )
        self.requests = Counter(
            "plumbline_api_requests", "Requests to the API server", ["verb", "resource", "code"], registry=registry
        )
        self.progress_reports = Counter(
            "plumbline_progress_reports", "Progress reports from trainers, by answer", ["answer"], registry=registry
        )
        self.resyncs = Counter("plumbline_resyncs", "Complete listings, by outcome", ["outcome"], registry=registry)
        self.last_resync = Gauge(
            "plumbline_last_resync_timestamp_seconds", "When the last complete listing ended", registry=registry
        )
        Gauge("plumbline_build_info", "Version of the operator", ["version"], registry=registry).labels(
            software_version()
        ).set(1)

    def watch_queue(self, depth: Callable[[], float], stalled: Callable[[], float], known: Callable[[], float]) -> None:
        """Read the state of the queue whenever somebody scrapes."""
        self.queue_depth.set_function(depth)
        self.queue_stalled.set_function(stalled)
        self.pipelines.set_function(known)

    def count_request(self, verb: str, resource: str, status: int) -> None:
        """One request; status 0 means that no answer came."""
        self.requests.labels(verb, resource, str(status)).inc()

    def count_transitions(self, old: PipelineStatus, new: PipelineStatus) -> None:
        """Count what ended between two states of a pipeline."""
        before = {entry.name: entry for entry in old.stages}
        for entry in new.stages:
            was = before.get(entry.name)
            if entry.phase in ENDED_PHASES and (was is None or was.phase != entry.phase):
                outcome = "Cached" if entry.phase == "Succeeded" and entry.cached else entry.phase
                self.stages_ended.labels(entry.type, outcome).inc()
        if new.phase != old.phase and new.phase in ENDED_PHASES:
            self.runs_ended.labels(new.phase).inc()

    def render(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
