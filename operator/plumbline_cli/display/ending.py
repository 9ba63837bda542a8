"""The last lines of a local run: how it went, where things lie, the figures that decide, how to go on."""

from __future__ import annotations

from typing import Any

from plumbline_api.names import FINALIZE, PREFLIGHT
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from plumbline_cli.display.figures import figure_notes, figures_table
from plumbline_cli.display.overview import complaints
from plumbline_cli.display.words import duration, moment, plural, symbols
from plumbline_cli.local.results import find_model, find_report, read_summary
from plumbline_cli.local.session import Session, command_to_go_on, shown
from plumbline_cli.local.state import LocalState


def print_ending(console: Console, session: Session, state: LocalState) -> None:
    """Print how a run has ended, and the command that goes on with it."""
    signs = symbols(console)
    status = state.status
    command = command_to_go_on(session.folder, state)
    if status.phase == "Succeeded":
        _print_success(console, session, state)
        return
    if state.interrupted:
        console.print(
            Text(f"  {signs.paused} stopped; it goes on from its last checkpoint with: {command}", style="yellow")
        )
        return
    for entry in status.stages:
        if entry.phase == "Failed":
            said = ": ".join(part for part in (entry.reason, entry.message) if part)
            console.print(Text(f"  {signs.failed} {entry.name} failed. {said}", style="red"))
            log = session.folder.job(entry.job).log if entry.job else None
            if log is not None and log.exists():
                console.print(f"    log {shown(log)}")
    if status.phase == "Refused":
        for text in complaints(status):
            console.print(Text(f"  {signs.failed} {text}", style="red"))
    if (report := find_report(state)) is not None:
        console.print(f"    report {shown(report)}")
    console.print(f"  what succeeded is kept; once the cause is mended, go on with: {command}")


def _print_success(console: Console, session: Session, state: LocalState) -> None:
    signs, status = symbols(console), state.status
    start, end = moment(status.start_time), moment(status.completion_time)
    taken = duration((end - start).total_seconds()) if start is not None and end is not None else ""
    declared = [entry for entry in status.stages if entry.name not in (PREFLIGHT, FINALIZE)]
    cached = sum(entry.cached for entry in declared)
    if cached == len(declared):
        words = f"all {plural(cached, 'stage')} found in storage, {taken}"
    else:
        words = f"done in {taken}" + (f" ({plural(cached, 'stage')} found in storage)" if cached else "")
    console.print(Text.assemble((f"  {signs.succeeded} ", "green"), words))
    if (model := find_model(state)) is not None:
        form = "adapter, PEFT layout" if model.is_adapter else "Hugging Face layout"
        console.print(f"    model   {shown(model.path)}  ({form})", soft_wrap=True)
    if (report := find_report(state)) is not None:
        console.print(f"    report  {shown(report)}", soft_wrap=True)
    else:
        for text in complaints(status):
            console.print(Text(f"    {text}", style="yellow"))
    if (summary := read_summary(session.folder)) is not None:
        print_figures(console, summary)


def print_figures(console: Console, summary: dict[str, Any]) -> None:
    """Print what an evaluation found: one sentence, the table, and what it rests on."""
    table = figures_table(summary)
    if table is None:
        return
    console.print()
    if isinstance(summary.get("sentence"), str):
        console.print(Padding(Text(summary["sentence"]), (0, 0, 0, 2)), soft_wrap=False)
        console.print()
    console.print(table, soft_wrap=False)
    for note in figure_notes(summary):
        console.print(Padding(Text(note, style="dim"), (0, 0, 0, 2)), soft_wrap=False)
