"""What a local run keeps in its storage folder between and during calls of the command."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from plumbline_api import layout
from plumbline_api.base import Contract
from plumbline_api.errors import InputError
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.stagerun import Role, StageResult, StageRun
from plumbline_api.status import PipelineStatus
from plumbline_operator.policies.clock import parse_time
from plumbline_operator.snapshot import JobState, JobView, PodFailure
from pydantic import ValidationError

UID_NAMESPACE = uuid.UUID("6f0a52e6-8f0c-5f0e-9a34-7a4e3c1f2b6d")
DEFAULT_STORAGE = Path("runs")


class Failure(Contract):
    """How a process died that left no result; the form of `PodFailure` on disk."""

    exit_code: int | None = None
    reason: str | None = None
    disrupted: bool = False
    message: str = ""


class LocalJob(Contract):
    """One attempt at a stage as it is kept on disk."""

    name: str
    role: Role
    stage: str
    fingerprint: str
    attempt: int
    state: JobState
    suspended: bool = False
    created: str
    started: str | None = None
    finished: str | None = None
    result: StageResult | None = None
    failure: Failure | None = None


class LocalState(Contract):
    """state.json: the status and the attempts of the latest call, and where the manifest was."""

    version: int = 1
    manifest: str
    """Absolute path of the manifest file."""
    options: list[str] = []
    """What else of the command line says which run this is: --name, --namespace, --pipeline."""
    generation: int
    """Counts changes of the spec between calls."""
    spec_digest: str
    """Identity of the spec of this generation."""
    body: dict[str, Any]
    """The object as it ran: sources resolved, with uid and generation."""
    notes: list[str] = []
    """Remarks about what a local run leaves out of the manifest."""
    status: PipelineStatus = PipelineStatus()
    jobs: list[LocalJob] = []
    interrupted: bool = False
    """Whether the call ended on Ctrl-C."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a local run keeps its own files: `<storage>/<namespace>/pipelines/<name>/<uid>/`."""

    storage: Path
    namespace: str
    name: str
    uid: str

    @property
    def path(self) -> Path:
        """The folder, which is also where finalize writes the report."""
        return Path(layout.pipeline_root(str(self.storage), self.namespace, self.name, self.uid))

    @property
    def state_file(self) -> Path:
        """Status and attempts."""
        return self.path / "state.json"

    @property
    def record_file(self) -> Path:
        """The run record."""
        return self.path / "record.json"

    @property
    def lock_file(self) -> Path:
        """Held while a process runs the pipeline."""
        return self.path.parent / "lock"

    def job(self, name: str) -> JobFolder:
        """The files of one attempt."""
        return JobFolder(self.path / "jobs" / name)

    def attempts(self) -> list[Attempt]:
        """Every attempt that has left files here, of earlier calls too; the latest last."""
        found = []
        for file in (self.path / "jobs").glob("*/stage.json"):
            with suppress(OSError, InputError):
                found.append((file.stat().st_mtime, Attempt(file.parent.name, StageRun.from_json(file.read_text()))))
        return [attempt for _, attempt in sorted(found, key=lambda item: item[0])]

    def load(self) -> LocalState | None:
        """The state of the latest call; None where there was none, or where an older release wrote it."""
        try:
            return LocalState.model_validate_json(self.state_file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def save(self, state: LocalState) -> None:
        """Replace the state in one step."""
        replace_file(self.state_file, state.model_dump_json(by_alias=True, exclude_none=True, indent=1))


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt that has left files."""

    job: str
    """Name of its job."""
    run: StageRun
    """What it was told."""


@dataclass(frozen=True, slots=True)
class JobFolder:
    """The files of one attempt."""

    path: Path

    @property
    def log(self) -> Path:
        """What the trainer printed."""
        return self.path / "log.txt"

    @property
    def termination(self) -> Path:
        """The trainer's StageResult."""
        return self.path / "result.json"

    @property
    def progress(self) -> Path:
        """The trainer's latest progress report."""
        return self.path / "progress.json"

    @property
    def scratch(self) -> Path:
        """Working directory of the trainer; removed when it ends."""
        return self.path / "scratch"

    @property
    def run(self) -> Path:
        """The StageRun that the attempt was started with."""
        return self.path / "stage.json"


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def run_uid(namespace: str, name: str, serial: int) -> str:
    """The uid of the serial-th run of a name: stable, so that an interrupted run goes on from its checkpoints."""
    return str(uuid.uuid5(UID_NAMESPACE, f"{namespace}/{name}/{serial}" if serial else f"{namespace}/{name}"))


def run_folders(storage: Path, namespace: str, name: str) -> Iterator[RunFolder]:
    """The folders of a pipeline's runs that exist, oldest first."""
    serial = 0
    while (folder := RunFolder(storage, namespace, name, run_uid(namespace, name, serial))).path.is_dir():
        yield folder
        serial += 1


def current_folder(storage: Path, namespace: str, name: str) -> RunFolder | None:
    """The folder of the latest run of a pipeline."""
    return next(reversed(list(run_folders(storage, namespace, name))), None)


def folder_to_run(storage: Path, namespace: str, name: str, pipeline: AlignmentPipeline) -> RunFolder:
    """The folder for a new call.

    It is that of the run before, whose outputs and checkpoints are then found again. Only where that run succeeded and
    a stage says `cache: false` a new one begins, because such a stage shall be computed anew.
    """
    folders = list(run_folders(storage, namespace, name))
    if not folders:
        return RunFolder(storage, namespace, name, run_uid(namespace, name, 0))
    before = folders[-1].load()
    starts_anew = any(not stage.cache for stage in pipeline.spec.stages)
    if starts_anew and before is not None and before.status.phase == "Succeeded":
        return RunFolder(storage, namespace, name, run_uid(namespace, name, len(folders)))
    return folders[-1]


def new_job(run: StageRun, name: str, *, now: str) -> LocalJob:
    """The entry of an attempt that has not begun yet."""
    return LocalJob(
        name=name,
        role=run.role,
        stage=run.stage,
        fingerprint=run.fingerprint,
        attempt=run.attempt,
        state="waiting",
        created=now,
    )


def failure_view(failure: Failure | None) -> PodFailure | None:
    """The planner's form of a failure."""
    if failure is None:
        return None
    return PodFailure(
        exit_code=failure.exit_code, reason=failure.reason, disrupted=failure.disrupted, message=failure.message
    )


def job_view(job: LocalJob, *, active: bool, waiting_reason: str | None = None, waiting_message: str = "") -> JobView:
    """The planner's form of an attempt."""
    return JobView(
        name=job.name,
        role=job.role,
        stage=job.stage,
        fingerprint=job.fingerprint,
        attempt=job.attempt,
        state=job.state,
        suspended=job.suspended,
        active=active,
        created=_moment(job.created),
        started=_moment(job.started),
        finished=_moment(job.finished),
        result=job.result,
        result_lost=job.state in ("succeeded", "failed") and job.result is None,
        failure=failure_view(job.failure),
        waiting_reason=waiting_reason,
        waiting_message=waiting_message,
    )


def _moment(text: str | None) -> datetime | None:
    return None if text is None else parse_time(text)
