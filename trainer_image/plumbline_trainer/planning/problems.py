"""What preflight finds wrong, collected, so that a person mends all of it at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from plumbline_trainer.errors import InputError

TOLD_BYTES = 3000
"""What the problems may take of a termination message."""


class Problems:
    """Faults that do not depend on each other, in the order in which they were found."""

    def __init__(self) -> None:
        self.found: list[InputError] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep a fault that is found meanwhile, and go on after the block."""
        try:
            yield
        except InputError as error:
            if str(error) not in self.messages:
                self.found.append(error)

    @property
    def messages(self) -> list[str]:
        """The faults as each is told by itself."""
        return [str(error) for error in self.found]

    def as_error(self, place: str) -> InputError:
        """The only fault itself; several as one, each on a line.

        Args:
            place: where all of them can be read.
        """
        if len(self.found) == 1:
            return self.found[0]
        reasons = {error.reason for error in self.found}
        reason = reasons.pop() if len(reasons) == 1 else InputError.reason
        return InputError(told(self.messages, place), reason=reason)


def told(messages: Sequence[str], place: str) -> str:
    """Messages on a line each, as many as fit, the first in any case; then how many more there are."""
    lines: list[str] = []
    room = TOLD_BYTES
    for number, message in enumerate(messages):
        room -= len(json.dumps(message, ensure_ascii=False).encode())
        if lines and room < 0:
            lines.append(f"and {len(messages) - number} more, in {place}")
            break
        lines.append(message)
    return "\n".join(lines)
