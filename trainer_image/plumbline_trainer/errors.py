"""How a stage ends early. Each class is one exit code of the stage contract."""

from __future__ import annotations

from plumbline_api.errors import InputError

__all__ = ["InputError", "Interrupted", "TransientError"]


class TransientError(Exception):
    """Something outside failed and may work again: the attempt is repeated (exit code 75)."""

    def __init__(self, message: str, *, reason: str = "Transient") -> None:
        super().__init__(message)
        self.reason = reason


class Interrupted(Exception):  # noqa: N818 - the end of an attempt, not a fault
    """SIGTERM came and the stage stopped; raised only after its checkpoint is committed (exit code 143)."""

    def __init__(self, step: int | None = None, message: str = "") -> None:
        super().__init__(message or ("stopped" if step is None else f"stopped after step {step}, checkpoint committed"))
        self.step = step
