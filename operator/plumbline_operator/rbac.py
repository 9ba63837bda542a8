"""The rights that the operator needs, and no more. The chart grants them; tests compare the chart, these rules and the
requests that the API server's audit log shows."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """A rule of a ClusterRole."""

    groups: tuple[str, ...]
    resources: tuple[str, ...]
    verbs: tuple[str, ...]


RULES: tuple[Rule, ...] = (
    # What tenants and platform teams write. A spec is never changed; a pipeline is deleted when its time is over.
    Rule(("plumbline.dev",), ("alignmentpipelines",), ("get", "list", "watch", "delete")),
    Rule(("plumbline.dev",), ("alignmentpipelines/status",), ("patch",)),
    # To own objects with blockOwnerDeletion where the API server checks for it.
    Rule(("plumbline.dev",), ("alignmentpipelines/finalizers",), ("update",)),
    Rule(("plumbline.dev",), ("alignmentruntimes",), ("list", "watch")),
    # One Job per attempt at a stage; its pods are read for termination messages and for why they wait.
    Rule(("batch",), ("jobs",), ("get", "list", "watch", "create", "patch", "delete")),
    Rule(("",), ("pods",), ("get", "list")),
    # By which the pods of a stage on several nodes find each other; it goes with the pipeline.
    Rule(("",), ("services",), ("get", "create")),
    # The run record.
    Rule(("apps",), ("controllerrevisions",), ("get", "list", "create")),
    # Whether a progress report comes from a pod of the stage's Job.
    Rule(("authentication.k8s.io",), ("tokenreviews",), ("create",)),
    Rule(("events.k8s.io",), ("events",), ("create",)),
)
