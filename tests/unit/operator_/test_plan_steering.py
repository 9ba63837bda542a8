"""What a user does to a run: suspends, resumes, retries."""

from __future__ import annotations

import pytest
from plumbline_api.runtime import AlignmentRuntime
from plumbline_operator.snapshot import StopStage, SuspendStage
from support.planning import (
    FORK,
    ONE_STAGE,
    World,
    failed,
    pipeline_body,
    runtime_body,
    starts,
)

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
    world = World(pipeline_body(ONE_STAGE))
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
    world = World(pipeline_body(ONE_STAGE), runtime=AlignmentRuntime.parse(runtime_body(queueName="q")))
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
    world = World(pipeline_body(ONE_STAGE))
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
    world = World(pipeline_body(ONE_STAGE))
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
    world = World(pipeline_body(ONE_STAGE, retry={"nonce": "1", "stage": "sft"}))
    world.settle()
    assert world.status.retry_nonce == "1"
    assert "RetryIgnored" not in world.event_reasons()
