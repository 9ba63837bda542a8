"""The pod of an attempt: restricted security, scratch space, resources, mounts."""

from __future__ import annotations

import math
from typing import Any

from plumbline_api.quantities import parse_duration, parse_quantity
from plumbline_api.record import RunRecord
from plumbline_api.runtime import PodClass, RuntimeSpec

from plumbline_operator.environment import (
    CA_BUNDLE_FILE,
    PROGRESS_PATH,
    TERMINATION_LOG,
    TMP_PATH,
    pod_environment,
)
from plumbline_operator.snapshot import StartStage

Manifest = dict[str, Any]

USER_ID = 65532
CONTAINER = "trainer"
CLAIMS_PATH = "/mnt/claims"
PROGRESS_CA_ANNOTATION = "plumbline.dev/progress-ca"
TOKEN_SECONDS = 3600
SCRATCH_REQUEST = "2Gi"


def pod_spec(
    start: StartStage,
    record: RunRecord,
    runtime: RuntimeSpec,
    *,
    progress_url: str | None,
    progress_audience: str,
    progress_ca: bool,
    subdomain: str | None,
) -> Manifest:
    """The pod spec; fits the restricted Pod Security Standard."""
    run, pieces = start.run, runtime.classes.of(start.runtime_class)
    cpu = start.resources.cpu or pieces.cpu
    volumes, mounts = _volumes(start, record, runtime, pieces)
    if progress_url is not None:
        volumes.append(_progress_volume(progress_audience, with_ca=progress_ca))
        mounts.append({"name": "progress", "mountPath": PROGRESS_PATH, "readOnly": True})
    environment = pod_environment(
        run,
        runtime,
        class_env={item.name: item.value for item in pieces.env},
        cpu=cpu,
        progress_url=progress_url,
        has_progress_ca=progress_ca,
        master_address=f"{start.job}-0.{subdomain}" if subdomain is not None else None,
    )
    spec: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(parse_duration(runtime.termination_grace_period)),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": CONTAINER,
                "image": runtime.image,
                "imagePullPolicy": runtime.image_pull_policy,
                "env": environment,
                "resources": _resources(start, runtime, pieces, cpu),
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "terminationMessagePath": TERMINATION_LOG,
                "terminationMessagePolicy": "File",
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    optional: Manifest = {
        "serviceAccountName": runtime.service_account_name,
        "imagePullSecrets": [{"name": name} for name in runtime.image_pull_secrets],
        "nodeSelector": dict(pieces.node_selector),
        "tolerations": [item.to_wire() for item in pieces.tolerations],
        "priorityClassName": pieces.priority_class_name,
        "runtimeClassName": pieces.runtime_class_name,
        "subdomain": subdomain,
    }
    return spec | {name: value for name, value in optional.items() if value}


def _resources(start: StartStage, runtime: RuntimeSpec, pieces: PodClass, cpu: str) -> Manifest:
    """Memory and accelerators are asked for and limited alike; CPU is only asked for: idle cores get used.

    The scratch disk's size is a ceiling that few stages come near: no more of it is asked for than keeps pods off nodes
    whose disk is full.
    """
    memory = start.resources.memory or pieces.memory
    fixed: dict[str, str] = {"memory": memory}
    gpus = start.resources.gpus_per_node or 0
    if gpus and runtime.accelerator is not None:
        fixed[runtime.accelerator.resource_name] = str(gpus)
    disk = pieces.ephemeral_storage
    asked = min(disk, SCRATCH_REQUEST, key=parse_quantity)
    return {
        "requests": {"cpu": cpu, **fixed, "ephemeral-storage": asked},
        "limits": {**fixed, "ephemeral-storage": disk},
    }


def _volumes(
    start: StartStage, record: RunRecord, runtime: RuntimeSpec, pieces: PodClass
) -> tuple[list[Manifest], list[Manifest]]:
    volumes: list[Manifest] = [{"name": "tmp", "emptyDir": {"sizeLimit": pieces.ephemeral_storage}}]
    mounts: list[Manifest] = [{"name": "tmp", "mountPath": TMP_PATH}]
    if pieces.shared_memory is not None:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": pieces.shared_memory}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108 - a volume of the pod's own
    if runtime.ca_bundle_config_map is not None:
        source = {"name": runtime.ca_bundle_config_map, "items": [{"key": "ca.crt", "path": "ca.crt"}]}
        volumes.append({"name": "ca-bundle", "configMap": source})
        mounts.append({"name": "ca-bundle", "mountPath": CA_BUNDLE_FILE.rpartition("/")[0], "readOnly": True})
    for number, claim in enumerate(claims_of(start, record)):
        name = f"claim-{number}"
        volumes.append({"name": name, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
        mounts.append({"name": name, "mountPath": f"{CLAIMS_PATH}/{claim}", "readOnly": True})
    return volumes, mounts


def _progress_volume(audience: str, *, with_ca: bool) -> Manifest:
    """A token for the progress service only, and its certificate authority from an annotation of the pod.

    So nothing has to be put into the tenant's namespace besides the Job.
    """
    token = {"audience": audience, "expirationSeconds": TOKEN_SECONDS, "path": "token"}
    sources: list[Manifest] = [{"serviceAccountToken": token}]
    if with_ca:
        reference = {"fieldPath": f"metadata.annotations['{PROGRESS_CA_ANNOTATION}']"}
        sources.append({"downwardAPI": {"items": [{"path": "ca.crt", "fieldRef": reference}]}})
    return {"name": "progress", "projected": {"sources": sources}}


def claims_of(start: StartStage, record: RunRecord) -> list[str]:
    """Claims that an attempt reads: of its own inputs, and of the base models under the adapters it starts from."""
    run = start.run
    if run.role == "preflight":
        uris = [item.uri for item in record.external_inputs]
    elif run.role == "stage":
        uris = [record.external_inputs[index].uri for index in sorted(_externals_of(record, run.stage))]
    else:
        uris = []
    claims = [uri.removeprefix("pvc://").split("/")[0] for uri in uris if uri.startswith("pvc://")]
    return list(dict.fromkeys(claims))


def _externals_of(record: RunRecord, name: str) -> set[int]:
    """External inputs of a stage, and the models (never the data) that the stages before it started from."""
    found: set[int] = set()
    seen: set[str] = set()
    pending = [name]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        for ref in record.stage(current).inputs:
            if ref.stage is not None:
                pending.append(ref.stage)
            elif ref.external is not None and (
                current == name or record.external_inputs[ref.external].kind == "policy"
            ):
                found.add(ref.external)
    return found
