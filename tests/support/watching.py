"""Everything that an observer with `kubectl get -w` sees of a pipeline."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cluster.binaries import find_program
from support.tenant import Run, stage_status


@dataclass
class Film:
    """The states of a pipeline in the order in which they were shown."""

    statuses: list[dict[str, Any]] = field(default_factory=list)

    def phases(self, stage: str) -> list[str]:
        """Phases that a stage went through, without repetitions."""
        found: list[str] = []
        for status in self.statuses:
            phase = stage_status(status, stage).get("phase")
            if phase is not None and (not found or found[-1] != phase):
                found.append(phase)
        return found

    def progress(self, stage: str) -> list[dict[str, Any]]:
        """Different reports of progress of a stage."""
        found: list[dict[str, Any]] = []
        for status in self.statuses:
            progress = stage_status(status, stage).get("progress")
            if progress and (not found or found[-1] != progress):
                found.append(progress)
        return found


@contextmanager
def filmed(run: Run) -> Iterator[Film]:
    """Watch a pipeline for the length of the block."""
    cluster, film = run.tenant.cluster, Film()
    command = [str(find_program("kubectl")), f"--kubeconfig={cluster.kubeconfig}", "-n", run.tenant.namespace]
    process = subprocess.Popen(
        [*command, "get", "alp", run.name, "--watch", "--output=json"], stdout=subprocess.PIPE, text=True
    )
    thread = threading.Thread(target=_read, args=(process, film), daemon=True)
    thread.start()
    try:
        yield film
    finally:
        process.terminate()
        process.wait(30)
        thread.join(30)


def _read(process: subprocess.Popen[str], film: Film) -> None:
    """kubectl writes one indented document after the other."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.rstrip() == "}" and not line.startswith(" "):
            film.statuses.append(json.loads("".join(lines)).get("status") or {})
            lines.clear()
