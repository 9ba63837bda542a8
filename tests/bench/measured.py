"""What `make bench-trainer` measures in a process, and how. Standard library only: each peer's environment uses it too."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

PPO_EPOCHS = 4
"""Passes over a rollout, on both sides of ppo."""
TEMPERATURE = 1.0
"""Of sampling, on all sides."""


@dataclass(frozen=True)
class Task:
    """What to measure."""

    side: str
    """`ours`, `trl` (its best settings) or `trl-default`."""
    method: str
    profile: str
    model: str
    """Folder in Hugging Face layout."""
    rows: int
    global_batch: int
    tokens_per_batch: int
    batch: int
    """Rows of trl's device batch."""
    precision: str
    threads: int
    left_out: int
    """First steps that are not counted."""
    answers: int = 1
    """Sampled for every prompt (ppo, grpo)."""
    new_tokens: int = 0
    """Tokens of every sampled answer; none ends before."""
    parts: bool = False
    """Profile the last step, which slows it."""
    device: str = "cpu"
    """`cpu` or `cuda`; stages that sample know the former only."""

    @property
    def steps(self) -> int:
        """Optimizer steps, or iterations where answers are sampled."""
        return self.rows // self.global_batch

    @property
    def stage(self) -> str:
        """Stage type."""
        return self.method.partition("-")[0]

    @property
    def answers_per_step(self) -> int:
        """What trl counts in an optimizer step: pairs for DPO, answers for KTO and where they are sampled."""
        return self.global_batch * (2 if self.method == "kto-pairs" else self.answers)


@dataclass
class Measured:
    """What one run took."""

    rows_per_second: float
    tokens_per_second: float
    """Tokens of the rows, each prompt once: the same count on both sides."""
    reference_seconds: float
    step_seconds: list[float]
    peak_bytes: int
    base_bytes: int
    """Resident after imports and weights."""
    operations: float
    """Of the whole run, reference pass included."""
    losses: list[float]
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of the last step by kind of operation, where it was profiled."""


class Profiler(Protocol):
    """Takes a step apart."""

    def begin(self) -> None:
        """The step begins."""

    def end(self) -> dict[str, float]:
        """The step has ended: its parts."""
        ...


class Gauge(Protocol):
    """Knows the memory that counts, and when work that was handed over is done."""

    def settle(self) -> None:
        """Wait until everything asked for is computed."""

    def start(self) -> int:
        """Bytes in use now; from here on the peak counts."""
        ...

    def peak(self) -> int:
        """Most bytes in use since the start."""
        ...


class Resident:
    """The memory of this process, which computes by itself."""

    def settle(self) -> None:
        """Nothing is handed over."""

    def start(self) -> int:
        """Resident bytes."""
        found = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        return found

    def peak(self) -> int:
        """Resident bytes at most."""
        return _status("VmHWM")


class Clock:
    """Ends of steps, and memory from the moment the model is loaded."""

    def __init__(self, weights: Iterable[Any], task: Task, profiler: Profiler, gauge: Gauge | None = None) -> None:
        """Start, with weights read: they are mapped from their file, and resident once they were touched."""
        self._steps, self._profiler = task.steps, profiler if task.parts else None
        self._parts: dict[str, float] = {}
        for tensor in weights:
            tensor.sum()
        gc.collect()
        self._gauge = Resident() if gauge is None else gauge
        self.base = self._gauge.start()
        self.reference = 0.0
        self.marks: list[float] = []

    def mark(self) -> None:
        """A step ends here, or the first one begins."""
        self._gauge.settle()
        if self._profiler is not None and len(self.marks) == self._steps:
            self._parts = self._profiler.end()
        self.marks.append(time.perf_counter())
        if self._profiler is not None and len(self.marks) == self._steps:
            self._profiler.begin()

    def result(self, task: Task, tokens: int, operations: float, losses: list[float]) -> Measured:
        """What the run took; `tokens` are those of all its rows."""
        steps = [end - start for start, end in zip(self.marks, self.marks[1:], strict=False)]
        counted = task.rows - task.left_out * task.global_batch
        seconds = self.reference / task.rows + sum(steps[task.left_out :]) / counted
        peak = self._gauge.peak()
        return Measured(
            1 / seconds,
            tokens / task.rows / seconds,
            self.reference,
            steps,
            peak,
            self.base,
            operations,
            losses,
            self._parts,
        )


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
