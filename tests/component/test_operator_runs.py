"""Whole runs against a real API server: what a user sees from apply to the end."""

from __future__ import annotations

import asyncio
import json
import ssl

import aiohttp
import pytest
from plumbline_api.names import job_name
from plumbline_api.stagerun import PROGRESS_URL_ENV, StageResult
from plumbline_operator.kube import EVENTS, JOBS, PIPELINES, PODS, RECORDS, SERVICES, Resource
from plumbline_operator.podtemplate import PROGRESS_CA_ANNOTATION
from plumbline_operator.rbac import RULES
from support.audit import count_creates, count_writes
from support.cluster_fixtures import ControlPlane
from support.fakekubelet import Attempt, Ending, FakeKubelet, failing, succeed, succeeded, waiting
from support.operatorprocess import OperatorProcess, condition

pytestmark = pytest.mark.component

TWO = [
    {"name": "sft", "sft": {"dataset": "tickets", "lora": {"rank": 4}}},
    {"name": "final", "merge": {}},
]


async def test_run_from_apply_to_succeeded(
    installed: ControlPlane, operator: OperatorProcess, kubelet: FakeKubelet, tenant
) -> None:
    created = await tenant.apply()
    pipeline = await tenant.until_ended()
    status = pipeline["status"]
    assert status["phase"] == "Succeeded", status
    assert condition(pipeline, "Succeeded")["status"] == "True"
    assert condition(pipeline, "Ready")["status"] == "True"
    assert all(item["observedGeneration"] == 1 for item in status["conditions"])
    assert await tenant.phases() == dict.fromkeys(
        ("preflight", "domain", "sft", "dpo", "final", "exam", "finalize"), "Succeeded"
    )
    assert status["model"]["stage"] == "final"

    creates = count_creates(installed.audit_log, "jobs", tenant.namespace)
    assert len(creates) == 7
    assert set(creates.values()) == {1}
    writes = count_writes(installed.audit_log, "operator-a", tenant.namespace)
    del writes["create events"]
    assert sum(writes.values()) <= 3 * 7, writes
    assert writes["create controllerrevisions"] == 1

    revision = await tenant.api.get(RECORDS, status["record"], tenant.namespace)
    assert revision["metadata"]["ownerReferences"][0]["uid"] == created["metadata"]["uid"]

    async def told() -> bool:
        events = await tenant.api.list(EVENTS, tenant.namespace)
        return any(event["reason"] == "Succeeded" and event["regarding"]["name"] == "run" for event in events)

    await tenant.until("the event Succeeded", told)


async def test_failed_stage_ends_the_run_with_the_trainers_words(
    operator: OperatorProcess, kubelet: FakeKubelet, tenant
) -> None:
    message = "tickets.jsonl line 7: no field `output`; add it or set columns"
    kubelet.script(tenant.namespace, "sft", failing("BadInput", message, exit_code=2))
    await tenant.apply(stages=TWO)
    pipeline = await tenant.until_ended()
    assert pipeline["status"]["phase"] == "Failed"
    assert message in condition(pipeline, "Failed")["message"]
    entry = await tenant.stage("sft")
    assert (entry["phase"], entry["reason"], entry["attempt"]) == ("Failed", "BadInput", 1)
    assert (await tenant.stage("final"))["phase"] == "Skipped"
    assert (await tenant.stage("finalize"))["phase"] == "Succeeded"


async def test_transient_failure_is_retried(operator: OperatorProcess, kubelet: FakeKubelet, tenant) -> None:
    kubelet.script(tenant.namespace, "sft", failing("Transient", "connection reset", exit_code=75, times=1))
    await tenant.apply(stages=TWO)
    pipeline = await tenant.until_ended()
    assert pipeline["status"]["phase"] == "Succeeded"
    entry = await tenant.stage("sft")
    assert (entry["attempt"], entry["failures"]) == (2, 1)


