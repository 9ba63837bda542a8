"""From a decision to Kubernetes objects: the Job of an attempt and the Service that lets its pods find each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from plumbline_api.base import GROUP_VERSION
from plumbline_api.names import (
    ANNOTATION_ATTEMPT,
    ANNOTATION_FINGERPRINT,
    ANNOTATION_STAGE,
    LABEL_FINGERPRINT,
    LABEL_HASH_DIGITS,
    LABEL_MANAGED_BY,
    LABEL_PIPELINE,
    LABEL_PIPELINE_UID,
    LABEL_ROLE,
    LABEL_STAGE,
    MANAGED_BY,
    label_hash,
)
from plumbline_api.quantities import parse_duration
from plumbline_api.record import RunRecord
from plumbline_api.stagerun import StageRun

from plumbline_operator.podtemplate import PROGRESS_CA_ANNOTATION, pod_spec
from plumbline_operator.snapshot import StartStage

Manifest = dict[str, Any]

KUEUE_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


@dataclass(frozen=True, slots=True)
class RenderSettings:
    """What the operator adds to every pod."""

    progress_url: str | None = None
    """Base of the operator's progress service, such as https://plumbline-operator.plumbline-system.svc; absent: pods
    report no progress. Each pod posts to `<base>` + `progress_path(namespace, job)`."""
    progress_audience: str = "plumbline.dev/progress"
    """Audience of the token that pods show to the progress service."""
    progress_ca_pem: str | None = None
    """Certificate authority of the progress service; absent: the pod's own trust."""


def progress_path(namespace: str, job: str) -> str:
    """Where the pods of a Job post their progress, below the base of the progress service."""
    return f"/v1alpha1/namespaces/{namespace}/jobs/{job}/progress"


def render_job(start: StartStage, record: RunRecord, settings: RenderSettings) -> Manifest:
    """The Job of one attempt. The same decision renders to the same object.

    Everything comes from the record, nothing from the runtime as it is now. Retries are the planner's: the Job itself
    makes none, but replaces the one pod of a stage that was preempted or drained.

    Raises:
        ValueError: if the record was made for a local run.
    """
    run, runtime = start.run, record.runtime
    if runtime is None:
        raise ValueError("the record names no runtime; it was made for a local run")
    labels = run_labels(run)
    job_labels = dict(labels)
    if runtime.queue_name is not None and run.role == "stage":
        job_labels[KUEUE_QUEUE_LABEL] = runtime.queue_name
    annotations = run_annotations(run)
    pod_annotations = dict(annotations)
    progress_url = None
    if settings.progress_url is not None and run.role in ("stage", "preflight"):
        progress_url = settings.progress_url.rstrip("/") + progress_path(run.pipeline.namespace, start.job)
        if settings.progress_ca_pem is not None:
            pod_annotations[PROGRESS_CA_ANNOTATION] = settings.progress_ca_pem
    subdomain = service_name(run) if run.nodes > 1 else None
    spec: Manifest = {
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "parallelism": run.nodes,
        "completions": run.nodes,
        "completionMode": "Indexed" if run.nodes > 1 else "NonIndexed",
        "ttlSecondsAfterFinished": math.ceil(parse_duration(runtime.job_ttl)),
        "template": {
            "metadata": {"labels": labels, "annotations": pod_annotations},
            "spec": pod_spec(
                start,
                record,
                runtime,
                progress_url=progress_url,
                progress_audience=settings.progress_audience,
                progress_ca=settings.progress_ca_pem is not None,
                subdomain=subdomain,
            ),
        },
    }
    if start.timeout_seconds is not None:
        spec["activeDeadlineSeconds"] = start.timeout_seconds
    if run.nodes == 1:
        # With several pods one replaced pod would leave the others waiting for it: any lost one ends the attempt.
        disruption = {"type": "DisruptionTarget", "status": "True"}
        spec["podFailurePolicy"] = {"rules": [{"action": "Ignore", "onPodConditions": [disruption]}]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": start.job,
            "namespace": run.pipeline.namespace,
            "labels": job_labels,
            "annotations": annotations,
            "ownerReferences": [owner_reference(run)],
        },
        "spec": spec,
    }


def render_service(start: StartStage) -> Manifest | None:
    """The headless Service by which the pods of a stage find each other; None where one pod works alone.

    One Service serves all stages of a pipeline: pods carry the name of their Job and their index.
    """
    run = start.run
    if run.nodes == 1:
        return None
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": service_name(run),
            "namespace": run.pipeline.namespace,
            "labels": {
                LABEL_MANAGED_BY: MANAGED_BY,
                LABEL_PIPELINE: run.pipeline.name,
                LABEL_PIPELINE_UID: run.pipeline.uid,
            },
            "ownerReferences": [owner_reference(run)],
        },
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {LABEL_PIPELINE_UID: run.pipeline.uid},
        },
    }


def service_name(run: StageRun) -> str:
    """Name of the headless Service of a pipeline."""
    return f"{run.pipeline.name}-{label_hash(run.pipeline.uid)[:8]}"


def owner_reference(run: StageRun) -> Manifest:
    """The pipeline as the owner: whatever it owns goes when it goes."""
    return {
        "apiVersion": GROUP_VERSION,
        "kind": "AlignmentPipeline",
        "name": run.pipeline.name,
        "uid": run.pipeline.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def run_labels(run: StageRun) -> dict[str, str]:
    """Labels of a Job and of its pods."""
    return {
        LABEL_MANAGED_BY: MANAGED_BY,
        LABEL_PIPELINE: run.pipeline.name,
        LABEL_PIPELINE_UID: run.pipeline.uid,
        LABEL_STAGE: run.stage,
        LABEL_ROLE: run.role,
        LABEL_FINGERPRINT: run.fingerprint[:LABEL_HASH_DIGITS],
    }


def run_annotations(run: StageRun) -> dict[str, str]:
    """Annotations that identify an attempt in full."""
    return {
        ANNOTATION_FINGERPRINT: run.fingerprint,
        ANNOTATION_ATTEMPT: str(run.attempt),
        ANNOTATION_STAGE: run.stage,
    }
