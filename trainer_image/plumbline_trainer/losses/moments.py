"""Running mean and standard deviation of a stream of rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_STD = 1e-4


@dataclass
class RunningMoments:
    """Count, mean and sum of squared deviations, updated by batches (Welford 1962; merging: Chan et al. 1983).

    In float64, so that a long run loses nothing; every rank that sees the same batches has the same state.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Σ (x − mean)²."""

    @property
    def std(self) -> float:
        """The unbiased standard deviation; 0 of fewer than two values."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    def update(self, values: Tensor | Sequence[float]) -> None:
        """Take in a batch."""
        batch = torch.as_tensor(values, dtype=torch.float64).flatten()
        if not batch.numel():
            return
        mean = batch.mean()
        self.merge(RunningMoments(batch.numel(), float(mean), float((batch - mean).square().sum())))

    def merge(self, other: RunningMoments) -> None:
        """Take in what another instance has seen, as if its values had come here."""
        count = self.count + other.count
        if not count:
            return
        shift = other.mean - self.mean
        self.mean += shift * other.count / count
        self.squares += other.squares + shift * shift * self.count * other.count / count
        self.count = count

    def normalise(self, values: Tensor) -> Tensor:
        """(x − mean)/std, std being at least 1e-4; call it after `update` with the same values.

        Args:
            values: [n]

        Returns:
            [n]
        """
        return ((values.double() - self.mean) / max(self.std, MIN_STD)).to(values.dtype)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, as JSON."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    @classmethod
    def restored(cls, state: dict[str, float]) -> RunningMoments:
        """Go on from a `state()`."""
        return cls(int(state["count"]), float(state["mean"]), float(state["squares"]))
