"""What follows from attempts that fail."""

from __future__ import annotations

from typing import Any

import pytest
from plumbline_operator.policies.retries import backoff_seconds
from plumbline_operator.snapshot import PodFailure
from support.planning import FORK, ONE_STAGE, SETTINGS, World, failed, pipeline_body, succeeded


def at_stage(stages: list[dict[str, Any]] | None = None, **spec: Any) -> World:
    """A run whose first stage runs."""
    world = World(pipeline_body(ONE_STAGE if stages is None else stages, **spec))
    world.go("preflight")
    world.run(world.body["spec"]["stages"][0]["name"])
    world.settle()
    return world


@pytest.mark.parametrize(
    "reason",
    ["BadInput", "StorageDenied", "InputChanged", "OutOfMemory", "RuntimeTooOld", "SomethingNew"],
)
def test_what_the_user_has_to_mend_is_never_retried(reason: str):
    world = at_stage()
    code = PodFailure(exit_code=2) if reason == "SomethingNew" else None
    world.end("sft", failed(reason, 's3://corpus/tickets.jsonl line 3: "answer" is missing'), failure=code)
    world.settle()
    assert world.entry("sft").phase == "Failed"
    assert world.entry("sft").reason == reason
    world.go("finalize")
    assert world.status.phase == "Failed"
    condition = world.condition("Failed")
    assert condition.reason == reason
    assert condition.message == f'sft: {reason}: s3://corpus/tickets.jsonl line 3: "answer" is missing'
    assert len([start for start in world.starts if start.run.stage == "sft"]) == 1


@pytest.mark.parametrize(
    ("failure", "reason", "retried"),
    [
        ({"exit_code": 137, "reason": "OOMKilled"}, "OutOfMemory", False),
        ({"reason": "DeadlineExceeded"}, "Timeout", False),
        (
            {"reason": "Evicted", "message": 'Usage of EmptyDir volume "tmp" exceeds the limit "50Gi".'},
            "DiskFull",
            False,
        ),
        ({"exit_code": 2}, "BadInput", False),
        ({"exit_code": 75}, "PodFailed", True),
        ({"exit_code": 1, "reason": "Error"}, "PodFailed", True),
        ({"exit_code": 137, "reason": "Error"}, "PodFailed", True),
        ({}, "PodFailed", True),
    ],
)
def test_a_pod_that_dies_without_a_message(failure: dict[str, Any], reason: str, retried: bool):
    world = at_stage()
    world.crash("sft", **failure)
    world.settle()
    assert (world.entry("sft").phase, world.entry("sft").reason) == ("Pending" if retried else "Failed", reason)
    assert world.entry("sft").failures == (1 if retried else 0)


@pytest.mark.parametrize(
    "ending",
    [
        {"result": None, "failure": PodFailure(disrupted=True), "result_lost": True, "state": "failed"},
        {"result": None, "failure": PodFailure(exit_code=143), "result_lost": True, "state": "failed"},
        {"result": failed("Interrupted", outcome="Stopped"), "failure": PodFailure(exit_code=143)},
        {"result": failed("Transient"), "failure": PodFailure(exit_code=75, disrupted=True)},
    ],
)
def test_what_the_cluster_takes_away_is_free_and_made_up_for_at_once(ending: dict[str, Any]):
    world = at_stage([ONE_STAGE[0] | {"retries": 0}])
    world.end("sft", **ending)
    world.settle()
    assert (world.entry("sft").phase, world.entry("sft").attempt, world.entry("sft").failures) == ("Queued", 2, 0)


def test_attempts_lost_to_the_cluster_are_bounded_and_slow_down():
    world = at_stage()
    for number in range(1, SETTINGS.attempts_max + 1):
        world.crash("sft", disrupted=True)
        plan = world.reconcile()
        if number > 3 and number < SETTINGS.attempts_max:
            assert plan.requeue_after == backoff_seconds(number - 3, SETTINGS)
            world.later(plan.requeue_after)
            world.settle()
    assert (world.entry("sft").phase, world.entry("sft").reason) == ("Failed", "TooManyAttempts")
    assert len([start for start in world.starts if start.run.stage == "sft"]) == SETTINGS.attempts_max


