"""A team on the real cluster: its namespace, its credentials, its data in S3, and what it sees of its pipelines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.audit import count_creates, read_audit_log
from support.cluster_fixtures import RealCluster, fresh_namespace
from support.release import Release
from support.tinypipeline import Manifest, tiny_manifest, write_inputs

SECRET = "s3-credentials"
PATIENCE_SECONDS = 600.0
"""Longest wait for one thing; an idle machine needs seconds, a busy one minutes."""


@dataclass(frozen=True)
class Tenant:
    """A namespace with data and credentials."""

    release: Release
    namespace: str

    @property
    def cluster(self) -> RealCluster:
        return self.release.cluster

    # Storage.

    @property
    def prefix(self) -> str:
        """Where the inputs lie."""
        return f"s3://{self.cluster.object_store.bucket}/inputs/{self.namespace}"

    @property
    def storage(self) -> dict[str, str]:
        """spec.storage of the tenant's pipelines."""
        store = self.cluster.object_store
        return {
            "uri": f"s3://{store.bucket}/results",
            "endpoint": store.endpoint,
            "region": store.region,
            "secretName": SECRET,
        }

    def upload(self, folder: Path) -> None:
        """Put a folder's files under the prefix."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{self.prefix}/{path.relative_to(folder)}", path.read_bytes())

    def put(self, uri: str, data: bytes) -> None:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        self.cluster.object_store.client().put_object(Bucket=bucket, Key=key, Body=data)

    def read(self, uri: str) -> bytes:
        """An object's content; KeyError if it is not there."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        client = self.cluster.object_store.client()
        try:
            data: bytes = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        except client.exceptions.NoSuchKey:
            raise KeyError(uri) from None
        return data

    def objects(self, uri: str) -> list[str]:
        """URIs of all objects under a prefix."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        pages = self.cluster.object_store.client().get_paginator("list_objects_v2")
        return [
            f"s3://{bucket}/{item['Key']}"
            for page in pages.paginate(Bucket=bucket, Prefix=prefix)
            for item in page.get("Contents", [])
        ]

    def create_secret(self, name: str = SECRET, **keys: str) -> None:
        """The credentials of storage; `keys` replaces some."""
        store = self.cluster.object_store
        data = {"AWS_ACCESS_KEY_ID": store.access_key, "AWS_SECRET_ACCESS_KEY": store.secret_key, **keys}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data}
        self.cluster.apply(secret, namespace=self.namespace)

    # Pipelines.

    def manifest(self, name: str, **fields: Any) -> Manifest:
        """The tiny pipeline on this tenant's data and storage; fields as of `tiny_manifest`."""
        return tiny_manifest(name, self.prefix, **{"storage": self.storage, **fields})

    def run(self, manifest: Manifest) -> Run:
        """Apply a pipeline."""
        self.cluster.kubectl("apply", "-n", self.namespace, "-f", "-", stdin=json.dumps(manifest))
        return Run(self, manifest["metadata"]["name"])

    def creates(self, resource: str = "jobs") -> dict[str, int]:
        """How often objects of each name were created here, by the audit log."""
        return dict(count_creates(self.cluster.audit_log, resource, self.namespace))


