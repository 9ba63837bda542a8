"""What the operator knows of the cluster: fed by watches, by listings and by the answers to its own writes.

An object is replaced only by a newer version of it, whichever way it comes; so a pass always sees what earlier passes
wrote, and a late event changes nothing. Pipelines are kept as JSON text, which takes a fifth of the memory of objects.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from plumbline_api.errors import ManifestError
from plumbline_api.names import ANNOTATION_DEFAULT_RUNTIME
from plumbline_api.runtime import AlignmentRuntime

from plumbline_operator.jobs import JobFacts, Key, read_job

GRAVES_MAX = 4096
DROPPED_METADATA = ("managedFields",)


@dataclass(frozen=True, slots=True)
class StoredPipeline:
    """A pipeline object."""

    uid: str
    resource_version: int
    text: bytes

    def body(self) -> dict[str, Any]:
        """The object, a copy of its own."""
        found: dict[str, Any] = json.loads(self.text)
        return found


@dataclass(frozen=True, slots=True)
class StoredRuntime:
    """A runtime object."""

    name: str
    uid: str
    resource_version: int
    is_default: bool
    created: str
    runtime: AlignmentRuntime | None
    problem: str | None
    """Why it does not parse."""


@dataclass(frozen=True, slots=True)
class SeenJob:
    """A Job and when this process first saw that it had ended (monotonic seconds)."""

    facts: JobFacts
    ended_at: float | None


class Cache:
    """Pipelines, runtimes and Jobs. Not thread-safe: everything happens in the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pipelines: dict[Key, StoredPipeline] = {}
        self._runtimes: dict[str, StoredRuntime] = {}
        self._jobs: dict[Key, SeenJob] = {}
        self._by_pipeline: dict[str, set[Key]] = {}
        self._running: dict[str, dict[Key, str]] = {}
        self._graves: OrderedDict[str, None] = OrderedDict()

    # Pipelines.

    def put_pipeline(self, body: dict[str, Any]) -> bool:
        """Take a pipeline in; False where the same or a newer version is known already."""
        metadata = body["metadata"]
        key, uid, version = (metadata["namespace"], metadata["name"]), metadata["uid"], int(metadata["resourceVersion"])
        known = self._pipelines.get(key)
        if uid in self._graves or (known is not None and known.resource_version >= version):
            return False
        kept = {name: value for name, value in metadata.items() if name not in DROPPED_METADATA}
        text = json.dumps(body | {"metadata": kept}, separators=(",", ":"), ensure_ascii=False).encode()
        self._pipelines[key] = StoredPipeline(uid, version, text)
        return True

    def drop_pipeline(self, key: Key, uid: str) -> None:
        """A pipeline is gone."""
        self._bury(uid)
        known = self._pipelines.get(key)
        if known is not None and known.uid == uid:
            del self._pipelines[key]

    def pipeline(self, key: Key) -> StoredPipeline | None:
        """A pipeline as last seen."""
        return self._pipelines.get(key)

    def pipeline_keys(self) -> list[Key]:
        """Every pipeline."""
        return list(self._pipelines)

    # Runtimes.

    def put_runtime(self, body: dict[str, Any]) -> bool:
        """Take a runtime in; False where it is known already."""
        metadata = body["metadata"]
        name, uid, version = metadata["name"], metadata["uid"], int(metadata["resourceVersion"])
        known = self._runtimes.get(name)
        if uid in self._graves or (known is not None and known.resource_version >= version):
            return False
        runtime, problem = None, None
        try:
            runtime = AlignmentRuntime.parse(body)
        except ManifestError as error:
            problem = f"AlignmentRuntime {name} cannot be used: {error}"
        annotations = metadata.get("annotations") or {}
        self._runtimes[name] = StoredRuntime(
            name=name,
            uid=uid,
            resource_version=version,
            is_default=annotations.get(ANNOTATION_DEFAULT_RUNTIME) == "true",
            created=metadata.get("creationTimestamp") or "",
            runtime=runtime,
            problem=problem,
        )
        return True

    def drop_runtime(self, name: str, uid: str) -> None:
        """A runtime is gone."""
        self._bury(uid)
        known = self._runtimes.get(name)
        if known is not None and known.uid == uid:
            del self._runtimes[name]

    def runtime(self, name: str) -> tuple[AlignmentRuntime | None, str | None]:
        """A runtime by name, or why there is none."""
        known = self._runtimes.get(name)
        if known is None:
            others = ", ".join(sorted(self._runtimes)) or "none"
            return None, f'there is no AlignmentRuntime "{name}". Runtimes of this cluster: {others}'
        return known.runtime, known.problem

    def default_runtime(self) -> tuple[AlignmentRuntime | None, str | None]:
        """The runtime that is marked as the default (of several the newest, as with storage classes)."""
        marked = [item for item in self._runtimes.values() if item.is_default]
        if marked:
            newest = max(marked, key=lambda item: (item.created, item.name))
            return newest.runtime, newest.problem
        others = ", ".join(sorted(self._runtimes)) or "none"
        return None, (
            "the pipeline names no runtime and the cluster has no default one. Set spec.runtimeRef.name, or mark one "
            f'with the annotation {ANNOTATION_DEFAULT_RUNTIME}: "true". Runtimes of this cluster: {others}'
        )

    # Jobs.

    def put_job(self, body: dict[str, Any]) -> JobFacts | None:
        """Take a Job in; its facts where they tell something new, else None."""
        facts = read_job(body)
        if facts is None or facts.uid in self._graves:
            return None
        key = (facts.namespace, facts.name)
        known = self._jobs.get(key)
        if known is not None and known.facts.resource_version >= facts.resource_version:
            return None
        if known is not None:
            self._unlink(known.facts)
        ended_at = None
        if facts.is_finished:
            before = known is not None and known.facts.uid == facts.uid and known.facts.is_finished
            ended_at = known.ended_at if before and known is not None else self._clock()
        self._jobs[key] = SeenJob(facts, ended_at)
        self._by_pipeline.setdefault(facts.pipeline_uid, set()).add(key)
        if facts.state == "running" and facts.role == "stage":
            self._running.setdefault(facts.namespace, {})[key] = facts.fingerprint
        return None if known is not None and _is_same(known.facts, facts) else facts

    def drop_job(self, namespace: str, name: str, uid: str) -> JobFacts | None:
        """A Job is gone; what was known of it."""
        self._bury(uid)
        known = self._jobs.get((namespace, name))
        if known is None or known.facts.uid != uid:
            return None
        self._unlink(known.facts)
        del self._jobs[namespace, name]
        return known.facts

    def job(self, namespace: str, name: str) -> JobFacts | None:
        """A Job by name."""
        known = self._jobs.get((namespace, name))
        return known.facts if known is not None else None

    def jobs_of(self, pipeline_uid: str) -> list[JobFacts]:
        """Every Job that claims to belong to a pipeline, by name."""
        return [self._jobs[key].facts for key in sorted(self._by_pipeline.get(pipeline_uid, ()))]

    def latest_end(self, pipeline_uid: str) -> float | None:
        """When this process saw the last of a pipeline's Jobs end (monotonic seconds)."""
        ends = (self._jobs[key].ended_at for key in self._by_pipeline.get(pipeline_uid, ()))
        return max((end for end in ends if end is not None), default=None)

    def running_fingerprints(self, namespace: str, *, but_of: str) -> frozenset[str]:
        """Fingerprints that other pipelines of a namespace are computing."""
        running = self._running.get(namespace, {})
        return frozenset(
            fingerprint
            for key, fingerprint in running.items()
            if (facts := self._jobs[key].facts).pipeline_uid != but_of and facts.owner_uid == facts.pipeline_uid
        )

    # Listings.

    def forget_jobs_but(self, seen: Iterable[tuple[str, str, str]], version: int) -> list[JobFacts]:
        """Drop Jobs that a listing at a version does not hold (namespace, name, uid); returns what was dropped."""
        kept = set(seen)
        gone = [
            item.facts
            for (namespace, name), item in self._jobs.items()
            if item.facts.resource_version <= version and (namespace, name, item.facts.uid) not in kept
        ]
        for facts in gone:
            self.drop_job(facts.namespace, facts.name, facts.uid)
        return gone

    def forget_pipelines_but(self, seen: Iterable[str], version: int) -> list[Key]:
        """Drop pipelines that a listing at a version does not hold (by uid); returns their keys."""
        kept = set(seen)
        gone = [
            (key, item.uid)
            for key, item in self._pipelines.items()
            if item.resource_version <= version and item.uid not in kept
        ]
        for key, uid in gone:
            self.drop_pipeline(key, uid)
        return [key for key, _ in gone]

    def forget_runtimes_but(self, seen: Iterable[str], version: int) -> bool:
        """Drop runtimes that a listing at a version does not hold (by uid); whether there were any."""
        kept = set(seen)
        gone = [item for item in self._runtimes.values() if item.resource_version <= version and item.uid not in kept]
        for item in gone:
            self.drop_runtime(item.name, item.uid)
        return bool(gone)

    def job_uids(self) -> Iterator[str]:
        """UIDs of every known Job."""
        return (item.facts.uid for item in self._jobs.values())

    def _unlink(self, facts: JobFacts) -> None:
        key = (facts.namespace, facts.name)
        siblings = self._by_pipeline.get(facts.pipeline_uid)
        if siblings is not None:
            siblings.discard(key)
            if not siblings:
                del self._by_pipeline[facts.pipeline_uid]
        running = self._running.get(facts.namespace)
        if running is not None:
            running.pop(key, None)
            if not running:
                del self._running[facts.namespace]

    def _bury(self, uid: str) -> None:
        """Remember that an object is gone, so that a late answer does not bring it back."""
        self._graves[uid] = None
        while len(self._graves) > GRAVES_MAX:
            self._graves.popitem(last=False)


def _is_same(before: JobFacts, after: JobFacts) -> bool:
    """Whether a newer version of a Job tells nothing new: a Job that waits may have its pod made, or told of again."""
    ignored: dict[str, Any] = {"resource_version": 0, "started": None}
    if after.state == "waiting" and not after.suspended:
        ignored["active"] = False
    return replace(before, **ignored) == replace(after, **ignored)
