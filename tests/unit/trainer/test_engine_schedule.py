"""What is in a step, and how it is cut."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from plumbline_trainer.engine.schedule import cut_step, epoch_order, fill_batches, plan_steps, random_key

IDS = [f"row-{number}" for number in range(10)]


def test_every_row_once_per_epoch_and_another_order_next_time() -> None:
    plan = plan_steps(IDS, seed=7, global_batch=4, epochs=2, max_steps=None)
    assert plan.steps == 6
    epochs = [[row for step in steps for row in plan.rows(step)] for steps in ((0, 1, 2), (3, 4, 5))]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert [len(plan.rows(step)) for step in range(6)] == [4, 4, 2, 4, 4, 2]


def test_order_depends_on_seed_epoch_and_ids_only() -> None:
    order = [IDS[index] for index in epoch_order(tuple(IDS), 1, 0)]
    shuffled = tuple(reversed(IDS))
    assert [shuffled[index] for index in epoch_order(shuffled, 1, 0)] == order
    assert [IDS[index] for index in epoch_order(tuple(IDS), 2, 0)] != order
    without = tuple(name for name in IDS if name != "row-3")
    assert [without[index] for index in epoch_order(without, 1, 0)] == [name for name in order if name != "row-3"]


def test_fractions_of_epochs_and_max_steps() -> None:
    def steps(epochs: float, max_steps: int | None = None) -> int:
        return plan_steps(IDS, seed=0, global_batch=1, epochs=epochs, max_steps=max_steps).steps

    assert steps(0.5) == 5
    assert steps(0.51) == 6
    assert steps(0.3) == 3, "0.1 · 3 in floating point must not add a step"
    assert steps(0.001) == 1
    assert steps(3, max_steps=4) == 4
    assert steps(0.2, max_steps=100) == 2


def test_visited_rows() -> None:
    plan = plan_steps(IDS, seed=7, global_batch=4, epochs=3, max_steps=2)
    assert plan.visited() == tuple(sorted([*plan.rows(0), *plan.rows(1)]))
    assert plan_steps(IDS, seed=7, global_batch=4, epochs=3, max_steps=4).visited() == tuple(range(10))


def test_random_keys_differ_by_purpose() -> None:
    assert random_key(1, "dropout", 3) == random_key(1, "dropout", 3)
    assert len({random_key(1, "dropout", 3), random_key(1, "order", 3), random_key(2, "dropout", 3)}) == 3


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=40),
    budget=st.integers(64, 300),
    ranks=st.integers(1, 4),
)
def test_cutting_loses_nothing_and_keeps_the_budget(lengths: list[int], budget: int, ranks: int) -> None:
    cut = cut_step(lengths, budget=budget, ranks=ranks)
    assert len(cut) == ranks
    assert len({len(batches) for batches in cut}) == 1, "all ranks take equally many micro-batches"
    members = [row for batches in cut for batch in batches for row in batch]
    assert sorted(members) == list(range(len(lengths)))
    for batches in cut:
        for batch in batches:
            assert len(batch) <= 1 or sum(lengths[row] for row in batch) <= budget
    # No rank idles while another one has several rows in hand.
    loads = [sum(len(batch) for batch in batches) for batches in cut]
    assert min(loads) > 0 or max(loads) <= len(cut[0])


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 120), max_size=40), budget=st.integers(64, 300))
def test_filling_loses_nothing_and_keeps_the_budget(lengths: list[int], budget: int) -> None:
    batches = fill_batches(lengths, budget=budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(batch) <= 1 or sum(lengths[row] for row in batch) <= budget for batch in batches)


def test_a_row_over_the_budget_stands_alone() -> None:
    assert sorted(map(sorted, cut_step([500, 10, 20], budget=64, ranks=1)[0])) == [[0], [1, 2]]


def test_one_step_is_shared_by_all_ranks() -> None:
    (first,), (second,) = cut_step([30, 20, 20, 30], budget=4096, ranks=2)
    assert len(first) == len(second) == 2
