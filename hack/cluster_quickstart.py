"""`make cluster-quickstart`: the quickstart pipeline on a throw-away cluster, by Helm and kubectl as on any other.

The pipeline is examples/01-quickstart/pipeline.yaml; only where its data and results lie differs.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from cluster.errors import ClusterFailedError, ClusterUnavailableError
from cluster.lifecycle import bring_up, environment
from cluster.objectstore import ObjectStore
from cluster.state import ClusterState

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "01-quickstart"
STATE = ROOT / ".cluster"
NAMESPACE = "quickstart"
PLUMBLINE = [sys.executable, "-m", "plumbline_cli.main"]


def main() -> int:
    """Bring the cluster up, install, apply, wait, and show what a user would look at."""
    try:
        state = bring_up(STATE)
    except (ClusterUnavailableError, ClusterFailedError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    shell = Shell({**os.environ, **environment(state)})
    store = ObjectStore(**state.object_store)
    install(shell, state, store)
    manifest = write_manifest(store)
    name = manifest["metadata"]["name"]
    shell.run("kubectl", "apply", "-n", NAMESPACE, "-f", str(STATE / "pipeline.yaml"))
    finished = shell.run(*PLUMBLINE, "wait", name, "-n", NAMESPACE, "--timeout", "30m", check=False)
    shell.run("kubectl", "get", "alp", "-n", NAMESPACE)
    shell.run(
        "kubectl",
        "get",
        "events",
        "-n",
        NAMESPACE,
        "--sort-by=.lastTimestamp",
        "--field-selector",
        f"involvedObject.name={name}",
    )
    shell.run(*PLUMBLINE, "status", name, "-n", NAMESPACE, check=False)
    if finished != 0:
        shell.run(*PLUMBLINE, "logs", name, "-n", NAMESPACE, check=False)
        return finished
    copy_report(store, manifest, shell)
    sys.stdout.write(
        f'\nTo look around:   eval "$(PYTHONPATH=tests {sys.executable} -m cluster env)"\n'
        f"                  kubectl get alp -n {NAMESPACE} -w\n"
        "To remove it all: make cluster-down\n"
    )
    return 0


class Shell:
    """Runs commands in the cluster's environment and shows each, so that a reader can do the same by hand."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._variables = variables

    def run(self, *command: str, check: bool = True, stdin: str | None = None) -> int:
        """Run and show a command; its exit code."""
        shown = ["plumbline", *command[len(PLUMBLINE) :]] if list(command[: len(PLUMBLINE)]) == PLUMBLINE else command
        sys.stdout.write(f"\n$ {shlex.join(shown)}\n")
        sys.stdout.flush()
        code = subprocess.run(command, env=self._variables, cwd=ROOT, input=stdin, text=True, check=False).returncode
        if check and code != 0:
            raise SystemExit(code)
        return code

    def output(self, *command: str) -> str:
        """What a command prints."""
        return subprocess.run(command, env=self._variables, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def install(shell: Shell, state: ClusterState, store: ObjectStore) -> None:
    """Helm release, the tenant's namespace and the Secret with its storage credentials."""
    values = {
        "operator": {"image": _image(state.images["operator"])},
        "runtime": {
            "image": _image(state.images["trainer"]),
            "spec": {
                "classes": {
                    "train": {"cpu": "1", "memory": "8Gi", "ephemeralStorage": "10Gi"},
                    "generate": {"cpu": "1", "memory": "8Gi", "ephemeralStorage": "10Gi"},
                    "cpu": {"cpu": "500m", "memory": "6Gi", "ephemeralStorage": "10Gi"},
                }
            },
        },
    }
    path = STATE / "values.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    shell.run(
        "helm", "upgrade", "--install", "plumbline", "charts/plumbline", "--namespace", "plumbline-system",
        "--create-namespace", "--values", str(path), "--wait", "--timeout", "5m",
    )  # fmt: skip
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
    }
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s3-credentials", "namespace": NAMESPACE},
        "stringData": {"AWS_ACCESS_KEY_ID": store.access_key, "AWS_SECRET_ACCESS_KEY": store.secret_key},
    }
    shell.run("kubectl", "apply", "-f", "-", stdin=yaml.safe_dump_all([namespace, secret]))


def write_manifest(store: ObjectStore) -> dict[str, Any]:
    """The example with its data in the bucket; the files are uploaded."""
    manifest: dict[str, Any] = yaml.safe_load((EXAMPLE / "pipeline.yaml").read_text(encoding="utf-8"))
    client = store.client()
    for dataset in manifest["spec"].get("datasets", []):
        source = dataset["source"]
        client.upload_file(str(EXAMPLE / source), store.bucket, f"quickstart/{source}")
        dataset["source"] = f"s3://{store.bucket}/quickstart/{source}"
    manifest["spec"]["storage"] = {
        "uri": f"s3://{store.bucket}/alignment",
        "endpoint": store.endpoint,
        "region": store.region,
        "secretName": "s3-credentials",
    }
    (STATE / "pipeline.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False), encoding="utf-8")
    return manifest


def copy_report(store: ObjectStore, manifest: dict[str, Any], shell: Shell) -> None:
    """Bring the report from the bucket, because a browser cannot open s3://."""
    name = manifest["metadata"]["name"]
    uri = shell.output("kubectl", "get", "alp", name, "-n", NAMESPACE, "-o", "jsonpath={.status.report}")
    key = uri.removeprefix(f"s3://{store.bucket}/")
    target = STATE / "report.html"
    store.client().download_file(store.bucket, key, str(target))
    sys.stdout.write(f"\nReport: {target} (from {uri})\n")


def _image(reference: str) -> dict[str, str]:
    repository, _, tag = reference.rpartition(":")
    return {"repository": repository, "tag": tag, "pullPolicy": "IfNotPresent"}


if __name__ == "__main__":
    sys.exit(main())
