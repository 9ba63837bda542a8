"""Golden cases: a snapshot and the whole plan that follows, status and events included.

Set PLUMBLINE_REGENERATE=1 to write them anew, then review the difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from plumbline_api.runtime import AlignmentRuntime
from plumbline_operator.snapshot import FreezeRecord, Plan, PodFailure, Snapshot, StartStage
from support.planning import FORK, World, failed, pipeline_body, runtime_body, succeeded

GOLDEN = Path(__file__).parent / "golden" / "plans"
TWO = [
    {"name": "sft", "sft": {"dataset": "tickets"}},
    {"name": "exam", "evaluate": {"suites": [{"perplexity": {"dataset": "held"}}]},
     "gates": [{"metric": "perplexity", "atMost": 12.0}]},
]  # fmt: skip


def first_sight() -> World:
    return World(pipeline_body(TWO))


def refused() -> World:
    return World(pipeline_body([{"name": "sft", "sft": {"dataset": "nowhere"}}]))


def preflight_ends() -> World:
    world = World(pipeline_body(FORK), in_storage={"base"})
    world.settle()
    world.end("preflight")
    return world


def stage_ends_and_the_next_starts() -> World:
    world = World(pipeline_body(TWO))
    world.go("preflight")
    world.run("sft")
    world.settle()
    world.later(60)
    world.end("sft", succeeded(metrics={"loss": 1.84}, gpu_seconds=118.5, message="40 steps"))
    return world


def transient_failure() -> World:
    world = World(pipeline_body(TWO))
    world.go("preflight")
    world.end("sft", failed("Transient", "S3 answers 503 SlowDown"), failure=PodFailure(exit_code=75))
    return world


def gate_fails() -> World:
    world = World(pipeline_body(TWO))
    world.go("preflight", "sft")
    world.end("exam", succeeded(metrics={"perplexity": 13.2}))
    return world


def failed_and_reported() -> World:
    world = World(pipeline_body(FORK))
    world.go("preflight", "base")
    world.end("left", failed("OutOfMemory", "78.9 GiB needed, 79.2 there"), failure=PodFailure(exit_code=2))
    world.go("right")
    world.end("finalize")
    return world


def succeeded_and_reported() -> World:
    world = World(pipeline_body(TWO, ttlAfterFinished="24h"))
    world.go("preflight", "sft")
    world.end("exam", succeeded(metrics={"perplexity": 11.5}))
    world.settle()
    world.end("finalize")
    return world


def edited_while_running() -> World:
    world = World(pipeline_body(FORK))
    world.go("preflight", "base")
    world.run("left")
    world.run("right")
    world.settle()
    stages = [dict(stage) for stage in FORK]
    stages[1] = stages[1] | {"sft": {"dataset": "tickets", "training": {"epochs": 3}}}
    world.edit(stages=stages)
    world.settle()
    world.later(20)
    world.end("preflight")
    return world


def suspended_while_running() -> World:
    world = World(pipeline_body(TWO))
    world.go("preflight")
    world.run("sft")
    world.settle()
    world.later(30)
    world.edit(suspend=True)
    return world


def retried() -> World:
    world = World(pipeline_body(TWO))
    world.go("preflight")
    world.end("sft", failed("OutOfMemory", "too big"))
    world.go("finalize")
    world.edit(retry={"nonce": "n-1", "stage": "sft"})
    return world


def result_is_lost() -> World:
    world = World(pipeline_body(TWO))
    world.go("preflight")
    world.end("sft", result_lost=True, state="succeeded")
    return world


def job_waits_for_a_secret() -> World:
    world = World(pipeline_body(TWO))
    world.go("preflight")
    waiting = {"waiting_reason": "CreateContainerConfigError", "waiting_message": 'secret "s3-credentials" not found'}
    world.change(world.job("sft").name, **waiting)
    return world


def foreign_job_under_our_name() -> World:
    world = World(pipeline_body(TWO))
    world.settle()
    probe = World(pipeline_body(TWO))
    probe.go("preflight")
    world.foreign = frozenset({probe.job("sft").name})
    world.end("preflight")
    return world


def progress_is_due() -> World:
    world = World(pipeline_body(TWO))
    world.go("preflight")
    world.run("sft")
    world.settle()
    world.later(90)
    world.report("sft", 62, loss="1.84")
    return world


def permission_is_gone() -> World:
    world = World(pipeline_body(TWO))
    world.go("preflight")
    world.end("sft")
    world.runtime = AlignmentRuntime.parse(runtime_body(allow={"storagePrefixes": ["s3://other"]}))
    return world


CASES: dict[str, Callable[[], World]] = {
    case.__name__.replace("_", "-"): case
    for case in (
        first_sight,
        refused,
        preflight_ends,
        stage_ends_and_the_next_starts,
        transient_failure,
        gate_fails,
        failed_and_reported,
        succeeded_and_reported,
        edited_while_running,
        suspended_while_running,
        retried,
        result_is_lost,
        job_waits_for_a_secret,
        foreign_job_under_our_name,
        progress_is_due,
        permission_is_gone,
    )
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_plan_is_the_golden_one(name: str):
    world = CASES[name]()
    snapshot = world.snapshot()
    document = {"snapshot": told(snapshot), "plan": planned(world.plan(snapshot))}
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("PLUMBLINE_REGENERATE"):
        path.write_text(yaml.safe_dump(document, sort_keys=False, width=120))
    assert yaml.safe_load(path.read_text()) == document


def test_every_golden_file_has_its_case():
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(CASES)


def told(snapshot: Snapshot) -> dict[str, Any]:
    """The snapshot in short: what differs from case to case."""
    jobs = [
        " ".join(filter(None, [job.name, job.role, job.state, job.result and job.result.reason, job.waiting_reason]))
        for job in snapshot.jobs
    ]
    stages = {entry.name: f"{entry.phase} {entry.reason or ''}".strip() for entry in snapshot.status.stages}
    spec = {name: value for name, value in snapshot.body["spec"].items() if name in ("suspend", "retry")}  # type: ignore[attr-defined]
    return {
        "generation": snapshot.body["metadata"]["generation"],  # type: ignore[index]
        "spec": spec,
        "phase": snapshot.status.phase,
        "stages": stages,
        "jobs": jobs,
    }


def planned(plan: Plan) -> dict[str, Any]:
    """The plan, whole but for the documents of the record and of the attempts, which have tests of their own."""
    return {
        "actions": [action_told(action) for action in plan.actions],
        "status": plan.status.to_wire() if plan.status is not None else None,
        "events": [f"{event.type} {event.reason}: {event.message}" for event in plan.events],
        "requeueAfter": plan.requeue_after,
    }


def action_told(action: Any) -> dict[str, Any]:
    kind = {"action": type(action).__name__}
    if isinstance(action, FreezeRecord):
        return kind | {"generation": action.record.pipeline.generation, "stages": len(action.record.stages)}
    if isinstance(action, StartStage):
        run = action.run
        return kind | {
            "job": action.job,
            "role": run.role,
            "stage": run.stage,
            "attempt": run.attempt,
            "inputs": [f"{item.role}: {item.name}" for item in run.inputs],
            "runtimeClass": action.runtime_class,
            "resources": action.resources.to_wire(),
        }
    return kind | {item.name: getattr(action, item.name) for item in fields(action)}
