"""What the control group of this process allows and has seen, of versions 1 and 2."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def available_cpus() -> int:
    """Processors that this process may use: its affinity, and the quota of its control group."""
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup/cpu")
        limit = int((group / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        if limit > 0:
            per = int((group / "cpu.cfs_period_us").read_text(encoding="utf-8"))
            count = min(count, max(1, round(limit / per)))
    return count


def memory_limit() -> int | None:
    """Bytes that the processes of this control group may use, at most what the machine has; None if unknown."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for counter in _oom_counters():
        for name in ("memory.max", "memory.limit_in_bytes"):  # version 2, version 1; "max" is no number
            with contextlib.suppress(OSError, ValueError):
                found.append(int((counter.parent / name).read_text(encoding="utf-8")))
    return min(found, default=None)


def oom_kills() -> int | None:
    """Processes of this control group that the kernel has killed for memory so far; None where it does not tell."""
    for path in _oom_counters():
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text(encoding="utf-8").splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return None


def _oom_counters() -> list[Path]:
    """Files that may hold the count: as a container sees its own group, then by path."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "memory":
                found.append(Path("/sys/fs/cgroup/memory") / path.lstrip("/") / "memory.oom_control")
            elif not controllers:
                found.append(Path("/sys/fs/cgroup") / path.lstrip("/") / "memory.events")
    return [*found, Path("/sys/fs/cgroup/memory/memory.oom_control"), Path("/sys/fs/cgroup/memory.events")]
