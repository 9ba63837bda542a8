"""Programs of the operating system that the node needs; on Debian, as root, they are installed."""

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from cluster.errors import ClusterFailedError, ClusterUnavailableError

# Debian package -> a file that it puts there. Programs are looked up by name, so that another distribution's own will do.
NODE_PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "nftables": "nft",
    "iproute2": "ip",
    "mount": "umount",
    "busybox-static": "busybox",
}
IMAGE_PACKAGES = {"buildah": "buildah", "debootstrap": "debootstrap", "skopeo": "skopeo"}


def find_program_of_system(name: str) -> str | None:
    """Absolute path of a program on PATH or in the sbin folders, which an ordinary PATH lacks; a path is only checked."""
    if name.startswith("/"):
        return name if Path(name).exists() else None
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin")


def missing_packages(packages: dict[str, str]) -> list[str]:
    """Names of the packages whose file is not there."""
    return [package for package, provided in packages.items() if find_program_of_system(provided) is None]


def ensure_root(purpose: str) -> None:
    """Raise unless we are root on Linux, which namespaces, mounts and the bridge need."""
    if os.uname().sysname != "Linux":
        raise ClusterUnavailableError(
            f"{purpose} needs Linux", "use a machine with Linux, or start Docker so that kind can be used"
        )
    if os.geteuid() != 0:
        raise ClusterUnavailableError(
            f"{purpose} needs root (namespaces, mounts, a network bridge)",
            "run as root, or start Docker or Podman so that kind can be used",
        )


def ensure_packages(packages: dict[str, str]) -> None:
    """Install what is missing with apt; elsewhere, or where apt fails, raise with the list of what is missing."""
    missing = missing_packages(packages)
    if not missing:
        return
    wanted = ", ".join(missing)
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        raise ClusterUnavailableError(
            f"missing: {wanted}",
            f"install these with your package manager (Debian: apt-get install {' '.join(missing)})",
        )
    _run_apt([apt, "update"])
    # containerd and runc must not start a service of their own: policy-rc.d is the documented way to say so.
    _run_apt([apt, "install", "--yes", "--no-install-recommends", *missing], {"RUNLEVEL": "1"})
    still = missing_packages(packages)
    if still:
        raise ClusterFailedError(f"apt-get installed {wanted}, yet these are still not found: {', '.join(still)}")


def _run_apt(command: Iterable[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        list(command),
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", **(environment or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ClusterUnavailableError(
            f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}",
            "make Debian's package archive reachable, or install the packages by hand",
        )
