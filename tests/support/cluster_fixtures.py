"""Fixtures around a real Kubernetes.

`control_plane`: API server and controllers (seconds, no root). `namespace`: one per test. `object_store`: a real S3 server on loopback.
`real_node`: a node that runs pods, with S3 beside it. `real_cluster`: the same with our images loaded and Helm.
PLUMBLINE_CLUSTER_STATE names the state folder of a running cluster to use instead; it is then left running.
"""

import json
import os
import re
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from cluster.binaries import find_program
from cluster.certificates import Authority, write_kubeconfig
from cluster.errors import ClusterUnavailableError
from cluster.lifecycle import bring_down, bring_up, remove_abandoned
from cluster.objectstore import ObjectStore, start_object_store
from cluster.places import STATE_VARIABLE, sessions_root
from cluster.state import ClusterState, load_state, record_of_this_process

NAMESPACE_EMPTY_SECONDS = 90.0
FINALIZER_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class ControlPlane:
    """A running API server and how to reach it as its administrator."""

    state: ClusterState

    @property
    def server(self) -> str:
        return self.state.server

    @property
    def kubeconfig(self) -> Path:
        return self.state.kubeconfig

    @property
    def audit_log(self) -> Path:
        return self.state.audit_log

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True, timeout: float = 120) -> str:
        """Run kubectl as administrator and return its output; with `check` a failure raises with kubectl's words."""
        return _run(
            [str(find_program("kubectl")), f"--kubeconfig={self.kubeconfig}", *arguments], stdin, check, timeout
        )

    def get(self, *arguments: str) -> Any:
        """`kubectl get … -o json`, decoded."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def read(self, path: str, **query: str) -> Any:
        """GET of a path of the API, decoded: for what is polled, as every kubectl is a process of its own."""
        client = self._client
        response = client.call_api(
            *client.param_serialize(
                "GET",
                path,
                query_params=list(query.items()),
                header_params={"Accept": "application/json"},
                auth_settings=["BearerToken"],
            )
        )
        text = response.read()
        assert response.status == 200, f"GET {path}: {response.status} {text.decode(errors='replace')}"
        return json.loads(text)

    @cached_property
    def _client(self) -> Any:
        return self.api_client()

    def apply(self, *documents: dict[str, Any], namespace: str | None = None) -> None:
        """Server-side apply of manifests."""
        scope = [f"--namespace={namespace}"] if namespace else []
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(documents)})
        self.kubectl("apply", "--server-side", *scope, "-f", "-", stdin=text)

    def api_client(self) -> Any:
        """A new `kubernetes.client.ApiClient` as administrator."""
        from kubernetes import config

        return config.new_client_from_config(str(self.kubeconfig))

    def kubeconfig_for(self, path: Path, user: str, groups: tuple[str, ...] = ()) -> Path:
        """Write a kubeconfig of another user (a client certificate), for tests of rights and for telling writers apart in the audit log."""
        if self.state.kind == "kind":
            pytest.skip(
                "kind keeps its authority's key inside the node: start our own control plane (`cluster up --own`)"
            )
        authority = Authority(self.state.folder / "certificates")
        client = authority.issue(f"user-{secrets.token_hex(4)}", user, groups)
        return write_kubeconfig(path, self.server, authority.pair, client)


@dataclass(frozen=True)
class RealCluster(ControlPlane):
    """A control plane with a node; `object_store.endpoint` is good for pods and for the host."""

    @property
    def object_store(self) -> ObjectStore:
        return ObjectStore(**self.state.object_store)

    @property
    def operator_image(self) -> str:
        return self.state.images["operator"]

    @property
    def trainer_image(self) -> str:
        return self.state.images["trainer"]

    @property
    def busybox_image(self) -> str:
        return self.state.images["busybox"]

    def set_capacity(self, resource: str, count: int) -> None:
        """Give the node an extended resource such as nvidia.com/gpu: scheduling and quotas are then real, the device is not."""
        patch = json.dumps({"status": {"capacity": {resource: str(count)}}})
        for node in self.get("nodes")["items"]:
            self.kubectl("patch", "node", node["metadata"]["name"], "--subresource=status", "--type=merge", "-p", patch)

    def helm(self, *arguments: str, check: bool = True, timeout: float = 300) -> str:
        """Run helm as administrator and return its output."""
        return _run([str(find_program("helm")), f"--kubeconfig={self.kubeconfig}", *arguments], None, check, timeout)


def _run(command: list[str], stdin: str | None, check: bool, timeout: float) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout if check else done.stdout + done.stderr


def _running_state() -> ClusterState | None:
    """The cluster that the environment names, if it does; a named one that is not there is an error, not a skip."""
    named = os.environ.get(STATE_VARIABLE)
    if not named:
        return None
    state = load_state(Path(named).expanduser().resolve())
    if state is None or state.dead():
        pytest.fail(f"{STATE_VARIABLE}={named} names no running cluster: unset it or run `python -m cluster up`")
    return state


def _session_folder(name: str) -> Path:
    """State folder of a cluster that lives as long as this session; those of sessions that died are taken down first."""
    remove_abandoned()
    return sessions_root() / f"{name}-{os.getpid()}-{secrets.token_hex(3)}"


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """API server and controllers for the whole session; each xdist worker has its own."""
    if state := _running_state():
        yield ControlPlane(state)
        return
    folder = _session_folder("control-plane")
    try:
        state = bring_up(folder, control_plane_only=True, keeper=record_of_this_process("pytest"))
        yield ControlPlane(state)
    except ClusterUnavailableError as error:
        pytest.skip(str(error))
    finally:
        bring_down(folder)


def _real(images: str) -> Iterator[RealCluster]:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        pytest.fail("tests on the real node share one machine-wide node: run them without `-n`")
    if state := _running_state():
        if state.kind == "control-plane":
            pytest.fail(f"{STATE_VARIABLE} names a cluster without a node: start one with `python -m cluster up`")
        yield RealCluster(bring_up(state.folder, images=images, own=state.kind != "kind"))
        return
    folder = _session_folder("real-cluster")
    try:
        yield RealCluster(bring_up(folder, images=images, keeper=record_of_this_process("pytest")))
    except ClusterUnavailableError as error:
        pytest.skip(str(error))
    finally:
        bring_down(folder)


@pytest.fixture(scope="session")
def real_node() -> Iterator[RealCluster]:
    """A cluster that runs pods, with a busybox image and S3; our own images may or may not be there."""
    yield from _real("none")


@pytest.fixture(scope="session")
def real_cluster(real_node: RealCluster) -> RealCluster:
    """The node with the operator's and the trainer's image loaded."""
    try:
        return RealCluster(bring_up(real_node.state.folder, images="all", own=real_node.state.kind != "kind"))
    except ClusterUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """A real S3 server with an empty bucket, on loopback."""
    keeper = record_of_this_process("pytest")
    state = ClusterState(_session_folder("object-store"), kind="object-store", keeper=keeper)
    try:
        yield start_object_store(state)
    except ClusterUnavailableError as error:
        pytest.skip(str(error))
    finally:
        bring_down(state.folder)


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of its own under the restricted pod security standard, on the cluster that the test uses; gone afterwards."""
    cluster: ControlPlane = request.getfixturevalue(
        next((name for name in ("real_cluster", "real_node") if name in request.fixturenames), "control_plane")
    )
    with fresh_namespace(cluster, request.node.name) as name:
        yield name


