"""The truth table of conditions: docs/conditions.md and the code say the same, and runs pass through it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from plumbline_api.status import Condition
from plumbline_operator.policies.conditions import CONDITION_TYPES, TRUTH_TABLE, Situation, conditions_for
from plumbline_operator.policies.summary import phase_of
from support.planning import START, World, failed, pipeline_body

PAGE = Path(__file__).parents[3] / "docs" / "conditions.md"


def documented() -> dict[str, dict[str, str]]:
    """The table of the page: cells by situation and column."""
    rows = [line.strip().strip("|") for line in PAGE.read_text().splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in row.split("|")] for row in rows]
    return {cells[0]: dict(zip(header, cells, strict=True)) for cells in body}


def test_the_page_has_every_situation_and_condition():
    table = documented()
    assert list(table) == [situation.value for situation in Situation]
    for cells in table.values():
        assert set(cells) == {"Situation", *CONDITION_TYPES, "phase"}


@pytest.mark.parametrize("situation", list(Situation))
def test_the_page_and_the_code_agree(situation: Situation):
    cells = documented()[situation.value]
    assert tuple(cells[name] for name in CONDITION_TYPES) == TRUTH_TABLE[situation]
    assert cells["phase"] == phase_of(situation, is_started=True)


@pytest.mark.parametrize("situation", list(Situation))
def test_kstatus_can_be_read_from_every_situation(situation: Situation):
    row = dict(zip(CONDITION_TYPES, TRUTH_TABLE[situation], strict=True))
    assert [row["Ready"], row["Stalled"], row["Reconciling"]].count("True") == 1
    assert (row["Ready"] == "True") == (row["Succeeded"] == "True")
    assert (row["Stalled"] == "True") == (row["Failed"] == "True" or row["Accepted"] == "False")


def test_conditions_that_end_a_run_are_written_last():
    assert CONDITION_TYPES[-3:] == ("Succeeded", "Failed", "Ready")


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Situation, repeat=2)))
def test_the_time_of_a_transition_changes_only_with_the_status(before: Situation, after: Situation):
    def conditions(situation: Situation, old: list[Condition], generation: int, hours: int) -> list[Condition]:
        return conditions_for(
            situation,
            old,
            generation=generation,
            reason="Why",
            message="words",
            report_message="",
            now=START.replace(hour=hours),
        )

    first = conditions(before, [], 1, 1)
    second = conditions(after, first, 2, 2)
    for one, two in zip(first, second, strict=True):
        assert two.observed_generation == 2
        assert (two.last_transition_time == one.last_transition_time) == (two.status == one.status)


def seen(world: World) -> Situation:
    """The row of the table that the written conditions are."""
    row = tuple(world.condition(name).status for name in CONDITION_TYPES)
    running = world.condition("Running")
    rows = [situation for situation in Situation if TRUTH_TABLE[situation] == row]
    return next((situation for situation in rows if running.reason == situation.value), rows[0])


def test_a_run_passes_through_the_situations():
    world = World(pipeline_body([{"name": "sft", "sft": {"dataset": "tickets"}}]))
    course = []
    world.settle()
    course.append(seen(world))
    world.go("preflight")
    course.append(seen(world))
    world.run("sft")
    world.edit(suspend=True)
    world.settle()
    course.append(seen(world))
    world.change(world.job("sft").name, active=False, state="waiting", started=None)
    world.settle()
    course.append(seen(world))
    world.edit(suspend=False)
    world.go("sft")
    course.append(seen(world))
    world.go("finalize")
    course.append(seen(world))
    world.edit(stages=[{"name": "sft", "sft": {"dataset": "nowhere"}}])
    world.settle()
    course.append(seen(world))
    assert course == [
        Situation.PREFLIGHT,
        Situation.STAGES,
        Situation.SUSPENDING,
        Situation.SUSPENDED,
        Situation.FINALIZING,
        Situation.SUCCEEDED,
        Situation.REFUSED,
    ]
    assert all(condition.observed_generation == 4 for condition in world.status.conditions)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("reported", [False, True])
def test_the_outcome_stands_whether_or_not_the_report_is_written(fails: bool, reported: bool):
    world = World(pipeline_body([{"name": "sft", "sft": {"dataset": "tickets"}}]))
    world.go("preflight")
    world.end("sft", failed("BadInput") if fails else None)
    world.settle()
    assert world.condition("Failed").status == "Unknown"
    if reported:
        world.go("finalize")
    else:
        world.end("finalize", failed("StorageDenied", "no access to s3://bucket"))
        world.settle()
    expected = {
        (False, True): Situation.SUCCEEDED,
        (False, False): Situation.SUCCEEDED_UNREPORTED,
        (True, True): Situation.FAILED,
        (True, False): Situation.FAILED_UNREPORTED,
    }
    assert seen(world) is expected[fails, reported]
    assert world.status.phase == ("Failed" if fails else "Succeeded")
    if not reported:
        assert "no access to s3://bucket" in world.condition("Reported").message
        assert world.status.report is None