async def test_retry_of_a_failed_run(operator: OperatorProcess, kubelet: FakeKubelet, tenant) -> None:
    kubelet.script(tenant.namespace, "final", failing("StorageDenied", "403 from the store", exit_code=2, times=1))
    await tenant.apply(stages=TWO)
    assert (await tenant.until_ended())["status"]["phase"] == "Failed"
    await tenant.edit(retry={"nonce": "again"})
    pipeline = await tenant.until_phase("Succeeded")
    assert pipeline["status"]["retryNonce"] == "again"
    assert kubelet.starts[tenant.namespace, "sft"] == 1
    assert kubelet.starts[tenant.namespace, "preflight"] == 1


async def test_suspend_and_resume(operator: OperatorProcess, kubelet: FakeKubelet, tenant) -> None:
    hold = asyncio.Event()

    async def until_released(attempt: Attempt) -> Ending:
        await hold.wait()
        return await succeed(attempt)

    kubelet.script(tenant.namespace, "sft", until_released)
    kubelet.stop_result = lambda run: Ending(
        StageResult(outcome="Stopped", reason="Interrupted", message="checkpoint at step 3"), exit_code=143
    )
    await tenant.apply(stages=TWO)
    await tenant.until_stage("sft", phase="Running")
    await tenant.edit(suspend=True)
    pipeline = await tenant.until_phase("Suspended")
    assert condition(pipeline, "Suspended")["status"] == "True"
    assert (await tenant.stage("sft"))["phase"] == "Suspended"
    assert not await tenant.api.list(PODS, tenant.namespace, "plumbline.dev/stage=sft")

    hold.set()
    await tenant.edit(suspend=False)
    pipeline = await tenant.until_ended()
    assert pipeline["status"]["phase"] == "Succeeded"
    entry = await tenant.stage("sft")
    assert (entry["attempt"], entry["failures"]) == (1, 0), "a suspension is no new attempt"
    assert kubelet.starts[tenant.namespace, "sft"] == 2


async def test_edit_while_running_stops_only_what_changed(
    operator: OperatorProcess, kubelet: FakeKubelet, tenant
) -> None:
    hold = asyncio.Event()

    async def until_released(attempt: Attempt) -> Ending:
        await hold.wait()
        return await succeed(attempt)

    stages = [
        {"name": "left", "sft": {"dataset": "tickets", "lora": {"rank": 4}}},
        {"name": "right", "pretrain": {"dataset": "manuals"}},
    ]
    stages[1]["model"] = "base"
    stages.insert(0, {"name": "base", "pretrain": {"dataset": "manuals"}})
    stages[1]["model"] = "base"
    stages[2]["model"] = "base"
    for stage in ("left", "right"):
        kubelet.script(tenant.namespace, stage, until_released)
    await tenant.apply(stages=stages)
    await tenant.until_stage("left", phase="Running")
    before = await tenant.until_stage("right", phase="Running")
    stages[1]["sft"]["lora"]["rank"] = 8
    await tenant.edit(stages=stages)

    async def restarted() -> bool:
        return kubelet.starts[tenant.namespace, "left"] == 2

    await tenant.until("left starts anew", restarted)
    hold.set()
    pipeline = await tenant.until_ended()
    assert pipeline["status"]["phase"] == "Succeeded"
    assert pipeline["status"]["observedGeneration"] == 2
    after = await tenant.stage("right")
    assert (after["job"], after["attempt"]) == (before["job"], 1)
    assert kubelet.starts[tenant.namespace, "right"] == 1
    assert kubelet.starts[tenant.namespace, "base"] == 1


async def test_delete_while_running_takes_everything_along(
    operator: OperatorProcess, kubelet: FakeKubelet, tenant
) -> None:
    async def for_ever(attempt: Attempt) -> Ending:
        await asyncio.Event().wait()
        raise AssertionError

    kubelet.script(tenant.namespace, "sft", for_ever)
    await tenant.apply(stages=TWO)
    await tenant.until_stage("sft", phase="Running")
    await tenant.api.delete(PIPELINES, "run", tenant.namespace, uid=(await tenant.see())["metadata"]["uid"])
    await tenant.until_gone()

    async def empty() -> bool:
        found = [await tenant.api.list(kind, tenant.namespace) for kind in (JOBS, PODS, RECORDS)]
        return not any(found)

    await tenant.until("Jobs, pods and records are gone", empty)


