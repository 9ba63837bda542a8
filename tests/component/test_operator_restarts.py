"""Operators that end, die, come twice or lose the API server: the run ends the same, and no Job is made twice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from plumbline_operator.kube import JOBS
from support.audit import count_creates, count_writes
from support.cluster_fixtures import ControlPlane
from support.fakekubelet import Attempt, Ending, FakeKubelet, succeed
from support.faultproxy import Answer, fault_proxy, nothing, sometimes
from support.operatorprocess import OperatorProcess

pytestmark = pytest.mark.component

TWO = [
    {"name": "sft", "sft": {"dataset": "tickets", "lora": {"rank": 4}}},
    {"name": "final", "merge": {}},
]


def outcome(pipeline: dict[str, Any]) -> Any:
    """How a run ended, without times and names that differ from run to run."""
    status = pipeline["status"]
    stages = {entry["name"]: (entry["phase"], entry["attempt"], entry["failures"]) for entry in status["stages"]}
    conditions = {item["type"]: item["status"] for item in status["conditions"]}
    return status["phase"], stages, conditions


@asynccontextmanager
async def revived(operator: OperatorProcess) -> AsyncIterator[None]:
    """Start the operator again whenever it ends, as its Deployment would."""

    async def revive() -> None:
        while True:
            if operator.process is not None and operator.process.poll() is not None:
                operator.start()
            await asyncio.sleep(0.05)

    reviver = asyncio.create_task(revive())
    try:
        yield
    finally:
        reviver.cancel()


ENDED_WELL = (
    "Succeeded",
    dict.fromkeys(("preflight", "sft", "final", "finalize"), ("Succeeded", 1, 0)),
    {
        "Accepted": "True", "Running": "False", "Suspended": "False", "Reported": "True", "Reconciling": "False",
        "Stalled": "False", "Succeeded": "True", "Failed": "False", "Ready": "True",
    },
)  # fmt: skip


async def test_second_pass_and_restart_write_nothing(
    installed: ControlPlane, idle_operator: OperatorProcess, kubelet: FakeKubelet, tenant
) -> None:
    operator = idle_operator
    operator.start()
    await tenant.apply(stages=TWO)
    before = (await tenant.until_ended())["metadata"]["resourceVersion"]
    operator.stop()
    writes = count_writes(installed.audit_log, "operator-a", tenant.namespace)
    operator.environment["PLUMBLINE_RESYNC_SECONDS"] = "0.5"
    operator.start()
    await operator.ready()

    async def listed() -> bool:
        return await operator.metric("plumbline_resyncs_total", outcome="complete") >= 4

    await tenant.until("four listings", listed)
    assert (await tenant.see())["metadata"]["resourceVersion"] == before
    assert count_writes(installed.audit_log, "operator-a", tenant.namespace) == writes


async def test_operator_ends_and_goes_on(idle_operator: OperatorProcess, kubelet: FakeKubelet, tenant) -> None:
    operator = idle_operator
    operator.start()
    hold = asyncio.Event()

    async def until_released(attempt: Attempt) -> Ending:
        await hold.wait()
        return await succeed(attempt)

    kubelet.script(tenant.namespace, "sft", until_released)
    await tenant.apply(stages=TWO)
    await tenant.until_stage("sft", phase="Running")
    assert operator.stop() == 0
    hold.set()
    operator.start()
    assert (await tenant.until_ended())["status"]["phase"] == "Succeeded"
    assert kubelet.starts[tenant.namespace, "sft"] == 1


async def test_two_operators_start_each_job_once(
    installed: ControlPlane, idle_operator: OperatorProcess, kubelet: FakeKubelet, tenant, tmp_path: Path
) -> None:
    other = OperatorProcess(installed.kubeconfig_for(tmp_path / "b", "operator-b"), tmp_path, name="operator-b")
    idle_operator.start()
    other.start()
    try:
        await idle_operator.ready()
        await other.ready()
        names = [f"run-{number}" for number in range(5)]
        for name in names:
            await tenant.apply(name, stages=TWO)
        for name in names:
            assert outcome(await tenant.until_ended(name)) == ENDED_WELL
    finally:
        assert other.stop() == 0
    creates = count_creates(installed.audit_log, "jobs", tenant.namespace)
    assert len(creates) == 4 * len(names)
    assert set(creates.values()) == {1}
    assert count_writes(installed.audit_log, "operator-b", tenant.namespace), "the second one did take part"


async def test_killed_before_and_after_every_write(
    installed: ControlPlane, idle_operator: OperatorProcess, kubelet: FakeKubelet, tenant, tmp_path: Path
) -> None:
    """SIGKILL at a random half of all writes, each time before or after it reached the API server."""
    chance = random.Random(11)
    deaths: list[str] = []
    async with fault_proxy(idle_operator.kubeconfig) as proxy:
        operator = OperatorProcess(proxy.kubeconfig(tmp_path / "proxy"), tmp_path, name="killed")

        def die(when: str) -> Any:
            def strike(number: int, request: web.Request) -> None:
                if chance.random() < 0.25 and len(deaths) < 10:
                    deaths.append(f"{when} {request.method} {request.path}")
                    assert operator.process is not None
                    os.kill(operator.process.pid, signal.SIGKILL)
                    if when == "before":
                        raise ConnectionResetError  # the write never reached the API server

            return strike

        proxy.before, proxy.after = die("before"), die("after")
        operator.start()
        tenant.log = operator
        await tenant.apply(stages=TWO)
        async with revived(operator):
            pipeline = await tenant.until_ended(seconds=240)
        operator.kill()
    assert len(deaths) >= 4, deaths
    assert outcome(pipeline) == ENDED_WELL, deaths
    creates = count_creates(installed.audit_log, "jobs", tenant.namespace)
    assert len(creates) == 4, deaths
    assert set(creates.values()) == {1}, deaths
    assert set(kubelet.starts.values()) == {1}
    assert not operator.defects(), operator.tail()


async def test_errors_of_the_api_server_lose_nothing(
    installed: ControlPlane, idle_operator: OperatorProcess, kubelet: FakeKubelet, tenant, tmp_path: Path
) -> None:
    """30 % of all requests answered 429, 500, 503 or 409; then none, and the run has ended well."""
    async with fault_proxy(idle_operator.kubeconfig) as proxy:
        operator = OperatorProcess(proxy.kubeconfig(tmp_path / "proxy"), tmp_path, name="faults")
        operator.start()
        await operator.ready()
        proxy.fault = sometimes(
            0.3,
            Answer(429, "TooManyRequests", retry_after=1),
            Answer(500),
            Answer(503, "ServiceUnavailable"),
            Answer(409, "Conflict"),
        )
        begun, requests = asyncio.get_running_loop().time(), proxy.requests
        tenant.log = operator
        await tenant.apply(stages=TWO)
        async with revived(operator):
            pipeline = await tenant.until_ended(seconds=180)
        rate = (proxy.requests - requests) / (asyncio.get_running_loop().time() - begun)
        assert proxy.failed > 10
        assert rate < 50, "a failing server is not hammered"
        assert outcome(pipeline) == ENDED_WELL
        assert set(count_creates(installed.audit_log, "jobs", tenant.namespace).values()) == {1}
        proxy.fault = nothing
        operator.stop()


async def test_an_outage_of_the_api_server_is_outlived(
    installed: ControlPlane, idle_operator: OperatorProcess, kubelet: FakeKubelet, tenant, tmp_path: Path
) -> None:
    hold = asyncio.Event()

    async def until_released(attempt: Attempt) -> Ending:
        await hold.wait()
        return await succeed(attempt)

    kubelet.script(tenant.namespace, "sft", until_released)
    async with fault_proxy(idle_operator.kubeconfig) as proxy:
        operator = OperatorProcess(
            proxy.kubeconfig(tmp_path / "proxy"), tmp_path, {"PLUMBLINE_RESYNC_SECONDS": "2"}, name="outage"
        )
        operator.start()
        await operator.ready()
        await tenant.apply(stages=TWO)
        job = (await tenant.until_stage("sft", phase="Running"))["job"]
        proxy.go_down()
        hold.set()  # the stage ends while the operator sees nothing

        async def over() -> bool:
            found = await tenant.api.get(JOBS, job, tenant.namespace)
            return bool(found["status"].get("completionTime"))

        await tenant.until("the Job's end", over)
        assert (await tenant.stage("sft"))["phase"] == "Running"
        proxy.come_up()
        assert outcome(await tenant.until_ended(seconds=120)) == ENDED_WELL
        assert operator.process is not None
        assert operator.process.poll() is None, "an outage is no reason to end"
        operator.stop()


async def test_lost_watch_events_are_made_up_for_by_the_slow_loop(
    idle_operator: OperatorProcess, kubelet: FakeKubelet, tenant, tmp_path: Path
) -> None:
    async with fault_proxy(idle_operator.kubeconfig) as proxy:
        proxy.fault = lambda request: Answer(503, "ServiceUnavailable") if "watch" in request.query else None
        operator = OperatorProcess(
            proxy.kubeconfig(tmp_path / "proxy"), tmp_path, {"PLUMBLINE_RESYNC_SECONDS": "0.5"}, name="blind"
        )
        operator.start()
        await operator.ready()
        await tenant.apply(stages=TWO)
        assert outcome(await tenant.until_ended(seconds=120)) == ENDED_WELL
        operator.kill()
