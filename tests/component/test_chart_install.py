"""Install, upgrade, uninstall and install again against a real API server; there is no node, so what pods would run runs here."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from cluster.binaries import find_program
from cluster.errors import ClusterUnavailableError
from cluster.lifecycle import bring_down, bring_up
from support.audit import read_audit_log
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


def account_environment(cluster: ControlPlane, account: str, folder: Path) -> dict[str, str]:
    """What a pod under an account finds in its environment and, below `folder`, among its files."""
    (folder / "token").write_text(cluster.kubectl("create", "token", account, "-n", NAMESPACE).strip())
    trust = cluster.get("configmap", "kube-root-ca.crt", "-n", NAMESPACE)["data"]["ca.crt"]
    (folder / "ca.crt").write_text(trust)
    server = urlsplit(cluster.server)
    return {
        "PATH": os.environ["PATH"],
        "ACCOUNT_DIR": str(folder),
        "KUBERNETES_SERVICE_HOST": str(server.hostname),
        "KUBERNETES_SERVICE_PORT": str(server.port),
    }


def run_script(container: dict[str, Any], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the script of a container here, its own variables below those given."""
    assert container["command"] == ["python3"]
    own = {item["name"]: item["value"].replace("$$(", "$(") for item in container.get("env", [])}
    command = [sys.executable, *container["args"]]
    return subprocess.run(command, env=own | environment, capture_output=True, text=True, timeout=60)


def run_runtime_job(cluster: ControlPlane, folder: Path) -> None:
    """Do what a node would: run the container of the job that applies the runtime, with its account's token, and say how it ended."""
    pod = wait_until("the pod of the runtime job", lambda: pods(cluster, "app.kubernetes.io/component=runtime-hook"))[0]
    environment = account_environment(cluster, pod["spec"]["serviceAccountName"], folder)
    done = run_script(pod["spec"]["containers"][0], environment | {"DEADLINE_SECONDS": "20"})
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


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False


def test_operator_works_with_the_rights_of_the_chart_and_passes_helm_test(bare: ControlPlane, tmp_path: Path) -> None:
    installing = start_helm(bare, "upgrade", "--install", RELEASE, str(CHART), "--create-namespace")
    run_runtime_job(bare, tmp_path)
    finish(installing)
    deployment = bare.get("deployment", RELEASE, "-n", NAMESPACE)["spec"]["template"]["spec"]
    account = deployment["serviceAccountName"]
    environment = account_environment(bare, account, tmp_path)
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "operator",
                "contexts": [{"name": "operator", "context": {"cluster": "here", "user": "operator"}}],
                "clusters": [
                    {
                        "name": "here",
                        "cluster": {"server": bare.server, "certificate-authority": str(tmp_path / "ca.crt")},
                    }
                ],
                "users": [{"name": "operator", "user": {"token": (tmp_path / "token").read_text()}}],
            }
        )
    )
    metrics, health, progress = free_ports(3)
    process = subprocess.Popen(
        [sys.executable, "-m", "plumbline_operator"],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(CHART.parents[1] / "operator"),
            "KUBECONFIG": str(kubeconfig),
            "PLUMBLINE_NAMESPACE": NAMESPACE,
            "PLUMBLINE_SERVICE_NAME": RELEASE,
            "PLUMBLINE_BIND_ADDRESS": "127.0.0.1",
            "PLUMBLINE_METRICS_PORT": str(metrics),
            "PLUMBLINE_HEALTH_PORT": str(health),
            "PLUMBLINE_PROGRESS_PORT": str(progress),
        },
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "operator.log").open("w"),
    )
    try:
        bare.apply(
            {
                **PIPELINE,
                "metadata": {"name": "watched", "namespace": "default"},
                "spec": {**PIPELINE["spec"], "storage": {"uri": "s3://bucket/root"}},
            }
        )
        wait_until("the operator's readiness", lambda: answers(f"http://127.0.0.1:{health}/readyz"))
        selector = "plumbline.dev/pipeline=watched,plumbline.dev/role=preflight"
        job = wait_until("preflight", lambda: bare.get("jobs", "-n", "default", "-l", selector)["items"])[0]
        assert job["metadata"]["ownerReferences"][0]["kind"] == "AlignmentPipeline"
        wait_until(
            "its status", lambda: bare.get("alp", "watched", "-n", "default")["status"].get("phase") == "Preflight"
        )
        wait_until(
            "its event",
            lambda: bare.get("events", "-n", "default", "--field-selector=involvedObject.name=watched")["items"],
        )

        manifest = finish(start_helm(bare, "get", "hooks", RELEASE))
        pod = next(item for item in yaml.safe_load_all(manifest) if item and item["kind"] == "Pod")
        addresses = {
            "HEALTH_URL": f"http://127.0.0.1:{health}/healthz",
            "METRICS_URL": f"http://127.0.0.1:{metrics}/metrics",
            "PROGRESS_URL": f"https://127.0.0.1:{progress}/v1alpha1/namespaces/nobody/jobs/none/progress",
        }
        done = run_script(pod["spec"]["containers"][0], environment | addresses)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("ok ") == 4
        metrics_page = urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=5).read().decode()
        for used in set(re.findall(r"plumbline_[a-z_]+", (CHART / "templates" / "prometheusrule.yaml").read_text())):
            assert f"\n# TYPE {used.removesuffix('_total')}" in metrics_page, f"no metric {used}"
    except AssertionError as error:
        raise AssertionError((tmp_path / "operator.log").read_text()[-4000:]) from error
    finally:
        process.terminate()
        process.wait(timeout=40)

    seen = list(read_audit_log(bare.audit_log))
    own = [event for event in seen if event.user == OPERATOR]
    assert own
    refused = {f"{event.verb} {event.group}/{event.resource}/{event.subresource}" for event in own if event.code == 403}
    assert refused == set()
