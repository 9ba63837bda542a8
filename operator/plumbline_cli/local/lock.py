"""One run of a pipeline at a time in one storage folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from plumbline_cli.exits import BAD_INPUT, CommandError


class RunLock:
    """A lock that ends with its process, however that ends; the file says who holds it."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a+", encoding="utf-8")
        if not _acquire(file):
            file.seek(0)
            holder = _holder(file.read())
            file.close()
            raise CommandError(
                f"{self._name} is being run already{holder}, in the same storage. Wait for it "
                f"(`plumbline wait`), stop it there with Ctrl-C, or choose another --storage",
                BAD_INPUT,
            )
        file.seek(0)
        file.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _acquire(file: IO[str]) -> bool:
    """Try for a moment: a reader that only looks whether the lock is held has it for an instant too."""
    for _ in range(5):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock right now."""
    try:
        with path.open("r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _holder(text: str) -> str:
    try:
        found = json.loads(text)
        return f" by process {found['pid']} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        return ""
