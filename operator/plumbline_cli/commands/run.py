"""`plumbline run`: the whole pipeline on this machine."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plumbline_cli.commands.options import Output, PipelineChoice
from plumbline_cli.exits import INTERRUPTED, RUN_FAILED
from plumbline_cli.output import Format, err, out, print_document

if TYPE_CHECKING:
    from plumbline_cli.local.runner import LocalRunner


def run(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Manifest of an AlignmentPipeline (`-`: standard input).")
    ],
    storage: Annotated[
        Path | None,
        typer.Option("--storage", metavar="DIR", help="Folder for results. [default: ./runs]", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Name of the run in place of metadata.name.")
    ] = None,
    namespace: Annotated[
        str | None,
        typer.Option("--namespace", "-n", metavar="NAME", help="Namespace in place of metadata.namespace."),
    ] = None,
    pipeline: PipelineChoice = None,
    parallel: Annotated[
        int,
        typer.Option(
            "--parallel",
            min=1,
            metavar="N",
            help="Stages that may run at once on this machine; they share its processors.",
        ),
    ] = 1,
    output: Output = Format.TEXT,
) -> None:
    """Run a pipeline on this machine: stages as processes, a folder as storage, no cluster.

    What is in storage already is not computed again. Ctrl-C stops after a checkpoint and the same call goes on from
    there; a second Ctrl-C stops at once. The trainer has to be installed: pip install '.[trainer]' in a checkout.
    """
    from plumbline_cli.display.ending import print_ending
    from plumbline_cli.display.live import display_for
    from plumbline_cli.display.words import plural, symbols
    from plumbline_cli.local.launch import TrainerLauncher, require_trainer
    from plumbline_cli.local.lock import RunLock
    from plumbline_cli.local.runner import LocalRunner
    from plumbline_cli.local.session import open_session

    session = open_session(file, storage=storage, name=name, namespace=namespace, pipeline_name=pipeline)
    require_trainer()
    console = out() if output is Format.TEXT else err()
    dot = symbols(console).dot
    shown = relative(session.storage)
    title = (
        f"Plumbline {dot} {session.folder.name} {dot} {plural(len(session.pipeline.spec.stages), 'stage')} "
        f"{dot} storage {shown}"
    )
    with RunLock(session.folder.lock_file, session.folder.name):
        for note in session.state.notes:
            err().print(f"note: {note}", style="dim")
        with display_for(console, title) as display:
            runner = LocalRunner(
                folder=session.folder,
                state=session.state,
                settings=session.settings,
                launch=TrainerLauncher(session.folder, parallel=parallel),
                observer=display,
                parallel=parallel,
            )
            with _Signals(runner):
                status = runner.run()
    if output is Format.TEXT:
        print_ending(console, session, runner.state)
    else:
        print_document(document_of(runner.state.body, status.to_wire()), output)
    if runner.interrupted:
        raise typer.Exit(INTERRUPTED)
    if status.phase != "Succeeded":
        raise typer.Exit(RUN_FAILED)


def document_of(body: dict[str, Any], status: dict[str, Any]) -> dict[str, Any]:
    """The object as `kubectl get -o json` would show it."""
    return {
        "apiVersion": body.get("apiVersion"),
        "kind": body.get("kind"),
        "metadata": body.get("metadata"),
        "spec": body.get("spec"),
        "status": status,
    }


def relative(path: Path) -> str:
    """A path as people write it: relative where it lies below the current folder."""
    try:
        return f"./{path.relative_to(Path.cwd())}"
    except ValueError:
        return str(path)


class _Signals:
    """Ctrl-C, SIGTERM and a closed terminal reach the runner while it runs."""

    def __init__(self, runner: LocalRunner) -> None:
        self._runner = runner
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, lambda _number, _frame: self._runner.interrupt())

    def __exit__(self, *_details: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
