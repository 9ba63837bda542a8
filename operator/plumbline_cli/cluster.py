"""The few calls that the command makes to a cluster. The Kubernetes client is imported when one is needed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plumbline_api.base import API_GROUP, API_VERSION
from plumbline_api.names import LABEL_PIPELINE_UID, LABEL_STAGE

from plumbline_cli.exits import BAD_INPUT, NOT_FOUND, CommandError

PLURAL = "alignmentpipelines"
RUNTIMES_PLURAL = "alignmentruntimes"
TIMEOUT_SECONDS = 20.0


class Cluster:
    """A namespace of a cluster, reached as kubectl would: kubeconfig and its context, else the pod's own account."""

    def __init__(self, *, context: str | None, namespace: str | None) -> None:
        try:
            from kubernetes import client, config
        except ImportError:
            raise CommandError(
                "commands for a cluster need the Kubernetes client: pip install '.[operator]' in a checkout. "
                "For a local run name its manifest file, or add --storage DIR",
                NOT_FOUND,
            ) from None
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings about retries say nothing that ours do not
        settings = client.Configuration()
        settings.retries = 1
        found = "default"
        try:
            # Named here, because the client reads KUBECONFIG only once, when it is imported.
            file = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
            contexts, active = config.list_kube_config_contexts(config_file=file)
            chosen = active if context is None else next((c for c in contexts if c["name"] == context), active)
            config.load_kube_config(config_file=file, context=context, client_configuration=settings)
            found = (chosen.get("context") or {}).get("namespace") or found
        except config.ConfigException as error:
            if context is not None:
                raise CommandError(
                    f"there is no usable context {context} in the kubeconfig: {error}", NOT_FOUND
                ) from None
            try:
                config.load_incluster_config(client_configuration=settings)
            except config.ConfigException:
                raise CommandError(
                    "no cluster is configured: there is neither a kubeconfig (KUBECONFIG, ~/.kube/config) nor a pod's "
                    "service account. For a local run name its manifest file, or add --storage DIR",
                    NOT_FOUND,
                ) from None
        self.namespace = namespace or found
        self._host = settings.host
        self._client = client.ApiClient(settings)
        self._objects = client.CustomObjectsApi(self._client)
        self._core = client.CoreV1Api(self._client)

    def pipeline(self, name: str) -> dict[str, Any]:
        """An AlignmentPipeline as the API server holds it.

        Raises:
            CommandError: if it is not there or the cluster cannot be reached.
        """
        found: dict[str, Any] = self._call(
            name,
            self._objects.get_namespaced_custom_object,
            API_GROUP,
            API_VERSION,
            self.namespace,
            PLURAL,
            name,
        )
        return found

    def runtime_storage(self, name: str) -> dict[str, Any] | None:
        """The storage that a runtime offers; None where it is not there, or this account may not read it."""
        try:
            found = self._call(
                name, self._objects.get_cluster_custom_object, API_GROUP, API_VERSION, RUNTIMES_PLURAL, name
            )
        except CommandError:
            return None
        storage = (found.get("spec") or {}).get("storage")
        return storage if isinstance(storage, dict) else None

    def patch_spec(self, name: str, changes: dict[str, Any]) -> dict[str, Any]:
        """Merge changes into the spec of a pipeline and return the object.

        Raises:
            CommandError: if it is not there, is refused, or the cluster cannot be reached.
        """
        found: dict[str, Any] = self._call(
            name,
            self._objects.patch_namespaced_custom_object,
            API_GROUP,
            API_VERSION,
            self.namespace,
            PLURAL,
            name,
            {"spec": changes},
            _content_type="application/merge-patch+json",
        )
        return found

    def pods(self, uid: str, stage: str) -> list[Any]:
        """Pods of a stage's attempts, oldest first."""
        labels = f"{LABEL_PIPELINE_UID}={uid},{LABEL_STAGE}={stage}"
        listed = self._call("", self._core.list_namespaced_pod, self.namespace, label_selector=labels)
        return sorted(listed.items, key=lambda pod: pod.metadata.creation_timestamp)

    def log_lines(self, pod: str, *, follow: bool, tail: int | None) -> Iterator[str]:
        """What a pod has printed, and with `follow` what it still prints."""
        options: dict[str, Any] = {} if tail is None else {"tail_lines": tail}
        response = self._call(
            "",
            self._core.read_namespaced_pod_log,
            pod,
            self.namespace,
            follow=follow,
            _preload_content=False,
            _request_timeout=None if follow else TIMEOUT_SECONDS,
            **options,
        )
        pending = b""
        for chunk in response.stream():
            *lines, pending = (pending + chunk).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
        if pending:
            yield pending.decode(errors="replace")

    def _call(self, name: str, function: Any, *arguments: Any, **options: Any) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        options.setdefault("_request_timeout", TIMEOUT_SECONDS)
        try:
            return function(*arguments, **options)
        except ApiException as error:
            raise self._explain(error, name) from None
        except HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise CommandError(f"the cluster at {self._host} cannot be reached: {reason}", NOT_FOUND) from None

    def _explain(self, error: Any, name: str) -> CommandError:
        try:
            status = json.loads(error.body)
        except (TypeError, ValueError):
            status = {}
        said = status.get("message") or error.reason
        if error.status == 404 and (status.get("details") or {}).get("name"):
            return CommandError(
                f"there is no AlignmentPipeline {name} in namespace {self.namespace} of {self._host}. "
                "Another namespace: -n; a local run: its manifest file, or --storage DIR",
                NOT_FOUND,
            )
        if error.status == 404:
            return CommandError(
                f"the cluster at {self._host} does not know AlignmentPipelines; install the Plumbline chart first "
                "(helm install plumbline charts/plumbline)",
                NOT_FOUND,
            )
        if error.status in (401, 403):
            return CommandError(f"the cluster at {self._host} does not allow that: {said}", NOT_FOUND)
        return CommandError(
            f"the cluster at {self._host} answered {error.status}: {said}",
            BAD_INPUT if error.status == 422 else NOT_FOUND,
        )