async def test_foreign_job_is_left_alone(
    installed: ControlPlane, operator: OperatorProcess, kubelet: FakeKubelet, tenant
) -> None:
    hold = asyncio.Event()

    async def until_released(attempt: Attempt) -> Ending:
        await hold.wait()
        return await succeed(attempt)

    kubelet.script(tenant.namespace, "sft", until_released)
    await tenant.apply(stages=TWO)
    sft = (await tenant.until_stage("sft", phase="Running"))["job"]
    fingerprint = (await tenant.stage("final"))["fingerprint"]
    uid = (await tenant.see())["metadata"]["uid"]
    name = job_name(pipeline="run", stage="final", uid=uid, fingerprint=fingerprint, attempt=1)
    squatter = await tenant.api.get(JOBS, sft, tenant.namespace)
    spec = squatter["spec"]
    for generated in ("selector", "manualSelector"):
        spec.pop(generated, None)
    spec["template"]["metadata"].pop("labels")
    spec["suspend"] = True
    made = await tenant.api.create(
        JOBS, {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}, tenant.namespace
    )
    hold.set()
    pipeline = await tenant.until_ended()
    assert pipeline["status"]["phase"] == "Failed"
    entry = await tenant.stage("final")
    assert entry["reason"] == "NameConflict"
    assert name in entry["message"]
    there = await tenant.api.get(JOBS, name, tenant.namespace)
    assert there["metadata"]["uid"] == made["metadata"]["uid"]
    assert there["spec"] == made["spec"]

    await tenant.api.delete(JOBS, name, tenant.namespace, uid=made["metadata"]["uid"])
    await tenant.edit(retry={"nonce": "now-free"})
    assert (await tenant.until_phase("Succeeded"))["status"]["phase"] == "Succeeded"


async def test_lost_message_is_collected(operator: OperatorProcess, kubelet: FakeKubelet, tenant) -> None:
    async def silent(attempt: Attempt) -> Ending:
        return Ending(None, message="")

    kubelet.script(tenant.namespace, "sft", silent)
    await tenant.apply(stages=TWO)
    pipeline = await tenant.until_ended()
    assert pipeline["status"]["phase"] == "Succeeded"
    assert kubelet.starts[tenant.namespace, "sft"] == 1
    assert kubelet.starts[tenant.namespace, "collect"] == 1
    assert (await tenant.stage("sft"))["metrics"] == [{"name": "loss", "value": "1.5"}]


async def test_deleted_pod_is_a_free_new_attempt(operator: OperatorProcess, kubelet: FakeKubelet, tenant) -> None:
    async def first_waits(attempt: Attempt) -> Ending:
        if attempt.number == 1:
            await asyncio.Event().wait()
        return await succeed(attempt)

    kubelet.script(tenant.namespace, "sft", first_waits)
    await tenant.apply(stages=TWO)
    await tenant.until_stage("sft", phase="Running")
    (pod,) = await tenant.api.list(PODS, tenant.namespace, "plumbline.dev/stage=sft")
    await tenant.api.delete(PODS, pod["metadata"]["name"], tenant.namespace, uid=pod["metadata"]["uid"])
    pipeline = await tenant.until_ended()
    assert pipeline["status"]["phase"] == "Succeeded"
    entry = await tenant.stage("sft")
    assert (entry["attempt"], entry["failures"]) == (2, 0)


async def test_out_of_memory_and_why_a_pod_waits(operator: OperatorProcess, kubelet: FakeKubelet, tenant) -> None:
    async def held_up(attempt: Attempt) -> Ending:
        await attempt.patch_status(waiting("CreateContainerConfigError", 'secret "s3-credentials" not found'))
        await tenant.until_stage("sft", reason="CreateContainerConfigError")
        return Ending(None, exit_code=137, reason="OOMKilled", message="")

    kubelet.script(tenant.namespace, "sft", held_up)
    await tenant.apply(stages=TWO)
    waits = await tenant.until_stage("sft", reason="CreateContainerConfigError")
    assert "AWS_SECRET_ACCESS_KEY" in waits["message"]
    pipeline = await tenant.until_ended()
    entry = await tenant.stage("sft")
    assert (entry["phase"], entry["reason"]) == ("Failed", "OutOfMemory"), pipeline["status"]


