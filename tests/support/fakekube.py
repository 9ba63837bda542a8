"""An API server in a dictionary, for tests of what the operator writes and in which order."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

from plumbline_operator.errors import api_error
from plumbline_operator.kube import Listing, Manifest, Propagation, Resource

Key = tuple[str, str | None, str]
Write = tuple[str, str, str]
"""Verb, kind (`jobs`, `alignmentpipelines/status`, …) and name."""


class Killed(BaseException):
    """The operator died here; nothing can catch it."""


class FakeKube:
    """Stores objects, checks preconditions and versions, and lists every write.

    `before` and `after` are called around each write with its number and what it is; they may raise.
    """

    def __init__(self) -> None:
        self.objects: dict[Key, Manifest] = {}
        self.writes: list[Write] = []
        self.reads: Counter[str] = Counter()
        self.created: Counter[str] = Counter()
        self.before: Callable[[int, Write], None] = lambda number, write: None
        self.after: Callable[[int, Write], None] = lambda number, write: None
        self.on_read: Callable[[Resource], None] = lambda resource: None
        self.reviews: dict[str, Manifest] = {}
        self._versions = itertools.count(1)
        self._uids = itertools.count(1)

    # What tests do.

    def add(self, resource: Resource, body: Manifest, namespace: str | None = None) -> Manifest:
        """Put an object in place, as somebody else would."""
        stored = copy.deepcopy(body)
        metadata = stored["metadata"]
        if namespace is not None:
            metadata["namespace"] = namespace
        metadata.setdefault("uid", f"uid-{next(self._uids)}")
        metadata.setdefault("generation", 1)
        metadata.setdefault("creationTimestamp", "2026-01-01T12:00:00Z")
        metadata["resourceVersion"] = str(next(self._versions))
        self.objects[resource.plural, metadata.get("namespace"), metadata["name"]] = stored
        return copy.deepcopy(stored)

    def change(self, resource: Resource, name: str, namespace: str, change: Callable[[Manifest], None]) -> Manifest:
        """Change an object, as somebody else would."""
        stored = self.objects[resource.plural, namespace, name]
        change(stored)
        stored["metadata"]["resourceVersion"] = str(next(self._versions))
        return copy.deepcopy(stored)

    def remove(self, resource: Resource, name: str, namespace: str) -> None:
        """An object is gone."""
        del self.objects[resource.plural, namespace, name]

    def of(self, resource: Resource) -> list[Manifest]:
        """Every object of a kind."""
        return [copy.deepcopy(body) for (plural, _, _), body in self.objects.items() if plural == resource.plural]

    # What the operator does.

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Manifest:
        self.reads["get " + resource.plural] += 1
        self.on_read(resource)
        return copy.deepcopy(self._find(resource, name, namespace))

    async def pages(self, resource: Resource, namespace: str | None = None, labels: str = "") -> AsyncIterator[Listing]:
        self.reads["list " + resource.plural] += 1
        self.on_read(resource)
        wanted = [part.partition("=") for part in labels.split(",") if part]
        items = []
        for (plural, place, _), body in self.objects.items():
            has = body["metadata"].get("labels") or {}
            fits = all(name in has and (not sign or has[name] == value) for name, sign, value in wanted)
            if plural == resource.plural and namespace in (None, place) and fits:
                items.append(copy.deepcopy(body))
        yield Listing(items, next(self._versions))

    async def create(self, resource: Resource, body: Manifest, namespace: str | None = None) -> Manifest:
        if resource.plural == "tokenreviews":
            self.reads["review"] += 1
            return {"status": self.reviews.get(body["spec"]["token"], {"authenticated": False})}
        name = body["metadata"]["name"]
        write = ("create", resource.plural, name)
        self._begin(write)
        if (resource.plural, namespace, name) in self.objects:
            raise api_error(409, "AlreadyExists", f"{name} already exists")
        stored = self.add(resource, body, namespace)
        self.created[f"{resource.plural}/{name}"] += 1
        self._end(write)
        return stored

    async def patch(
        self, resource: Resource, name: str, namespace: str | None, body: Manifest, subresource: str | None = None
    ) -> Manifest:
        kind = f"{resource.plural}/{subresource}" if subresource else resource.plural
        write = ("patch", kind, name)
        self._begin(write)
        stored = self._find(resource, name, namespace)
        given = body.get("metadata") or {}
        for field in ("uid", "resourceVersion"):
            if field in given and given[field] != stored["metadata"][field]:
                raise api_error(409, "Conflict", f"{field} differs")
        changes = {key: value for key, value in body.items() if key != "metadata"}
        merge(stored, changes)
        stored["metadata"]["resourceVersion"] = str(next(self._versions))
        answer = copy.deepcopy(stored)
        self._end(write)
        return answer

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
        write = ("delete", resource.plural, name)
        self._begin(write)
        stored = self._find(resource, name, namespace)
        if stored["metadata"]["uid"] != uid:
            raise api_error(409, "Conflict", "uid differs")
        if resource_version is not None and stored["metadata"]["resourceVersion"] != resource_version:
            raise api_error(409, "Conflict", "resourceVersion differs")
        if propagation == "Foreground":
            stored["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
            stored["metadata"]["resourceVersion"] = str(next(self._versions))
        else:
            del self.objects[resource.plural, namespace, name]
        self._end(write)
        return copy.deepcopy(stored)

    def _begin(self, write: Write) -> None:
        self.before(len(self.writes), write)

    def _end(self, write: Write) -> None:
        self.writes.append(write)
        self.after(len(self.writes) - 1, write)

    def _find(self, resource: Resource, name: str, namespace: str | None) -> Manifest:
        found = self.objects.get((resource.plural, namespace, name))
        if found is None:
            raise api_error(404, "NotFound", f"{resource.plural} {name} not found")
        return found


def merge(target: dict[str, Any], patch: dict[str, Any]) -> None:
    """A JSON merge patch (RFC 7386), in place."""
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            if not isinstance(target.get(key), dict):
                target[key] = {}
            merge(target[key], value)
        else:
            target[key] = copy.deepcopy(value)
