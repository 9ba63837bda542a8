"""`plumbline logs`: what the trainer of a stage has printed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plumbline_cli.commands.options import Context, Namespace, Output, PipelineChoice, Storage, Target
from plumbline_cli.commands.targets import ClusterTarget, LocalTarget, find_target
from plumbline_cli.exits import BAD_INPUT, NOT_FOUND, CommandError
from plumbline_cli.output import Format, err, print_document

if TYPE_CHECKING:
    from plumbline_api.status import PipelineStatus

POLL_SECONDS = 0.5


def logs(
    target: Target,
    stage: Annotated[
        str | None,
        typer.Argument(
            metavar="[STAGE]",
            help="Stage. Absent: the one that runs, else that failed, else the last.",
            show_default=False,
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as more is printed, until the stage ends.")
    ] = False,
    tail: Annotated[int | None, typer.Option("--tail", min=0, metavar="N", help="Begin with the last N lines.")] = None,
    attempt: Annotated[
        int | None, typer.Option("--attempt", min=1, metavar="N", help="Attempt (else the last).")
    ] = None,
    storage: Storage = None,
    namespace: Namespace = None,
    context: Context = None,
    pipeline: PipelineChoice = None,
    output: Output = Format.TEXT,
) -> None:
    """Print the log of a stage."""
    if follow and output is not Format.TEXT:
        raise CommandError("--follow prints text as it comes; leave --output out", BAD_INPUT)
    found = find_target(target, storage=storage, namespace=namespace, context=context, pipeline=pipeline)
    if isinstance(found, LocalTarget):
        lines = _local_lines(found, stage, attempt, follow=follow, tail=tail)
    else:
        lines = _cluster_lines(found, stage, attempt, follow=follow, tail=tail)
    if output is not Format.TEXT:
        print_document({"lines": list(lines)}, output)
        return
    count = 0
    for count, line in enumerate(lines, 1):  # noqa: B007 -- counted, to tell that there was none
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    if not count and tail != 0:
        err().print("the log is empty", style="dim")


def _local_lines(
    target: LocalTarget, stage: str | None, attempt: int | None, *, follow: bool, tail: int | None
) -> Iterator[str]:
    found = target.folder.attempts()
    current = {job.name for job in target.state.jobs}
    name = stage or _default_stage(target.state.status, [item.run.stage for item in found if item.job in current])
    chosen = [item for item in found if item.run.stage == name and attempt in (None, item.run.attempt)]
    if not chosen:
        there = ", ".join(dict.fromkeys(f"{item.run.stage} (attempt {item.run.attempt})" for item in found)) or "none"
        what = "" if name is None else f" of {name}" + ("" if attempt is None else f", attempt {attempt}")
        raise CommandError(f"there is no log{what} in {target.folder.path}. Logs: {there}", NOT_FOUND)
    job = chosen[-1]
    if job.job not in current:
        err().print(f"{job.run.stage} did not run in the latest call; this is its log of an earlier one", style="dim")

    def is_over() -> bool:
        now = next((item for item in target.again().state.jobs if item.name == job.job), None)
        return now is None or now.state != "running" or not target.is_running

    yield from read_lines(target.folder.job(job.job).log, tail=tail, is_over=is_over if follow else None)


def read_lines(path: Path, *, tail: int | None, is_over: Callable[[], bool] | None) -> Iterator[str]:
    """The lines of a file, the last `tail` where given; with `is_over` also those that come until it holds."""
    with path.open(encoding="utf-8", errors="replace") as file:
        if is_over is None:
            lines = file.read().splitlines()
            yield from lines if tail is None else lines[max(0, len(lines) - tail) :]
            return
        over = is_over()
        *lines, pending = file.read().split("\n")
        yield from lines if tail is None else lines[max(0, len(lines) - tail) :]
        while not over:
            time.sleep(POLL_SECONDS)
            # Asked before reading, so that what was printed last is read as well.
            over = is_over()
            *lines, pending = (pending + file.read()).split("\n")
            yield from lines
    if pending:
        yield pending


def _cluster_lines(
    target: ClusterTarget, stage: str | None, attempt: int | None, *, follow: bool, tail: int | None
) -> Iterator[str]:
    from plumbline_api.names import ANNOTATION_ATTEMPT
    from plumbline_api.status import PipelineStatus

    body = target.read()
    status = PipelineStatus.model_validate(body.get("status") or {})
    declared = [item["name"] for item in (body.get("spec") or {}).get("stages") or [] if "name" in item]
    known = ["preflight", *declared, "finalize"]
    name = stage or _default_stage(status, [entry.name for entry in status.stages if entry.job])
    if name is None:
        raise CommandError(
            f"{target.name} has not started a stage yet; see `plumbline status {target.name}`", NOT_FOUND
        )
    if name not in known:
        raise CommandError(f'{target.name} has no stage "{name}". Stages: {", ".join(known)}', BAD_INPUT)
    pods = target.cluster.pods(body["metadata"]["uid"], name)
    if attempt is not None:
        pods = [pod for pod in pods if (pod.metadata.annotations or {}).get(ANNOTATION_ATTEMPT) == str(attempt)]
    if not pods:
        entry = status.stage_named(name)
        why = (
            "it was found in storage" if entry is not None and entry.cached else "none has started, or they are deleted"
        )
        raise CommandError(f"there is no pod of {name} to read a log from: {why}", NOT_FOUND)
    newest = pods[-1]
    if len(pods) > 1:
        err().print(f"{newest.metadata.name} ({len(pods)} pods; the newest is shown)", style="dim")
    yield from target.cluster.log_lines(newest.metadata.name, follow=follow, tail=tail)


def _default_stage(status: PipelineStatus, started: list[str]) -> str | None:
    """The stage whose log is most likely wanted."""
    for phase in ("Running", "Failed"):
        for entry in status.stages:
            if entry.phase == phase and entry.name in started:
                return entry.name
    return started[-1] if started else None
