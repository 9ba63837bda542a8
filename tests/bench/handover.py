"""How fast and how sparing the operator is, on a real API server and real controllers.

Hand-over: from the moment that the API server has stored a Job's end to the moment that it has stored the next Job, both
by the audit log's own clock. Pods are ended at once by a fake kubelet, so that nothing but control is measured.
Memory: resident set of the operator's process.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from cluster.lifecycle import bring_down, bring_up
from cluster.places import STATE_VARIABLE
from cluster.state import load_state
from plumbline_operator.kube import PIPELINES
from support.cluster_fixtures import ControlPlane
from support.fakekubelet import Attempt, Ending, FakeKubelet, succeed
from support.liveapi import LiveApi, eventually, live_api
from support.operatorprocess import OperatorProcess, install
from support.pipelines import pipeline_body

USER = "operator-bench"
ENDED_PHASES = ("Succeeded", "Failed", "Refused")
STAGES = [
    {"name": "domain", "pretrain": {"dataset": "manuals", "lora": {"rank": 4}}},
    {"name": "sft", "sft": {"dataset": "tickets", "lora": {"rank": 4}}},
    {"name": "dpo", "dpo": {"dataset": "prefs", "lora": {"rank": 4}}},
    {"name": "final", "merge": {}},
]
JOBS_PER_RUN = len(STAGES) + 2  # preflight and finalize
SHORT, BURST, HELD = 100, 20, 200
STAGE_SECONDS = 1.2
MEBIBYTE = 1024 * 1024


def measure() -> list[dict[str, str]]:
    """Rows of figure, value and aim."""
    if named := os.environ.get(STATE_VARIABLE):
        state = load_state(Path(named))
        assert state is not None, f"{STATE_VARIABLE}={named} names no cluster"
        return asyncio.run(_measure(ControlPlane(state)))
    with tempfile.TemporaryDirectory() as folder:
        try:
            return asyncio.run(_measure(ControlPlane(bring_up(Path(folder), control_plane_only=True))))
        finally:
            bring_down(Path(folder))


async def _measure(cluster: ControlPlane) -> list[dict[str, str]]:
    install(cluster, USER)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        # Poll as it is shipped; tests poll faster.
        shipped = {"PLUMBLINE_WAITING_POLL_SECONDS": "10", "PLUMBLINE_ERROR_BACKOFF_SECONDS": "0.5"}
        operator = OperatorProcess(cluster.kubeconfig_for(folder / "kubeconfig", USER), folder, shipped)
        operator.start()
        try:
            await operator.ready()
            async with live_api(cluster.kubeconfig) as api, FakeKubelet(api) as kubelet:
                rows = await _short_runs(cluster, api, kubelet, operator)
                rows += await _held_runs(cluster, api, kubelet, operator)
                return rows
        finally:
            operator.stop()


async def _short_runs(
    cluster: ControlPlane, api: LiveApi, kubelet: FakeKubelet, operator: OperatorProcess
) -> list[dict[str, str]]:
    """100 pipelines of short stages, a few at a time; then 20 at once."""
    idle = _resident(operator)
    steady = await _runs(cluster, api, kubelet, SHORT, at_once=4, seconds=STAGE_SECONDS)
    burst = await _runs(cluster, api, kubelet, BURST, at_once=BURST, seconds=0.0)
    jobs = SHORT * JOBS_PER_RUN
    # A run itself costs two more: its record and the status that says that it is accepted.
    per_stage = (steady.object_writes - 2 * SHORT) / jobs
    events = steady.event_writes / jobs
    cpu = psutil.Process(_pid(operator)).cpu_times()
    in_all = (SHORT + BURST) * JOBS_PER_RUN
    return [
        _row(f"stage end → next Job, {SHORT} runs, 4 at a time, p50", f"{_percentile(steady.gaps, 50):.0f} ms", "< 100 ms"),
        _row("… p99", f"{_percentile(steady.gaps, 99):.0f} ms", "< 500 ms"),
        _row(f"stage end → next Job, {BURST} runs at once, p50 / p99",
             f"{_percentile(burst.gaps, 50):.0f} / {_percentile(burst.gaps, 99):.0f} ms", ""),
        _row("writes per stage (its Job, status)", f"{per_stage:.2f}", "≤ 3"),
        _row("writes per run besides (record, acceptance)", "2", ""),
        _row("events per stage", f"{events:.2f}", ""),
        _row("Jobs created twice", str(steady.doubles + burst.doubles), "0"),
        _row("operator CPU per stage", f"{1000 * (cpu.user + cpu.system) / in_all:.0f} ms", ""),
        _row("load average of the machine meanwhile", f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", ""),
        _row("operator memory, idle", f"{idle:.0f} MiB", ""),
        _row(f"operator memory after {SHORT + BURST} runs", f"{_resident(operator):.0f} MiB", "< 150 MiB"),
    ]  # fmt: skip


async def _held_runs(
    cluster: ControlPlane, api: LiveApi, kubelet: FakeKubelet, operator: OperatorProcess
) -> list[dict[str, str]]:
    """200 pipelines at the same time, each with a stage that runs."""
    namespace = _namespace(cluster, "bench-held")

    async def for_ever(attempt: Attempt) -> Ending:
        await asyncio.Event().wait()
        raise AssertionError

    kubelet.script(namespace, "domain", for_ever)
    for number in range(HELD):
        await _create(api, namespace, f"held-{number}")

    async def all_run() -> bool:
        found = await api.list(PIPELINES, namespace)
        return sum(_stage_phase(item, "domain") == "Running" for item in found) == HELD

    await eventually(f"{HELD} stages run", all_run, 600, interval=2.0, explain=operator.tail)
    return [_row(f"operator memory, {HELD} pipelines running", f"{_resident(operator):.0f} MiB", "< 150 MiB")]


@dataclass
class Measured:
    """What the audit log tells of a series of runs."""

    gaps: list[float]
    """Milliseconds from each stage's end to the next Job."""
    object_writes: int
    event_writes: int
    doubles: int


