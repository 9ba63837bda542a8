"""Deterministic names of everything the operator creates."""

from __future__ import annotations

import hashlib
import re

from plumbline_api.base import API_GROUP

MANAGED_BY = "plumbline"
PREFLIGHT = "preflight"
FINALIZE = "finalize"
COLLECT = "collect"
IMPLICIT_STAGES = (PREFLIGHT, FINALIZE, COLLECT)
"""Names that no declared stage or dataset may take."""

LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_PIPELINE_UID = f"{API_GROUP}/pipeline-uid"
LABEL_PIPELINE = f"{API_GROUP}/pipeline"
LABEL_STAGE = f"{API_GROUP}/stage"
LABEL_ROLE = f"{API_GROUP}/role"
LABEL_FINGERPRINT = f"{API_GROUP}/fingerprint"
ANNOTATION_FINGERPRINT = f"{API_GROUP}/fingerprint"
ANNOTATION_ATTEMPT = f"{API_GROUP}/attempt"
ANNOTATION_STAGE = f"{API_GROUP}/stage"
ANNOTATION_DEFAULT_RUNTIME = f"{API_GROUP}/is-default-runtime"
FINALIZER = f"{API_GROUP}/finalizer"

JOB_NAME_MAX = 52
LABEL_HASH_DIGITS = 32


def job_name(*, pipeline: str, stage: str, uid: str, fingerprint: str, attempt: int, role: str = "stage") -> str:
    """The name of a stage's Job: readable, at most 52 characters, and a hash of what identifies it.

    Two operators at once, or one that starts again, derive the same name and so create the Job once.
    """
    identity = hashlib.sha256(f"{uid}/{role}/{stage}/{fingerprint}/{attempt}".encode()).hexdigest()[:10]
    readable = re.sub(r"[^a-z0-9-]+", "-", f"{pipeline}-{stage}").strip("-")
    return f"{readable[: JOB_NAME_MAX - len(identity) - 1].rstrip('-')}-{identity}"


def record_name(*, pipeline: str, uid: str, generation: int) -> str:
    """The name of the ControllerRevision that freezes what a generation of a pipeline resolved to."""
    return f"{pipeline}-{hashlib.sha256(uid.encode()).hexdigest()[:8]}-{generation}"


def label_hash(value: str) -> str:
    """A label value for something that may be longer than a label or hold other characters."""
    return hashlib.sha256(value.encode()).hexdigest()[:LABEL_HASH_DIGITS]
