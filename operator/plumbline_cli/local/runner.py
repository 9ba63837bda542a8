"""The local runner: observe this machine's processes, ask `plan`, carry its actions out."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from plumbline_api.errors import ManifestError, Problem
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.record import RunRecord
from plumbline_api.stagerun import ProgressReport, StageResult, StageRun, TrainerStatus
from plumbline_api.status import PipelineStatus, Progress
from plumbline_operator.plan import plan
from plumbline_operator.policies.clock import format_time, parse_time
from plumbline_operator.settings import PlanSettings
from plumbline_operator.snapshot import (
    Action,
    DeletePipeline,
    FreezeRecord,
    Plan,
    PlannedEvent,
    ProgressView,
    Snapshot,
    StartStage,
    StopStage,
    SuspendStage,
)

from plumbline_cli.local.process import StageProcess
from plumbline_cli.local.state import Failure, LocalJob, LocalState, RunFolder, job_view, new_job, replace_file

POLL_SECONDS = 0.1
LOOK_SECONDS = 2.0
"""Longest time between two looks at the plan while nothing seems to happen."""
STOP_GRACE_SECONDS = 120.0
"""Time a trainer has to write its checkpoint after SIGTERM before it is killed."""


@dataclass(frozen=True, slots=True)
class RunView:
    """What there is to show of a run at a moment."""

    pipeline: AlignmentPipeline
    status: PipelineStatus
    now: datetime
    live: Mapping[str, TrainerStatus]
    """Latest report of each running stage."""
    results: Mapping[str, StageResult]
    """Latest result of each stage."""
    stopping: bool = False


class Observer(Protocol):
    """Shows a run while it goes on."""

    def show(self, view: RunView) -> None:
        """Show the run as it is now; called several times a second."""

    def tell(self, event: PlannedEvent) -> None:
        """Something happened that is worth a line."""


class Launch(Protocol):
    """Starts the process of an attempt."""

    def __call__(self, run: StageRun, job: str) -> StageProcess:
        """The process, started."""
        ...


@dataclass
class _Live:
    process: StageProcess
    deadline: float | None
    stop_by: float | None = None
    timed_out: bool = False
    oom_kills: int = 0


class LocalRunner:
    """Runs one pipeline to its end, or until it is interrupted."""

    def __init__(
        self,
        *,
        folder: RunFolder,
        state: LocalState,
        settings: PlanSettings,
        launch: Launch,
        observer: Observer,
        parallel: int = 1,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._folder, self._state, self._settings = folder, state, settings
        self._launch, self._observer, self._parallel, self._now = launch, observer, parallel, now
        self._record: RunRecord | None = None
        self._jobs: dict[str, LocalJob] = {job.name: job for job in state.jobs}
        self._starts: dict[str, StartStage] = {}
        self._live: dict[str, _Live] = {}
        self._progress: dict[str, TrainerStatus] = {}
        self._progress_stamps: dict[str, int] = {}
        self._wake = threading.Event()
        self._interrupts = 0
        self._changed = True
        try:
            self._pipeline: AlignmentPipeline | None = AlignmentPipeline.parse(state.body)
            self._problems: tuple[Problem, ...] = ()
        except ManifestError as error:
            self._pipeline, self._problems = None, tuple(error.problems)

    @property
    def state(self) -> LocalState:
        """The state as it is on disk."""
        return self._state

    @property
    def record(self) -> RunRecord | None:
        """The run record, once it is frozen."""
        return self._record

    @property
    def interrupted(self) -> bool:
        """Whether the run was told to stop."""
        return self._interrupts > 0

    def interrupt(self) -> None:
        """Once: stop after a checkpoint. Twice: stop at once. Safe in a signal handler."""
        self._interrupts += 1
        self._wake.set()

    def run(self, until: Callable[[LocalState], bool] = lambda _state: False) -> PipelineStatus:
        """Run until the pipeline has ended, was interrupted, or `until` holds after a plan was carried out."""
        try:
            look_at = 0.0
            while True:
                self._changed |= self._collect()
                if self._interrupts > 1:
                    break
                if self._changed or time.monotonic() >= look_at:
                    self._changed = False
                    pause = self._look()
                    look_at = time.monotonic() + pause
                    if self._is_over() or until(self._state):
                        break
                    self._changed |= self._launch_waiting()
                self._show()
                self._wake.wait(0.0 if self._changed else POLL_SECONDS)
                if self._wake.is_set():
                    self._wake.clear()
                    self._changed = True
        finally:
            self._stop_everything()
        self._show()
        return self._state.status

    def _is_over(self) -> bool:
        if self._interrupts and not self._live:
            return True
        status = self._state.status
        ended = status.completion_time is not None or status.phase == "Refused"
        return ended and not self._live and not self._waiting()

    def _waiting(self) -> list[LocalJob]:
        return [job for job in self._jobs.values() if job.state == "waiting" and not job.suspended]

    def _look(self) -> float:
        """One pass of observe → plan → apply; the seconds until the next look."""
        decided: Plan = plan(self._observe(), self._settings, self._now())
        for action in decided.actions:
            self._apply(action)
        if decided.status is not None:
            self._state = self._state.model_copy(update={"status": decided.status})
        if decided.status is not None or decided.actions:
            self._save()
        for event in decided.events:
            self._observer.tell(event)
        # Another pass must find nothing to do, so it is only needed where something was done.
        self._changed |= bool(decided.actions)
        return min(LOOK_SECONDS, decided.requeue_after if decided.requeue_after is not None else LOOK_SECONDS)

    def _observe(self) -> Snapshot:
        body: dict[str, Any] = self._state.body
        if self._interrupts and isinstance(body.get("spec"), dict):
            # Ctrl-C is what `plumbline suspend` is on a cluster, and is decided upon by the same code.
            body = {**body, "spec": {**body["spec"], "suspend": True}}
        pipeline = AlignmentPipeline.parse(body) if self._pipeline is not None else None
        progress = tuple(
            ProgressView(
                job=job.name,
                progress=_progress(self._progress[job.name], self._now()),
                metrics=tuple((item["name"], item["value"]) for item in self._progress[job.name].metrics),
            )
            for job in self._jobs.values()
            if job.name in self._progress and job.state == "running"
        )
        return Snapshot(
            body=body,
            pipeline=pipeline,
            problems=self._problems,
            status=self._state.status,
            record=self._record,
            runtime=None,
            runtime_problem=None,
            place="local",
            jobs=tuple(self._view(job) for job in self._jobs.values()),
            progress=progress,
        )

    def _view(self, job: LocalJob) -> Any:
        waits = job.state == "waiting" and not job.suspended
        return job_view(
            job,
            active=job.name in self._live,
            waiting_reason="OtherStageRuns" if waits else None,
            waiting_message="another stage is using this machine" if waits else "",
        )

    def _apply(self, action: Action) -> None:
        match action:
            case FreezeRecord(record=record):
                self._record = record
                replace_file(
                    self._folder.record_file, record.model_dump_json(by_alias=True, exclude_none=True, indent=1)
                )
            case StartStage(run=run, job=name):
                self._starts[name] = action
                self._jobs[name] = new_job(run, name, now=self._stamp())
            case StopStage(job=name):
                self._stop(name)
                self._jobs.pop(name, None)
            case SuspendStage(job=name, suspend=suspend):
                if name in self._jobs:
                    self._update(name, suspended=suspend)
                    if suspend and name in self._live:
                        self._request_stop(self._live[name])
            case DeletePipeline():
                pass  # a local run has no object to delete; its files belong to the user

    def _launch_waiting(self) -> bool:
        launched = False
        for job in self._waiting():
            if len(self._live) >= self._parallel:
                break
            start = self._starts[job.name]
            process = self._launch(start.run, job.name)
            deadline = None if start.timeout_seconds is None else time.monotonic() + start.timeout_seconds
            self._live[job.name] = _Live(process, deadline, oom_kills=_oom_kills())
            self._update(job.name, state="running", started=self._stamp())
            launched = True
        if launched:
            self._save()
        return launched

    def _collect(self) -> bool:
        """Read progress and notice ends; whether anything changed."""
        changed = False
        for name, live in list(self._live.items()):
            changed |= self._read_progress(name)
            code = live.process.poll()
            if code is None:
                self._enforce_deadlines(live)
                continue
            self._read_progress(name)
            del self._live[name]
            self._finish(name, live, code)
            changed = True
        return changed

    def _enforce_deadlines(self, live: _Live) -> None:
        now = time.monotonic()
        if live.deadline is not None and now >= live.deadline and not live.timed_out:
            live.timed_out = True
            self._request_stop(live)
        if live.stop_by is not None and now >= live.stop_by:
            live.process.kill()

    def _request_stop(self, live: _Live) -> None:
        if live.stop_by is None:
            live.stop_by = time.monotonic() + STOP_GRACE_SECONDS
            live.process.terminate()

    def _finish(self, name: str, live: _Live, code: int) -> None:
        files = self._folder.job(name)
        shutil.rmtree(files.scratch, ignore_errors=True)
        result = None
        with suppress(FileNotFoundError):
            result = StageResult.from_message(files.termination.read_text(encoding="utf-8"))
        self._progress.pop(name, None)
        if self._jobs[name].suspended and code != 0:
            # As a suspended Job: the attempt is not over, it has no process for now.
            self._update(name, state="waiting", result=result)
            self._save()
            return
        failure = None
        if code != 0:
            reason = "DeadlineExceeded" if live.timed_out else None
            if code == 137 and _oom_kills() > live.oom_kills:
                reason = "OOMKilled"
            log = f"see {files.log}"
            failure = Failure(exit_code=code, reason=reason, disrupted=self._interrupts > 0, message=log)
        self._update(
            name,
            state="succeeded" if code == 0 else "failed",
            finished=self._stamp(),
            result=result,
            failure=failure,
        )
        self._save()

    def _read_progress(self, name: str) -> bool:
        path = self._folder.job(name).progress
        try:
            stamp = path.stat().st_mtime_ns
            if self._progress_stamps.get(name) == stamp:
                return False
            report = ProgressReport.model_validate_json(path.read_bytes())
        except (OSError, ValueError):
            return False
        self._progress_stamps[name] = stamp
        self._progress[name] = report.trainer_status
        return True

    def _stop(self, name: str) -> None:
        live = self._live.pop(name, None)
        if live is not None:
            live.process.terminate()
            if live.process.wait(STOP_GRACE_SECONDS) is None:
                live.process.kill()
            shutil.rmtree(self._folder.job(name).scratch, ignore_errors=True)
        self._progress.pop(name, None)

    def _stop_everything(self) -> None:
        """Leave no process behind, whatever ended the loop."""
        for name, live in list(self._live.items()):
            live.process.kill()
            self._finish(name, live, live.process.poll() or 137)
        self._live.clear()
        if self._interrupts:
            self._state = self._state.model_copy(update={"interrupted": True})
            self._save()

    def _update(self, name: str, **changes: Any) -> None:
        self._jobs[name] = self._jobs[name].model_copy(update=changes)

    def _save(self) -> None:
        self._state = self._state.model_copy(update={"jobs": list(self._jobs.values())})
        self._folder.save(self._state)

    def _stamp(self) -> str:
        return self._now().astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def _show(self) -> None:
        if self._pipeline is None:
            return
        live = {self._jobs[name].stage: report for name, report in self._progress.items() if name in self._live}
        results = {job.stage: job.result for job in self._jobs.values() if job.result is not None}
        self._observer.show(
            RunView(
                pipeline=self._pipeline,
                status=self._state.status,
                now=self._now(),
                live=live,
                results=results,
                stopping=self._interrupts > 0,
            )
        )


def _progress(report: TrainerStatus, now: datetime) -> Progress:
    updated = report.last_updated_time
    left = report.estimated_remaining_seconds
    finish = None
    if left is not None:
        base = parse_time(updated) if updated else now
        finish = format_time(datetime.fromtimestamp(base.timestamp() + left, UTC))
    return Progress(
        percentage=report.progress_percentage or 0,
        message=report.message,
        finish_time=finish,
        last_update_time=updated or format_time(now),
    )


def _oom_kills() -> int:
    """Processes that the kernel has killed for memory so far; 0 where it does not tell."""
    with suppress(OSError), open("/proc/vmstat", encoding="ascii") as file:  # noqa: PTH123
        for line in file:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
