"""Which rows make up which optimizer step, and how a step is cut into micro-batches.

The composition of a step is a pure function of seed, epoch and row ids. Lengths, ranks and the token budget only decide
how a step is cut, never what is in it.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache


@dataclass(frozen=True)
class Rehearsed:
    """Rows of another dataset that are mixed in."""

    row_ids: tuple[str, ...]
    per_epoch: int
    """Rows taken in an epoch of the stage's own dataset; the next epoch goes on where it ended."""

    def rows(self, seed: int, epoch: int) -> tuple[int, ...]:
        """Indices of the rows of an epoch: a window of the dataset's own epochs, one after another."""
        found: list[int] = []
        count, start = len(self.row_ids), epoch * self.per_epoch
        while len(found) < self.per_epoch:
            own, place = divmod(start + len(found), count)
            order = epoch_order(self.row_ids, seed, own)
            found.extend(order[place : place + self.per_epoch - len(found)])
        return tuple(found)


@dataclass(frozen=True)
class StepPlan:
    """The optimizer steps of a stage.

    Rows are numbered through: the stage's own first, then those of each rehearsed dataset.
    """

    row_ids: tuple[str, ...]
    seed: int
    global_batch: int
    steps: int
    """Optimizer steps in all."""
    least: int = 1
    """Rows that a step needs; a shorter rest of an epoch joins the step before it."""
    rehearsed: tuple[Rehearsed, ...] = ()

    @property
    def rows_per_epoch(self) -> int:
        """Rows of a whole epoch."""
        return len(self.row_ids) + sum(other.per_epoch for other in self.rehearsed)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a whole epoch; the last one takes what is left."""
        full, rest = divmod(self.rows_per_epoch, self.global_batch)
        return max(1, full + (rest >= self.least))

    def epoch(self, step: int) -> float:
        """Epochs done before a step."""
        return step / self.steps_per_epoch

    def own_rows(self, step: int) -> tuple[int, ...]:
        """Indices of the rows of a step that are the stage's own."""
        return tuple(row for row in self.rows(step) if row < len(self.row_ids))

    def rows(self, step: int) -> tuple[int, ...]:
        """Indices of the rows of a step."""
        epoch, slot = divmod(step, self.steps_per_epoch)
        order = mixed_order(self, epoch) if self.rehearsed else epoch_order(self.row_ids, self.seed, epoch)
        is_last = slot + 1 == self.steps_per_epoch
        return order[slot * self.global_batch : None if is_last else (slot + 1) * self.global_batch]

    def visited(self) -> tuple[int, ...]:
        """Indices of the stage's own rows that some step takes, in order."""
        if self.steps <= self.steps_per_epoch:
            return tuple(sorted({row for step in range(self.steps) for row in self.own_rows(step)}))
        return tuple(range(len(self.row_ids)))


def plan_steps(
    row_ids: Sequence[str],
    *,
    seed: int,
    global_batch: int,
    epochs: float,
    max_steps: int | None,
    rehearsal: Sequence[tuple[Sequence[str], float]] = (),
    least: int = 1,
) -> StepPlan:
    """Plan a stage: ⌈epochs · steps per epoch⌉ steps, at most `max_steps`.

    Args:
        row_ids: Of the stage's own rows.
        seed: Of the order.
        global_batch: Rows of a step.
        epochs: Passes over the own rows.
        max_steps: Most steps.
        rehearsal: Row ids of every dataset that is mixed in, and its share of all rows.
        least: Rows that a step needs.
    """
    own_share = 1.0 - sum(share for _, share in rehearsal)
    rehearsed = tuple(
        Rehearsed(tuple(names), max(1, round(len(row_ids) * share / own_share))) for names, share in rehearsal
    )
    plan = StepPlan(tuple(row_ids), seed=seed, global_batch=global_batch, steps=0, least=least, rehearsed=rehearsed)
    # The tolerance keeps 0.1 · 30 = 3.0000000000000004 from becoming four steps.
    steps = max(1, math.ceil(epochs * plan.steps_per_epoch - 1e-9))
    return replace(plan, steps=steps if max_steps is None else min(steps, max_steps))