def test_transient_failures_are_retried_with_growing_pauses():
    world = at_stage([ONE_STAGE[0] | {"retries": 3}])
    pauses = []
    for _ in range(3):
        world.end("sft", failed("Transient", "S3 answers 503", gpu_seconds=5.0), failure=PodFailure(exit_code=75))
        plan = world.settle()
        pauses.append(plan.requeue_after)
        assert world.entry("sft").phase == "Pending"
        world.later(plan.requeue_after - 1)
        assert world.settle().actions == ()
        world.later(1)
        world.settle()
        assert world.entry("sft").phase == "Queued"
    assert pauses == [10.0, 20.0, 40.0]
    world.end("sft", failed("Transient", "S3 answers 503"), failure=PodFailure(exit_code=75))
    world.settle()
    assert world.entry("sft").phase == "Failed"
    assert world.entry("sft").gpu_seconds == 15.0
    assert world.event_reasons().count("StageRetried") == 3


def test_the_pause_is_measured_from_the_end_of_the_attempt():
    world = at_stage()
    world.crash("sft", exit_code=1)
    world.later(60)
    world.settle()
    assert (world.entry("sft").phase, world.entry("sft").attempt) == ("Queued", 2)


def test_pauses_have_a_cap():
    assert [backoff_seconds(count, SETTINGS) for count in (0, 1, 5, 6, 500)] == [0.0, 10.0, 160.0, 300.0, 300.0]


def test_only_what_depends_on_a_failed_stage_is_skipped():
    world = at_stage(FORK)
    world.go("base")
    world.end("left", failed("BadInput", "no"))
    world.settle()
    assert world.phases() | {"preflight": ""} == {
        "preflight": "",
        "base": "Succeeded",
        "left": "Failed",
        "right": "Queued",
        "join": "Skipped",
    }
    assert world.entry("join").message == "not started, because left failed"
    world.go("right", "finalize")
    assert world.status.phase == "Failed"
    assert world.condition("Failed").message.startswith("left: BadInput: no")
    assert world.runs[world.job("finalize").name].outcomes[3].phase == "Skipped"


def test_the_first_failed_stage_in_declared_order_gives_the_message_whatever_came_first():
    messages = set()
    for order in (("left", "right"), ("right", "left")):
        world = at_stage(FORK)
        world.go("base")
        for name in order:
            world.end(name, failed("BadInput", f"{name} is wrong"))
            world.settle()
        world.go("finalize")
        messages.add(world.condition("Failed").message)
    assert messages == {"left: BadInput: left is wrong (failed as well: right)"}


def test_preflight_failing_fails_the_run_before_anything_asks_for_a_gpu():
    world = World()
    world.settle()
    world.end("preflight", failed("BadInput", "s3://corpus/prefs.jsonl: no such object"))
    world.settle()
    assert {world.phases()[name] for name in ("sft", "dpo", "final", "exam")} == {"Skipped"}
    world.go("finalize")
    assert world.status.phase == "Failed"
    assert world.condition("Failed").message == "preflight: BadInput: s3://corpus/prefs.jsonl: no such object"
    assert all(job.gpus == 0 for job in world.jobs.values())


@pytest.mark.parametrize("findings", [None, {"digests": ["x"], "cached": "0"}, {"digests": ["ü"] * 2, "cached": "0"}])
def test_findings_that_do_not_fit_the_record_mean_a_foreign_trainer(findings: dict[str, Any] | None):
    world = World(pipeline_body(ONE_STAGE))
    world.settle()
    world.end("preflight", succeeded(preflight=findings))
    world.settle()
    assert world.entry("preflight").reason == "RuntimeTooOld"
    assert "trainer image" in world.entry("preflight").message


# Gates


