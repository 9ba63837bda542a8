"""Stands between runner and trainer: if the runner dies, the trainer is told to stop instead of being left behind.

The runner holds the other end of our standard input; end of file means that it is gone, however it died. Run as a
script, with nothing but the standard library, so that it starts in milliseconds.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

GRACE_SECONDS = 120.0
"""Time a trainer has to write its checkpoint once the runner is gone."""


def main(command: list[str]) -> int:
    """Run the command, forward SIGTERM to it, and return its exit code (128 + signal where a signal ended it)."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    child: subprocess.Popen[bytes] | None = None

    def forward(_number: int, _frame: object) -> None:
        if child is not None:
            child.terminate()

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    runner = sys.stdin.fileno()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    watched = [runner, wake_read]
    deadline: float | None = None
    while child.poll() is None:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select(watched, [], [], timeout)
        if wake_read in ready:
            os.read(wake_read, 4096)
        if runner in ready and not os.read(runner, 4096):
            watched.remove(runner)
            child.terminate()
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() >= deadline:
            os.killpg(os.getpgid(0), signal.SIGKILL)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
