"""What a user does to a run: edits, suspends, resumes, retries, deletes; and what stands in its way."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from plumbline_api.pipeline import Storage
from plumbline_api.runtime import AlignmentRuntime
from plumbline_operator.settings import PlanSettings
from plumbline_operator.snapshot import DeletePipeline, FreezeRecord, Plan, PodFailure, StopStage, SuspendStage
from support.planning import FORK, FOUR_STAGES, SETTINGS, World, failed, pipeline_body, runtime_body, succeeded

ONE = [{"name": "sft", "sft": {"dataset": "tickets"}}]


def starts(plan: Plan) -> list[str]:
    return [action.run.stage for action in plan.actions if hasattr(action, "run")]


def finished(stages: list[dict[str, Any]] | None = None, **spec: Any) -> World:
    world = World(pipeline_body(stages, **spec))
    names = [stage["name"] for stage in world.body["spec"]["stages"]]
    world.go("preflight", *names, "finalize")
    assert world.status.phase == "Succeeded"
    return world


# Acceptance


def test_everything_that_is_wrong_is_said_at_once():
    stages = [{"name": "sft", "sft": {"dataset": "nowhere"}}, {"name": "dpo", "dpo": {"dataset": "held"}}]
    world = World(pipeline_body(stages))
    plan = world.settle()
    assert plan.actions == ()
    accepted = world.condition("Accepted")
    assert (accepted.status, accepted.reason) == ("False", "InvalidSpec")
    assert "spec.stages[0].sft.dataset" in accepted.message
    assert "spec.stages[1].dpo.dataset" in accepted.message
    assert world.condition("Stalled").status == "True"
    assert world.status.phase == "Refused"
    assert world.event_reasons() == ["Refused"]
    world.later(3600)
    assert world.plan().status is None
    assert world.plan().requeue_after is None


def test_a_body_that_does_not_parse_is_refused_with_its_field_path():
    world = World()
    world.body["spec"]["stages"][0]["sft"]["learningRte"] = 1
    world.settle()
    assert "spec.stages[0].sft.learningRte: unknown field" in world.condition("Accepted").message


def test_a_corrected_spec_goes_on():
    world = World(pipeline_body([{"name": "sft", "sft": {"dataset": "nowhere"}}]))
    world.settle()
    world.edit(stages=ONE)
    world.settle()
    assert world.condition("Accepted").status == "True"
    assert world.status.phase == "Preflight"
    assert world.status.observed_generation == 2


def test_without_a_runtime_nothing_starts_until_there_is_one():
    world = World(runtime=None, runtime_problem='there is no AlignmentRuntime "h100". Known: cpu')
    plan = world.settle()
    assert world.condition("Accepted").reason == "NoRuntime"
    assert 'there is no AlignmentRuntime "h100"' in world.condition("Accepted").message
    assert plan.requeue_after == SETTINGS.runtime_poll_seconds
    world.runtime = AlignmentRuntime.parse(runtime_body())
    assert starts(world.settle()) == ["preflight"]


def test_what_the_runtime_does_not_allow_is_refused():
    world = World(runtime=AlignmentRuntime.parse(runtime_body(allow={"namespaces": ["team-b"]})))
    world.settle()
    assert world.condition("Accepted").reason == "NotAllowed"
    assert "team-a" in world.condition("Accepted").message


def test_a_pipeline_too_big_for_a_job_is_refused():
    text = "x" * 2000
    suites = [
        {"winRate": {"dataset": "held", "judge": {"model": {"source": f"s3://m/{n}", "rubric": text}}}}
        for n in range(10)
    ]
    world = World(pipeline_body([{"name": f"exam-{n}", "evaluate": {"suites": suites}} for n in range(4)]))
    world.settle()
    assert "split the pipeline" in world.condition("Accepted").message


def test_permission_taken_away_fails_the_next_stage_only():
    world = World()
    world.go("preflight")
    world.run("sft")
    refusing = runtime_body(allow={"datasetSources": ["s3://elsewhere"]})
    world.runtime = AlignmentRuntime.parse(refusing)
    world.settle()
    assert world.phases()["sft"] == "Running"
    world.end("sft")
    world.settle()
    assert (world.entry("dpo").phase, world.entry("dpo").reason) == ("Failed", "NotAllowed")
    assert "s3://elsewhere" in world.entry("dpo").message


def test_a_limit_that_only_another_stage_exceeds_does_not_stop_a_stage():
    stages = [ONE[0], {"name": "big", "model": "sft", "sft": {"dataset": "tickets"}, "resources": {"nodes": 4}}]
    world = World(pipeline_body(stages))
    world.settle()
    world.runtime = AlignmentRuntime.parse(runtime_body(limits={"nodes": 2}))
    world.go("preflight", "sft")
    assert (world.entry("sft").phase, world.entry("big").reason) == ("Succeeded", "NotAllowed")


def test_a_runtime_that_is_gone_is_waited_for():
    world = World()
    world.go("preflight")
    world.run("sft")
    world.runtime, world.runtime_problem = None, 'the AlignmentRuntime "gpu" is gone'
    world.end("sft")
    world.settle()
    assert (world.entry("dpo").phase, world.entry("dpo").reason) == ("Pending", "NoRuntime")
    world.runtime = AlignmentRuntime.parse(runtime_body())
    world.settle()
    assert world.phases()["dpo"] == "Queued"


# The record


def test_neither_an_edited_runtime_nor_an_upgrade_changes_a_run_under_way():
    world = World()
    world.go("preflight", "sft")
    world.runtime = AlignmentRuntime.parse(runtime_body(image="registry.example/new:2"))
    world.settings = PlanSettings(operator_version="9.9.9")
    world.edit(suspend=True)
    world.settle()
    world.edit(suspend=False)
    world.settle()
    kept, first = world.records[3], world.records[1]
    assert kept.model_copy(update={"pipeline": first.pipeline}) == first
    assert len([start for start in world.starts if start.run.stage == "preflight"]) == 1


def test_a_retry_takes_the_runtime_as_it_is_now():
    world = World(pipeline_body(ONE))
    world.go("preflight")
    world.end("sft", failed("RuntimeTooOld", "contract version"))
    world.go("finalize")
    world.runtime = AlignmentRuntime.parse(runtime_body(image="registry.example/new:2"))
    world.edit(retry={"nonce": "1"})
    world.go("preflight")
    assert world.records[2].runtime is not None
    assert world.records[2].runtime.image == "registry.example/new:2"
    assert world.entry("sft").phase == "Queued"
    assert world.entry("sft").attempt == 2


# Edits


def test_an_edit_reruns_only_what_changed():
    world = finished()
    stages = [dict(stage) for stage in FOUR_STAGES]
    stages[1] = {"name": "dpo", "dpo": {"dataset": "prefs", "beta": 0.3, "lora": {"rank": 8}}}
    world.edit(stages=stages)
    plan = world.settle()
    assert isinstance(plan.actions[0], FreezeRecord)
    assert starts(plan) == ["preflight"]
    assert world.condition("Succeeded").status == "Unknown"
    world.go("preflight")
    assert world.phases() == {
        "preflight": "Succeeded",
        "sft": "Succeeded",
        "dpo": "Queued",
        "final": "Pending",
        "exam": "Pending",
    }
    world.go("dpo", "final", "exam", "finalize")
    assert world.status.phase == "Succeeded"
    counts = [start.run.stage for start in world.starts]
    assert {name: counts.count(name) for name in set(counts)} == {
        "preflight": 2,
        "sft": 1,
        "dpo": 2,
        "final": 2,
        "exam": 2,
        "finalize": 2,
    }


def test_an_edit_stops_only_attempts_whose_fingerprint_changed():
    world = World(pipeline_body(FORK))
    world.go("preflight", "base")
    for name in ("left", "right"):
        world.run(name)
    stages = [dict(stage) for stage in FORK]
    stages[1] = stages[1] | {"sft": {"dataset": "tickets", "training": {"epochs": 3}}}
    world.edit(stages=stages)
    world.later(30)
    world.settle()
    assert {job.stage for job in world.live() if not job.deleting} == {"left", "right", "preflight"}
    old = world.job("left").name
    world.end("preflight")
    plan = world.settle()
    assert [action.job for action in plan.actions if isinstance(action, StopStage)] == [old]
    assert world.phases()["right"] == "Running"
    assert world.entry("left").reason == "WaitingForStop"
    assert world.entry("left").gpu_seconds == 2 * 30
    world.change(old, active=False, state="failed", finished=world.now, result=failed("Interrupted", outcome="Stopped"))
    world.settle()
    assert world.phases()["left"] == "Queued"
    assert world.entry("left").job != old
    assert world.entry("left").failures == 0


def test_an_edit_back_finds_the_attempts_of_before():
    world = World(pipeline_body(ONE))
    world.go("preflight")
    world.run("sft")
    job = world.job("sft").name
    world.edit(seed=1)
    world.settle()
    world.edit(seed=0)
    world.go()
    assert {job.name for job in world.live() if not job.deleting} == {job}
    assert world.entry("sft").job == job
    assert world.phases()["sft"] == "Running"


def test_a_failed_stage_starts_again_when_the_spec_is_edited():
    world = World(pipeline_body(ONE))
    world.go("preflight")
    world.end("sft", failed("OutOfMemory", "too big"))
    world.go("finalize")
    world.edit(stages=[ONE[0] | {"resources": {"memory": "128Gi"}}])
    world.go("preflight")
    entry = world.entry("sft")
    assert (entry.phase, entry.attempt, entry.failures) == ("Queued", 2, 0)
    assert world.starts[-1].resources.memory == "128Gi"


def test_a_stage_that_is_taken_out_is_stopped_and_its_cost_is_kept():
    world = World(pipeline_body(FORK))
    world.go("preflight", "base", "left")
    world.run("right")
    world.later(100)
    world.edit(stages=FORK[:2])
    world.settle()
    assert world.status.usage.former_gpu_seconds == 200.0
    world.go("preflight")
    assert {job.stage for job in world.live() if not job.deleting} == {"finalize"}
    world.reap()
    world.go("finalize")
    assert world.status.phase == "Succeeded"
    assert world.status.usage.gpu_hours == round((200 + 20 + 20) / 3600, 3)


def test_an_edited_gate_is_judged_again_without_computing_again():
    world = finished([ONE[0] | {"gates": [{"metric": "loss", "atMost": 2.0}]}])
    world.edit(stages=[ONE[0] | {"gates": [{"metric": "loss", "atMost": 1.0}]}])
    world.in_storage = {"sft"}
    world.go("preflight")
    assert world.job("sft").role == "collect"
    world.end("sft", succeeded(metrics={"loss": 1.5}))
    world.settle()
    assert (world.entry("sft").phase, world.entry("sft").reason) == ("Failed", "GateFailed")


def test_storage_that_moved_makes_everything_anew():
    world = finished(ONE)
    world.edit(storage={"uri": "s3://elsewhere/root"})
    world.go("preflight")
    assert world.phases()["sft"] == "Queued"


def test_changed_data_are_found_by_the_next_preflight():
    world = finished(ONE)
    world.contents = "edited in place"
    world.edit(stages=[ONE[0] | {"retries": 3}])
    world.go("preflight")
    assert world.phases()["sft"] == "Queued"


def test_a_new_preflight_that_fails_stops_what_runs():
    world = World(pipeline_body(ONE))
    world.go("preflight")
    world.run("sft")
    world.edit(seed=1)
    world.settle()
    world.end("preflight", failed("BadInput", "gone"))
    plan = world.settle()
    assert any(isinstance(action, StopStage) for action in plan.actions)
    assert world.phases()["sft"] == "Skipped"


# The cache


def test_stages_in_storage_need_no_jobs():
    world = World(in_storage={"sft", "dpo", "final", "exam"})
    world.go("preflight", "finalize")
    assert world.status.phase == "Succeeded"
    assert len(world.starts) == 2
    assert all(world.entry(name).cached for name in ("sft", "dpo", "final", "exam"))
    assert world.entry("sft").output.uri.startswith("s3://bucket/root/team-a/sft/")
    assert world.status.model.stage == "final"


def test_a_cached_stage_with_gates_is_read_and_judged_for_this_run():
    stages = [ONE[0] | {"gates": [{"metric": "loss", "atMost": 2.0}]}, {"name": "final", "merge": {}}]
    world = World(pipeline_body(stages), in_storage={"sft", "final"})
    world.go("preflight")
    assert world.job("sft").role == "collect"
    assert world.phases()["final"] == "Pending"
    world.end("sft", succeeded(metrics={"loss": 1.0}))
    world.settle()
    assert world.entry("sft").cached
    assert world.phases() | {"finalize": ""} == dict.fromkeys(("preflight", "sft", "final"), "Succeeded") | {
        "finalize": ""
    }


def test_a_cached_stage_that_cannot_be_read_is_computed():
    stages = [ONE[0] | {"gates": [{"metric": "loss", "atMost": 2.0}]}]
    world = World(pipeline_body(stages), in_storage={"sft"})
    world.go("preflight")
    world.end("sft", failed("InputMissing", "damaged"), failure=PodFailure(exit_code=2))
    world.settle()
    assert world.job("sft").role == "stage"
    assert not world.entry("sft").cached


def test_cache_false_computes_anew():
    world = World(pipeline_body([ONE[0] | {"cache": False}]), in_storage={"sft"})
    world.go("preflight")
    assert world.job("sft").role == "stage"


# Suspend and resume


def test_suspend_and_resume_keep_the_job():
    world = World()
    world.go("preflight")
    world.run("sft")
    world.later(50)
    world.edit(suspend=True)
    plan = world.settle()
    job = world.job("sft")
    assert plan.actions[1:] == (SuspendStage(job.name, suspend=True),)
    assert world.entry("sft").reason == "Suspending"
    world.change(job.name, active=False, state="waiting", started=None)
    world.settle()
    assert world.phases()["sft"] == "Suspended"
    assert world.status.phase == "Suspended"
    assert world.entry("sft").gpu_seconds == 100.0
    world.edit(suspend=False)
    plan = world.settle()
    assert plan.actions[1:] == (SuspendStage(job.name, suspend=False),)
    assert world.phases()["sft"] == "Queued"
    world.go("sft")
    assert world.entry("sft").attempt == 1
    assert world.entry("sft").gpu_seconds == 120.0
    assert world.event_reasons().count("Suspended") == world.event_reasons().count("Resumed") == 1


def test_nothing_starts_while_suspended_and_what_ends_is_counted():
    world = World()
    world.go("preflight")
    world.run("sft")
    world.edit(suspend=True)
    world.settle()
    world.end("sft")
    world.settle()
    assert world.phases()["sft"] == "Succeeded"
    assert world.phases()["dpo"] == "Pending"
    assert world.status.phase == "Suspended"
    world.edit(suspend=False)
    assert starts(world.settle()) == ["dpo"]


@pytest.mark.parametrize("stage", ["preflight", "finalize"])
def test_implicit_steps_are_suspended_too(stage: str):
    world = World(pipeline_body(ONE))
    world.settle()
    if stage == "finalize":
        world.go("preflight", "sft")
    world.run(stage)
    world.edit(suspend=True)
    world.settle()
    assert world.job(stage).suspended
    world.change(world.job(stage).name, active=False, state="waiting", started=None)
    world.settle()
    assert (world.phases()[stage], world.status.phase) == ("Suspended", "Suspended")
    world.edit(suspend=False)
    world.go(stage)
    assert world.phases()[stage] == "Succeeded"


def test_a_pipeline_made_suspended_starts_when_it_is_resumed():
    world = World(pipeline_body(suspend=True))
    world.settle()
    assert (world.jobs, world.status.phase) == ({}, "Suspended")
    world.edit(suspend=False)
    assert starts(world.settle()) == ["preflight"]


def test_a_job_in_a_queue_is_stopped_and_made_again():
    world = World(pipeline_body(ONE), runtime=AlignmentRuntime.parse(runtime_body(queueName="q")))
    world.go("preflight")
    name = world.job("sft").name
    world.change(name, suspended=True, waiting_reason="WaitingForQuota", waiting_message="asks 8 GPUs, 5 free")
    assert not any(isinstance(action, SuspendStage) for action in world.settle().actions)
    assert (world.phases()["sft"], world.entry("sft").reason) == ("Queued", "WaitingForQuota")
    world.change(name, suspended=False)
    world.run("sft")
    world.settle()
    world.edit(suspend=True)
    plan = world.settle()
    assert StopStage(name, "suspended") in plan.actions
    world.vanish(name)
    world.settle()
    assert world.status.phase == "Suspended"
    world.edit(suspend=False)
    world.settle()
    assert (world.phases()["sft"], world.entry("sft").failures) == ("Queued", 0)


# Retry


def failed_run() -> World:
    world = World()
    world.go("preflight", "sft")
    world.end("dpo", failed("OutOfMemory", "too big"))
    world.settle()
    world.go("finalize")
    assert world.status.phase == "Failed"
    return world


@pytest.mark.parametrize("stage", [None, "dpo"])
def test_a_retry_starts_the_failed_stage_again_from_its_checkpoint(stage: str | None):
    world = failed_run()
    before = world.job("dpo")
    world.edit(retry={"nonce": "1"} | ({} if stage is None else {"stage": stage}))
    world.settle()
    after = world.job("dpo")
    assert (after.attempt, after.fingerprint) == (2, before.fingerprint)
    assert world.entry("dpo").failures == 0
    assert world.phases()["final"] == "Pending"
    assert world.status.retry_nonce == "1"
    assert world.status.completion_time is None
    assert world.condition("Failed").status == "Unknown"
    world.go("dpo", "final", "exam", "finalize")
    assert world.status.phase == "Succeeded"
    assert len([start for start in world.starts if start.run.stage == "preflight"]) == 1


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("sft", "sft has succeeded"),
        ("final", "final was skipped because dpo failed; retry that instead"),
        ("typo", 'there is no stage "typo"'),
    ],
)
def test_a_retry_of_what_has_not_failed_is_ignored_and_says_so(stage: str, words: str):
    world = failed_run()
    world.edit(retry={"nonce": "1", "stage": stage})
    assert starts(world.settle()) == []
    ignored = [event for event in world.events if event.reason == "RetryIgnored"]
    assert [words in event.message for event in ignored] == [True]
    assert world.status.phase == "Failed"
    assert world.status.retry_nonce == "1"


def test_a_retry_happens_once_per_nonce():
    world = failed_run()
    world.edit(retry={"nonce": "1"})
    world.settle()
    world.end("dpo", failed("OutOfMemory", "still too big"))
    world.go("finalize")
    assert world.status.phase == "Failed"
    assert starts(world.settle()) == []
    world.edit(retry={"nonce": "2"})
    world.settle()
    assert world.job("dpo").attempt == 3


def test_a_retry_of_one_stage_leaves_other_failures_alone():
    world = World(pipeline_body(FORK))
    world.go("preflight", "base")
    for name in ("left", "right"):
        world.end(name, failed("OutOfMemory", "no"))
    world.go("finalize")
    world.edit(retry={"nonce": "1", "stage": "left"})
    world.settle()
    assert world.phases() | {"finalize": ""} == {
        "preflight": "Succeeded",
        "base": "Succeeded",
        "left": "Queued",
        "right": "Failed",
        "join": "Skipped",
        "finalize": "",
    }


@pytest.mark.parametrize("reason", ["BadInput", "InputChanged"])
def test_a_retry_after_bad_data_looks_at_the_data_again(reason: str):
    world = World(pipeline_body(ONE))
    world.go("preflight")
    world.end("sft", failed(reason, "line 3"))
    world.go("finalize")
    world.contents = "mended"
    world.edit(retry={"nonce": "1"})
    assert starts(world.settle()) == ["preflight"]
    before = world.entry("sft").fingerprint
    world.go("preflight", "sft", "finalize")
    assert world.status.phase == "Succeeded"
    assert world.entry("sft").fingerprint != before


def test_a_retry_of_finalize_writes_the_report_again():
    world = World(pipeline_body(ONE))
    world.go("preflight", "sft")
    world.end("finalize", failed("StorageDenied", "no"))
    world.settle()
    world.edit(retry={"nonce": "1", "stage": "finalize"})
    assert starts(world.settle()) == ["finalize"]
    world.go("finalize")
    assert world.condition("Reported").status == "True"


def test_a_report_is_written_again_after_a_retry():
    world = failed_run()
    world.edit(retry={"nonce": "1"})
    world.go("dpo", "final", "exam", "finalize")
    fingerprints = {start.run.fingerprint for start in world.starts if start.run.stage == "finalize"}
    assert len(fingerprints) == 2


def test_a_nonce_set_from_the_start_does_nothing():
    world = World(pipeline_body(ONE, retry={"nonce": "1", "stage": "sft"}))
    world.settle()
    assert world.status.retry_nonce == "1"
    assert "RetryIgnored" not in world.event_reasons()


# Twins


def test_the_same_work_in_another_pipeline_is_waited_for():
    world = World(pipeline_body(ONE))
    world.settle()
    other = World(pipeline_body(ONE))
    other.go("preflight")
    world.twins = frozenset({other.job("sft").fingerprint})
    world.end("preflight")
    plan = world.settle()
    assert plan.requeue_after == SETTINGS.twin_poll_seconds
    assert (world.entry("sft").phase, world.entry("sft").reason) == ("Pending", "WaitingForTwin")
    world.twins = frozenset()
    world.settle()
    assert world.phases()["sft"] == "Queued"
    world.end("sft", succeeded(reused=True))
    world.settle()
    assert world.entry("sft").cached


def test_two_that_run_already_do_not_wait_for_each_other():
    world = World(pipeline_body(ONE))
    world.go("preflight")
    world.twins = frozenset({world.job("sft").fingerprint})
    world.run("sft")
    world.settle()
    assert world.phases()["sft"] == "Running"


def test_the_same_work_in_one_pipeline_is_done_once():
    twice = [
        {"name": "one", "sft": {"dataset": "tickets"}},
        {"name": "other", "sft": {"dataset": "tickets"}},
    ]
    twice[1]["model"] = "zero"
    twice[0]["model"] = "zero"
    world = World(pipeline_body([{"name": "zero", "pretrain": {"dataset": "manuals"}}, *twice]))
    world.go("preflight", "zero")
    assert world.entry("one").fingerprint == world.entry("other").fingerprint
    assert (world.phases()["one"], world.entry("other").reason) == ("Queued", "WaitingForTwin")
    world.go("one")
    assert world.phases()["other"] == "Queued"


# Time to live


def test_a_pipeline_is_deleted_when_its_time_is_over():
    world = World(pipeline_body(ONE, ttlAfterFinished="1h"))
    world.go("preflight", "sft")
    world.end("finalize")
    plan = world.settle()
    assert plan.requeue_after == 3600.0
    world.later(3599)
    assert world.settle().actions == ()
    world.later(1)
    assert world.reconcile().actions == (DeletePipeline(),)
    assert world.is_deleted


def test_deletion_leaves_everything_to_owner_references():
    world = World()
    world.settle()
    snapshot = world.snapshot()
    gone = type(snapshot)(**{name: getattr(snapshot, name) for name in snapshot.__slots__} | {"deleting": True})
    assert world.plan(gone) == Plan()


# Progress


def test_progress_is_shown_but_written_at_most_every_ten_seconds():
    world = World()
    world.go("preflight")
    world.run("sft")
    world.settle()
    world.report("sft", 10, loss="2.5")
    world.settle()
    assert world.status.progress == "10%"
    writes = world.writes
    for second in range(1, 10):
        world.later(1)
        world.report("sft", 10 + second)
        plan = world.settle()
        assert plan.requeue_after == pytest.approx(10.0 - second)
    assert world.writes == writes
    world.later(1)
    world.settle()
    assert world.status.progress == "19%"
    assert world.entry("sft").metrics[0].value == "2.5"
    assert world.status.usage.gpu_hours == round(2 * 10 / 3600, 3)


def test_progress_does_not_hold_back_anything_else():
    world = World(pipeline_body(FORK))
    world.go("preflight", "base")
    world.run("left")
    world.run("right")
    world.report("left", 50)
    world.settle()
    world.later(1)
    world.report("left", 51)
    world.end("right")
    world.settle()
    assert world.phases()["right"] == "Succeeded"
    assert world.entry("left").progress.percentage == 51


def test_the_same_report_again_writes_nothing():
    world = World()
    world.go("preflight")
    world.run("sft")
    world.report("sft", 50)
    world.settle()
    world.later(100)
    assert world.settle() == Plan()


# Local runs


def test_the_same_plan_serves_a_laptop():
    local = {"local_storage": Storage(uri="file:///work/runs"), "backoff_base_seconds": 0.1}
    body = pipeline_body(ONE, model={"source": "bundled://smollm2-135m-instruct"})
    body["spec"]["datasets"][1]["source"] = "tickets.jsonl"
    del body["spec"]["storage"]
    world = World(body, runtime=None, place="local", settings=PlanSettings(operator_version="1", **local))  # type: ignore[arg-type]
    world.go("preflight", "sft", "finalize")
    assert world.status.phase == "Succeeded"
    assert world.entry("sft").output.uri.startswith("file:///work/runs/team-a/sft/")


def test_times_are_whole_seconds_in_utc():
    world = finished(ONE)
    assert world.status.start_time == "2026-01-01T12:00:00Z"
    assert world.status.completion_time == ((world.now - timedelta(0)).strftime("%Y-%m-%dT%H:%M:%SZ"))


@pytest.mark.parametrize("ended", [False, True])
def test_another_version_of_the_operator_leaves_runs_alone(ended: bool, monkeypatch: pytest.MonkeyPatch):
    """A later version may write records and outcomes with other fields; what has been computed stays as it is."""
    world = World(pipeline_body(ONE))
    world.go("preflight", *(["sft", "finalize"] if ended else []))
    monkeypatch.setattr("plumbline_operator.draft.record_identity", lambda _record: "another")
    monkeypatch.setattr("plumbline_operator.starting.finalize_identity", lambda *_: "another")
    world.settings = PlanSettings(operator_version="2.0.0")
    assert world.settle() == Plan()
