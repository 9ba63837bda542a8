"""Exit codes of the command, and the error that carries one."""

from __future__ import annotations

OK = 0
RUN_FAILED = 1
"""A run failed, or the software itself did."""
BAD_INPUT = 2
"""What the user wrote does not hold: a manifest, a file, an option."""
NOT_FOUND = 3
"""What was asked for is not there, or cannot be reached."""
WAIT_TIMEOUT = 124
INTERRUPTED = 130

EXIT_CODES_HELP = (
    "Exit codes: 0 done, 1 the run failed, 2 bad input, 3 not found or not reachable, "
    "124 `wait` ran out of time, 130 interrupted."
)


class CommandError(Exception):
    """Ends the command with a message for people and an exit code for scripts."""

    def __init__(self, message: str, code: int = BAD_INPUT) -> None:
        super().__init__(message)
        self.code = code
