"""Which rows make up which optimizer step, and how a step is cut into micro-batches.

The composition of a step is a pure function of seed, epoch and row ids. Lengths, ranks and the token budget only decide
how a step is cut, never what is in it.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class StepPlan:
    """The optimizer steps of a stage."""

    row_ids: tuple[str, ...]
    seed: int
    global_batch: int
    steps: int
    """Optimizer steps in all."""
    least: int = 1
    """Rows that a step needs; a shorter rest of an epoch joins the step before it."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a whole epoch; the last one takes what is left."""
        return steps_per_epoch(len(self.row_ids), self.global_batch, self.least)

    def epoch(self, step: int) -> float:
        """Epochs done before a step."""
        return step / self.steps_per_epoch

    def rows(self, step: int) -> tuple[int, ...]:
        """Indices of the rows of a step."""
        epoch, slot = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.row_ids, self.seed, epoch)
        is_last = slot + 1 == self.steps_per_epoch
        return order[slot * self.global_batch : None if is_last else (slot + 1) * self.global_batch]

    def visited(self) -> tuple[int, ...]:
        """Indices of all rows that some step takes, in order."""
        seen = {row for step in range(min(self.steps, self.steps_per_epoch)) for row in self.rows(step)}
        if self.steps > self.steps_per_epoch:
            seen = set(range(len(self.row_ids)))
        return tuple(sorted(seen))


def steps_per_epoch(rows: int, global_batch: int, least: int = 1) -> int:
    """Steps of an epoch: a rest of at least `least` rows is a step of its own."""
    full, rest = divmod(rows, global_batch)
    return max(1, full + (rest >= least))


def plan_steps(
    row_ids: Sequence[str], *, seed: int, global_batch: int, epochs: float, max_steps: int | None, least: int = 1
) -> StepPlan:
    """Plan a stage: ⌈epochs · steps per epoch⌉ steps, at most `max_steps`; each of at least `least` rows."""
    per_epoch = steps_per_epoch(len(row_ids), global_batch, least)
    # The tolerance keeps 0.1 · 30 = 3.0000000000000004 from becoming four steps.
    steps = max(1, math.ceil(epochs * per_epoch - 1e-9))
    if max_steps is not None:
        steps = min(steps, max_steps)
    return StepPlan(row_ids=tuple(row_ids), seed=seed, global_batch=global_batch, steps=steps, least=least)


@lru_cache(maxsize=4)
def epoch_order(row_ids: tuple[str, ...], seed: int, epoch: int) -> tuple[int, ...]:
    """Order of the rows in an epoch: sorted by a hash of seed, epoch and id, so that other rows do not matter."""
    keys = [hashlib.sha256(f"{seed}/order/{epoch}/{row_id}".encode()).digest() for row_id in row_ids]
    return tuple(sorted(range(len(row_ids)), key=lambda index: (keys[index], index)))


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
