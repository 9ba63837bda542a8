"""What the ranks print: passed on as it comes, and kept within bounds for storage."""

from __future__ import annotations

import sys
import threading
from collections import deque
from typing import IO

HEAD_BYTES = 256 * 1024
TAIL_BYTES = 768 * 1024


class Transcript:
    """The lines of all ranks; of a long log its beginning and its end are kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._head: list[bytes] = []
        self._tail: deque[bytes] = deque()
        self._head_size = self._tail_size = self._dropped = 0

    def follow(self, stream: IO[bytes], *, prefix: str = "") -> None:
        """Pass on every line of a stream from now on, in a thread."""
        thread = threading.Thread(target=self._pump, args=(stream, prefix.encode()), daemon=True)
        self._threads.append(thread)
        thread.start()

    def join(self, seconds: float = 5.0) -> None:
        """Wait for the streams to end; a stray child may hold one open, so not for ever."""
        for thread in self._threads:
            thread.join(seconds)

    def content(self) -> bytes:
        """What is kept."""
        with self._lock:
            gap = [f"… {self._dropped} bytes left out …\n".encode()] if self._dropped else []
            return b"".join([*self._head, *gap, *self._tail])

    def last_lines(self, count: int = 3) -> str:
        """The last lines, for messages about an end that nobody explained."""
        lines = [line for line in self.content().decode(errors="replace").splitlines() if line.strip()]
        return " | ".join(line.strip() for line in lines[-count:])

    def _pump(self, stream: IO[bytes], prefix: bytes) -> None:
        with stream:
            for line in iter(lambda: stream.readline(64 * 1024), b""):
                self._add(prefix + line)

    def _add(self, line: bytes) -> None:
        with self._lock:
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
            if self._head_size + len(line) <= HEAD_BYTES and not self._tail:
                self._head.append(line)
                self._head_size += len(line)
                return
            self._tail.append(line)
            self._tail_size += len(line)
            while self._tail_size > TAIL_BYTES:
                gone = self._tail.popleft()
                self._tail_size -= len(gone)
                self._dropped += len(gone)
