"""The few requests that the operator makes of the API server. Nothing is retried here: a pass that fails is repeated as
a whole by the queue, with a growing wait, and every write of a pass is safe to repeat."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import aiohttp

from plumbline_operator.connection import Connection
from plumbline_operator.errors import ApiError, api_error

Manifest = dict[str, Any]
Propagation = Literal["Foreground", "Background"]
PAGE = 500


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind as the API server's paths know it."""

    group_version: str
    plural: str
    namespaced: bool = True

    @property
    def group(self) -> str:
        """API group; empty for the core group."""
        return self.group_version.rpartition("/")[0]

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        """Path of the collection, of an object or of a part of it."""
        root = f"/apis/{self.group_version}" if "/" in self.group_version else f"/api/{self.group_version}"
        parts = [root]
        if namespace is not None and self.namespaced:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        parts += [part for part in (name, subresource) if part is not None]
        return "/".join(parts)


PIPELINES = Resource("plumbline.dev/v1alpha1", "alignmentpipelines")
RUNTIMES = Resource("plumbline.dev/v1alpha1", "alignmentruntimes", namespaced=False)
JOBS = Resource("batch/v1", "jobs")
PODS = Resource("v1", "pods")
SERVICES = Resource("v1", "services")
RECORDS = Resource("apps/v1", "controllerrevisions")
EVENTS = Resource("events.k8s.io/v1", "events")
TOKEN_REVIEWS = Resource("authentication.k8s.io/v1", "tokenreviews", namespaced=False)


@dataclass(frozen=True, slots=True)
class Listing:
    """One page of a list."""

    items: list[Manifest]
    resource_version: int
    """Version of the collection that the whole list shows."""


class Kube(Protocol):
    """What the operator needs of an API server. Every method raises ApiError."""

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Manifest:
        """One object as it is now."""
        ...

    def pages(self, resource: Resource, namespace: str | None = None, labels: str = "") -> AsyncIterator[Listing]:
        """Every object that fits, page by page; a page's memory can go before the next comes."""
        ...

    async def create(self, resource: Resource, body: Manifest, namespace: str | None = None) -> Manifest:
        """Create an object and return it as stored."""
        ...

    async def patch(
        self, resource: Resource, name: str, namespace: str | None, body: Manifest, subresource: str | None = None
    ) -> Manifest:
        """Merge-patch an object and return it as stored."""
        ...

    async def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str | None,
        *,
        uid: str,
        resource_version: str | None = None,
        propagation: Propagation = "Background",
    ) -> Manifest:
        """Delete an object if it is still the one meant; returns it (or a Status)."""
        ...


Observer = Callable[[str, str, int], None]
"""Told of every response: verb, resource, status."""


class HttpKube:
    """The real API server."""

    def __init__(
        self, connection: Connection, *, timeout_seconds: float, agent: str, observer: Observer | None = None
    ) -> None:
        self._connection = connection
        self._session: aiohttp.ClientSession | None = None
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds, connect=5)
        self._agent = agent
        self._observer = observer

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Manifest:
        """One object as it is now."""
        return await self._request("get", resource, resource.path(namespace, name))

    async def pages(self, resource: Resource, namespace: str | None = None, labels: str = "") -> AsyncIterator[Listing]:
        """Every object that fits, page by page."""
        query = {"limit": str(PAGE)}
        if labels:
            query["labelSelector"] = labels
        while True:
            page = await self._request("list", resource, resource.path(namespace), query=query)
            metadata = page.get("metadata", {})
            yield Listing(page.get("items") or [], int(metadata.get("resourceVersion") or 0))
            if not (token := metadata.get("continue")):
                return
            query["continue"] = token

    async def create(self, resource: Resource, body: Manifest, namespace: str | None = None) -> Manifest:
        """Create an object and return it as stored."""
        return await self._request("create", resource, resource.path(namespace), body=body)

    async def patch(
        self, resource: Resource, name: str, namespace: str | None, body: Manifest, subresource: str | None = None
    ) -> Manifest:
        """Merge-patch an object and return it as stored."""
        return await self._request("patch", resource, resource.path(namespace, name, subresource), body=body)

    async def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str | None,
        *,
        uid: str,
        resource_version: str | None = None,
        propagation: Propagation = "Background",
    ) -> Manifest:
        """Delete an object if it is still the one meant."""
        preconditions = {"uid": uid}
        if resource_version is not None:
            preconditions["resourceVersion"] = resource_version
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": propagation,
            "preconditions": preconditions,
        }
        return await self._request("delete", resource, resource.path(namespace, name), body=body)

    async def _request(
        self,
        verb: str,
        resource: Resource,
        path: str,
        *,
        body: Manifest | None = None,
        query: dict[str, str] | None = None,
    ) -> Manifest:
        if self._session is None:
            self._session = self._connection.session()
        method = {"get": "GET", "list": "GET", "create": "POST", "patch": "PATCH", "delete": "DELETE"}[verb]
        content = "application/merge-patch+json" if verb == "patch" else "application/json"
        headers = self._connection.headers() | {
            "Accept": "application/json",
            "Content-Type": content,
            "User-Agent": self._agent,
        }
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        label = f"{verb} {path}"
        status = 0
        try:
            async with self._session.request(
                method,
                self._connection.server + path,
                params=query,
                data=data,
                headers=headers,
                timeout=self._timeout,
                allow_redirects=False,
            ) as response:
                status = response.status
                raw = await response.read()
                retry_after = _seconds(response.headers.get("Retry-After"))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            words = str(error) or type(error).__name__
            raise ApiError(f"the API server does not answer: {words}", request=label) from error
        finally:
            if self._observer is not None:
                self._observer(verb, resource.plural, status)
        if status == 401:
            self._connection.forget_token()
        return _decoded(raw, status, retry_after, label)


def _decoded(raw: bytes, status: int, retry_after: float | None, label: str) -> Manifest:
    try:
        document = json.loads(raw)
    except ValueError:
        document = None
    if 200 <= status < 300 and isinstance(document, dict):
        return document
    answer = document if isinstance(document, dict) else {}
    message = str(answer.get("message") or raw[:200].decode(errors="replace") or f"HTTP {status}")
    details = answer.get("details")
    if retry_after is None and isinstance(details, dict):
        retry_after = _seconds(details.get("retryAfterSeconds"))
    raise api_error(status, str(answer.get("reason") or ""), message, retry_after=retry_after, request=label)


def _seconds(text: object) -> float | None:
    try:
        return max(float(str(text)), 0.0) if text is not None else None
    except ValueError:
        return None
