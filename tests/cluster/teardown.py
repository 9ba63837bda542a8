"""Taking the node away: containers, their shims, mounts, control groups and folders, and nothing that is not ours."""

import contextlib
import os
import shutil
from pathlib import Path

import psutil

from cluster.errors import ClusterFailedError
from cluster.network import run_tool
from cluster.node import containerd_client, run_folder
from cluster.state import ClusterState, stop_processes


def remove_node(state: ClusterState) -> None:
    """Stop kubelet, proxy and DNS, then every container, then containerd, and undo their traces on the machine."""
    state.stop("kubelet", "kube-proxy", "coredns")
    if state.process("containerd"):
        remove_containers(state)
        state.stop("containerd", grace_seconds=1.0)
    stop_shims(state)
    unmount_below(state.folder)
    unmount_below(run_folder(state))
    remove_control_groups()
    remove_log_links(state)
    run = run_folder(state)
    if run.exists():
        shutil.rmtree(run)


def remove_containers(state: ClusterState) -> None:
    """Kill and delete every task and container of Kubernetes' namespace in our containerd."""
    for task in containerd_client(state, "tasks", "list", "--quiet", check=False).split():
        containerd_client(state, "tasks", "delete", "--force", task, check=False)
    for container in containerd_client(state, "containers", "list", "--quiet", check=False).split():
        containerd_client(state, "containers", "delete", container, check=False)


def stop_shims(state: ClusterState) -> None:
    """End shims that outlived their task; they are known by our containerd's socket in their command line."""
    socket = str(run_folder(state) / "containerd.sock")
    shims = []
    for process in psutil.process_iter(["cmdline", "name"]):
        command = process.info["cmdline"] or []
        if command and Path(command[0]).name.startswith("containerd-shim") and socket in command:
            shims.append(process)
    stop_processes(shims, 5.0)


def mounts_below(folder: Path, table: str) -> list[str]:
    """Mount points at or under a folder, deepest first, from the text of /proc/self/mounts."""
    points = [line.split()[1].encode().decode("unicode_escape") for line in table.splitlines() if line]
    prefix = str(folder)
    return sorted((p for p in points if p == prefix or p.startswith(prefix + "/")), key=len, reverse=True)


def unmount_below(folder: Path) -> None:
    if not Path("/proc/self/mounts").exists():
        return
    for point in mounts_below(folder, Path("/proc/self/mounts").read_text()):
        run_tool("umount", point, check=False)
    for point in mounts_below(folder, Path("/proc/self/mounts").read_text()):
        run_tool("umount", "--lazy", point)


def remove_control_groups() -> None:
    """Remove the kubelet's now empty control groups, version 1 and 2; a group in use refuses and stays."""
    for root in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/")):
        group = root / "kubepods"
        if not group.is_dir():
            continue
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()


def remove_log_links(state: ClusterState) -> None:
    """The kubelet links every container's log from /var/log/containers; remove the links into our folder."""
    folder = Path("/var/log/containers")
    if not folder.is_dir():
        return
    for link in folder.iterdir():
        if link.is_symlink() and str(link.readlink()).startswith(str(state.folder) + "/"):
            link.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def remove_state_folder(folder: Path) -> None:
    """Delete the state folder; refuses while anything is mounted below it, which deletion would reach into."""
    mounts = Path("/proc/self/mounts")
    if mounts.exists() and (still := mounts_below(folder, mounts.read_text())):
        raise ClusterFailedError(f"still mounted: {', '.join(still)}; unmount and call down again")
    shutil.rmtree(folder, ignore_errors=False)
