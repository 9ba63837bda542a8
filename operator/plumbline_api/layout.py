"""Where things lie in object storage."""

from __future__ import annotations

MANIFEST = "manifest.json"


def namespace_root(storage_uri: str, namespace: str) -> str:
    """Everything of a namespace."""
    return f"{storage_uri.rstrip('/')}/{namespace}"


def stage_root(storage_uri: str, namespace: str, stage_type: str, fingerprint: str) -> str:
    """Output, checkpoints and logs of one piece of work; its manifest is `<stage_root>/manifest.json`."""
    return f"{namespace_root(storage_uri, namespace)}/{stage_type}/{fingerprint}"


def stage_run_root(storage_uri: str, namespace: str, stage_type: str, fingerprint: str, uid: str) -> str:
    """Checkpoints, metrics, logs and results of one pipeline's attempts at a piece of work."""
    return f"{stage_root(storage_uri, namespace, stage_type, fingerprint)}/runs/{uid}"


def pipeline_root(storage_uri: str, namespace: str, name: str, uid: str) -> str:
    """plan.json, lineage.json, report.html and model-card.md of one pipeline."""
    return f"{namespace_root(storage_uri, namespace)}/pipelines/{name}/{uid}"
