"""Where the seconds of an iteration go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Part = Literal["generating", "scoring", "training"]


class Stopwatch:
    """Adds up the seconds of each part."""

    def __init__(self) -> None:
        """Start from zero."""
        self.spent: dict[str, float] = {"generating": 0.0, "scoring": 0.0, "training": 0.0}

    @contextmanager
    def timing(self, part: Part) -> Iterator[None]:
        """While this is open, the time counts to a part."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.spent[part] += time.monotonic() - started

    @property
    def seconds(self) -> float:
        """All of them; never 0."""
        return max(sum(self.spent.values()), 1e-9)
