"""How the figures of a stage ran: where they began, where they are now, and the best evaluation between."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from plumbline_api.watched import RARE_FIGURES

START = 3
"""Rollouts that figures are compared with later on."""
RECENT = 10
"""Rollouts at the end that are averaged."""


@dataclass
class Run:
    """One figure: its first and last few values."""

    first: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    count: int = 0
    """Values so far."""

    def add(self, value: float, *, first: int, recent: int) -> None:
        """Remember a value, of so many at either end."""
        self.count += 1
        if len(self.first) < first:
            self.first.append(value)
        self.recent = [*self.recent, value][-recent:]

    @property
    def start(self) -> float:
        """Mean of the first values."""
        return math.fsum(self.first) / len(self.first)

    @property
    def end(self) -> float:
        """Mean of the last values, those that count as the start left out while there are others."""
        last = self.recent[-max(1, self.count - len(self.first)) :]
        return math.fsum(last) / len(last)


class Course:
    """Remembers the figures of a stage. Its state is JSON and is restored exactly.

    Figures of evaluations begin and end with one value, those of steps with means over the first 3 and the last 10.
    """

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}
        self._peak: dict[str, float] = {}

    def observe(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Remember what was measured.

        Returns:
            The figures, and with them those that need the rollouts before: `length.growth` and `rewardStart`.
        """
        for name, value in figures.items():
            if math.isfinite(value):
                first, recent = (1, 1) if name in RARE_FIGURES else (START, RECENT)
                self._runs.setdefault(name, Run()).add(value, first=first, recent=recent)
        gold = figures.get("goldReward")
        if gold is not None and math.isfinite(gold) and gold > self._peak.get("goldReward", -math.inf):
            rewards = self._runs.get("reward")
            self._peak = {name: value for name, value in figures.items() if name in RARE_FIGURES}
            if rewards is not None:
                self._peak["reward"] = rewards.end
        added: dict[str, float] = {}
        length, reward = (self.start(name) for name in ("length.mean", "reward"))
        if "length.mean" in figures and length:
            added["length.growth"] = figures["length.mean"] / length
        if "reward" in figures and reward is not None:
            added["rewardStart"] = reward
        return {**figures, **added}

    def start(self, name: str) -> float | None:
        """Where a figure began; None where it was never measured."""
        run = self._runs.get(name)
        return None if run is None else run.start

    def end(self, name: str) -> float | None:
        """Where a figure is now; None where it was never measured."""
        run = self._runs.get(name)
        return None if run is None else run.end

    @property
    def peak(self) -> Mapping[str, float]:
        """The evaluation with the highest goldReward, and the reward in training at that time."""
        return self._peak

    def state(self) -> dict[str, Any]:
        """Everything it knows, as JSON."""
        return {"runs": {name: asdict(run) for name, run in self._runs.items()}, "peak": self._peak}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a state, exactly."""
        self._runs = {name: Run(**run) for name, run in state["runs"].items()}
        self._peak = dict(state["peak"])