@lru_cache(maxsize=16)
def epoch_order(row_ids: tuple[str, ...], seed: int, epoch: int) -> tuple[int, ...]:
    """Order of the rows in an epoch: sorted by a hash of seed, epoch and id, so that other rows do not matter."""
    keys = [hashlib.sha256(f"{seed}/order/{epoch}/{row_id}".encode()).digest() for row_id in row_ids]
    return tuple(sorted(range(len(row_ids)), key=lambda index: (keys[index], index)))


@lru_cache(maxsize=4)
def mixed_order(plan: StepPlan, epoch: int) -> tuple[int, ...]:
    """Order of all rows in an epoch: each dataset's evenly spread, so that every step has each dataset's share.

    The j-th of n rows of a dataset stands at (j + ½) / n of the epoch. A function of seed, epoch and row ids.
    """
    orders = [epoch_order(plan.row_ids, plan.seed, epoch)]
    orders += [other.rows(plan.seed, epoch) for other in plan.rehearsed]
    first, placed = 0, []
    for number, (order, size) in enumerate(
        zip(orders, [len(plan.row_ids), *(len(other.row_ids) for other in plan.rehearsed)], strict=True)
    ):
        placed += [((2 * j + 1) / (2 * len(order)), number, first + row) for j, row in enumerate(order)]
        first += size
    # Only place and dataset are compared: rows of a dataset never share a place.
    return tuple(row for _, _, row in sorted(placed))


def random_key(seed: int, purpose: str, *parts: int | str) -> int:
    """A seed for a random generator, keyed by what it is for; 63 bits."""
    text = "/".join(str(part) for part in (seed, purpose, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def cut_step(lengths: Sequence[int], *, budget: int, ranks: int) -> list[list[list[int]]]:
    """Cut the rows of a step into micro-batches of at most `budget` tokens, equally many per rank.

    Rows go, longest first, to the micro-batch with the fewest tokens, so that micro-batches are alike in size. A row
    longer than the budget stands alone. Ranks may end up with an empty micro-batch: the caller fills it with a dummy of
    weight zero.

    Args:
        lengths: Tokens of each row.
        budget: Tokens of one micro-batch.
        ranks: Processes that share the step.

    Returns:
        [rank][micro-batch] → positions in `lengths`.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    rounds = max(1, math.ceil(sum(min(length, budget) for length in lengths) / budget / ranks))
    while True:
        batches = _spread(lengths, order, rounds * ranks)
        fits = all(len(rows) <= 1 or sum(lengths[row] for row in rows) <= budget for rows in batches)
        if fits or rounds * ranks >= len(lengths):
            break
        rounds += max(1, rounds // 20)
    batches.sort(key=lambda rows: (-sum(lengths[row] for row in rows), rows))
    return [[batches[round_ * ranks + rank] for round_ in range(rounds)] for rank in range(ranks)]


def _spread(lengths: Sequence[int], order: Sequence[int], count: int) -> list[list[int]]:
    """Longest first, each to the batch with the fewest tokens so far."""
    heap = [(0, index) for index in range(count)]
    batches: list[list[int]] = [[] for _ in range(count)]
    for row in order:
        tokens, index = heapq.heappop(heap)
        batches[index].append(row)
        heapq.heappush(heap, (tokens + lengths[row], index))
    return batches


def fill_batches(lengths: Sequence[int], *, budget: int) -> list[list[int]]:
    """Cut any number of rows into micro-batches for scoring: longest first, each filled up to the budget."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    room = 0
    for row in order:
        if lengths[row] > room or not batches:
            batches.append([])
            room = budget
        batches[-1].append(row)
        room -= lengths[row]
    return batches
