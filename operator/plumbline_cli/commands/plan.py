"""`plumbline plan`: what a run would do, without training anything."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from plumbline_cli.commands.options import Output, PipelineChoice, Storage
from plumbline_cli.exits import BAD_INPUT, OK, RUN_FAILED
from plumbline_cli.output import Format, err, out, print_document


def plan(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Manifest of an AlignmentPipeline.")],
    storage: Storage = None,
    pipeline: PipelineChoice = None,
    output: Output = Format.TEXT,
) -> None:
    """Read the data and the model's facts, and say what would run, what is in storage already, and what it needs."""
    from plumbline_cli.display.forecast import print_forecast
    from plumbline_cli.local.forecast import make_forecast
    from plumbline_cli.local.launch import require_trainer
    from plumbline_cli.local.session import open_session

    session = open_session(file, storage=storage, pipeline_name=pipeline)
    require_trainer()
    for note in session.state.notes:
        err().print(f"note: {note}", style="dim")
    forecast = make_forecast(session)
    if output is Format.TEXT:
        print_forecast(out(), forecast)
    else:
        wire: dict[str, Any] = forecast.to_wire()
        print_document(wire, output)
    if forecast.problem is not None:
        raise typer.Exit(BAD_INPUT if forecast.is_input_wrong else RUN_FAILED)
    raise typer.Exit(OK)
