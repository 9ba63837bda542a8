"""Where the time of a step goes: processor time of torch's own operations by kind, and what lies between them."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Protocol

from torch.profiler import ProfilerActivity, profile

KINDS: dict[str, re.Pattern[str]] = {
    "products": re.compile(r"^aten::(mm|addmm_?|bmm|baddbmm_?|matmul|linear|mv|dot)$"),
    "attention": re.compile(r"^aten::_?(scaled_dot_product|efficient_attention|flash_attention)"),
    "copies": re.compile(
        r"^aten::(copy_|cat|clone|contiguous|stack|index|index_select|repeat_interleave|pad|fill_|zero_)"
    ),
}
"""Kind → names of operations; all others are `elementwise`, as most of them are."""


class Event(Protocol):
    """What of a profiler's averages is read."""

    key: str
    self_cpu_time_total: float
    """Microseconds."""


class StepParts:
    """Profiles one step and adds up its parts."""

    def __init__(self) -> None:
        self._profile: Any = None
        self._started = 0.0

    def begin(self) -> None:
        """The step begins."""
        self._profile = profile(activities=[ProfilerActivity.CPU])  # shapes or FLOPs would keep tensors alive
        self._profile.__enter__()
        self._started = time.perf_counter()

    def end(self) -> dict[str, float]:
        """The step has ended: seconds by kind, `step` (wall) and `between` (the rest)."""
        wall = time.perf_counter() - self._started
        self._profile.__exit__(None, None, None)
        return parts_of(self._profile.key_averages(), wall)


def parts_of(events: Iterable[Event], wall: float) -> dict[str, float]:
    """Seconds by kind of operation.

    Args:
        events: Averages of a profiler, one per name.
        wall: Seconds that the step took.
    """
    found: dict[str, float] = defaultdict(float)
    for event in events:
        kind = next((kind for kind, names in KINDS.items() if names.match(event.key)), "elementwise")
        found[kind] += event.self_cpu_time_total / 1e6
    return {**found, "between": max(wall - sum(found.values()), 0.0), "step": wall}