async def _runs(
    cluster: ControlPlane, api: LiveApi, kubelet: FakeKubelet, count: int, *, at_once: int, seconds: float
) -> Measured:
    namespace = _namespace(cluster, f"bench-{count}-{at_once}")

    async def work(attempt: Attempt) -> Ending:
        await asyncio.sleep(seconds)
        return await succeed(attempt)

    for stage in ("preflight", "finalize", *(item["name"] for item in STAGES)):
        kubelet.script(namespace, str(stage), work)
    left = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        async with left:
            name = f"run-{number}"
            await _create(api, namespace, name)

            async def ended() -> bool:
                phase = ((await api.get(PIPELINES, name, namespace)).get("status") or {}).get("phase")
                assert phase not in ("Failed", "Refused"), f"{name}: {phase}"
                return phase == "Succeeded"

            await eventually(f"{name} ends", ended, 600, interval=0.5)

    await asyncio.gather(*(one(number) for number in range(count)))
    await asyncio.sleep(1)  # the last events
    return _read_audit(cluster.audit_log, namespace)


def _read_audit(path: Path, namespace: str) -> Measured:
    ends: dict[str, float] = {}
    creates: dict[str, list[tuple[float, str]]] = defaultdict(list)
    objects = events = 0
    for entry in _entries(path, namespace):
        target, verb, user = entry["objectRef"], entry["verb"], entry["user"]["username"]
        resource, name = target["resource"], target.get("name", "")
        moment = datetime.fromisoformat(entry["stageTimestamp"]).timestamp() * 1000
        if resource == "jobs" and target.get("subresource") == "status":
            ends[name] = max(moment, ends.get(name, 0.0))  # the last write of a Job's status is its end
        if user != USER or verb not in ("create", "patch", "update", "delete"):
            continue
        if resource == "events":
            events += 1
            continue
        objects += 1
        if resource == "jobs" and verb == "create" and entry["responseStatus"]["code"] == 201:
            creates[entry["requestObject"]["metadata"]["labels"]["plumbline.dev/pipeline"]].append((moment, name))
    gaps = []
    for made in creates.values():
        made.sort()
        gaps += [moment - ends[before] for (_, before), (moment, _) in itertools.pairwise(made)]
    doubles = sum(len(made) - len({name for _, name in made}) for made in creates.values())
    assert gaps, "the audit log tells of no hand-over"
    return Measured(gaps, objects, events, doubles)


def _entries(path: Path, namespace: str) -> Iterator[dict[str, Any]]:
    with path.open() as lines:
        for line in lines:
            if namespace not in line or not line.endswith("\n"):
                continue
            entry = json.loads(line)
            if entry["stage"] == "ResponseComplete" and (entry.get("objectRef") or {}).get("namespace") == namespace:
                yield entry


def _namespace(cluster: ControlPlane, prefix: str) -> str:
    name = f"{prefix}-{int(time.time())}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    return name


async def _create(api: LiveApi, namespace: str, name: str) -> None:
    # A seed of its own: the same work twice would be computed once.
    body = pipeline_body(name=name, namespace=namespace, stages=STAGES, seed=abs(hash((namespace, name))) % 2**31)
    for given_by_server in ("uid", "generation"):
        del body["metadata"][given_by_server]
    await api.create(PIPELINES, body, namespace)


def _stage_phase(pipeline: dict[str, Any], stage: str) -> str | None:
    entries = (pipeline.get("status") or {}).get("stages", [])
    return next((entry["phase"] for entry in entries if entry["name"] == stage), None)


def _pid(operator: OperatorProcess) -> int:
    assert operator.process is not None
    return operator.process.pid


def _resident(operator: OperatorProcess) -> float:
    return psutil.Process(_pid(operator)).memory_info().rss / MEBIBYTE


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _row(figure: str, value: str, aim: str) -> dict[str, str]:
    return {"figure": figure, "measured": value, "aim": aim}
