"""What stages know of a rollout: prompts in, sampled token ids out. Who samples, and how, is the engine's affair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Prompt:
    """What to answer."""

    row_id: str
    """Keys the random numbers of its answers."""
    ids: list[int]
    """Rendered up to where the answer begins; never empty."""


@dataclass(frozen=True)
class Sampled:
    """One answer."""

    ids: list[int]
    """With the end token where it finished; never empty."""
    finished: bool
    """Whether it ended by itself; else it was cut at the longest length."""


class RolloutEngine(Protocol):
    """Samples answers of the policy as it is now. Log-probabilities are the trainer's to compute."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        answers: int,
        seed: int,
        at_step: Callable[[float], None] | None = None,
    ) -> list[list[Sampled]]:
        """Answer every prompt several times.

        Args:
            prompts: with different row ids; equal ids give equal answers.
            answers: how many for each prompt.
            seed: of the draws. The random number of a token is a function of seed, row id, number of the answer and
                place in it, so that more answers begin with what fewer give.
            at_step: told the share of this process's work that is done; it may raise to stop.

        Returns:
            By prompt, by answer; every rank gets all of them.
        """
        ...
