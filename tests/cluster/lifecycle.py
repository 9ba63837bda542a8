"""Bringing the cluster up, down and describing it; every step is recorded before the next, so that an aborted `up` can be taken down."""

import os
import shlex
from pathlib import Path

from cluster.binaries import find_program
from cluster.controlplane import start_control_plane
from cluster.errors import ClusterFailedError
from cluster.imageload import load_images
from cluster.kind import kind_is_usable, start_kind, stop_kind
from cluster.network import BRIDGE, bridge_exists, create_network, remove_network
from cluster.node import start_node
from cluster.objectstore import ObjectStore, start_object_store
from cluster.packages import NODE_PACKAGES, ensure_packages, ensure_root
from cluster.places import (
    CACHE_VARIABLE,
    STATE_VARIABLE,
    cache_root,
    load_owner,
    locked,
    remove_owner,
    sessions_root,
    write_owner,
)
from cluster.state import ClusterState, ProcessRecord, load_state
from cluster.teardown import remove_node, remove_state_folder

CONTROL_PLANE = "control-plane"
NODE = "node"
KIND = "kind"


def bring_up(
    folder: Path,
    control_plane_only: bool = False,
    images: str = "all",
    own: bool = False,
    keeper: ProcessRecord | None = None,
) -> ClusterState:
    """Start a cluster in a state folder, or what is missing of the one there. A second call changes nothing.

    `images` is none, operator or all. With a `keeper` the cluster may be taken down by anybody once that process is gone. Raises ClusterUnavailableError with the remedy where this machine cannot run it.
    """
    state = load_state(folder)
    kind = CONTROL_PLANE if control_plane_only else KIND if not own and kind_is_usable() else NODE
    if state is not None and state.kind != kind and not (state.kind in (NODE, KIND) and control_plane_only):
        raise ClusterFailedError(
            f"{folder} holds a cluster of kind {state.kind!r}, wanted is {kind!r}: run `python -m cluster --state {folder} down` first"
        )
    if state is None:
        state = ClusterState(folder=folder, kind=kind, keeper=keeper)
    if state.kind == CONTROL_PLANE:
        _ensure_control_plane(state, "127.0.0.1")
        return state
    if control_plane_only:
        return state
    if state.kind == KIND:
        start_kind(state, images)
        return state
    _ensure_node(state)
    start_object_store(state, state.network["address"])
    if images != "none":
        load_images(state, images)
    return state


def _ensure_control_plane(state: ClusterState, address: str) -> None:
    names = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
    alive = [name for name in names if state.process(name)]
    if len(alive) == len(names):
        return
    if state.processes and len(alive) < len(names):
        raise ClusterFailedError(
            f"{', '.join(set(names) - set(alive))} of the cluster in {state.folder} no longer run:"
            f" `python -m cluster --state {state.folder} down`, then up again"
        )
    start_control_plane(state, address)


def _ensure_node(state: ClusterState) -> None:
    ensure_root("a node of our own")
    ensure_packages(NODE_PACKAGES)
    for name in ("kubernetes", "etcd", "coredns", "versitygw", "helm"):
        find_program(name)
    with locked(cache_root() / "node.lock"):
        owner = load_owner()
        if owner and (holder := load_state(owner)) and holder.abandoned():
            bring_down(owner)
            owner = None
        if owner not in (None, state.folder) and load_state(owner) is not None:
            raise ClusterFailedError(
                f"this machine's one node belongs to the cluster in {owner}: `python -m cluster --state {owner} down` first,"
                f" or use it: export {STATE_VARIABLE}={owner}"
            )
        if owner != state.folder and bridge_exists():
            raise ClusterFailedError(
                f"a network device {BRIDGE} that no recorded cluster owns is in the way: `ip link delete {BRIDGE}`"
            )
        write_owner(state.folder)
    address = create_network(state)
    _ensure_control_plane(state, address)
    start_node(state)


def bring_down(folder: Path) -> None:
    """Stop every recorded process, undo the network and mounts, remove the state folder. Nothing to do is fine."""
    state = load_state(folder)
    if state is None:
        if folder.exists() and (folder / "logs").exists():
            remove_state_folder(folder)
        return
    if state.kind == KIND:
        stop_kind(state)
    else:
        if state.kind == NODE:
            remove_node(state)
        state.stop(grace_seconds=1.0)
        if state.kind == NODE:
            remove_network(state)
    remove_state_folder(folder)
    if load_owner() == folder:
        remove_owner()


def remove_abandoned() -> None:
    """Take down the clusters of test sessions that died without doing so."""
    for file in sessions_root().glob("*/state.json"):
        state = load_state(file.parent)
        if state and state.abandoned():
            bring_down(state.folder)


def environment(state: ClusterState) -> dict[str, str]:
    """Variables that make kubectl, boto3 and the tests use this cluster."""
    programs = [str(find_program(name).parent) for name in ("kubectl", "helm")] if state.kind != CONTROL_PLANE else []
    variables = {"KUBECONFIG": str(state.kubeconfig), STATE_VARIABLE: str(state.folder)}
    if state.object_store:
        variables |= ObjectStore(**state.object_store).environment()
    if CACHE_VARIABLE in os.environ:
        variables[CACHE_VARIABLE] = os.environ[CACHE_VARIABLE]
    if programs:
        variables["PATH"] = os.pathsep.join([*programs, os.environ.get("PATH", "")])
    return variables


def require_state(folder: Path) -> ClusterState:
    state = load_state(folder)
    if state is None:
        raise ClusterFailedError(f"no cluster in {folder}: start one with `python -m cluster up`")
    return state


def describe_environment(folder: Path) -> str:
    return "\n".join(
        f"export {name}={shlex.quote(value)}" for name, value in environment(require_state(folder)).items()
    )


def describe_status(folder: Path) -> tuple[str, bool]:
    """A few lines for people, and whether every recorded part runs."""
    state = load_state(folder)
    if state is None:
        return f"no cluster in {folder}", False
    lines = [f"cluster      {state.kind}, API server {state.server}", f"kubeconfig   {state.kubeconfig}"]
    lines += [
        f"{record.name:<24} {'running' if record.process() else 'DEAD'}  pid {record.pid}" for record in state.processes
    ]
    if state.object_store:
        lines.append(
            f"S3           {state.object_store['endpoint']} bucket {state.object_store['bucket']} (keys: python -m cluster env)"
        )
    lines += [f"image        {reference}" for reference in state.images.values()]
    return "\n".join(lines), not state.dead()