@pytest.mark.parametrize(
    ("gate", "metrics", "message"),
    [
        ({"atLeast": 0.5}, {"winRate.lower": 0.47}, "winRate.lower is 0.47; the gate asks for at least 0.5"),
        ({"atLeast": 0.1, "atMost": 0.2}, {"winRate.lower": 0.3}, "asks for at least 0.1 and at most 0.2"),
        ({"atLeast": 0.5}, {"perplexity": 3.0}, "did not measure it. It measured: perplexity"),
        ({"atLeast": 0.5}, {"winRate.lower": 0.5}, None),
    ],
)
def test_gates_decide_over_success(gate: dict[str, float], metrics: dict[str, float], message: str | None):
    stages = [ONE_STAGE[0] | {"gates": [{"metric": "winRate.lower", **gate}]}, {"name": "final", "merge": {}}]
    world = at_stage(stages)
    world.end("sft", succeeded(metrics=metrics))
    world.settle()
    entry = world.entry("sft")
    if message is None:
        assert (entry.phase, world.phases()["final"]) == ("Succeeded", "Queued")
    else:
        assert (entry.phase, entry.reason, world.phases()["final"]) == ("Failed", "GateFailed", "Skipped")
        assert message in entry.message
    assert {metric.name: float(metric.value) for metric in entry.metrics} == metrics


# Lost results


def test_a_complete_attempt_without_a_message_is_read_back_from_storage():
    world = at_stage()
    world.crash("sft")
    world.change(world.job("sft").name, state="succeeded", failure=None)
    world.settle()
    collect = world.job("sft")
    assert (collect.role, collect.gpus, collect.attempt) == ("collect", 0, 2)
    assert world.runs[collect.name].fingerprint == world.entry("sft").fingerprint
    world.end("sft", succeeded(metrics={"loss": 1.0}))
    world.settle()
    assert world.entry("sft").phase == "Succeeded"
    assert world.entry("sft").output.digest == "d" * 64
    assert len([start for start in world.starts if start.run.role == "stage"]) == 1


def test_where_nothing_can_be_read_back_the_stage_runs_again_and_it_counts():
    world = at_stage()
    for attempt in range(3):
        world.crash("sft")
        world.change(world.job("sft").name, state="succeeded", failure=None)
        world.settle()
        assert world.job("sft").role == "collect"
        world.end("sft", failed("InputMissing", "no manifest"))
        plan = world.settle()
        world.later((plan.requeue_after or 0) + 300)
        world.settle()
        assert world.entry("sft").failures == attempt + 1
    assert world.entry("sft").phase == "Failed"


def test_a_message_that_is_not_there_yet_is_waited_for():
    world = at_stage()
    name = world.job("sft").name
    world.change(name, state="succeeded", active=False, finished=world.now)
    plan = world.settle()
    assert plan.requeue_after == SETTINGS.result_wait_seconds
    assert world.entry("sft").phase == "Running"
    world.change(name, result=succeeded())
    world.settle()
    assert world.entry("sft").phase == "Succeeded"


def test_a_message_that_never_comes_counts_as_lost():
    world = at_stage()
    world.change(world.job("sft").name, state="succeeded", active=False, finished=world.now)
    world.settle()
    world.later(SETTINGS.result_wait_seconds)
    world.settle()
    assert world.job("sft").role == "collect"


def test_a_lost_preflight_message_runs_preflight_again():
    world = World()
    world.settle()
    world.end("preflight", result_lost=True, state="succeeded")
    world.settle()
    assert (world.entry("preflight").phase, world.entry("preflight").attempt) == ("Queued", 2)


def test_a_lost_finalize_message_is_no_failure():
    world = at_stage()
    world.go("sft")
    world.end("finalize", result_lost=True, state="succeeded")
    world.settle()
    assert world.status.phase == "Succeeded"
    assert world.condition("Reported").status == "True"


# Lost inputs


def test_a_lost_input_is_computed_again_and_then_the_stage():
    world = at_stage([ONE_STAGE[0], {"name": "final", "merge": {}}])
    world.go("sft")
    world.end(
        "final", failed("InputMissing", "out-1/model.safetensors of sft is damaged"), failure=PodFailure(exit_code=2)
    )
    world.settle()
    assert world.phases()["sft"] == "Queued"
    assert world.phases()["final"] == "Pending"
    assert world.job("sft").attempt == 2
    world.go("sft")
    assert world.phases()["final"] == "Queued"
    world.go("final", "finalize")
    assert world.status.phase == "Succeeded"


