"""Observe, plan and apply together over an API server in a dictionary: order of writes, idempotence, deaths, doubles."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from plumbline_api.names import record_name
from plumbline_operator.errors import ApiError, RefusedError, api_error
from plumbline_operator.kube import JOBS, PIPELINES, RECORDS, RUNTIMES, SERVICES
from support.controlling import NAME, NAMESPACE, Cluster, Process, finish, run_of
from support.fakekube import Killed, Write
from support.fakekubelet import Ending, ended, succeeded, waiting
from support.pipelines import pipeline_body

TWO = [
    {"name": "sft", "sft": {"dataset": "tickets", "lora": {"rank": 4}}},
    {"name": "final", "merge": {}},
]
FORK = [
    {"name": "base", "pretrain": {"dataset": "manuals"}},
    {"name": "left", "model": "base", "sft": {"dataset": "tickets"}},
    {"name": "right", "model": "base", "sft": {"dataset": "tickets", "training": {"epochs": 2}}},
]


def cluster_of(stages: list[dict[str, Any]] = TWO, **spec: Any) -> Cluster:
    return Cluster(body=pipeline_body(stages=stages, **spec))


def kinds(writes: list[Write]) -> list[str]:
    return [f"{verb} {kind}" for verb, kind, _ in writes]


async def test_the_first_pass_freezes_the_record_starts_preflight_and_then_says_so() -> None:
    cluster = cluster_of()
    await cluster.reconcile()
    assert kinds(cluster.kube.writes) == [
        "create controllerrevisions",
        "create jobs",
        "patch alignmentpipelines/status",
    ]
    assert cluster.status["phase"] == "Preflight"
    job = cluster.jobs()["preflight"]
    assert job["metadata"]["ownerReferences"][0]["uid"] == cluster.pipeline["metadata"]["uid"]


async def test_a_second_pass_writes_nothing_at_any_point_of_a_run() -> None:
    cluster = cluster_of(FORK)
    for _ in range(30):
        await cluster.reconcile()
        before = len(cluster.kube.writes)
        await cluster.reconcile()
        cluster.boot()
        await cluster.reconcile()
        assert cluster.kube.writes[before:] == []
        if cluster.status.get("completionTime"):
            break
        for job in cluster.open_jobs():
            cluster.end(job["metadata"]["annotations"]["plumbline.dev/stage"])
        cluster.later(1)
    assert cluster.status["phase"] == "Succeeded"


async def test_two_writes_per_stage_when_stages_are_short() -> None:
    cluster = cluster_of()
    await finish(cluster)
    # record; 4 Jobs; status at the start, at each hand-over and at the end
    assert sorted(set(kinds(cluster.kube.writes))) == [
        "create controllerrevisions",
        "create jobs",
        "patch alignmentpipelines/status",
    ]
    assert len(cluster.kube.writes) == 1 + 4 + 5


async def test_a_shown_start_costs_one_more_write() -> None:
    cluster = cluster_of()
    await cluster.reconcile()
    before = len(cluster.kube.writes)
    cluster.run_pod("preflight")
    await cluster.reconcile()
    await cluster.reconcile()
    assert len(cluster.kube.writes) == before + 1
    assert cluster.phases()["preflight"] == "Running"


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("stages", [TWO, FORK], ids=["line", "fork"])
async def test_dying_at_any_write_ends_the_same(stages: list[dict[str, Any]], moment: str) -> None:
    calm = cluster_of(stages)
    await finish(calm)
    expected = outcome(calm)
    for number in range(len(calm.kube.writes)):
        cluster = cluster_of(stages)
        deaths = []

        def die(count: int, write: Write, number: int = number, deaths: list[Write] = deaths) -> None:
            if count == number and not deaths:
                deaths.append(write)
                raise Killed

        setattr(cluster.kube, moment, die)
        await finish(cluster)
        assert deaths, f"write {number} never came"
        assert outcome(cluster) == expected, f"died {moment} {deaths[0]}"
        assert set(cluster.kube.created.values()) == {1}, f"died {moment} {deaths[0]}"


def outcome(cluster: Cluster) -> Any:
    """The end state without its times and random names."""
    status = copy.deepcopy(cluster.status)
    for gone in ("startTime", "completionTime"):
        status.pop(gone)
    for item in status["conditions"]:
        item.pop("lastTransitionTime")
    for entry in status["stages"]:
        for gone in ("startTime", "completionTime"):
            entry.pop(gone, None)
    return status, dict(cluster.kube.created)


async def test_two_operators_at_once_start_one_job_each() -> None:
    cluster = cluster_of(FORK)
    now = lambda: cluster.now  # noqa: E731
    twins = [Process(cluster.kube, now) for _ in range(2)]
    for _ in range(40):
        for process in twins:
            assert await process.resync.once()
        for process in twins:  # both act on what they saw before either wrote
            await process.controller.reconcile((NAMESPACE, NAME))
        if cluster.status.get("completionTime"):
            break
        for job in cluster.open_jobs():
            cluster.end(job["metadata"]["annotations"]["plumbline.dev/stage"])
        cluster.later(1)
    assert cluster.status["phase"] == "Succeeded"
    assert set(cluster.kube.created.values()) == {1}
    calm = cluster_of(FORK)
    await finish(calm)
    assert cluster.kube.created == calm.kube.created


async def test_a_stale_list_of_jobs_starts_nothing_twice() -> None:
    cluster = cluster_of()
    await cluster.reconcile()
    (job,) = cluster.kube.of(JOBS)
    blind = Process(cluster.kube, lambda: cluster.now)
    cluster.kube.remove(JOBS, job["metadata"]["name"], NAMESPACE)
    assert await blind.resync.once()
    cluster.kube.add(JOBS, job, NAMESPACE)
    await blind.controller.reconcile(cluster.key)
    assert cluster.kube.created["jobs/" + job["metadata"]["name"]] == 1
    assert cluster.phases()["preflight"] == "Queued"


async def test_a_suspension_that_was_not_seen_yet_is_seen_before_a_start() -> None:
    cluster = cluster_of()
    await cluster.reconcile()
    cluster.end("preflight")
    assert await cluster.process.resync.once()
    cluster.edit(suspend=True)
    await cluster.process.controller.reconcile(cluster.key)
    assert set(cluster.jobs()) == {"preflight"}


async def test_a_status_that_somebody_else_wrote_is_not_overwritten() -> None:
    cluster = cluster_of()
    edited = []

    def edit_once(count: int, write: Write) -> None:
        if write[1] == "alignmentpipelines/status" and not edited:
            edited.append(write)
            cluster.edit(seed=9)

    cluster.kube.before = edit_once
    await cluster.reconcile()
    assert cluster.status["observedGeneration"] == 2
    names = {item["metadata"]["name"] for item in cluster.kube.of(RECORDS)}
    uid = cluster.pipeline["metadata"]["uid"]
    assert names == {record_name(pipeline=NAME, uid=uid, generation=number) for number in (1, 2)}


async def test_stops_come_before_starts() -> None:
    cluster = cluster_of(FORK)
    await cluster.reconcile()
    cluster.end("preflight")
    await cluster.reconcile()
    cluster.end("base")
    await cluster.reconcile()
    stages = copy.deepcopy(FORK)
    stages[1]["sft"] = {"dataset": "tickets", "training": {"epochs": 3}}
    cluster.edit(stages=stages)
    await cluster.reconcile()
    cluster.end("preflight")
    before = len(cluster.kube.writes)
    await cluster.reconcile()
    assert kinds(cluster.kube.writes[before:]) == ["delete jobs", "patch alignmentpipelines/status"]
    left = cluster.jobs()["left"]
    assert "deletionTimestamp" in left["metadata"]
    cluster.reap()
    await cluster.reconcile()
    assert cluster.jobs()["left"]["metadata"]["name"] != left["metadata"]["name"]
    assert cluster.kube.created["jobs/" + cluster.jobs()["right"]["metadata"]["name"]] == 1


async def test_suspend_and_resume_patch_the_same_job() -> None:
    cluster = cluster_of()
    await cluster.reconcile()
    cluster.end("preflight")
    await cluster.reconcile()
    cluster.run_pod("sft")
    await cluster.reconcile()
    name = cluster.jobs()["sft"]["metadata"]["name"]
    cluster.edit(suspend=True)
    await cluster.reconcile()
    assert cluster.jobs()["sft"]["spec"]["suspend"] is True
    cluster.kube.change(JOBS, name, NAMESPACE, lambda job: job.update(status={}))
    await cluster.reconcile()
    assert cluster.status["phase"] == "Suspended"
    cluster.edit(suspend=False)
    await cluster.reconcile()
    assert cluster.jobs()["sft"]["spec"]["suspend"] is False
    assert cluster.jobs()["sft"]["metadata"]["name"] == name


async def test_a_foreign_job_is_reported_and_left_alone() -> None:
    cluster = cluster_of()
    await cluster.reconcile()
    name = cluster.jobs()["preflight"]["metadata"]["name"]
    cluster = cluster_of()
    foreign = cluster.kube.add(JOBS, {"metadata": {"name": name}, "spec": {"parallelism": 1}}, NAMESPACE)
    await cluster.reconcile()
    assert cluster.status["stages"][0]["reason"] == "NameConflict"
    assert cluster.kube.objects["jobs", NAMESPACE, name] == foreign


async def test_a_refused_job_is_shown_and_tried_again_later() -> None:
    cluster = cluster_of()

    def refuse(count: int, write: Write) -> None:
        if write[:2] == ("create", "jobs"):
            raise api_error(403, "Forbidden", "exceeded quota: few")

    cluster.kube.before = refuse
    again = await cluster.reconcile()
    entry = cluster.status["stages"][0]
    assert (entry["phase"], entry["reason"]) == ("Queued", "JobRefused")
    assert "exceeded quota: few" in entry["message"]
    assert again is not None
    before = len(cluster.kube.writes)
    await cluster.reconcile()
    assert len(cluster.kube.writes) == before, "no try before it is due"
    cluster.process.refusals.clock = lambda: 1e12
    cluster.kube.before = lambda number, write: None
    await cluster.reconcile()
    assert cluster.status["stages"][0].get("reason") is None
    assert cluster.status["stages"][0]["attempt"] == 1


async def test_an_unreachable_server_fails_the_pass_and_changes_nothing() -> None:
    cluster = cluster_of()

    def fail(count: int, write: Write) -> None:
        raise api_error(503, "ServiceUnavailable", "etcd is gone", retry_after=3)

    cluster.kube.before = fail
    with pytest.raises(ApiError) as caught:
        await cluster.reconcile()
    assert caught.value.retry_after == 3
    assert not isinstance(caught.value, RefusedError)
    cluster.kube.before = lambda number, write: None
    await finish(cluster)
    assert cluster.status["phase"] == "Succeeded"


async def test_the_result_is_read_once_and_kept() -> None:
    cluster = cluster_of()
    await cluster.reconcile()
    cluster.end("preflight")
    await cluster.reconcile()
    reads = cluster.kube.reads["list pods"]
    for _ in range(3):
        await cluster.reconcile()
    assert cluster.kube.reads["list pods"] == reads


async def test_pods_of_an_ended_run_are_not_asked_after_a_restart() -> None:
    cluster = cluster_of()
    await finish(cluster)
    cluster.boot()
    reads = cluster.kube.reads["list pods"]
    await cluster.reconcile()
    assert cluster.kube.reads["list pods"] == reads


async def test_a_lost_message_starts_a_collect_job() -> None:
    cluster = cluster_of()
    await cluster.reconcile()
    cluster.end("preflight")
    await cluster.reconcile()
    cluster.end("sft", Ending(None), with_pod=False)
    await cluster.reconcile()
    (collect,) = [job for job in cluster.open_jobs() if run_of(job).role == "collect"]
    assert collect["metadata"]["annotations"]["plumbline.dev/stage"] == "sft"
    await finish(cluster)
    assert cluster.status["phase"] == "Succeeded"


async def test_why_a_pod_waits_is_asked_at_a_bounded_rate() -> None:
    cluster = cluster_of()
    moment = [1000.0]
    cluster.process.observer.clock = lambda: moment[0]
    await cluster.reconcile()
    job = cluster.jobs()["preflight"]
    cluster._pod(job, waiting("ImagePullBackOff", "no such image"))
    look_again = await cluster.reconcile()
    assert look_again == pytest.approx(5.0)
    assert not cluster.kube.reads["list pods"], "most pods start soon: nothing is asked at once"
    moment[0] += 6
    assert await cluster.reconcile() == pytest.approx(10.0)
    assert cluster.status["stages"][0]["reason"] == "ImagePullBackOff"
    for _ in range(5):
        await cluster.reconcile()
    assert cluster.kube.reads["list pods"] == 1


async def test_the_pass_that_starts_or_resumes_a_job_asks_for_another_look() -> None:
    """The API server tells nothing of a Job whose pod cannot start: without that look nobody would learn why."""
    cluster = cluster_of()
    cluster.process.observer.clock = lambda: 1000.0
    assert await cluster.reconcile() == pytest.approx(5.0)
    cluster.edit(suspend=True)
    await cluster.reconcile()
    assert await cluster.reconcile() is None, "a suspended Job has no pod to ask for"
    cluster.edit(suspend=False)
    assert await cluster.reconcile() == pytest.approx(5.0)


async def test_a_pod_that_ends_does_not_wait_again_but_its_replacement_does() -> None:
    cluster = cluster_of()
    moment = [1000.0]
    cluster.process.observer.clock = lambda: moment[0]
    await cluster.reconcile()
    cluster.run_pod("preflight")
    moment[0] += 60
    await cluster.reconcile()
    assert cluster.phases()["preflight"] == "Running"
    job = cluster.jobs()["preflight"]
    cluster._set(job, job["status"] | {"ready": 0})  # its container has ended, the Job has not counted it yet
    before, reads = len(cluster.kube.writes), cluster.kube.reads["list pods"]
    await cluster.reconcile()
    assert len(cluster.kube.writes) == before
    assert cluster.kube.reads["list pods"] == reads
    assert cluster.phases()["preflight"] == "Running"

    cluster._pod(job, waiting("ImagePullBackOff", "no such image"))  # it was drained, and another pod takes its place
    moment[0] += 6
    await cluster.reconcile()
    assert cluster.phases()["preflight"] == "Queued"
    assert cluster.status["stages"][0]["reason"] == "ImagePullBackOff"


async def test_a_twin_waits_for_the_running_one() -> None:
    cluster = cluster_of()
    await cluster.reconcile()
    cluster.end("preflight")
    await cluster.reconcile()
    cluster.run_pod("sft")
    await cluster.reconcile()
    body = pipeline_body(stages=TWO, name="copy", uid="0b9b5a4e-0000-4000-8000-000000000002")
    cluster.kube.add(PIPELINES, body)
    await cluster.reconcile()
    await cluster.process.controller.reconcile((NAMESPACE, "copy"))
    preflight = next(job for job in cluster.open_jobs() if run_of(job).pipeline.name == "copy")
    cluster._pod(preflight, {})
    cluster.kube.change(
        JOBS,
        preflight["metadata"]["name"],
        NAMESPACE,
        lambda job: job.update(
            status={
                "conditions": [{"type": "Complete", "status": "True", "lastTransitionTime": "2026-01-01T12:00:00Z"}]
            }
        ),
    )

    cluster._pod(preflight, ended(Ending(succeeded(run_of(preflight)))))
    await cluster.process.resync.once()
    await cluster.process.controller.reconcile((NAMESPACE, "copy"))
    copied = cluster.kube.objects["alignmentpipelines", NAMESPACE, "copy"]["status"]
    entry = next(item for item in copied["stages"] if item["name"] == "sft")
    assert entry["reason"] == "WaitingForTwin"


async def test_the_default_runtime_and_its_absence() -> None:
    cluster = cluster_of()
    cluster.kube.objects.pop(("alignmentruntimes", None, "cpu"))
    again = await cluster.reconcile()
    assert cluster.status["phase"] == "Refused"
    assert "no default one" in cluster.status["conditions"][0]["message"]
    assert again is not None
    cluster.kube.add(RUNTIMES, {"apiVersion": "plumbline.dev/v1alpha1", "kind": "AlignmentRuntime",
                                "metadata": {"name": "broken", "annotations": {"plumbline.dev/is-default-runtime": "true"}},
                                "spec": {}})  # fmt: skip
    await cluster.reconcile()
    assert "spec.image" in cluster.status["conditions"][0]["message"]


async def test_a_record_of_somebody_else_is_never_used() -> None:
    cluster = cluster_of()
    uid = cluster.pipeline["metadata"]["uid"]
    name = record_name(pipeline=NAME, uid=uid, generation=1)
    cluster.kube.add(RECORDS, {"metadata": {"name": name}, "revision": 1, "data": {}}, NAMESPACE)
    await cluster.reconcile()
    assert cluster.status["phase"] == "Refused"
    assert name in cluster.status["conditions"][0]["message"]
    assert not cluster.kube.of(JOBS)


async def test_several_nodes_get_a_service_first() -> None:
    cluster = cluster_of([TWO[0] | {"resources": {"nodes": 2}}])
    await cluster.reconcile()
    cluster.end("preflight")
    before = len(cluster.kube.writes)
    await cluster.reconcile()
    assert kinds(cluster.kube.writes[before:])[:2] == ["create services", "create jobs"]
    (service,) = cluster.kube.of(SERVICES)
    assert service["metadata"]["ownerReferences"][0]["uid"] == cluster.pipeline["metadata"]["uid"]


async def test_a_pipeline_that_is_being_deleted_is_let_go() -> None:
    cluster = cluster_of()
    await cluster.reconcile()
    before = len(cluster.kube.writes)
    cluster.kube.change(PIPELINES, NAME, NAMESPACE, lambda body: body["metadata"].update(deletionTimestamp="now"))
    await cluster.reconcile()
    cluster.kube.remove(PIPELINES, NAME, NAMESPACE)
    await cluster.reconcile()
    assert cluster.kube.writes[before:] == []


async def test_events_follow_the_status_and_their_loss_is_no_failure() -> None:
    cluster = cluster_of()
    await cluster.reconcile()
    assert not cluster.kube.created["events"], "events are not in the way of a pass"
    announcer = cluster.process.announcer
    await announcer.write_next()
    (event,) = [body for (kind, _, _), body in cluster.kube.objects.items() if kind == "events"]
    assert event["regarding"]["uid"] == cluster.pipeline["metadata"]["uid"]

    def refuse(count: int, write: Write) -> None:
        raise api_error(403, "Forbidden", "no events here")

    cluster.kube.before = refuse
    await announcer.write_next()
