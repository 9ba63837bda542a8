"""What is scored, and who scores it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from plumbline_trainer.data.rows import Message

if TYPE_CHECKING:  # Preflight looks at functions and schemas, without torch.
    from torch import Tensor

    from plumbline_trainer.engine.distributed import Ranks


@dataclass(frozen=True, slots=True)
class Candidate:
    """One sampled answer."""

    prompt: tuple[Message, ...]
    answer: str
    """Its text, without special tokens."""
    tokens: int
    """Tokens that the policy sampled for it."""
    reference: str | None
    """The answer of the prompt's row, where it has one."""
    row_id: str
    """The prompt's row, for messages."""


class Component(Protocol):
    """Scores answers in one way. Higher is better."""

    def score(self, candidates: Sequence[Candidate], ranks: Ranks) -> Tensor:
        """[candidates] float32 on the CPU.

        Every rank is given the same answers and gets the same values; ranks may share the work.

        Raises:
            InputError: where an answer cannot be scored.
            TransientError: where trying again may help.
        """
        ...
