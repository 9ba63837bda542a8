"""Edits of a spec: only what they change is computed again, and what is in storage is found."""

from __future__ import annotations

from plumbline_operator.snapshot import FreezeRecord, PodFailure, StopStage
from support.planning import (
    FORK,
    FOUR_STAGES,
    ONE_STAGE,
    World,
    failed,
    finished,
    pipeline_body,
    starts,
    succeeded,
)

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
    world = World(pipeline_body(ONE_STAGE))
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
    world = World(pipeline_body(ONE_STAGE))
    world.go("preflight")
    world.end("sft", failed("OutOfMemory", "too big"))
    world.go("finalize")
    world.edit(stages=[ONE_STAGE[0] | {"resources": {"memory": "128Gi"}}])
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
    world = finished([ONE_STAGE[0] | {"gates": [{"metric": "loss", "atMost": 2.0}]}])
    world.edit(stages=[ONE_STAGE[0] | {"gates": [{"metric": "loss", "atMost": 1.0}]}])
    world.in_storage = {"sft"}
    world.go("preflight")
    assert world.job("sft").role == "collect"
    world.end("sft", succeeded(metrics={"loss": 1.5}))
    world.settle()
    assert (world.entry("sft").phase, world.entry("sft").reason) == ("Failed", "GateFailed")


def test_storage_that_moved_makes_everything_anew():
    world = finished(ONE_STAGE)
    world.edit(storage={"uri": "s3://elsewhere/root"})
    world.go("preflight")
    assert world.phases()["sft"] == "Queued"


def test_changed_data_are_found_by_the_next_preflight():
    world = finished(ONE_STAGE)
    world.contents = "edited in place"
    world.edit(stages=[ONE_STAGE[0] | {"retries": 3}])
    world.go("preflight")
    assert world.phases()["sft"] == "Queued"


def test_a_new_preflight_that_fails_stops_what_runs():
    world = World(pipeline_body(ONE_STAGE))
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
    stages = [ONE_STAGE[0] | {"gates": [{"metric": "loss", "atMost": 2.0}]}, {"name": "final", "merge": {}}]
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
    stages = [ONE_STAGE[0] | {"gates": [{"metric": "loss", "atMost": 2.0}]}]
    world = World(pipeline_body(stages), in_storage={"sft"})
    world.go("preflight")
    world.end("sft", failed("InputMissing", "damaged"), failure=PodFailure(exit_code=2))
    world.settle()
    assert world.job("sft").role == "stage"
    assert not world.entry("sft").cached


def test_cache_false_computes_anew():
    world = World(pipeline_body([ONE_STAGE[0] | {"cache": False}]), in_storage={"sft"})
    world.go("preflight")
    assert world.job("sft").role == "stage"