async def test_refused_job_says_why_and_starts_when_it_may(
    installed: ControlPlane, operator: OperatorProcess, kubelet: FakeKubelet, tenant
) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "no-jobs"},
        "spec": {"hard": {"count/jobs.batch": "0"}},
    }
    installed.apply(quota, namespace=tenant.namespace)

    async def enforced() -> bool:
        return "hard" in installed.get("resourcequota", "no-jobs", "-n", tenant.namespace).get("status", {})

    await tenant.until("the quota", enforced)
    await tenant.apply(stages=TWO)
    entry = await tenant.until_stage("preflight", reason="JobRefused")
    assert "exceeded quota: no-jobs" in entry["message"]
    installed.kubectl("delete", "resourcequota", "no-jobs", "-n", tenant.namespace)
    pipeline = await tenant.until_ended()
    assert pipeline["status"]["phase"] == "Succeeded"
    assert (await tenant.stage("preflight"))["attempt"] == 1


async def test_refused_spec_and_missing_runtime(operator: OperatorProcess, kubelet: FakeKubelet, tenant) -> None:
    await tenant.apply(stages=[{"name": "sft", "sft": {"dataset": "prefs"}}], name="wrong")
    pipeline = await tenant.until_phase("Refused", name="wrong")
    accepted = condition(pipeline, "Accepted")
    assert accepted["status"] == "False"
    assert "spec.stages[0].sft.dataset" in accepted["message"]
    assert condition(pipeline, "Stalled")["status"] == "True"
    await tenant.apply(stages=TWO, name="astray", runtimeRef={"name": "no-such"})
    pipeline = await tenant.until_phase("Refused", name="astray")
    assert 'no AlignmentRuntime "no-such"' in condition(pipeline, "Accepted")["message"]
    assert not await tenant.jobs()


async def test_time_to_live(operator: OperatorProcess, kubelet: FakeKubelet, tenant) -> None:
    await tenant.apply(stages=TWO, ttlAfterFinished="1s")
    await tenant.until_gone(seconds=60)


async def test_tampered_record_is_refused(operator: OperatorProcess, kubelet: FakeKubelet, tenant) -> None:
    await tenant.apply(stages=TWO)
    pipeline = await tenant.until_ended()
    revision = await tenant.api.get(RECORDS, pipeline["status"]["record"], tenant.namespace)
    forged = {key: revision[key] for key in ("apiVersion", "kind", "data")}
    forged["data"]["seed"] = 99
    name = revision["metadata"]["name"].removesuffix("-1") + "-2"
    kept = {key: revision["metadata"][key] for key in ("labels", "annotations", "ownerReferences")}
    await tenant.api.create(RECORDS, forged | {"metadata": {"name": name, **kept}, "revision": 2}, tenant.namespace)
    await tenant.edit(seed=5)
    pipeline = await tenant.until_phase("Refused")
    assert "does not hold what was frozen" in condition(pipeline, "Accepted")["message"]


async def test_stage_on_two_nodes(operator: OperatorProcess, kubelet: FakeKubelet, tenant) -> None:
    async def only_first_tells(attempt: Attempt) -> Ending:
        index = attempt.pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]
        return Ending(succeeded(attempt.run, message="rank 0") if index == "0" else None)

    kubelet.script(tenant.namespace, "sft", only_first_tells)
    stages = [TWO[0] | {"resources": {"nodes": 2}}]
    await tenant.apply(stages=stages)
    assert (await tenant.until_ended())["status"]["phase"] == "Succeeded"
    assert kubelet.starts[tenant.namespace, "sft"] == 2
    assert (await tenant.stage("sft"))["message"] == "rank 0"
    (service,) = await tenant.api.list(SERVICES, tenant.namespace)
    assert service["spec"]["clusterIP"] == "None"


