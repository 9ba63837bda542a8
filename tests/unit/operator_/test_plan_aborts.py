"""Stages that stopped by their own abort rules."""

from __future__ import annotations

from typing import Any

import pytest
from plumbline_operator.snapshot import PlannedEvent
from support.planning import World, pipeline_body, succeeded

SAID = "kl above 15 for 5 steps (now 17.2)"


def world_of(on_abort: str | None = None, **stage: Any) -> World:
    """A stage with an abort rule, and one that depends on it."""
    rl = {
        "name": "rl",
        "abortWhen": [{"metric": "kl", "above": 15, "for": 5}],
        "grpo": {"prompts": "tickets", "rewards": [{"rule": "length"}]},
        **({"onAbort": on_abort} if on_abort else {}),
        **stage,
    }
    return World(pipeline_body([rl, {"name": "final", "merge": {}}]))


def run(world: World, **fields: Any) -> None:
    world.go("preflight")
    world.run("rl")
    world.end("rl", succeeded(**fields))
    world.settle()


def test_an_aborted_stage_fails_with_the_trainers_own_words():
    world = world_of()
    run(world, metrics={"aborted": 1.0, "kl": 17.2}, message=SAID)
    entry = world.entry("rl")
    assert (entry.phase, entry.reason, entry.message) == ("Failed", "Aborted", SAID)
    assert entry.output is not None  # the last good weights are there
    assert world.phases()["final"] == "Skipped"
    world.go("finalize")
    condition = world.condition("Failed")
    assert (condition.reason, condition.message) == ("Aborted", f"rl: Aborted: {SAID}")


@pytest.mark.parametrize("on_abort", ["fail", "continue"])
def test_a_stage_that_was_not_aborted_completes(on_abort: str):
    world = world_of(on_abort)
    run(world, metrics={"aborted": 0.0, "kl": 2.0})
    assert (world.entry("rl").phase, world.entry("rl").reason) == ("Succeeded", "Completed")


def test_with_on_abort_continue_the_pipeline_goes_on_and_says_so():
    world = world_of("continue")
    run(world, metrics={"aborted": 1.0, "kl": 17.2}, message=SAID)
    entry = world.entry("rl")
    assert (entry.phase, entry.reason, entry.message) == ("Succeeded", "Aborted", SAID)
    assert world.phases()["final"] == "Queued"
    assert PlannedEvent("Warning", "StageAborted", f"rl: {SAID}") in world.events


@pytest.mark.parametrize(
    ("on_abort", "phase", "following"), [("fail", "Failed", "Skipped"), ("continue", "Succeeded", "Queued")]
)
def test_an_aborted_output_that_is_found_in_storage_is_read_and_says_the_same(
    on_abort: str, phase: str, following: str
):
    world = world_of(on_abort)
    world.in_storage = {"rl"}
    world.go("preflight")
    assert world.job("rl").role == "collect"
    world.run("rl")
    world.end("rl", succeeded(metrics={"aborted": 1.0}, message=SAID))
    world.settle()
    entry = world.entry("rl")
    assert (entry.phase, entry.reason, entry.message, entry.cached) == (phase, "Aborted", SAID, True)
    assert world.phases()["final"] == following


def test_the_abort_is_told_before_other_gates():
    world = world_of(gates=[{"metric": "reward", "atLeast": 1.0}])
    run(world, metrics={"aborted": 1.0, "reward": 0.1}, message=SAID)
    assert (world.entry("rl").reason, world.entry("rl").message) == ("Aborted", SAID)


def test_other_gates_hold_for_an_aborted_output_that_is_let_through():
    world = world_of("continue", gates=[{"metric": "reward", "atLeast": 1.0}])
    run(world, metrics={"aborted": 1.0, "reward": 0.1}, message=SAID)
    assert world.entry("rl").reason == "GateFailed"
    assert "reward is 0.1; the gate asks for at least 1" in world.entry("rl").message


def test_letting_an_aborted_output_through_afterwards_computes_nothing_again():
    world = world_of()
    run(world, metrics={"aborted": 1.0}, message=SAID)
    world.go("finalize")
    stages = world.body["spec"]["stages"]
    world.edit(stages=[stages[0] | {"onAbort": "continue"}, stages[1]])
    world.in_storage = {"rl"}
    world.go("preflight")
    assert world.job("rl").role == "collect"
    world.run("rl")
    world.end("rl", succeeded(metrics={"aborted": 1.0}, message=SAID))
    world.settle()
    assert (world.entry("rl").phase, world.entry("rl").reason) == ("Succeeded", "Aborted")
    assert world.phases()["final"] == "Queued"
