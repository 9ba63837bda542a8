"""The product as users install it: the chart's release on the real node, once for all tests of a session."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cluster_fixtures import RealCluster

CHART = Path(__file__).resolve().parents[2] / "charts" / "plumbline"
NAME, NAMESPACE = "plumbline", "plumbline-system"
OPERATOR_PODS = f"app.kubernetes.io/instance={NAME},app.kubernetes.io/component=operator"
FAST = {
    # A person's patience, not a test's: everything else is as users have it.
    "PLUMBLINE_RETRY_BACKOFF_SECONDS": "1",
    "PLUMBLINE_RETRY_BACKOFF_CAP_SECONDS": "5",
    "PLUMBLINE_WAITING_POLL_SECONDS": "3",
    "PLUMBLINE_REFUSED_POLL_SECONDS": "5",
}


@dataclass(frozen=True)
class Release:
    """An installed chart."""

    cluster: RealCluster

    def operators(self) -> list[dict[str, Any]]:
        """The operator's pods."""
        found: list[dict[str, Any]] = self.cluster.get("pods", "-n", NAMESPACE, "-l", OPERATOR_PODS)["items"]
        return found

    def kill_operator(self, *, force: bool = False) -> None:
        """Delete the operator's pod; with `force` its processes get SIGKILL. Its Deployment makes a new one."""
        grace = ["--grace-period=0", "--force"] if force else ["--grace-period=5"]
        self.cluster.kubectl("delete", "pods", "-n", NAMESPACE, "-l", OPERATOR_PODS, "--wait=false", *grace)

    def scale(self, replicas: int) -> None:
        """Change the number of operators and wait until it is so."""
        self.cluster.kubectl("scale", f"deployment/{NAME}", "-n", NAMESPACE, f"--replicas={replicas}")
        if replicas:
            self.wait_ready()
            return
        deadline = time.monotonic() + 120
        while self.operators():
            assert time.monotonic() < deadline, "the operator does not end"
            time.sleep(0.2)

    def wait_ready(self) -> None:
        """Wait until the operator is ready."""
        self.cluster.kubectl("rollout", "status", f"deployment/{NAME}", "-n", NAMESPACE, "--timeout=300s", timeout=320)

    def logs(self, lines: int = 60) -> str:
        """The end of the operators' logs, those of an earlier container included."""
        text = ""
        for pod in self.operators():
            for earlier in ([], ["--previous"]):
                text += self.cluster.kubectl(
                    "logs", pod["metadata"]["name"], "-n", NAMESPACE, f"--tail={lines}", *earlier, check=False
                )
        return text


def release_values(cluster: RealCluster) -> dict[str, Any]:
    """Values for the images of this tree and for pods that several fit on two cores."""
    share = {"cpu": "200m", "memory": "2Gi", "ephemeralStorage": "2Gi"}
    return {
        "operator": {
            "image": _image(cluster.operator_image),
            "extraEnv": [{"name": name, "value": value} for name, value in FAST.items()],
        },
        "runtime": {
            "image": _image(cluster.trainer_image),
            "spec": {
                "classes": {"train": share, "generate": share, "cpu": share},
                "terminationGracePeriod": "60s",
            },
        },
    }


def _image(reference: str) -> dict[str, str]:
    repository, _, tag = reference.rpartition(":")
    return {"repository": repository, "tag": tag, "pullPolicy": "Never"}


@pytest.fixture(scope="session")
def release(real_cluster: RealCluster, tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The chart, installed or upgraded; it goes with the cluster, and on a cluster that is kept it stays for the next session."""
    values = tmp_path_factory.mktemp("release") / "values.yaml"
    values.write_text(yaml.safe_dump(release_values(real_cluster)))
    found = Release(real_cluster)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    real_cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
    try:
        real_cluster.helm(
            "upgrade", "--install", NAME, str(CHART), "--namespace", NAMESPACE,
            "--values", str(values), "--wait", "--timeout", "6m", "--take-ownership", timeout=420,
        )  # fmt: skip
    except AssertionError as error:
        events = real_cluster.kubectl("get", "events", "-n", NAMESPACE, "--sort-by=.lastTimestamp", check=False)
        raise AssertionError(f"{error}\n{events[-3000:]}\n{found.logs()}") from error
    return found
