"""Builds the programs of the test cluster from Go modules, once per machine.

Outputs and Go's own caches lie under the cache folder, keyed by a hash of the sources, the module sums and the Go version. On 2 cores
the first build of everything takes about 10 minutes (Kubernetes 8, the S3 server 1), a later call milliseconds.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ClusterFailedError, ClusterUnavailableError
from cluster.places import SOURCES, cache_root, content_key, locked

KUBERNETES_PARTS = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
    "kubectl",
)


@dataclass(frozen=True)
class Program:
    """One `go build`: the folder that holds go.mod, the package to build and the names under which it is called."""

    name: str
    module: Path
    package: str
    links: tuple[str, ...] = ()

    def sources(self) -> list[Path]:
        """Files that decide the output; go.sum fixes every dependency."""
        found = [self.module / "go.mod", self.module / "go.sum"]
        if self.package.startswith("."):
            found += (self.module / self.package).glob("*.go")
        return found


PROGRAMS = {
    program.name: program
    for program in (
        Program("kubernetes", SOURCES, "./cmd/kubernetes", KUBERNETES_PARTS),
        Program("etcd", SOURCES, "./cmd/etcd"),
        Program("coredns", SOURCES, "./cmd/coredns"),
        Program("helm", SOURCES, "helm.sh/helm/v3/cmd/helm"),
        Program("versitygw", SOURCES / "cmd/versitygw", "github.com/versity/versitygw/cmd/versitygw"),
    )
}


def kubernetes_version() -> str:
    """Version of Kubernetes that go.mod pins, such as v1.34.4; the build stamps it into the binary."""
    for line in (SOURCES / "go.mod").read_text().splitlines():
        words = line.removeprefix("require").split()
        if words[:1] == ["k8s.io/kubernetes"]:
            return words[1]
    raise ValueError("tests/cluster/go.mod requires no k8s.io/kubernetes")


def linker_flags(program: Program) -> str:
    """Strip symbols; tell Kubernetes its version, which its build scripts otherwise inject."""
    if program.name != "kubernetes":
        return "-s -w"
    version = kubernetes_version()
    major, minor, _ = version.removeprefix("v").split(".", 2)
    package = "k8s.io/component-base/version"
    return (
        f"-s -w -X {package}.gitVersion={version} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
        f" -X {package}.gitTreeState=clean -X {package}.gitCommit=0000000000000000000000000000000000000000"
    )


def go_environment() -> dict[str, str]:
    """Environment of a build: no cgo (static binaries), caches under our cache folder, modules that can be deleted again."""
    cache = cache_root()
    return {
        **os.environ,
        "CGO_ENABLED": "0",
        "GOCACHE": str(cache / "go-build"),
        "GOMODCACHE": str(cache / "go-mod"),
        "GOFLAGS": "-modcacherw -buildvcs=false",
        "GOWORK": "off",
    }


def find_program(name: str) -> Path:
    """Path of a program of `PROGRAMS`, or of one of its links, built first if the cache lacks it.

    Raises ClusterUnavailableError without a Go toolchain and ClusterFailedError when the build fails.
    """
    program = next((p for p in PROGRAMS.values() if name == p.name or name in p.links), None)
    if program is None:
        raise KeyError(f"no program called {name}; known: {', '.join(sorted(PROGRAMS))}")
    return build_program(program) / name


def build_program(program: Program) -> Path:
    """Folder that holds the built program and its links."""
    go = shutil.which("go")
    if go is None:
        raise ClusterUnavailableError(
            f"the Go toolchain that builds {program.name} is not on PATH",
            "install Go 1.21 or newer (it fetches the release that the modules ask for) and put it on PATH",
        )
    version = subprocess.run([go, "env", "GOVERSION", "GOOS", "GOARCH"], capture_output=True, text=True, check=True)
    found = re.match(r"go1\.(\d+)", version.stdout)
    if found and int(found[1]) < 21:
        raise ClusterUnavailableError(
            f"{go} is {version.stdout.split()[0]}, too old to build {program.name}", "install Go 1.21 or newer"
        )
    flags = linker_flags(program)
    key = content_key([version.stdout, flags, program.package, *program.links], program.sources())
    folder = cache_root() / "bin" / f"{program.name}-{key}"
    if (folder / program.name).exists():
        return folder
    with locked(cache_root() / "bin" / f"{program.name}.lock"):
        if (folder / program.name).exists():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".{program.name}.unfinished"
        command = [go, "build", "-trimpath", "-ldflags", flags, "-o", str(unfinished), program.package]
        nice = shutil.which("nice")
        built = subprocess.run(
            [nice, "-n", "10", *command] if nice else command,
            cwd=program.module,
            env=go_environment(),
            capture_output=True,
            text=True,
        )
        if built.returncode:
            raise ClusterFailedError(
                f"building {program.name} failed: cd {program.module} && {' '.join(command)}\n{built.stderr[-4000:]}"
            )
        for link in program.links:
            path = folder / link
            path.unlink(missing_ok=True)
            path.symlink_to(program.name)
        unfinished.rename(folder / program.name)
    return folder
