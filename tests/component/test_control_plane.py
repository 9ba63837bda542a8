"""The API server of the test bed is a real one: it answers, admits, runs controllers and writes its audit log."""

import json
import time
from pathlib import Path

import pytest
from cluster.binaries import kubernetes_version
from kubernetes import client
from support.audit import count_creates, count_writes
from support.cluster_fixtures import ControlPlane

pytestmark = pytest.mark.component

RESTRICTED = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def job(name: str, security: dict[str, object]) -> dict[str, object]:
    container = {"name": "main", "image": "localhost/nothing", "command": ["true"], "securityContext": security}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"backoffLimit": 0, "template": {"spec": {"restartPolicy": "Never", "containers": [container]}}},
    }


def test_answers_with_the_pinned_version(control_plane: ControlPlane) -> None:
    version = json.loads(control_plane.kubectl("get", "--raw", "/version"))["gitVersion"]
    assert version == kubernetes_version()


def test_namespace_exists_and_the_job_controller_makes_pods(control_plane: ControlPlane, namespace: str) -> None:
    control_plane.apply(job("first", RESTRICTED), namespace=namespace)
    core = client.CoreV1Api(control_plane.api_client())
    deadline = time.monotonic() + 20
    while not (pods := core.list_namespaced_pod(namespace, label_selector="job-name=first").items):
        assert time.monotonic() < deadline, "the Job controller made no pod within 20 s"
    assert pods[0].spec.containers[0].image == "localhost/nothing"
    [pod] = control_plane.read(f"/api/v1/namespaces/{namespace}/pods", labelSelector="job-name=first")["items"]
    assert pod["metadata"]["name"] == pods[0].metadata.name
    assert control_plane.read(f"/api/v1/namespaces/{namespace}/pods", labelSelector="job-name=second")["items"] == []
    with pytest.raises(AssertionError, match="404"):
        control_plane.read(f"/api/v1/namespaces/{namespace}/pods/none")


def test_pods_outside_the_restricted_standard_are_refused(control_plane: ControlPlane, namespace: str) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "root"},
        "spec": {"containers": [{"name": "main", "image": "localhost/nothing"}]},
    }
    with pytest.raises(AssertionError, match='violates PodSecurity "restricted'):
        control_plane.apply(pod, namespace=namespace)


def test_audit_log_counts_creates_by_name_and_writes_by_user(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    other = control_plane.kubeconfig_for(tmp_path / "kubeconfig", "someone", ("system:masters",))
    batch = client.BatchV1Api(api_client_of(other))
    batch.create_namespaced_job(namespace, job("once", RESTRICTED))
    batch.delete_namespaced_job("once", namespace, propagation_policy="Background")
    wait_for_delete(batch, namespace, "once")
    batch.create_namespaced_job(namespace, job("once", RESTRICTED))
    with pytest.raises(client.ApiException) as refused:
        batch.create_namespaced_job(namespace, job("once", RESTRICTED))
    assert refused.value.status == 409

    assert count_creates(control_plane.audit_log, "jobs", namespace) == {"once": 2}
    assert count_writes(control_plane.audit_log, "someone", namespace) == {"create jobs": 3, "delete jobs": 1}


def api_client_of(kubeconfig: Path) -> client.ApiClient:
    from kubernetes import config

    return config.new_client_from_config(str(kubeconfig))


def wait_for_delete(batch: client.BatchV1Api, namespace: str, name: str) -> None:
    deadline = time.monotonic() + 20
    while any(found.metadata.name == name for found in batch.list_namespaced_job(namespace).items):
        assert time.monotonic() < deadline, f"Job {name} was not deleted within 20 s"
