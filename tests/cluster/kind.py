"""The same cluster through kind, on machines where Docker or Podman answers: node, CNI and DNS are then kind's own.

Written after kind's documentation; the machine on which the rest is tested has no container engine.
"""

import ipaddress
import json
import os
import shutil
import subprocess
from pathlib import Path

import yaml

from cluster.binaries import kubernetes_version
from cluster.busybox import write_busybox_archive
from cluster.controlplane import audit_policy
from cluster.errors import ClusterFailedError, ClusterUnavailableError
from cluster.images import build_image, find_engine, run_engine
from cluster.objectstore import start_object_store
from cluster.packages import find_program_of_system
from cluster.state import ClusterState

CLUSTER_NAME = "plumbline-test"
BUSYBOX_IMAGE = "localhost/plumbline-busybox:test"


def kind_is_usable() -> bool:
    """Whether kind and a container engine that answers are there."""
    return shutil.which("kind") is not None and find_engine() is not None


def kind_configuration(state_folder: Path, version: str) -> dict[str, object]:
    """One node with our audit policy; the log appears in the state folder as with our own control plane."""
    patch = {
        "kind": "ClusterConfiguration",
        "apiServer": {
            "extraArgs": {
                "audit-policy-file": "/etc/kubernetes/audit/policy.yaml",
                "audit-log-path": "/var/log/kubernetes/audit.log",
                "audit-log-maxsize": "4096",
            },
            "extraVolumes": [
                {"name": "policy", "hostPath": "/etc/kubernetes/audit", "mountPath": "/etc/kubernetes/audit", "readOnly": True},
                {"name": "log", "hostPath": "/var/log/kubernetes", "mountPath": "/var/log/kubernetes", "pathType": "DirectoryOrCreate"},
            ],
        },
    }  # fmt: skip
    return {
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "name": CLUSTER_NAME,
        "nodes": [
            {
                "role": "control-plane",
                "image": f"kindest/node:{version.rsplit('.', 1)[0]}.0",
                "kubeadmConfigPatches": [yaml.safe_dump(patch)],
                "extraMounts": [
                    {"hostPath": str(state_folder / "audit"), "containerPath": "/etc/kubernetes/audit"},
                    {"hostPath": str(state_folder / "logs"), "containerPath": "/var/log/kubernetes"},
                ],
            }
        ],
    }


def engine_variables(engine: str) -> dict[str, str]:
    return {**os.environ, **({"KIND_EXPERIMENTAL_PROVIDER": "podman"} if engine == "podman" else {})}


def start_kind(state: ClusterState, images: str) -> None:
    """Create the cluster unless it runs, start S3 on the engine's bridge, build and load the images."""
    engine = find_engine()
    if engine is None:
        raise ClusterUnavailableError("no container engine answers", "start Docker or Podman")
    state.folder.mkdir(parents=True, exist_ok=True)
    if CLUSTER_NAME not in _kind(engine, "get", "clusters").split():
        for name in ("audit", "logs"):
            (state.folder / name).mkdir(exist_ok=True)
        (state.folder / "audit" / "policy.yaml").write_text(yaml.safe_dump(audit_policy(), sort_keys=False))
        configuration = state.folder / "kind.yaml"
        configuration.write_text(yaml.safe_dump(kind_configuration(state.folder, kubernetes_version())))
        state.save()
        _kind(
            engine, "create", "cluster", f"--config={configuration}", f"--kubeconfig={state.kubeconfig}", "--wait=180s"
        )
    state.server = yaml.safe_load(state.kubeconfig.read_text())["clusters"][0]["cluster"]["server"]
    state.save()
    start_object_store(state, engine_address(engine))
    if find_program_of_system("busybox") and "busybox" not in state.images:
        archive = state.folder / "busybox.tar"
        write_busybox_archive(archive, BUSYBOX_IMAGE)
        _kind(engine, "load", "image-archive", str(archive), f"--name={CLUSTER_NAME}")
        state.images["busybox"] = BUSYBOX_IMAGE
    wanted = {"none": (), "operator": ("operator",), "all": ("operator", "trainer")}[images]
    for name in wanted:
        reference = build_image(name, engine)
        if state.images.get(name) != reference:
            archive = state.folder / f"{name}.tar"
            run_engine(engine, "save", "--output", str(archive), reference)
            _kind(engine, "load", "image-archive", str(archive), f"--name={CLUSTER_NAME}")
            archive.unlink()
            state.images[name] = reference
    state.save()


def stop_kind(state: ClusterState) -> None:
    """Delete the kind cluster and stop the S3 server."""
    engine = find_engine()
    if engine is not None:
        _kind(engine, "delete", "cluster", f"--name={CLUSTER_NAME}")
    state.stop()


def engine_address(engine: str) -> str:
    """The host's address on kind's network, which both the host and pods can reach."""
    done = subprocess.run([engine, "network", "inspect", "kind"], capture_output=True, text=True)
    if done.returncode:
        raise ClusterFailedError(f"{engine} network inspect kind: {done.stderr.strip()}")
    return gateway_of_network(json.loads(done.stdout)[0])


def gateway_of_network(network: dict[str, object]) -> str:
    """IPv4 gateway in the output of `docker network inspect` (IPAM.Config) or `podman network inspect` (subnets)."""
    ipam = network.get("IPAM")
    entries = ipam.get("Config", []) if isinstance(ipam, dict) else network.get("subnets", [])
    assert isinstance(entries, list)
    for entry in entries:
        gateway = entry.get("Gateway") or entry.get("gateway")
        if gateway and ipaddress.ip_address(gateway).version == 4:
            return str(gateway)
    raise ClusterFailedError("kind's network has no IPv4 gateway, on which the S3 server would listen")


def _kind(engine: str, *arguments: str) -> str:
    done = subprocess.run(["kind", *arguments], capture_output=True, text=True, env=engine_variables(engine))
    if done.returncode:
        raise ClusterFailedError(f"kind {' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
    return done.stdout
