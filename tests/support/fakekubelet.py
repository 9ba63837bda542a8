"""A kubelet without containers: it moves pods of the operator's Jobs through their lives as a script says.

The API server, the Job controller and the garbage collector are real; only the processes are not.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from plumbline_api.stagerun import STAGE_ENV, PreflightFindings, StageResult, StageRun
from plumbline_operator.errors import ApiError, NotFoundError
from plumbline_operator.kube import PODS, Resource
from support.liveapi import LiveApi, Manifest

NODES = Resource("v1", "nodes", namespaced=False)
SELECTOR = "app.kubernetes.io/managed-by=plumbline"


@dataclass
class Ending:
    """How a pod ends."""

    result: StageResult | None = None
    exit_code: int = 0
    reason: str = "Completed"
    message: str | None = None
    """Termination message instead of the result's; empty for none."""


@dataclass
class Attempt:
    """One pod as its script sees it."""

    run: StageRun
    pod: Manifest
    number: int
    """How many pods of this stage (and role) there were, this one included."""
    kubelet: FakeKubelet

    async def patch_status(self, status: Manifest) -> None:
        await self.kubelet.patch_status(self.pod, status)


Script = Callable[[Attempt], Awaitable[Ending | None]]
"""Called when a pod runs; returns how it ends. None: the script has done everything itself."""


def succeeded(run: StageRun, **fields: Any) -> StageResult:
    """The result of an attempt at which nothing goes wrong."""
    findings = None
    if run.role == "preflight":
        assert run.record is not None
        digests = [
            base64.urlsafe_b64encode(hashlib.sha256(item.uri.encode()).digest()).decode().rstrip("=")
            for item in run.record.external_inputs
        ]
        findings = PreflightFindings(digests=digests, cached="0" * len(run.record.stages))
    given: dict[str, Any] = {
        "outcome": "Succeeded",
        "reason": "Completed",
        "manifest_digest": hashlib.sha256(run.fingerprint.encode()).hexdigest(),
        "metrics": {"loss": 1.5},
        "preflight": findings,
    }
    return StageResult.model_validate(given | fields)


async def succeed(attempt: Attempt) -> Ending:
    """The script of a stage that just works."""
    return Ending(succeeded(attempt.run))


def failing(reason: str, message: str, *, exit_code: int = 1, times: int = 1000) -> Script:
    """A script that fails so many times, then works."""

    async def script(attempt: Attempt) -> Ending:
        if attempt.number > times:
            return await succeed(attempt)
        result = StageResult(outcome="Failed", reason=reason, message=message)
        return Ending(result, exit_code=exit_code, reason="Error")

    return script