async def test_progress_of_the_right_pod_is_shown_at_a_bounded_rate(
    installed: ControlPlane, operator: OperatorProcess, kubelet: FakeKubelet, tenant
) -> None:
    hold = asyncio.Event()

    async def until_released(attempt: Attempt) -> Ending:
        await hold.wait()
        return await succeed(attempt)

    kubelet.script(tenant.namespace, "sft", until_released)
    await tenant.apply(stages=TWO)
    await tenant.until_stage("sft", phase="Running")
    (pod,) = await tenant.api.list(PODS, tenant.namespace, "plumbline.dev/stage=sft")
    env = {item["name"]: item.get("value") for item in pod["spec"]["containers"][0]["env"]}
    trust = ssl.create_default_context(cadata=pod["metadata"]["annotations"][PROGRESS_CA_ANNOTATION])

    async def post(token: str, percentage: int) -> int:
        report = {"trainerStatus": {"progressPercentage": percentage, "message": f"step {percentage}/100"}}
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                env[PROGRESS_URL_ENV], json=report, ssl=trust, headers={"Authorization": f"Bearer {token}"}
            ) as response,
        ):
            return response.status

    good = await token_of(tenant, pod, "plumbline.dev/progress")
    assert await post(good, 40) == 204
    entry = await tenant.until("progress", lambda: progress_of(tenant, 40))
    assert entry["progress"]["message"] == "step 40/100"
    before = count_writes(installed.audit_log, "operator-a", tenant.namespace)["patch alignmentpipelines/status"]
    for percentage in (41, 42, 43):
        assert await post(good, percentage) == 204
    assert await post(await token_of(tenant, pod, "https://kubernetes.default.svc"), 99) == 401
    assert await post("made-up", 99) == 401
    (other,) = await tenant.api.list(PODS, tenant.namespace, "plumbline.dev/stage=preflight")
    assert await post(await token_of(tenant, other, "plumbline.dev/progress"), 99) in (401, 403)
    await tenant.until("the next write", lambda: progress_of(tenant, 43))
    writes = count_writes(installed.audit_log, "operator-a", tenant.namespace)
    assert writes["patch alignmentpipelines/status"] == before + 1
    assert (await tenant.see())["status"]["progress"] == "43%"
    hold.set()
    assert (await tenant.until_ended())["status"]["phase"] == "Succeeded"
    assert await post(good, 100) == 403, "the Job has ended"


async def progress_of(tenant, percentage: int) -> dict | None:
    entry = await tenant.stage("sft")
    return entry if (entry.get("progress") or {}).get("percentage") == percentage else None


async def token_of(tenant, pod: dict, audience: str) -> str:
    """A token as kubelet projects it into the pod."""
    reference = {"kind": "Pod", "apiVersion": "v1", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
    answer = await tenant.api.create(
        Resource("v1", "serviceaccounts/default/token"),
        {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"audiences": [audience], "expirationSeconds": 3600, "boundObjectRef": reference},
        },
        tenant.namespace,
    )
    return answer["status"]["token"]


async def test_rights_are_enough_and_all_are_used(
    installed: ControlPlane, operator: OperatorProcess, request: pytest.FixtureRequest
) -> None:
    """Runs last: what the tests above made the operator ask for, against what its rules give."""
    here = [item for item in request.session.items if item.path == request.path]
    is_whole = len(here) == sum(name.startswith("test_") for name in vars(request.module))
    granted = {
        (group, resource, verb)
        for rule in RULES
        for group in rule.groups
        for resource in rule.resources
        for verb in rule.verbs
    }
    asked = set()
    for line in installed.audit_log.read_text().splitlines():
        event = json.loads(line)
        target = event.get("objectRef") or {}
        if event["user"]["username"] != "operator-a" or "resource" not in target:
            continue
        resource = "/".join(part for part in (target["resource"], target.get("subresource")) if part)
        asked.add((target.get("apiGroup", ""), resource, event["verb"]))
        is_quota = resource == "jobs" and event["verb"] == "create"
        assert is_quota or (event.get("responseStatus") or {}).get("code") != 403, event
    assert asked <= granted
    # Asked for by the API server on behalf of whoever sets blockOwnerDeletion, and by rare paths.
    rare = {
        ("plumbline.dev", "alignmentpipelines/finalizers", "update"),
        ("", "services", "get"),
    }
    assert granted - asked <= rare or not is_whole
