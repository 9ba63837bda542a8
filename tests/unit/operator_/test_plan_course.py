"""How a run goes when nothing goes wrong."""

from __future__ import annotations

from plumbline_operator.snapshot import FreezeRecord, StartStage
from support.planning import FORK, World, pipeline_body


def test_a_run_goes_from_preflight_through_its_stages_to_the_report():
    world = World()
    first = world.settle()
    assert [type(action) for action in first.actions] == [FreezeRecord, StartStage]
    assert world.status.phase == "Preflight"
    assert world.condition("Accepted").status == "True"
    world.go("preflight", "sft", "dpo", "final", "exam")
    assert world.status.phase == "Running"
    assert world.status.stage == "finalize"
    assert world.condition("Succeeded").status == "Unknown"
    world.go("finalize")
    assert world.status.phase == "Succeeded"
    assert set(world.phases().values()) == {"Succeeded"}
    assert [world.condition(name).status for name in ("Succeeded", "Reported", "Ready")] == ["True"] * 3
    assert world.status.model.stage == "final"
    assert world.status.report == "s3://bucket/root/team-a/pipelines/support/u-1/report.html"
    assert len(world.starts) == 6
    assert world.status.usage.gpu_hours == round(2 * 20 / 3600, 3)


def test_independent_stages_run_side_by_side():
    world = World(pipeline_body(FORK))
    world.go("preflight", "base")
    assert {job.stage for job in world.live()} == {"left", "right"}
    world.run("left")
    world.run("right")
    world.settle()
    assert world.status.stage == "left +1 (2/4)"
    world.go("left")
    assert "join" not in {job.stage for job in world.jobs.values()}
    world.go("right")
    assert {job.stage for job in world.live()} == {"join"}
