"""The node of the test bed runs real pods under the restricted standard, with working services, DNS and S3."""

import time
from typing import Any

import pytest
from support.cluster_fixtures import RealCluster

pytestmark = pytest.mark.e2e


def job(name: str, image: str, script: str) -> dict[str, Any]:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": 60,
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "automountServiceAccountToken": False,
                    "containers": [
                        {
                            "name": "main",
                            "image": image,
                            "imagePullPolicy": "Never",
                            "command": ["sh", "-c", script],
                            "terminationMessagePolicy": "File",
                            "securityContext": {
                                "runAsNonRoot": True,
                                "runAsUser": 65532,
                                "readOnlyRootFilesystem": True,
                                "allowPrivilegeEscalation": False,
                                "capabilities": {"drop": ["ALL"]},
                                "seccompProfile": {"type": "RuntimeDefault"},
                            },
                            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
                        }
                    ],
                    "volumes": [{"name": "tmp", "emptyDir": {}}],
                }
            },
        },
    }


def run_job(cluster: RealCluster, namespace: str, script: str) -> str:
    """Run a shell script as a Job to its end and return its log; the test fails with the log if the Job does."""
    cluster.apply(job("probe", cluster.busybox_image, script), namespace=namespace)
    deadline = time.monotonic() + 60
    while True:
        conditions = cluster.get("job", "probe", "-n", namespace)["status"].get("conditions", [])
        ended = {condition["type"] for condition in conditions if condition["status"] == "True"}
        if ended & {"Complete", "Failed"}:
            break
        assert time.monotonic() < deadline, cluster.kubectl("describe", "pods", "-n", namespace)
    log = cluster.kubectl("logs", "job/probe", "-n", namespace)
    assert "Complete" in ended, log
    return log


def test_job_completes_under_the_restricted_standard(real_node: RealCluster, namespace: str) -> None:
    started = time.monotonic()
    log = run_job(
        real_node, namespace, "id -u; touch /tmp/writable && echo written; touch /nothing 2>&1 || echo refused"
    )
    assert log.split("\n")[0] == "65532"
    assert "written" in log
    assert "refused" in log
    assert time.monotonic() - started < 30


def test_pod_resolves_cluster_names_and_reaches_the_api_and_s3(real_node: RealCluster, namespace: str) -> None:
    host_port = real_node.object_store.endpoint.removeprefix("http://")
    log = run_job(
        real_node,
        namespace,
        "nslookup kubernetes.default.svc.cluster.local && nc -w 5 kubernetes.default 443 </dev/null && echo api-reached;"
        f" nc -w 5 {host_port.replace(':', ' ')} </dev/null && echo s3-reached;"
        f" wget -q -O- http://{host_port}/plumbline 2>&1 | grep -o '403' | head -1;"
        " nslookup no-such-service.default.svc.cluster.local || echo unknown-refused",
    )
    assert "10.96.0.1" in log
    assert "api-reached" in log
    assert "s3-reached" in log
    assert "403" in log, "the S3 server let an anonymous reader in"
    assert "unknown-refused" in log


def test_pods_have_no_way_off_the_machine(real_node: RealCluster, namespace: str) -> None:
    # An address for documentation, where nobody is: without the rule the attempt would wait for its time limit.
    log = run_job(real_node, namespace, "nc -w 20 203.0.113.1 80 </dev/null 2>&1; exit 0")
    assert "refused" in log


def test_pod_reaches_another_pod_through_its_service(real_node: RealCluster, namespace: str) -> None:
    server = job("server", real_node.busybox_image, "while true; do echo hello-from-pod | nc -l -p 8080; done")
    server["spec"]["template"]["metadata"] = {"labels": {"app": "server"}}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "server"},
        "spec": {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8080}]},
    }
    real_node.apply(server, service, namespace=namespace)
    real_node.kubectl("wait", "--for=condition=Ready", "pod", "-l", "app=server", "-n", namespace, "--timeout=30s")
    log = run_job(
        real_node,
        namespace,
        "for i in 1 2 3 4 5 6 7 8 9 10; do nc -w 2 server 80 </dev/null && exit 0; sleep 1; done; exit 1",
    )
    assert "hello-from-pod" in log
