"""Wall time of the quickstart and its stages, and its memory, from empty storage and again from full storage.

The first call starts with an empty cache too, so that it converts the bundled model as on a fresh machine. Memory is
the sum of the proportional set sizes (shared pages counted once) of all processes of the run, sampled every two seconds
and no oftener: the kernel walks the page tables for it, and holds up a process that maps memory meanwhile. What lies
between two samples is missed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_SECONDS = 2.0


def measure() -> list[dict[str, str]]:
    """Rows of the first call, each of its stages, and the second call, which finds everything computed."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        first, peak = _run(place)
        rows = [_row("first call", first, f"{peak:.1f}", "< 360 s")]
        rows += [_row(f"… {name}", seconds) for name, seconds in stage_seconds(_status(place))]
        second, peak = _run(place)
        load = os.getloadavg()[2]
        return [
            *rows,
            _row("second call", second, f"{peak:.1f}", "seconds"),
            {"quickstart": f"load average of the machine meanwhile: {load:.1f} on {os.cpu_count()} cores"},
        ]


def stage_seconds(status: dict[str, Any]) -> list[tuple[str, float]]:
    """Stages by name with the seconds from start to end, in order, from the status of a run."""
    found = []
    for stage in status["stages"]:
        start, end = (datetime.fromisoformat(stage[name]) for name in ("startTime", "completionTime"))
        found.append((str(stage["name"]), (end - start).total_seconds()))
    return found


def _row(label: str, seconds: float, memory: str = "", aim: str = "") -> dict[str, str]:
    return {"quickstart": label, "wall (s)": f"{seconds:.0f}", "memory, all processes (GiB)": memory, "aim": aim}


def _status(place: Path) -> dict[str, Any]:
    [state] = place.glob("storage/*/pipelines/*/*/state.json")
    status: dict[str, Any] = json.loads(state.read_text(encoding="utf-8"))["status"]
    return status


def _run(place: Path) -> tuple[float, float]:
    """One call: seconds and GiB."""
    pipeline = ROOT / "examples" / "01-quickstart" / "pipeline.yaml"
    command = [sys.executable, "-m", "plumbline_cli.main", "run", str(pipeline), "--storage", str(place / "storage")]
    environment = {**os.environ, "NO_COLOR": "1", "PLUMBLINE_CACHE": str(place / "cache")}
    start = time.perf_counter()
    process = psutil.Popen(command, cwd=ROOT, env=environment)
    peak = PeakMemory(process)
    peak.start()
    code = process.wait()
    seconds = time.perf_counter() - start
    peak.join()
    if code != 0:
        raise RuntimeError(f"the quickstart ended with exit code {code}")
    return seconds, peak.gibibytes


class PeakMemory(threading.Thread):
    """Samples the proportional memory of a process and all its children until it ends."""

    def __init__(self, process: psutil.Process, every_seconds: float = SAMPLE_SECONDS) -> None:
        super().__init__(daemon=True)
        self._process, self._every, self.gibibytes = process, every_seconds, 0.0

    def run(self) -> None:
        """Keep the largest sum."""
        while self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE:
            self.gibibytes = max(self.gibibytes, self._sum() / 2**30)
            time.sleep(self._every)

    def _sum(self) -> int:
        total = 0
        for process in [self._process, *self._children()]:
            # A process that ends meanwhile takes its memory along, not the sample.
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total

    def _children(self) -> list[psutil.Process]:
        try:
            return list(self._process.children(recursive=True))
        except psutil.Error:
            return []
