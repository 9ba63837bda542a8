"""`plumbline wait`: until a pipeline has ended, well or not."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plumbline_cli.commands.options import Context, Namespace, Output, PipelineChoice, Storage, Target
from plumbline_cli.commands.targets import ClusterTarget, LocalTarget, find_target
from plumbline_cli.exits import BAD_INPUT, RUN_FAILED, WAIT_TIMEOUT, CommandError
from plumbline_cli.output import Format, err, out, print_document

if TYPE_CHECKING:
    from plumbline_api.status import PipelineStatus

POLL_SECONDS = {True: 0.5, False: 2.0}
"""Between two looks, by whether the run is local."""
ENDED = ("Succeeded", "Failed", "Refused")


def wait(
    target: Target,
    timeout: Annotated[
        str | None, typer.Option("--timeout", metavar="DURATION", help="Give up after so long, such as 30m or 2h.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="NAME", help="Wait for the end of this stage only.")
    ] = None,
    storage: Storage = None,
    namespace: Namespace = None,
    context: Context = None,
    pipeline: PipelineChoice = None,
    output: Output = Format.TEXT,
) -> None:
    """Wait until a pipeline has ended, well or not (exit code 0: it succeeded, 1: it failed or was refused)."""
    from plumbline_api.quantities import parse_duration

    from plumbline_cli.commands.run import document_of
    from plumbline_cli.display.overview import complaints

    try:
        deadline = None if timeout is None else time.monotonic() + parse_duration(timeout)
    except ValueError as error:
        raise CommandError(f"--timeout: {error}", BAD_INPUT) from None
    found = find_target(target, storage=storage, namespace=namespace, context=context, pipeline=pipeline)
    watch = _Watch(found, quiet=output is not Format.TEXT)
    while True:
        body, state = watch.look()
        result = _result(state, stage, body)
        if result is not None:
            break
        if deadline is not None and time.monotonic() >= deadline:
            raise CommandError(f"{target} has not ended after {timeout}; it is {state.phase}", WAIT_TIMEOUT)
        if isinstance(found, LocalTarget) and not found.is_running and watch.is_settled():
            raise CommandError(
                f"nobody runs {found.folder.name} right now, so waiting is in vain; "
                f"it goes on with: {found.command_to_go_on}",
                RUN_FAILED,
            )
        pause = POLL_SECONDS[isinstance(found, LocalTarget)]
        time.sleep(pause if deadline is None else max(0.0, min(pause, deadline - time.monotonic())))
    if output is not Format.TEXT:
        print_document(document_of(body, state.to_wire()), output)
    else:
        name = watch.name if stage is None else f"{watch.name}/{stage}"
        out().print(f"{name} {'succeeded' if result else 'did not succeed'}")
        for text in [] if result else complaints(state):
            err().print(text)
    if not result:
        raise typer.Exit(RUN_FAILED)


def _result(state: PipelineStatus, stage: str | None, body: dict[str, Any]) -> bool | None:
    """Whether it succeeded; None while it goes on or the status speaks of an older spec."""
    generation = (body.get("metadata") or {}).get("generation")
    if generation is not None and state.observed_generation not in (None, generation):
        return None
    if stage is not None and state.phase != "Refused":
        entry = state.stage_named(stage)
        declared = [item.get("name") for item in (body.get("spec") or {}).get("stages") or []]
        if entry is None and stage not in ("preflight", "finalize", *declared):
            raise CommandError(f'there is no stage "{stage}". Stages: {", ".join(map(str, declared))}', BAD_INPUT)
        if entry is not None and entry.phase in ("Succeeded", "Failed", "Skipped"):
            return entry.phase == "Succeeded"
    return state.phase == "Succeeded" if state.phase in ENDED else None


class _Watch:
    """Looks at a target again and again and prints what has changed."""

    def __init__(self, target: LocalTarget | ClusterTarget, *, quiet: bool) -> None:
        from plumbline_cli.display.live import PlainLines

        self._target = target
        self._lines = None if quiet else PlainLines(err())
        self._looks = 0
        self._last: PipelineStatus | None = None
        self._same = 0

    @property
    def name(self) -> str:
        """Name of the pipeline."""
        return self._target.folder.name if isinstance(self._target, LocalTarget) else self._target.name

    def look(self) -> tuple[dict[str, Any], PipelineStatus]:
        """The object and its status as they are now."""
        from plumbline_api.errors import ManifestError
        from plumbline_api.pipeline import AlignmentPipeline
        from plumbline_api.status import PipelineStatus

        from plumbline_cli.local.runner import RunView

        if isinstance(self._target, LocalTarget):
            self._target = self._target.again()
            body, state = self._target.state.body, self._target.state.status
        else:
            body = self._target.read()
            state = PipelineStatus.model_validate(body.get("status") or {})
        self._same = self._same + 1 if state == self._last else 0
        self._last = state
        if self._lines is not None:
            try:
                pipeline = AlignmentPipeline.parse(body)
            except ManifestError:
                return body, state
            self._lines.show(RunView(pipeline=pipeline, status=state, now=datetime.now(UTC), live={}, results={}))
        return body, state

    def is_settled(self) -> bool:
        """Whether a second look has seen the same: a run that ends just now has written its last status by then."""
        return self._same > 0
