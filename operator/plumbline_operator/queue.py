"""The work queue: one pass at a time for each key, a bound on passes in all, a growing wait after failures.

kopf swallows errors of event handlers and knows no level-triggered work; so its handlers only put keys here.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from plumbline_operator.errors import ApiError

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Entry:
    due: float | None = None
    """When the next pass is due; None where none is asked for."""
    started: float | None = None
    """When the pass under way began; None where none is."""
    again: float | None = None
    """Asked for during the pass under way: when the next one is due (the dirty flag)."""
    failures: int = 0


class Schedule(Generic[K]):
    """Which key is due when. Plain bookkeeping: it knows neither a clock nor tasks."""

    def __init__(self) -> None:
        self._entries: dict[K, _Entry] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._order = itertools.count()

    def add(self, key: K, due: float) -> None:
        """Ask for a pass. An earlier one that is already asked for stands; one under way is followed by another."""
        entry = self._entries.setdefault(key, _Entry())
        if entry.started is not None:
            entry.again = due if entry.again is None else min(entry.again, due)
        elif entry.due is None or due < entry.due:
            entry.due = due
            heapq.heappush(self._heap, (due, next(self._order), key))

    def take(self, now: float) -> K | None:
        """The key that has been due longest, marked as under way; None where none is due."""
        while self._heap and self._heap[0][0] <= now:
            due, _, key = heapq.heappop(self._heap)
            entry = self._entries.get(key)
            if entry is not None and entry.started is None and entry.due == due:
                entry.due, entry.started = None, now
                return key
        return None

    def finish(self, key: K, *, failed: bool) -> int:
        """A pass has ended; returns how many failed in a row."""
        entry = self._entries[key]
        entry.started = None
        entry.failures = entry.failures + 1 if failed else 0
        if entry.again is not None:
            again, entry.again = entry.again, None
            self.add(key, again)
        elif not failed and entry.due is None:
            del self._entries[key]
        return entry.failures

    def next_due(self) -> float | None:
        """When something is due next."""
        while self._heap:
            due, _, key = self._heap[0]
            entry = self._entries.get(key)
            if entry is not None and entry.started is None and entry.due == due:
                return due
            heapq.heappop(self._heap)
        return None

    def depth(self, now: float) -> int:
        """Keys that are due and wait for a worker."""
        return sum(entry.due is not None and entry.due <= now for entry in self._entries.values())

    def oldest(self, now: float) -> float:
        """Seconds that the longest-waiting key has been due, or the longest pass has been under way."""
        since = [entry.due for entry in self._entries.values() if entry.due is not None and entry.due <= now]
        since += [entry.started for entry in self._entries.values() if entry.started is not None]
        return now - min(since) if since else 0.0


@dataclass(frozen=True, slots=True)
class Backoff:
    """The wait after failed passes: doubling, capped, spread so that failures do not come back together."""

    base_seconds: float
    cap_seconds: float
    random: random.Random = field(default_factory=random.Random)

    def seconds(self, failures: int, error: BaseException) -> float:
        """The wait after so many failures in a row; never less than the server asked for."""
        wait = min(self.base_seconds * 2.0 ** min(failures - 1, 30), self.cap_seconds)
        wait *= self.random.uniform(0.5, 1.0)
        asked = error.retry_after if isinstance(error, ApiError) else None
        return max(wait, min(asked, self.cap_seconds)) if asked is not None else wait


class WorkQueue(Generic[K]):
    """Runs passes.

    Args:
        work: One pass for a key; returns the seconds after which to look again, or None.
        workers: Passes at the same time.
        backoff: The wait after a failure.
        timeout_seconds: Longest time of a pass; a longer one counts as failed.
        on_error: Told of every failed pass.
    """

    def __init__(
        self,
        work: Callable[[K], Awaitable[float | None]],
        *,
        workers: int,
        backoff: Backoff,
        timeout_seconds: float,
        on_error: Callable[[K, BaseException], None] | None = None,
    ) -> None:
        self._work = work
        self._workers = workers
        self._backoff = backoff
        self._timeout = timeout_seconds
        self._on_error = on_error
        self._schedule: Schedule[K] = Schedule()
        self._changed = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._last_finished = 0.0

    def add(self, key: K, delay: float = 0.0) -> None:
        """Ask for a pass. Call it in the event loop's thread."""
        self._schedule.add(key, _now() + delay)
        self._changed.set()

    def depth(self) -> int:
        """Keys that wait for a worker."""
        return self._schedule.depth(_now())

    def stalled_seconds(self) -> float:
        """How long something has been due with no pass ending meanwhile; 0 where the queue moves or is empty."""
        now = _now()
        return min(self._schedule.oldest(now), now - self._last_finished)

    async def run(self) -> None:
        """Work until cancelled; passes under way are cancelled with it (every write is safe to be cut off after)."""
        self._last_finished = _now()
        try:
            while True:
                self._changed.clear()
                while len(self._running) < self._workers and (key := self._schedule.take(_now())) is not None:
                    task = asyncio.create_task(self._pass(key), name=f"pass {key}")
                    self._running.add(task)
                    task.add_done_callback(self._ended)
                await self._wait()
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._changed.set()

    async def _wait(self) -> None:
        due = self._schedule.next_due() if len(self._running) < self._workers else None
        try:
            async with asyncio.timeout(None if due is None else max(due - _now(), 0.0)):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _pass(self, key: K) -> None:
        failure: BaseException | None = None
        after: float | None = None
        try:
            async with asyncio.timeout(self._timeout):
                after = await self._work(key)
        except asyncio.CancelledError:
            self._schedule.finish(key, failed=False)
            raise
        except Exception as error:
            failure = error
        self._last_finished = _now()
        failures = self._schedule.finish(key, failed=failure is not None)
        if failure is not None:
            after = self._backoff.seconds(failures, failure)
            if self._on_error is not None:
                self._on_error(key, failure)
        if after is not None:
            self.add(key, after)


def _now() -> float:
    return asyncio.get_running_loop().time()
