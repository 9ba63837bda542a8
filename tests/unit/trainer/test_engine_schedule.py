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


OTHERS = [f"old-{number}" for number in range(6)]


def test_rehearsed_rows_stand_in_every_step_by_their_share() -> None:
    """Ten own rows and a fifth of all from elsewhere: 10 · 0.2 / 0.8 = 2.5, rounded to 2 per epoch."""
    plan = plan_steps(IDS, seed=7, global_batch=6, epochs=2, max_steps=None, rehearsal=[(OTHERS, 0.2)])
    assert plan.rows_per_epoch == 12
    assert plan.steps == 4
    for step in range(4):
        rows = plan.rows(step)
        assert len(rows) == 6
        assert sum(row >= 10 for row in rows) == 1
    own = [row for step in (0, 1) for row in plan.rows(step) if row < 10]
    assert sorted(own) == list(range(10)), "an epoch is still a pass over the own rows"


def test_rehearsal_goes_on_where_the_last_epoch_ended() -> None:
    plan = plan_steps(IDS, seed=7, global_batch=5, epochs=6, max_steps=None, rehearsal=[(OTHERS, 1 / 3), (IDS, 1 / 3)])
    assert plan.rows_per_epoch == 30
    taken = [row for step in range(plan.steps) for row in plan.rows(step)]
    old = [row - 10 for row in taken if 10 <= row < 16]
    assert len(old) == 60
    assert [old.count(row) for row in range(6)] == [10] * 6, "each equally often"
    first = epoch_order(tuple(OTHERS), 7, 0)
    assert tuple(old[:6]) == first
    assert plan.visited() == tuple(range(10)), "what is rehearsed needs no reference"


def test_own_order_does_not_depend_on_what_is_mixed_in() -> None:
    plain = plan_steps(IDS, seed=7, global_batch=4, epochs=1, max_steps=None)
    mixed = plan_steps(IDS, seed=7, global_batch=4, epochs=1, max_steps=None, rehearsal=[(OTHERS, 0.3)])
    own = [row for step in range(mixed.steps) for row in mixed.rows(step) if row < 10]
    assert own == [row for step in range(plain.steps) for row in plain.rows(step)]


def test_visited_with_rehearsal() -> None:
    plan = plan_steps(IDS, seed=7, global_batch=4, epochs=3, max_steps=2, rehearsal=[(OTHERS, 0.2)])
    assert plan.visited() == tuple(sorted({*plan.own_rows(0), *plan.own_rows(1)}))


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