@dataclass
class FakeKubelet:
    """Runs every pod of the operator's Jobs in the cluster."""

    api: LiveApi
    scripts: dict[tuple[str, str], Script] = field(default_factory=dict)
    """By namespace and stage (also `preflight`, `finalize`, `collect`)."""
    starts: Counter[tuple[str, str]] = field(default_factory=Counter)
    runs: list[StageRun] = field(default_factory=list)
    stop_result: Callable[[StageRun], Ending] = lambda run: Ending(None, exit_code=143, reason="Error")
    """How a pod that is deleted while it runs ends."""
    node: str = field(default_factory=lambda: f"fake-{secrets.token_hex(4)}")
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)
    _errors: list[BaseException] = field(default_factory=list)

    async def __aenter__(self) -> FakeKubelet:
        await self._make_node()
        self._main = asyncio.create_task(self._watch())
        self._heart = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [self._main, self._heart, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.api._request("delete", NODES, NODES.path(None, self.node))
        if self._errors:
            raise self._errors[0]

    def script(self, namespace: str, stage: str, script: Script) -> None:
        self.scripts[namespace, stage] = script

    async def _make_node(self) -> None:
        room = {"cpu": "1000", "memory": "4000Gi", "ephemeral-storage": "100Ti", "pods": "10000"}
        await self.api.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": self.node}})
        await self._tell_node({"capacity": room, "allocatable": room})
        deadline = time.monotonic() + 30
        while (await self.api.get(NODES, self.node))["spec"].get("taints"):
            assert time.monotonic() < deadline, "the node stays tainted"
            await asyncio.sleep(0.1)

    async def _tell_node(self, more: Manifest) -> None:
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": now()}
        await self.api.patch(NODES, self.node, None, {"status": {"conditions": [ready], **more}}, "status")

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(8)
            await self._tell_node({})

    async def _watch(self) -> None:
        async for type_, pod in self.api.watch(PODS, SELECTOR):
            uid = pod["metadata"]["uid"]
            if pod["spec"].get("nodeName") != self.node:
                continue
            if type_ != "DELETED" and (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
                self._seen.add(uid)
            if type_ == "DELETED":
                if (task := self._tasks.pop(uid, None)) is not None:
                    task.cancel()
            elif "deletionTimestamp" in pod["metadata"]:
                if (task := self._tasks.pop(uid, None)) is not None:
                    task.cancel()
                if uid + "/end" not in self._tasks:
                    self._tasks[uid + "/end"] = asyncio.create_task(self._terminate(pod))
            elif uid not in self._seen:
                self._seen.add(uid)
                task = asyncio.create_task(self._live(pod))
                self._tasks[uid] = task
                task.add_done_callback(self._note)

    def _note(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, NotFoundError):
            self._errors.append(error)

    async def _live(self, pod: Manifest) -> None:
        run = stage_run_of(pod)
        namespace = pod["metadata"]["namespace"]
        what = run.role if run.role != "stage" else run.stage
        self.starts[namespace, what] += 1
        self.runs.append(run)
        attempt = Attempt(run, pod, self.starts[namespace, what], self)
        script = self.scripts.get((namespace, what)) or self.scripts.get(("*", what)) or succeed
        await self.patch_status(pod, running())
        ending = await script(attempt)
        if ending is not None:
            await self.patch_status(pod, ended(ending))

    async def _terminate(self, pod: Manifest) -> None:
        """What a kubelet does with a deleted pod whose process has stopped: tell how it ended, then let it go."""
        with contextlib.suppress(ApiError):
            if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed"):
                await self.patch_status(pod, ended(self.stop_result(stage_run_of(pod))))
            await self.api._request(
                "delete",
                PODS,
                PODS.path(pod["metadata"]["namespace"], pod["metadata"]["name"]),
                body={"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}},
            )

    async def patch_status(self, pod: Manifest, status: Manifest) -> None:
        metadata = pod["metadata"]
        body = {"metadata": {"uid": metadata["uid"]}, "status": status}
        await self.api.patch(PODS, metadata["name"], metadata["namespace"], body, "status")


def stage_run_of(pod: Manifest) -> StageRun:
    """What the pod is told, as its container would see it."""
    (container,) = pod["spec"]["containers"]
    value = next(item["value"] for item in container["env"] if item["name"] == STAGE_ENV)
    return StageRun.model_validate(json.loads(value.replace("$$", "$")))


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def running() -> Manifest:
    """Status of a pod whose container runs."""
    return {
        "phase": "Running",
        "startTime": now(),
        "conditions": [
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": now()},
            {"type": "Ready", "status": "True", "lastTransitionTime": now()},
        ],
        "containerStatuses": [_container({"running": {"startedAt": now()}}, ready=True)],
    }


def ended(ending: Ending) -> Manifest:
    """Status of a pod whose container has ended."""
    message = ending.message
    if message is None:
        message = ending.result.to_message() if ending.result is not None else ""
    terminated = {
        "exitCode": ending.exit_code,
        "reason": ending.reason,
        "message": message,
        "startedAt": now(),
        "finishedAt": now(),
    }
    return {
        "phase": "Succeeded" if ending.exit_code == 0 else "Failed",
        "conditions": [
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": now()},
            {"type": "Ready", "status": "False", "reason": "PodCompleted", "lastTransitionTime": now()},
        ],
        "containerStatuses": [_container({"terminated": terminated}, ready=False)],
    }


def waiting(reason: str, message: str) -> Manifest:
    """Status of a pod whose container cannot be made."""
    return {
        "phase": "Pending",
        "startTime": now(),
        "conditions": [{"type": "PodScheduled", "status": "True", "lastTransitionTime": now()}],
        "containerStatuses": [_container({"waiting": {"reason": reason, "message": message}}, ready=False)],
    }


def _container(state: Manifest, *, ready: bool) -> Manifest:
    return {
        "name": "trainer",
        "image": "trainer",
        "imageID": "",
        "ready": ready,
        "restartCount": 0,
        "state": state,
    }