@dataclass(frozen=True)
class Run:
    """A pipeline on the cluster."""

    tenant: Tenant
    name: str

    @property
    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = self.tenant.cluster.read(
            f"/apis/plumbline.dev/v1alpha1/namespaces/{self.tenant.namespace}/alignmentpipelines/{self.name}"
        )
        return found

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.body.get("status") or {}
        return found

    @property
    def uid(self) -> str:
        return str(self.body["metadata"]["uid"])

    def patch(self, **spec: Any) -> None:
        """Merge changes into the spec."""
        patch = json.dumps({"spec": spec})
        self.kubectl("patch", "alp", self.name, "--type=merge", "-p", patch)

    def kubectl(self, *arguments: str, **options: Any) -> str:
        """kubectl in the tenant's namespace."""
        return self.tenant.cluster.kubectl(f"--namespace={self.tenant.namespace}", *arguments, **options)

    # Waiting.

    def until(
        self, what: str, found: Callable[[dict[str, Any]], Any], seconds: float = PATIENCE_SECONDS, ended: bool = True
    ) -> Any:
        """Poll the status until `found(status)` is true and return that.

        With `ended` a run that ends without it fails at once.
        """
        deadline = time.monotonic() + seconds
        while True:
            status = self.status
            if value := found(status):
                return value
            over = ended and (is_ended(status) or status.get("phase") == "Refused")
            assert not over, f"{self.name} has ended without this: {what}\n{self.explain()}"
            assert time.monotonic() < deadline, f"{self.name}: {what}: not within {seconds:.0f} s\n{self.explain()}"
            time.sleep(0.2)

    def until_ended(self, seconds: float = 2 * PATIENCE_SECONDS) -> dict[str, Any]:
        """Wait for the end, report included, and return the status."""
        found: dict[str, Any] = self.until("it ends", lambda status: status if is_ended(status) else None, seconds)
        return found

    def until_succeeded(self, seconds: float = 2 * PATIENCE_SECONDS) -> dict[str, Any]:
        status = self.until_ended(seconds)
        assert status["phase"] == "Succeeded", self.explain()
        return status

    def until_failed(self, seconds: float = 2 * PATIENCE_SECONDS) -> dict[str, Any]:
        status = self.until_ended(seconds)
        assert status["phase"] == "Failed", self.explain()
        return status

    # What it did.

    def jobs(self, role: str = "stage") -> list[dict[str, Any]]:
        """Its Jobs of a role that are there."""
        return self._owned("/apis/batch/v1", "jobs", f"plumbline.dev/role={role}")

    def pods(self, stage: str) -> list[dict[str, Any]]:
        return self._owned("/api/v1", "pods", f"plumbline.dev/stage={stage}")

    def _owned(self, group: str, kind: str, label: str) -> list[dict[str, Any]]:
        path = f"{group}/namespaces/{self.tenant.namespace}/{kind}"
        found: list[dict[str, Any]] = self.tenant.cluster.read(
            path, labelSelector=f"plumbline.dev/pipeline={self.name},{label}"
        )["items"]
        return found

    def jobs_created(self) -> list[tuple[str, str]]:
        """(role, stage) of every Job that was created for it, in order, by the audit log."""
        found = []
        for event in read_audit_log(self.tenant.cluster.audit_log, self.tenant.namespace):
            if event.verb != "create" or event.resource != "jobs" or event.code != 201 or event.request is None:
                continue
            metadata: Any = event.request["metadata"]
            if metadata["labels"]["plumbline.dev/pipeline"] == self.name:
                labels, annotations = metadata["labels"], metadata["annotations"]
                found.append((labels["plumbline.dev/role"], annotations["plumbline.dev/stage"]))
        return found

    def stage_root(self, stage: str) -> str:
        """Where a stage's output and runs lie."""
        entry = stage_status(self.status, stage)
        return f"{self.tenant.storage['uri']}/{self.tenant.namespace}/{entry['type']}/{entry['fingerprint']}"

    def output(self, stage: str) -> dict[str, Any]:
        """The committed manifest of a stage."""
        found: dict[str, Any] = json.loads(self.tenant.read(f"{self.stage_root(stage)}/manifest.json"))
        return found

    def results(self, stage: str) -> list[dict[str, Any]]:
        """What the stage's attempts left in storage as their results, in order."""
        files = self.tenant.objects(f"{self.stage_root(stage)}/runs/{self.uid}/results/")
        return [json.loads(self.tenant.read(uri)) for uri in sorted(files)]

    def checkpoints(self, stage: str) -> list[int]:
        """Steps of the committed checkpoints that are there; none before preflight has told what the stage's work is."""
        if "fingerprint" not in stage_status(self.status, stage):
            return []
        files = self.tenant.objects(f"{self.stage_root(stage)}/runs/{self.uid}/checkpoints/")
        names = [uri.split("/")[-2] for uri in files if uri.endswith("/manifest.json")]
        # Of a stage that samples also those within an iteration: 00000003.000002-….
        return sorted(int(name.split("-")[0].split(".")[0]) for name in names)

    def report_files(self) -> dict[str, str]:
        """Name and URI of the pipeline's own documents in storage."""
        root = f"{self.tenant.storage['uri']}/{self.tenant.namespace}/pipelines/{self.name}/{self.uid}/"
        return {uri.removeprefix(root): uri for uri in self.tenant.objects(root)}

    def explain(self) -> str:
        """Everything that helps to see why a test failed."""
        namespace = self.tenant.namespace
        parts = [
            self.kubectl("get", "alp", self.name, "-o", "jsonpath={.status}", check=False)[-6000:],
            self.kubectl("get", "jobs,pods", "-o", "wide", check=False),
            self.kubectl("get", "events", "--sort-by=.lastTimestamp", check=False)[-3000:],
        ]
        pods = self.kubectl("get", "pods", "-o", "name", check=False).split()[-4:]
        parts += [f"--- {pod}\n{self.kubectl('logs', pod, '--tail=15', check=False)}" for pod in pods]
        return "\n".join([f"=== {namespace}/{self.name}", *parts, "--- operator", self.tenant.release.logs()])


def stage_status(status: dict[str, Any], name: str) -> dict[str, Any]:
    """The entry of a stage; empty while there is none."""
    return next((entry for entry in status.get("stages", []) if entry["name"] == name), {})


def condition(status: dict[str, Any], type_: str) -> dict[str, Any]:
    """A condition; empty while there is none."""
    return next((entry for entry in status.get("conditions", []) if entry["type"] == type_), {})


def is_ended(status: dict[str, Any]) -> bool:
    """Whether the run has ended and its report is written or given up."""
    over = any(condition(status, type_).get("status") == "True" for type_ in ("Succeeded", "Failed"))
    return over and condition(status, "Reported").get("status") in ("True", "False")


@pytest.fixture(scope="session")
def tiny_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and data of the tiny pipeline."""
    return write_inputs(tmp_path_factory.mktemp("tiny") / "inputs")


@contextmanager
def fresh_tenant(release: Release, inputs: Path, label: str) -> Iterator[Tenant]:
    """A namespace with the tiny pipeline's inputs in S3 and the credentials in a Secret."""
    with fresh_namespace(release.cluster, label) as namespace:
        found = Tenant(release, namespace)
        found.create_secret()
        found.upload(inputs)
        yield found


@pytest.fixture
def tenants(release: Release, tiny_inputs: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Tenant]]:
    """Makes tenants, which share nothing: the same work in two of them is done twice."""
    with ExitStack() as stack:
        label = request.node.name.removeprefix("test_")[:24]
        yield lambda name: stack.enter_context(fresh_tenant(release, tiny_inputs, f"{name}-{label}"))


@pytest.fixture
def tenant(tenants: Callable[[str], Tenant]) -> Tenant:
    """The one tenant of a test."""
    return tenants("team")
