"""The record of a running cluster: what was started and made, so that exactly that is taken away again."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cluster.errors import ClusterFailedError

STATE_VERSION = 1


@dataclass(frozen=True)
class ProcessRecord:
    """A process we started; the start time tells it from a later one that got the same number."""

    name: str
    pid: int
    started: float

    def process(self) -> psutil.Process | None:
        """The process, if it still runs and is the one we started."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 0.05
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


@dataclass
class ClusterState:
    """Contents of `state.json` in the state folder. Written after every change, before the next thing is started."""

    folder: Path
    kind: str = ""
    server: str = ""
    processes: list[ProcessRecord] = field(default_factory=list)
    network: dict[str, str] = field(default_factory=dict)
    object_store: dict[str, str] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    keeper: ProcessRecord | None = None

    def abandoned(self) -> bool:
        """Whether the cluster belongs to a test session that died without taking it down."""
        return self.keeper is not None and self.keeper.process() is None

    @property
    def file(self) -> Path:
        return self.folder / "state.json"

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "kubeconfig"

    @property
    def audit_log(self) -> Path:
        return self.folder / "logs" / "audit.log"

    def save(self) -> None:
        """Write the record in one step: a reader sees the old or the new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        document: dict[str, Any] = {"version": STATE_VERSION, **asdict(self)}
        del document["folder"]
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(document, indent=2) + "\n")
        unfinished.replace(self.file)

    def process(self, name: str) -> psutil.Process | None:
        """The live process recorded under a name."""
        for record in self.processes:
            if record.name == name and (process := record.process()):
                return process
        return None

    def dead(self) -> list[str]:
        """Names of recorded processes that no longer run."""
        return [record.name for record in self.processes if record.process() is None]

    def log_tail(self, name: str, characters: int = 3000) -> str:
        path = self.folder / "logs" / f"{name}.log"
        return path.read_text(errors="replace")[-characters:] if path.exists() else ""

    def start(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> None:
        """Start a process in a session of its own, log to `logs/<name>.log`, and record it. Does nothing if it runs already."""
        if self.process(name):
            return
        self.processes = [record for record in self.processes if record.name != name]
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
                env={**os.environ, **(environment or {})},
            )
        try:
            started = psutil.Process(child.pid).create_time()
        except psutil.NoSuchProcess:
            raise ClusterFailedError(f"{name} ended at once:\n{self.log_tail(name)}") from None
        self.processes.append(ProcessRecord(name, child.pid, started))
        self.save()

    def stop(self, *names: str, grace_seconds: float = 2.0) -> None:
        """Stop recorded processes, all of them without a name: SIGTERM to all together, SIGKILL to the slow ones, then forget them."""
        records = [record for record in self.processes if not names or record.name in names]
        processes = [process for record in records if (process := record.process())]
        stop_processes(processes, grace_seconds)
        self.processes = [record for record in self.processes if record not in records]
        self.save()


def stop_processes(processes: list[psutil.Process], grace_seconds: float) -> None:
    """End processes and wait until they are gone, also when they are our own children."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, slow = psutil.wait_procs(processes, timeout=grace_seconds)
    for process in slow:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(slow, timeout=10)


def load_state(folder: Path) -> ClusterState | None:
    """The record in a state folder, or None where there is none."""
    path = folder / "state.json"
    if not path.exists():
        return None
    document = json.loads(path.read_text())
    if document.pop("version", None) != STATE_VERSION:
        raise ClusterFailedError(
            f"{path} was written by another version: remove the folder after stopping its processes"
        )
    records = [ProcessRecord(**record) for record in document.pop("processes")]
    keeper = document.pop("keeper", None)
    return ClusterState(
        folder=folder, processes=records, keeper=ProcessRecord(**keeper) if keeper else None, **document
    )


def record_of_this_process(name: str) -> ProcessRecord:
    """The calling process as a record, to be put down as a cluster's keeper."""
    return ProcessRecord(name, os.getpid(), psutil.Process().create_time())


def wait_until(
    ready: Callable[[], bool], what: str, state: ClusterState, process: str, seconds: float = 60.0, pause: float = 0.1
) -> None:
    """Poll `ready()` until it is true; fails early, with the log, when the process that it waits for has died."""
    deadline = time.monotonic() + seconds
    while not ready():
        if state.process(process) is None:
            raise ClusterFailedError(f"{what}: {process} has ended. Its log ends:\n{state.log_tail(process)}")
        if time.monotonic() > deadline:
            raise ClusterFailedError(
                f"{what}: not within {seconds:.0f} s. The log of {process} ends:\n{state.log_tail(process)}"
            )
        time.sleep(pause)
