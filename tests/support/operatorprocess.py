"""The operator as users run it: a process of its own, with the rights that its RBAC rules give and no more."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plumbline_operator.rbac import RULES
from support.cluster_fixtures import ControlPlane
from support.liveapi import ROOT, crds
from support.pipelines import runtime_body

ROLE = "plumbline-operator-test"


def install(cluster: ControlPlane, *users: str) -> None:
    """CRDs, a default runtime, and the operator's rights for users."""
    cluster.apply(*crds())
    for crd in crds():
        cluster.kubectl("wait", "--for=condition=Established", f"crd/{crd['metadata']['name']}", "--timeout=30s")
    rules = [
        {"apiGroups": list(rule.groups), "resources": list(rule.resources), "verbs": list(rule.verbs)} for rule in RULES
    ]
    api = "rbac.authorization.k8s.io"
    cluster.apply(
        runtime_body(),
        {"apiVersion": f"{api}/v1", "kind": "ClusterRole", "metadata": {"name": ROLE}, "rules": rules},
        {
            "apiVersion": f"{api}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": ROLE},
            "roleRef": {"apiGroup": api, "kind": "ClusterRole", "name": ROLE},
            "subjects": [{"kind": "User", "name": user, "apiGroup": api} for user in users],
        },
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class OperatorProcess:
    """One operator process; may be killed and started again."""

    kubeconfig: Path
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    name: str = "operator"
    process: subprocess.Popen[bytes] | None = None
    ports: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ports = {name: free_port() for name in ("METRICS", "HEALTH", "PROGRESS")}

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start(self) -> None:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "KUBECONFIG": str(self.kubeconfig),
            "PYTHONPATH": str(ROOT / "operator"),
            "PLUMBLINE_BIND_ADDRESS": "127.0.0.1",
            "PLUMBLINE_PROGRESS_URL": f"https://127.0.0.1:{self.ports['PROGRESS']}",
            "PLUMBLINE_ERROR_BACKOFF_SECONDS": "0.1",
            "PLUMBLINE_ERROR_BACKOFF_CAP_SECONDS": "2",
            "PLUMBLINE_RETRY_BACKOFF_SECONDS": "0.2",
            "PLUMBLINE_RETRY_BACKOFF_CAP_SECONDS": "0.5",
            "PLUMBLINE_WAITING_POLL_SECONDS": "1",
            "PLUMBLINE_REFUSED_POLL_SECONDS": "2",
            **{f"PLUMBLINE_{name}_PORT": str(port) for name, port in self.ports.items()},
            **self.environment,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "plumbline_operator"], env=environment, stdout=log, stderr=log, cwd=self.folder
            )

    async def ready(self, seconds: float = 60.0) -> None:
        await asyncio.to_thread(self.wait_until_ready, seconds)

    def wait_until_ready(self, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not self._answers("HEALTH", "/readyz"):
            assert self.process is not None
            code = self.process.poll()
            assert code is None, f"the operator ended with {code}:\n{self.tail()}"
            assert time.monotonic() < deadline, f"the operator is not ready within {seconds} s:\n{self.tail()}"
            time.sleep(0.05)

    def _answers(self, port: str, path: str) -> bytes | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[port]}{path}", timeout=5) as reply:
                return bytes(reply.read()) or b"ok"
        except OSError:  # urllib's errors are
            return None

    async def metric(self, name: str, **labels: str) -> float:
        """The value of a metric."""
        from prometheus_client.parser import text_string_to_metric_families

        text = await asyncio.to_thread(self._answers, "METRICS", "/metrics")
        assert text is not None, self.tail()
        for family in text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """SIGTERM, as the cluster does; returns the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"the operator did not end on SIGTERM:\n{self.tail()}") from None
        return int(self.process.returncode)

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def defects(self) -> list[str]:
        """Lines of the log that say that something is wrong with the operator itself."""
        words = ("defect of the operator", "Traceback", "forbidden", "Unclosed", "was never awaited")
        return [line for line in self.log.read_text().splitlines() if any(word in line for word in words)]


def condition(pipeline: dict[str, Any], type_: str) -> dict[str, Any]:
    """A condition of a pipeline object; empty where it has none."""
    found = (pipeline.get("status") or {}).get("conditions") or []
    return next((item for item in found if item["type"] == type_), {})
