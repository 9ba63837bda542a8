"""What a run would do, for people."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from plumbline_cli.display.words import number, plural, symbols
from plumbline_cli.local.forecast import Forecast, StageForecast
from plumbline_cli.local.session import shown


def print_forecast(console: Console, forecast: Forecast) -> None:
    """Print what preflight found, then a line per stage."""
    signs = symbols(console)
    title = f" {signs.dot} ".join(
        [forecast.name, plural(len(forecast.stages), "stage"), f"storage {shown(forecast.storage)}"]
    )
    console.print(Text(title if forecast.stages else forecast.name, style="bold"))
    if forecast.problem is not None:
        console.print(Text(f"  {signs.failed} preflight {forecast.problem}", style="red"))
        return
    for note in forecast.notes:
        console.print(f"  {note}")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for stage in forecast.stages:
        sign, style = (signs.succeeded, "green") if stage.is_cached else (signs.running, "cyan")
        action = Text(f"{sign} {'found in storage' if stage.is_cached else 'runs'}", style=style)
        table.add_row(Text(f"  {stage.record.name}"), action, Text(describe(stage)))
    console.print(table, soft_wrap=False)
    left = sum(not stage.is_cached for stage in forecast.stages)
    console.print(f"  {plural(left, 'stage')} to run" if left else "  nothing to run: every stage is in storage")


def describe(stage: StageForecast) -> str:
    """`sft on questions, LoRA rank 16, learning rate 0.0002, 2 epochs`."""
    parameters: dict[str, Any] = stage.record.parameters
    parts = [stage.record.type + (f" on {parameters['dataset']}" if "dataset" in parameters else "")]
    if "lora" in parameters:
        parts.append(f"LoRA rank {parameters['lora']['rank']}")
    training = parameters.get("training")
    if isinstance(training, dict):
        if (sweep := training.get("rangeTest")) is not None:
            parts.append(f"learning rates from {sweep['from']:g} to {sweep['to']:g}, no policy")
        else:
            parts.append(f"learning rate {training['learningRate']:g}")
            if "maxSteps" in training:
                parts.append(f"at most {training['maxSteps']} steps")
            parts.append(f"{training['epochs']:g} epoch" + ("" if training["epochs"] == 1 else "s"))
        parts.append(f"batch {training['globalBatch']}")
    if "method" in parameters:
        names = [model.get("stage", "spec.model") for model in parameters["models"]]
        parts.append(f"{parameters['method']} of {', '.join(names)}")
    if "suites" in parameters:
        parts.append(", ".join(next(iter(suite)) for suite in parameters["suites"]))
    return ", ".join([*parts, *needs(stage.estimate)])


def needs(estimate: dict[str, Any]) -> list[str]:
    """`54 steps`, `19,800 tokens`, `2.4 of 15.6 GiB`: what preflight expects a stage to take."""
    found = []
    if isinstance(steps := estimate.get("steps"), int | float) and steps:
        found.append(plural(round(steps), "step"))
    if isinstance(tokens := estimate.get("tokens"), int | float) and tokens:
        found.append(f"about {plural(round(tokens), 'token')}")
    if isinstance(memory := estimate.get("memoryBytes"), int | float) and memory:
        there = machine_memory()
        found.append(f"{number(memory / 2**30)}{f' of {number(there / 2**30)}' if there else ''} GiB")
    return found


def machine_memory() -> int | None:
    """Bytes of memory of this machine; None where it does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
