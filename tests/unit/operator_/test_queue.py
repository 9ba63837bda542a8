"""The work queue: order, one pass per key, the dirty flag, waits after failures."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plumbline_operator.errors import ApiError
from plumbline_operator.queue import Backoff, Schedule, WorkQueue


def test_keys_come_in_the_order_in_which_they_fell_due() -> None:
    schedule: Schedule[str] = Schedule()
    schedule.add("late", 5)
    schedule.add("soon", 1)
    assert schedule.take(0.5) is None
    assert schedule.next_due() == 1
    assert schedule.take(6) == "soon"
    assert schedule.take(6) == "late"
    assert schedule.take(6) is None


def test_asking_twice_is_one_pass_at_the_earlier_time() -> None:
    schedule: Schedule[str] = Schedule()
    schedule.add("a", 10)
    schedule.add("a", 2)
    schedule.add("a", 7)
    assert schedule.take(2) == "a"
    schedule.finish("a", failed=False)
    assert schedule.take(100) is None


def test_a_key_asked_for_during_its_pass_gets_another_after_it() -> None:
    schedule: Schedule[str] = Schedule()
    schedule.add("a", 0)
    assert schedule.take(0) == "a"
    schedule.add("a", 1)
    assert schedule.take(5) is None, "never two passes at a time for one key"
    schedule.finish("a", failed=False)
    assert schedule.take(5) == "a"


def test_failures_are_counted_in_a_row_and_forgotten_by_success() -> None:
    schedule: Schedule[str] = Schedule()
    for expected in (1, 2, 3):
        schedule.add("a", 0)
        schedule.take(0)
        assert schedule.finish("a", failed=True) == expected
    schedule.add("a", 0)
    schedule.take(0)
    assert schedule.finish("a", failed=False) == 0


def test_age_tells_of_what_waits_and_of_what_hangs() -> None:
    schedule: Schedule[str] = Schedule()
    assert schedule.oldest(9) == 0
    schedule.add("a", 3)
    assert (schedule.depth(10), schedule.oldest(10)) == (1, 7)
    schedule.take(10)
    assert (schedule.depth(30), schedule.oldest(30)) == (0, 20)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 100), st.booleans()), max_size=60))
def test_no_request_is_lost_and_no_key_runs_twice_at_once(steps: list[tuple[str, float, bool]]) -> None:
    schedule: Schedule[str] = Schedule()
    running: set[str] = set()
    owed: set[str] = set()
    for key, due, should_finish in steps:
        schedule.add(key, due)
        owed.add(key)
        if (taken := schedule.take(50)) is not None:
            assert taken not in running
            running.add(taken)
            owed.discard(taken)
        if should_finish and running:
            schedule.finish(running.pop(), failed=False)
    while running:
        schedule.finish(running.pop(), failed=False)
    while (taken := schedule.take(100)) is not None:
        owed.discard(taken)
        schedule.finish(taken, failed=False)
    assert not owed


def test_waits_double_up_to_the_cap_with_jitter() -> None:
    backoff = Backoff(1.0, 60.0, random.Random(7))
    waits = [backoff.seconds(failures, ValueError()) for failures in range(1, 12)]
    assert all(0.5 * 2**n <= wait <= 2**n for n, wait in enumerate(waits[:6]))
    assert all(30 <= wait <= 60 for wait in waits[6:])
    assert len({backoff.seconds(3, ValueError()) for _ in range(10)}) == 10


def test_the_server_may_ask_for_a_longer_wait() -> None:
    backoff = Backoff(0.1, 60.0, random.Random(7))
    assert backoff.seconds(1, ApiError("slow down", status=429, retry_after=20)) == 20
    assert backoff.seconds(1, ApiError("slow down", status=429, retry_after=9999)) == 60


async def running(queue: WorkQueue[str], until: asyncio.Event) -> None:
    task = asyncio.create_task(queue.run())
    try:
        async with asyncio.timeout(10):
            await until.wait()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def queue_of(work, workers: int = 4, timeout: float = 5.0, errors: list | None = None) -> WorkQueue[str]:
    def note(key: str, error: BaseException) -> None:
        if errors is not None:
            errors.append(error)

    return WorkQueue(work, workers=workers, backoff=Backoff(0.001, 0.01), timeout_seconds=timeout, on_error=note)


async def test_passes_of_one_key_never_overlap_and_the_last_request_is_served() -> None:
    active: set[str] = set()
    served: list[str] = []
    done = asyncio.Event()

    async def work(key: str) -> None:
        assert key not in active
        active.add(key)
        await asyncio.sleep(0)
        active.discard(key)
        served.append(key)
        if served.count("a") == 1:
            queue.add("a")
        if served.count("a") >= 2 and "b" in served:
            done.set()

    queue = queue_of(work)
    for key in ("a", "b", "a"):
        queue.add(key)
    await running(queue, done)
    assert served.count("b") == 1


async def test_a_failed_pass_comes_again_and_a_defect_does_not_stop_the_queue() -> None:
    calls: list[str] = []
    errors: list[BaseException] = []
    done = asyncio.Event()

    async def work(key: str) -> None:
        calls.append(key)
        if len(calls) < 4:
            raise RuntimeError("defect")
        done.set()

    queue = queue_of(work, errors=errors)
    queue.add("a")
    await running(queue, done)
    assert len(errors) == 3


async def test_no_more_passes_at_once_than_workers() -> None:
    active = 0
    most = 0
    done = asyncio.Event()
    left = 20

    async def work(key: str) -> None:
        nonlocal active, most, left
        active += 1
        most = max(most, active)
        await asyncio.sleep(0.001)
        active -= 1
        left -= 1
        if not left:
            done.set()

    queue = queue_of(work, workers=3)
    for number in range(20):
        queue.add(f"k{number}")
    await running(queue, done)
    assert most == 3


async def test_a_hanging_pass_is_given_up_and_tried_again() -> None:
    errors: list[BaseException] = []
    done = asyncio.Event()
    calls = 0

    async def work(key: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            await asyncio.Event().wait()
        done.set()

    queue = queue_of(work, timeout=0.05, errors=errors)
    queue.add("a")
    await running(queue, done)
    assert [type(error) for error in errors] == [TimeoutError]


async def test_a_pass_may_ask_to_look_again() -> None:
    calls = 0
    done = asyncio.Event()

    async def work(key: str) -> float | None:
        nonlocal calls
        calls += 1
        if calls == 3:
            done.set()
            return None
        return 0.001

    queue = queue_of(work)
    queue.add("a")
    await running(queue, done)
    assert queue.stalled_seconds() == pytest.approx(0.0, abs=1.0)
