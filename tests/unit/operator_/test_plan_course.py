"""How a run goes when nothing goes wrong."""

from __future__ import annotations

import subprocess
import sys

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


def test_decisions_and_rendering_know_no_cluster_library():
    """A laptop runs the same decisions without any of them installed."""
    program = (
        "import sys, plumbline_operator.plan, plumbline_operator.rendering\n"
        "print(sorted({'kopf', 'kubernetes', 'aiohttp'} & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
