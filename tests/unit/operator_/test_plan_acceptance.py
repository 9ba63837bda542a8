"""What a pipeline must fulfil before it runs, and what of the runtime a run keeps."""

from __future__ import annotations

from plumbline_api.runtime import AlignmentRuntime
from plumbline_operator.settings import PlanSettings
from support.planning import (
    ONE_STAGE,
    SETTINGS,
    World,
    failed,
    pipeline_body,
    runtime_body,
    starts,
)

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
    world.edit(stages=ONE_STAGE)
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
    stages = [ONE_STAGE[0], {"name": "big", "model": "sft", "sft": {"dataset": "tickets"}, "resources": {"nodes": 4}}]
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
    world = World(pipeline_body(ONE_STAGE))
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
