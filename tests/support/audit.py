"""Reads the API server's audit log, the one witness of what was really created, by whom and how often."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})


@dataclass(frozen=True)
class AuditEvent:
    """One finished request. `name` is the object's, empty where the server generated it (pods of Jobs); `code` the HTTP status."""

    verb: str
    resource: str
    subresource: str
    group: str
    namespace: str
    name: str
    user: str
    agent: str
    code: int
    request: dict[str, object] | None


def read_audit_log(path: Path, namespace: str | None = None) -> Iterator[AuditEvent]:
    """Finished requests on objects, in the order in which they ended; of one namespace if it is given.

    A line that the server is still writing is left out.
    """
    if not path.exists():
        return
    # Most lines are of other namespaces; a look at the text spares their decoding. What it lets pass is looked at again.
    named = "" if namespace is None else json.dumps(namespace)
    with path.open() as lines:
        for line in lines:
            if not line.endswith("\n"):
                return
            if named not in line:
                continue
            event = json.loads(line)
            reference = event.get("objectRef")
            if event.get("stage") not in ("ResponseComplete", "Panic") or reference is None:
                continue
            if namespace is not None and reference.get("namespace") != namespace:
                continue
            yield AuditEvent(
                verb=event["verb"],
                resource=reference.get("resource", ""),
                subresource=reference.get("subresource", ""),
                group=reference.get("apiGroup", ""),
                namespace=reference.get("namespace", ""),
                name=reference.get("name", ""),
                user=event["user"].get("username", ""),
                agent=event.get("userAgent", ""),
                code=event.get("responseStatus", {}).get("code", 0),
                request=event.get("requestObject"),
            )


def count_creates(path: Path, resource: str = "jobs", namespace: str | None = None) -> Counter[str]:
    """How often an object of each name was really created (status 201); a Job twice under one name counts two."""
    return Counter(
        event.name
        for event in read_audit_log(path, namespace)
        if event.verb == "create" and event.resource == resource and not event.subresource and event.code == 201
    )


def count_writes(path: Path, user: str, namespace: str | None = None) -> Counter[str]:
    """Accepted and refused writes of one user, by `verb resource[/subresource]`."""
    return Counter(
        f"{event.verb} {event.resource}{'/' + event.subresource if event.subresource else ''}"
        for event in read_audit_log(path, namespace)
        if event.user == user and event.verb in WRITES
    )
