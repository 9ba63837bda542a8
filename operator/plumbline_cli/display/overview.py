"""The state of one pipeline on a few lines: the same for a local run and for a cluster."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from plumbline_api.errors import ManifestError
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.status import PipelineStatus
from rich.console import Console
from rich.text import Text

from plumbline_cli.display.stages import stage_lines
from plumbline_cli.display.table import StageTable
from plumbline_cli.display.words import number, symbols

MESSAGES = ("Failed", "Accepted", "Reported")
"""Conditions whose message is worth a line where they say that something is wrong."""


def print_overview(console: Console, body: dict[str, Any], status: PipelineStatus, now: datetime) -> None:
    """Print name, phase, runtime and use of accelerators, then a line per stage, then what is wrong."""
    signs = symbols(console)
    try:
        pipeline: AlignmentPipeline | None = AlignmentPipeline.parse(body)
    except ManifestError:
        pipeline = None
    name = (body.get("metadata") or {}).get("name", "")
    hours = status.usage.gpu_hours
    parts = [name, status.phase, status.runtime or "", f"{number(hours)} GPU-hours" if hours else ""]
    console.print(Text(f" {signs.dot} ".join(part for part in parts if part), style="bold"))
    if status.phase != "Refused":
        console.print(StageTable(stage_lines(pipeline, status, now), signs), soft_wrap=False)
    for text in complaints(status):
        console.print(Text(f"  {text}", style="red"))
    if status.model is not None and status.phase == "Succeeded":
        console.print(f"  model   {status.model.uri}")
    if status.report is not None:
        console.print(f"  report  {status.report}")


def complaints(status: PipelineStatus) -> list[str]:
    """What the conditions say is wrong, in their own words."""
    found = []
    for type_ in MESSAGES:
        condition = status.condition(type_)
        bad = "True" if type_ == "Failed" else "False"
        if condition is not None and condition.status == bad and condition.message:
            found.append(condition.message)
    return list(dict.fromkeys(found))
