"""Wall time and peak memory of the quickstart, from empty storage and again from full storage."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def measure() -> list[dict[str, str]]:
    """Two rows: the first call, and the second that finds everything computed."""
    with tempfile.TemporaryDirectory() as storage:
        return [_run("first call", storage), _run("second call", storage)]


def _run(label: str, storage: str) -> dict[str, str]:
    command = [
        sys.executable,
        "-m",
        "plumbline_cli.main",
        "run",
        "examples/01-quickstart/pipeline.yaml",
        "--storage",
        storage,
    ]
    start = time.perf_counter()
    process = psutil.Popen(command, cwd=ROOT, env={**os.environ, "NO_COLOR": "1"})
    peak = _PeakMemory(process)
    peak.start()
    code = process.wait()
    seconds = time.perf_counter() - start
    if code != 0:
        raise RuntimeError(f"the quickstart ended with exit code {code}")
    return {
        "quickstart": label,
        "wall (s)": f"{seconds:.0f}",
        "peak memory of all processes (GiB)": f"{peak.gibibytes:.1f}",
    }


class _PeakMemory(threading.Thread):
    """Samples the proportional memory of a process and all its children until it ends."""

    def __init__(self, process: psutil.Popen) -> None:
        super().__init__(daemon=True)
        self._process, self.gibibytes = process, 0.0

    def run(self) -> None:
        while self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE:
            total = 0
            try:
                for child in [self._process, *self._process.children(recursive=True)]:
                    total += child.memory_full_info().pss
            except psutil.Error:
                continue
            finally:
                time.sleep(0.2)
            self.gibibytes = max(self.gibibytes, total / 2**30)
