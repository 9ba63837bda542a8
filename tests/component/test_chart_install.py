"""Install, upgrade, uninstall and install again against a real API server; there is no node, so pods are only made, not run."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cluster.binaries import find_program
from cluster.errors import ClusterUnavailableError
from cluster.lifecycle import bring_down, bring_up
from support.cluster_fixtures import ControlPlane

pytestmark = pytest.mark.component

CHART = Path(__file__).resolve().parents[2] / "charts" / "plumbline"
RELEASE, NAMESPACE = "plumbline", "plumbline-system"
OPERATOR = f"system:serviceaccount:{NAMESPACE}:plumbline"
PIPELINE = {
    "apiVersion": "plumbline.dev/v1alpha1",
    "kind": "AlignmentPipeline",
    "metadata": {"name": "kept", "namespace": "default"},
    "spec": {
        "model": {"source": "bundled://smollm2-135m-instruct"},
        "datasets": [{"name": "rows", "source": "s3://bucket/rows.jsonl"}],
        "stages": [{"name": "sft", "sft": {"dataset": "rows"}}],
    },
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane of its own: other tests bring CRDs that Helm would refuse to take over."""
    folder = tmp_path_factory.mktemp("bare")
    try:
        yield ControlPlane(bring_up(folder, control_plane_only=True))
    except ClusterUnavailableError as error:
        pytest.skip(str(error))
    finally:
        bring_down(folder)


def start_helm(cluster: ControlPlane, *arguments: str) -> subprocess.Popen[str]:
    program = shutil.which("helm") or str(find_program("helm"))
    command = [program, f"--kubeconfig={cluster.kubeconfig}", "--namespace", NAMESPACE, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return out


def wait_until(what: str, found: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)
    return value


def pods(cluster: ControlPlane, selector: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cluster.get("pods", "-n", NAMESPACE, "-l", selector)["items"]
    return found


def run_runtime_job(cluster: ControlPlane, folder: Path) -> None:
    """Do what a node would: run the container of the job that applies the runtime, with its account's token, and say how it ended."""
    pod = wait_until("the pod of the runtime job", lambda: pods(cluster, "app.kubernetes.io/component=runtime-hook"))[0]
    account = pod["spec"]["serviceAccountName"]
    (folder / "token").write_text(cluster.kubectl("create", "token", account, "-n", NAMESPACE).strip())
    trust = cluster.get("configmap", "kube-root-ca.crt", "-n", NAMESPACE)["data"]["ca.crt"]
    (folder / "ca.crt").write_text(trust)
    server = urlsplit(cluster.server)
    (container,) = pod["spec"]["containers"]
    environment = {
        "PATH": os.environ["PATH"],
        "ACCOUNT_DIR": str(folder),
        "KUBERNETES_SERVICE_HOST": str(server.hostname),
        "KUBERNETES_SERVICE_PORT": str(server.port),
        "DEADLINE_SECONDS": "20",
        **{item["name"]: item["value"].replace("$$(", "$(") for item in container["env"]},
    }
    assert container["command"] == ["python3"]
    done = subprocess.run(
        [sys.executable, *container["args"]], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ended = {"phase": "Succeeded", "conditions": [{"type": "Ready", "status": "False", "reason": "PodCompleted"}]}
    name = pod["metadata"]["name"]
    cluster.kubectl("patch", "pod", name, "-n", NAMESPACE, "--subresource=status", "-p", json.dumps({"status": ended}))
    wait_until("the end of the runtime job", lambda: not pods(cluster, "app.kubernetes.io/component=runtime-hook"))


def may(cluster: ControlPlane, user: str, verb: str, resource: str, namespace: str = "default") -> bool:
    kind, _, subresource = resource.partition("/")
    part = [f"--subresource={subresource}"] if subresource else []
    answer = cluster.kubectl("auth", "can-i", verb, kind, *part, "-n", namespace, f"--as={user}", check=False)
    return "yes" in answer.splitlines()


def test_release_lives_through_install_upgrade_uninstall_and_install(bare: ControlPlane, tmp_path: Path) -> None:
    bare.apply(
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        }
    )

    installing = start_helm(bare, "install", RELEASE, str(CHART))
    run_runtime_job(bare, tmp_path)
    notes = finish(installing)
    assert "helm test plumbline" in notes
    assert "keep" in notes or "stay" in notes
    runtime = bare.get("alr", "default")
    assert runtime["metadata"]["annotations"]["plumbline.dev/is-default-runtime"] == "true"
    assert wait_until("the operator's pod", lambda: pods(bare, "app.kubernetes.io/component=operator"))
    bare.apply(PIPELINE)

    upgrading = start_helm(bare, "upgrade", RELEASE, str(CHART), "--set", "runtime.spec.limits.nodes=3")
    run_runtime_job(bare, tmp_path)
    finish(upgrading)
    upgraded = bare.get("alr", "default")
    assert upgraded["metadata"]["uid"] == runtime["metadata"]["uid"]
    assert upgraded["spec"]["limits"] == {"nodes": 3}

    uninstalled = finish(start_helm(bare, "uninstall", RELEASE))
    assert "kept due to the resource policy" in uninstalled
    assert wait_until("the operator's end", lambda: not pods(bare, "app.kubernetes.io/component=operator"))
    assert bare.get("alp", "kept", "-n", "default")["spec"]["stages"][0]["name"] == "sft"
    assert bare.get("alr", "default")["metadata"]["uid"] == runtime["metadata"]["uid"]
    assert not may(bare, OPERATOR, "list", "alignmentpipelines")

    installing = start_helm(bare, "install", RELEASE, str(CHART), "--set", "rbac.runtimesForEveryone=true")
    run_runtime_job(bare, tmp_path)
    finish(installing)
    again = bare.get("alr", "default")
    assert "limits" not in again["spec"]
    assert again["metadata"]["uid"] == runtime["metadata"]["uid"]
    assert "plumbline-runtime\n" not in bare.kubectl("get", "clusterroles", "-o", "name"), (
        "the job's rights outlived it"
    )

    assert may(bare, OPERATOR, "list", "alignmentpipelines")
    assert may(bare, OPERATOR, "create", "jobs")
    assert not may(bare, OPERATOR, "get", "secrets")
    assert not may(bare, OPERATOR, "create", "pods/exec")
    assert not may(bare, OPERATOR, "create", "alignmentruntimes")
    bare.kubectl("create", "rolebinding", "team", "--clusterrole=edit", "--user=ada", "-n", "default")
    wait_until("aggregation", lambda: may(bare, "ada", "create", "alignmentpipelines"))
    assert not may(bare, "ada", "patch", "alignmentpipelines/status")
    assert not may(bare, "ada", "create", "controllerrevisions")
    assert not may(bare, "ada", "patch", "alignmentruntimes")
    assert may(bare, "ada", "list", "alignmentruntimes")
    assert not may(bare, "ada", "create", "alignmentpipelines", "kube-system")
