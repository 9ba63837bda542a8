"""What is around a run: the same work elsewhere, its end, its progress, a laptop, another version of the operator."""

from __future__ import annotations

from datetime import timedelta

import pytest
from plumbline_api.pipeline import Storage
from plumbline_operator.settings import PlanSettings
from plumbline_operator.snapshot import DeletePipeline, Plan
from support.planning import (
    FORK,
    ONE_STAGE,
    SETTINGS,
    World,
    finished,
    pipeline_body,
    succeeded,
)

# Twins


def test_the_same_work_in_another_pipeline_is_waited_for():
    world = World(pipeline_body(ONE_STAGE))
    world.settle()
    other = World(pipeline_body(ONE_STAGE))
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
    world = World(pipeline_body(ONE_STAGE))
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
    world = World(pipeline_body(ONE_STAGE, ttlAfterFinished="1h"))
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


def test_the_first_estimate_of_the_end_is_written_at_once_and_later_ones_wait():
    world = World()
    world.go("preflight")
    world.run("sft")
    world.settle()
    world.report("sft", 0)
    world.settle()
    world.later(1)
    world.report("sft", 3, finish="2026-01-01T12:01:00Z")
    world.settle()
    assert world.status.progress == "3%"
    world.later(1)
    world.report("sft", 6, finish="2026-01-01T12:01:10Z")
    assert world.settle().requeue_after == pytest.approx(9.0)
    assert world.status.progress == "3%"


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
    body = pipeline_body(ONE_STAGE, model={"source": "bundled://smollm2-135m-instruct"})
    body["spec"]["datasets"][1]["source"] = "tickets.jsonl"
    del body["spec"]["storage"]
    world = World(body, runtime=None, place="local", settings=PlanSettings(operator_version="1", **local))  # type: ignore[arg-type]
    world.go("preflight", "sft", "finalize")
    assert world.status.phase == "Succeeded"
    assert world.entry("sft").output.uri.startswith("file:///work/runs/team-a/sft/")


def test_times_are_whole_seconds_in_utc():
    world = finished(ONE_STAGE)
    assert world.status.start_time == "2026-01-01T12:00:00Z"
    assert world.status.completion_time == ((world.now - timedelta(0)).strftime("%Y-%m-%dT%H:%M:%SZ"))


@pytest.mark.parametrize("ended", [False, True])
def test_another_version_of_the_operator_leaves_runs_alone(ended: bool, monkeypatch: pytest.MonkeyPatch):
    """A later version may write records and outcomes with other fields; what has been computed stays as it is."""
    world = World(pipeline_body(ONE_STAGE))
    world.go("preflight", *(["sft", "finalize"] if ended else []))
    monkeypatch.setattr("plumbline_operator.draft.record_identity", lambda _record: "another")
    monkeypatch.setattr("plumbline_operator.starting.finalize_identity", lambda *_: "another")
    world.settings = PlanSettings(operator_version="2.0.0")
    assert world.settle() == Plan()