def test_every_stage_under_a_chain_of_adapters_looks_at_its_own_output():
    world = World()
    world.go("preflight", "sft", "dpo")
    world.end("final", failed("InputMissing", "an adapter is damaged"))
    world.settle()
    assert (world.phases()["sft"], world.phases()["dpo"]) == ("Queued", "Pending")


def test_inputs_that_get_lost_again_and_again_end_the_run():
    world = at_stage([ONE_STAGE[0], {"name": "final", "merge": {}}])
    world.go("sft")
    for _ in range(SETTINGS.recoveries_max):
        world.end("final", failed("InputMissing", "gone"))
        world.settle()
        world.go("sft")
    world.end("final", failed("InputMissing", "gone"))
    world.settle()
    assert world.entry("final").phase == "Failed"
    assert len([start for start in world.starts if start.run.stage == "sft"]) == 1 + SETTINGS.recoveries_max


# Jobs that others touch


def test_a_job_deleted_by_hand_starts_again_as_the_same_attempt():
    world = at_stage()
    name = world.job("sft").name
    world.vanish(name)
    world.settle()
    assert world.job("sft").name == name
    assert (world.entry("sft").phase, world.entry("sft").attempt, world.entry("sft").failures) == ("Queued", 1, 0)


def test_a_finished_stage_does_not_need_its_job_any_more():
    world = at_stage()
    world.go("sft")
    world.vanish(world.job("sft").name)
    assert world.settle().actions == ()
    assert world.entry("sft").phase == "Succeeded"


@pytest.mark.parametrize("how", ["seen", "told"])
def test_a_foreign_job_under_our_name_is_left_alone(how: str):
    world = at_stage()
    name = world.job("sft").name
    fresh = World(world.body)
    fresh.settle()
    if how == "seen":
        fresh.jobs[name] = world.jobs[name].__class__(
            name=name, role="stage", stage="sft", fingerprint="f", attempt=1, state="running", owned=False, active=True
        )
    else:
        fresh.foreign = frozenset({name})
    fresh.go("preflight")
    entry = fresh.entry("sft")
    assert (entry.phase, entry.reason) == ("Failed", "NameConflict")
    assert name in entry.message
    assert not any(start.run.stage == "sft" for start in fresh.starts)
    fresh.edit(retry={"nonce": "again"})
    fresh.settle()
    assert fresh.entry("sft").phase == "Queued"
    assert fresh.entry("sft").job != name


# Why a job waits


@pytest.mark.parametrize(
    ("reason", "said", "remedy"),
    [
        ("CreateContainerConfigError", 'secret "s3-credentials" not found', "AWS_ACCESS_KEY_ID"),
        (
            "CreateContainerConfigError",
            "couldn't find key AWS_SECRET_ACCESS_KEY in Secret team-a/s3-credentials",
            "add the key AWS_SECRET_ACCESS_KEY to the Secret s3-credentials",
        ),
        ("ImagePullBackOff", 'Back-off pulling image "x"', "imagePullSecrets"),
        ("Unschedulable", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu", "resources"),
        ("Unschedulable", 'persistentvolumeclaim "models" not found', "create the claim"),
    ],
)
def test_a_job_that_waits_says_why_and_what_to_do(reason: str, said: str, remedy: str):
    world = World(pipeline_body(ONE_STAGE))
    world.go("preflight")
    world.change(world.job("sft").name, waiting_reason=reason, waiting_message=said)
    world.settle()
    entry = world.entry("sft")
    assert (entry.phase, entry.reason) == ("Queued", reason)
    assert said in entry.message
    assert remedy in entry.message
    assert reason in world.event_reasons()
    world.later(3600)
    assert world.settle().actions == ()
    assert world.entry("sft").phase == "Queued"
