"""Why a job has no running pod, in words that say who has to act."""

from __future__ import annotations

import re

from plumbline_operator.policies.clock import shorten
from plumbline_operator.snapshot import JobView

_MISSING = re.compile(
    r'(secret|configmap|persistentvolumeclaim|serviceaccount) "?([-a-z0-9./]+)"? not found', re.IGNORECASE
)
_REMEDIES = {
    "secret": "create it in the pipeline's namespace, with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "configmap": "create it in the pipeline's namespace, with the key ca.crt",
    "persistentvolumeclaim": "create the claim in the pipeline's namespace",
    "serviceaccount": "create the service account in the pipeline's namespace",
}
_KEY_MISSING = re.compile(r"couldn't find key (\S+) in Secret (\S+)", re.IGNORECASE)
STOPPING_WORDS = "the attempt is being stopped"
_IMAGE_REASONS = frozenset({"ImagePullBackOff", "ErrImagePull", "ErrImageNeverPull", "InvalidImageName"})


def waiting_words(job: JobView) -> tuple[str | None, str | None]:
    """Reason and message for a job that waits: what the cluster says, and the remedy where one is known."""
    if job.deleting:
        return "Stopping", STOPPING_WORDS
    if job.waiting_reason is None:
        return ("WaitingForQueue", "the queue has not admitted the job yet") if job.suspended else (None, None)
    message = job.waiting_message
    remedy = _remedy(job.waiting_reason, message)
    joined = "; ".join(part.rstrip(". ") for part in (message, remedy) if part)
    return job.waiting_reason, shorten(joined) or None


def _remedy(reason: str, message: str) -> str | None:
    if (missing := _MISSING.search(message)) is not None:
        return _REMEDIES[missing[1].lower()]
    if (key := _KEY_MISSING.search(message)) is not None:
        return f"add the key {key[1]} to the Secret {key[2].split('/')[-1]}"
    if reason in _IMAGE_REASONS:
        return "the owners of the runtime check its image and imagePullSecrets"
    if reason == "Unschedulable" and "persistentvolumeclaim" not in message:
        return "no node fits now; it starts as soon as one does, or ask for less in resources of the stage"
    return None
