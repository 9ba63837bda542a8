"""Who sends a progress report: the token's pod must be a pod of the very Job that is reported on."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from plumbline_operator.cache import Cache
from plumbline_operator.errors import NotFoundError, RefusedError
from plumbline_operator.jobs import JobFacts, controller_of
from plumbline_operator.kube import PODS, TOKEN_REVIEWS, Kube

POD_NAME = "authentication.kubernetes.io/pod-name"
POD_UID = "authentication.kubernetes.io/pod-uid"
KEPT_MAX = 4096
GOOD_SECONDS = 300.0
BAD_SECONDS = 30.0
TOKEN_MAX = 16 * 1024


class UnauthenticatedError(Exception):
    """The token is not one that was made for us (401)."""


class UnauthorizedError(Exception):
    """The token is good, but its pod does not belong to the Job (403)."""


class BusyError(Exception):
    """Too many tokens to review at the moment (429)."""

    def __init__(self, seconds: float) -> None:
        super().__init__("too many reports at once")
        self.seconds = seconds


@dataclass(slots=True)
class Bucket:
    """A token bucket: bounds what strangers can make us ask the API server."""

    per_second: float
    burst: float
    clock: Callable[[], float] = time.monotonic
    _level: float = field(init=False, default=0.0)
    _at: float | None = field(init=False, default=None)

    def take(self) -> float:
        """Take one; 0 where there was one, else the seconds until there is."""
        now = self.clock()
        since = 0.0 if self._at is None else now - self._at
        self._level = self.burst if self._at is None else min(self.burst, self._level + since * self.per_second)
        self._at = now
        if self._level >= 1.0:
            self._level -= 1.0
            return 0.0
        return (1.0 - self._level) / self.per_second


@dataclass(frozen=True, slots=True)
class _Verdict:
    until: float
    job_uid: str | None
    """The Job that the pod belongs to; None where the token is no good."""
    error: str = ""
    is_stranger: bool = False


@dataclass(slots=True)
class TokenChecker:
    """Checks bearer tokens and remembers the answers for a few minutes, so that a report costs no request."""

    kube: Kube
    cache: Cache
    audience: str
    clock: Callable[[], float] = time.monotonic
    bucket: Bucket = field(default_factory=lambda: Bucket(per_second=20.0, burst=100.0))
    _kept: OrderedDict[bytes, _Verdict] = field(default_factory=OrderedDict)

    async def check(self, token: str, namespace: str, job: str) -> JobFacts:
        """The Job that a token may report on.

        Raises:
            UnauthenticatedError: if the token is not one for our audience.
            UnauthorizedError: if its pod is not one of this Job, or the Job is not one of ours or has ended.
            BusyError: if too many unknown tokens come at once.
            ApiError: if the API server cannot be asked.
        """
        facts = self.cache.job(namespace, job)
        verdict = await self._verdict(token, namespace)
        if verdict.job_uid is None:
            raise (UnauthenticatedError if verdict.is_stranger else UnauthorizedError)(verdict.error)
        if facts is None or facts.uid != verdict.job_uid or facts.owner_uid != facts.pipeline_uid:
            raise UnauthorizedError(f"the token's pod does not belong to Job {namespace}/{job}")
        if facts.is_finished:
            raise UnauthorizedError(f"Job {namespace}/{job} has ended")
        return facts

    async def _verdict(self, token: str, namespace: str) -> _Verdict:
        if not token or len(token) > TOKEN_MAX:
            return _Verdict(0.0, None, "no token", is_stranger=True)
        digest = hashlib.sha256(f"{namespace}\n{token}".encode()).digest()
        kept = self._kept.get(digest)
        if kept is not None and kept.until > self.clock():
            self._kept.move_to_end(digest)
            return kept
        if wait := self.bucket.take():
            raise BusyError(wait)
        verdict = await self._review(token, namespace)
        self._kept[digest] = verdict
        while len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)
        return verdict

    async def _review(self, token: str, namespace: str) -> _Verdict:
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [self.audience]},
        }
        try:
            status = (await self.kube.create(TOKEN_REVIEWS, body)).get("status") or {}
        except RefusedError as error:
            if error.status == 403:  # our own rights are missing: not the sender's fault
                raise
            return self._bad("the token cannot be read", is_stranger=True)
        if not status.get("authenticated") or self.audience not in (status.get("audiences") or []):
            return self._bad("the token is not valid for this service", is_stranger=True)
        user = status.get("user") or {}
        if not str(user.get("username", "")).startswith(f"system:serviceaccount:{namespace}:"):
            return self._bad(f"the token is not one of namespace {namespace}")
        pod_name, pod_uid = _extra(user, POD_NAME), _extra(user, POD_UID)
        if pod_name is None or pod_uid is None:
            return self._bad("the token is not bound to a pod")
        try:
            pod = await self.kube.get(PODS, pod_name, namespace)
        except NotFoundError:
            return self._bad(f"pod {pod_name} is gone")
        owner = controller_of(pod["metadata"])
        if pod["metadata"]["uid"] != pod_uid or owner is None or owner.get("kind") != "Job":
            return self._bad(f"pod {pod_name} does not belong to a Job")
        return _Verdict(self.clock() + GOOD_SECONDS, str(owner["uid"]))

    def _bad(self, error: str, *, is_stranger: bool = False) -> _Verdict:
        return _Verdict(self.clock() + BAD_SECONDS, None, error, is_stranger)


def _extra(user: dict[str, Any], name: str) -> str | None:
    values = (user.get("extra") or {}).get(name) or []
    return str(values[0]) if values else None
