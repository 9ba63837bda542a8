"""Several rewards as one score: each component normalised, clipped and weighted, and logged apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from plumbline_api.online import Reward
from torch import Tensor

from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.errors import InputError
from plumbline_trainer.rewards.interface import Candidate, Component

LEAST_STD = 1e-8
"""A component that does not vary is 0 once its mean is off, whatever it is divided by."""


@dataclass(frozen=True)
class Scored:
    """Scores of n answers, float32 on the CPU, the same on every rank."""

    total: Tensor
    """[n] weighted sum of the components that are trained on."""
    components: dict[str, Tensor]
    """[n] raw values of every component that was scored, by its name."""
    gold: Tensor | None
    """[n] weighted sum of the gold components; None where there are none or they were not asked for."""


@dataclass
class RunningMoments:
    """Mean and spread of all values seen so far (Chan et al. 1983), batch by batch in float64.

    A batch is a whole rollout, which every rank holds, so that the moments depend on no number of ranks.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances to the mean."""

    def add(self, values: Tensor) -> None:
        """Take a batch in."""
        added = len(values)
        if not added:
            return
        batch = values.double()
        mean = float(batch.mean())
        squares = float((batch - mean).square().sum())
        total, gap = self.count + added, mean - self.mean
        self.squares += squares + gap * gap * self.count * added / total
        self.mean += gap * added / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation of the values seen (n in the denominator)."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def normalized(self, values: Tensor) -> Tensor:
        """(v − mean) / std, float64."""
        return (values.double() - self.mean) / max(self.std, LEAST_STD)


class RewardSet:
    """The components of a stage's reward."""

    def __init__(self, rewards: Sequence[Reward], components: Sequence[Component]) -> None:
        """Take a component for each declared reward, in order."""
        self._parts = list(zip(rewards, components, strict=True))
        self._moments = {reward.figure: RunningMoments() for reward in rewards if reward.normalize}

    @property
    def names(self) -> list[str]:
        """Names of the components that are trained on, in declared order."""
        return [reward.figure for reward, _ in self._parts if not reward.gold]

    @property
    def gold_names(self) -> list[str]:
        """Names of the components that are only watched."""
        return [reward.figure for reward, _ in self._parts if reward.gold]

    def score(self, candidates: Sequence[Candidate], *, held_out: bool = False, ranks: Ranks | None = None) -> Scored:
        """Score answers: of the whole global batch, on every rank alike.

        Args:
            candidates: n answers.
            held_out: answers to held-out prompts, at an evaluation: gold components are scored as well, and the
                running moments stay as they are.
            ranks: processes that share the work; every one of them gets all results.

        Raises:
            InputError: where a component cannot score an answer, or says something that is no number.
            TransientError: where trying again may help.
        """
        ranks = ranks or Ranks()
        total = torch.zeros(len(candidates), dtype=torch.float64)
        gold = torch.zeros(len(candidates), dtype=torch.float64)
        values: dict[str, Tensor] = {}
        for number, (reward, component) in enumerate(self._parts):
            if reward.gold and not held_out:
                continue
            raw = component.score(candidates, ranks) if candidates else torch.zeros(0)
            _refuse_no_number(raw, reward, number, candidates)
            values[reward.figure] = raw
            weighted = reward.weight * self._shaped(reward, raw, held_out=held_out)
            if reward.gold:
                gold += weighted
            else:
                total += weighted
        has_gold = held_out and bool(self.gold_names)
        return Scored(total.float(), values, gold.float() if has_gold else None)

    def _shaped(self, reward: Reward, raw: Tensor, *, held_out: bool) -> Tensor:
        """[n] float64: normalised if that is asked for, then clipped."""
        values = raw.double()
        if reward.normalize:
            moments = self._moments[reward.figure]
            if not held_out:
                moments.add(raw)
            elif not moments.count:  # An evaluation before the first rollout has only its own answers to go by.
                moments = RunningMoments()
                moments.add(raw)
            values = moments.normalized(raw)
        return values if reward.clip is None else values.clamp(-reward.clip, reward.clip)

    def state(self) -> dict[str, Any]:
        """The running moments, as JSON that gives the same numbers back."""
        return {
            name: {"count": moments.count, "mean": moments.mean, "squares": moments.squares}
            for name, moments in self._moments.items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            InputError: if it is that of other rewards.
        """
        if set(state) != set(self._moments):
            raise InputError(
                f"the checkpoint holds moments of {', '.join(sorted(state)) or 'no reward'}, but "
                f"{', '.join(sorted(self._moments)) or 'no reward'} is normalised"
            )
        self._moments = {
            name: RunningMoments(int(kept["count"]), float(kept["mean"]), float(kept["squares"]))
            for name, kept in state.items()
        }


def _refuse_no_number(values: Tensor, reward: Reward, number: int, candidates: Sequence[Candidate]) -> None:
    assert values.shape == (len(candidates),)
    bad = (~torch.isfinite(values)).nonzero().flatten()
    if len(bad):
        place = int(bad[0])
        raise InputError(
            f'rewards[{number}] ("{reward.figure}"): the score of an answer to row {candidates[place].row_id} is '
            f"{float(values[place])}, no number ({len(bad)} of {len(values)} answers)"
        )
