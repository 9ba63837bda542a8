"""The restricted pod security standard (Kubernetes 1.34), as a function of a pod's spec, so that tests need no cluster to check it."""

from collections.abc import Iterator
from typing import Any

ALLOWED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


def find_violations(pod: dict[str, Any]) -> list[str]:
    """What the restricted standard refuses in a pod spec; empty when it would be admitted."""
    found = [f"{field} is set" for field in ("hostNetwork", "hostPID", "hostIPC") if pod.get(field)]
    whole = pod.get("securityContext", {})
    if whole.get("sysctls"):
        found.append("sysctls are set")
    found += _find_context_violations("pod", whole)
    for volume in pod.get("volumes", []):
        if kinds := set(volume) - {"name"} - ALLOWED_VOLUMES:
            found.append(f"volume {volume['name']} is a {', '.join(sorted(kinds))}")
    for container in [*pod.get("initContainers", []), *pod.get("containers", [])]:
        found += _find_container_violations(container, whole)
    return found


def _find_container_violations(container: dict[str, Any], whole: dict[str, Any]) -> Iterator[str]:
    name, own = container["name"], container.get("securityContext", {})
    yield from _find_context_violations(name, own)
    if own.get("allowPrivilegeEscalation") is not False:
        yield f"{name}: allowPrivilegeEscalation is not false"
    if own.get("procMount", "Default") != "Default":
        yield f"{name}: procMount {own['procMount']}"
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []):
        yield f"{name}: capabilities do not drop ALL"
    if extra := set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield f"{name}: capabilities add {', '.join(sorted(extra))}"
    if own.get("runAsNonRoot", whole.get("runAsNonRoot")) is not True:
        yield f"{name}: runAsNonRoot is not true"
    if own.get("seccompProfile", whole.get("seccompProfile", {})).get("type") not in ("RuntimeDefault", "Localhost"):
        yield f"{name}: no seccomp profile"
    for port in container.get("ports", []):
        if port.get("hostPort"):
            yield f"{name}: hostPort {port['hostPort']}"
    for probe in PROBES:
        for action in ("httpGet", "tcpSocket"):
            if container.get(probe, {}).get(action, {}).get("host"):
                yield f"{name}: {probe} names a host"


def _find_context_violations(owner: str, context: dict[str, Any]) -> Iterator[str]:
    if context.get("privileged"):
        yield f"{owner}: privileged"
    if context.get("runAsUser") == 0:
        yield f"{owner}: runAsUser 0"
    if context.get("windowsOptions", {}).get("hostProcess"):
        yield f"{owner}: hostProcess"
    selinux = context.get("seLinuxOptions", {})
    if (
        selinux.get("user")
        or selinux.get("role")
        or selinux.get("type", "")
        not in ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
    ):
        yield f"{owner}: seLinuxOptions"
    if context.get("appArmorProfile", {}).get("type", "RuntimeDefault") not in ("RuntimeDefault", "Localhost"):
        yield f"{owner}: appArmorProfile"