@contextmanager
def fresh_namespace(cluster: ControlPlane, label: str) -> Iterator[str]:
    """A namespace under the restricted pod security standard whose name begins like `label`; deleted at the end."""
    name = f"{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')[:40].rstrip('-')}-{secrets.token_hex(3)}"
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        }
    )
    try:
        yield name
    finally:
        delete_namespace(cluster, name)


def delete_namespace(cluster: ControlPlane, name: str) -> None:
    """Delete a namespace and wait until nothing in it can act on another test: no object of ours, no Job, no pod.

    The empty shell goes by itself (Kubernetes takes five seconds before it looks at a deleted namespace). Finalizers of our own objects
    that nobody is left to remove are stripped after a while.
    """
    cluster.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")
    ours = cluster.kubectl("api-resources", "--api-group=plumbline.dev", "--namespaced", "-o", "name").split()
    # Pods first: deleted by the garbage collector for their Job's sake they would get their full grace time. Nobody can make new
    # ones in a namespace that is being deleted.
    kinds = ",".join(["pods", "jobs.batch", *ours])
    cluster.kubectl("delete", kinds, "--all", "-n", name, "--grace-period=1", "--wait=false", check=False)
    begun = time.monotonic()
    while left := cluster.kubectl("get", kinds, "-n", name, "-o", "name", "--ignore-not-found").split():
        waited = time.monotonic() - begun
        assert waited < NAMESPACE_EMPTY_SECONDS, f"namespace {name} still holds {', '.join(left)}"
        if waited > FINALIZER_PATIENCE_SECONDS:
            for item in left:
                if not item.startswith("pod/"):
                    patch = '{"metadata":{"finalizers":null}}'
                    cluster.kubectl("patch", item, "-n", name, "--type=merge", "-p", patch, check=False)
