"""A local run while it goes on: a table that moves on a terminal, plain lines everywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol

from plumbline_api.names import PREFLIGHT
from plumbline_operator.snapshot import PlannedEvent
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from plumbline_cli.display.stages import StageLine, stage_lines
from plumbline_cli.display.table import StageTable, phase_sign
from plumbline_cli.display.words import clock, symbols
from plumbline_cli.local.runner import Observer, RunView

PLAIN_SECONDS = 10.0
"""Least time between two plain lines about the progress of one stage."""
REFRESH_PER_SECOND = 4.0
TOLD_ANYWAY = ("StageFailed", "Failed", "Refused")
"""Events whose words stand on the line of the stage and in the ending."""


class Display(Observer, Protocol):
    """An observer that is opened and closed."""

    def __enter__(self) -> Display:
        """Begin to show."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show the last state and leave it standing."""


def display_for(console: Console, title: str) -> Display:
    """The display that suits a console."""
    return LiveTable(console, title) if console.is_terminal and not console.is_dumb_terminal else PlainLines(console)


def lines_of(view: RunView) -> list[StageLine]:
    """The stages of a view."""
    return stage_lines(view.pipeline, view.status, view.now, live=view.live, notes=preflight_notes(view))


def preflight_notes(view: RunView) -> Mapping[str, Sequence[str]]:
    """What preflight found, in its own words."""
    result = view.results.get(PREFLIGHT)
    return {PREFLIGHT: result.preflight.notes} if result is not None and result.preflight is not None else {}


class LiveTable:
    """A table that is drawn over itself."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title, self._signs = console, title, symbols(console)
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._shown_at = 0.0
        self._view: RunView | None = None

    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._view is not None:
            self._live.update(self._render(self._view), refresh=True)
        self._live.stop()

    def show(self, view: RunView) -> None:
        """Draw, a few times a second at most."""
        self._view = view
        if time.monotonic() - self._shown_at >= 1 / REFRESH_PER_SECOND:
            self._shown_at = time.monotonic()
            self._live.update(self._render(view), refresh=True)

    def tell(self, event: PlannedEvent) -> None:
        """Warnings stay above the table; the rest is what the table shows."""
        if event.type == "Warning" and event.reason not in TOLD_ANYWAY:
            self._console.print(Text(f"  {event.reason}: {event.message}", style="yellow"))

    def _render(self, view: RunView) -> RenderableType:
        parts: list[RenderableType] = [Text(self._title, style="bold"), StageTable(lines_of(view), self._signs)]
        if view.stopping:
            parts.append(Text("  stopping after a checkpoint; press Ctrl-C again to stop at once", style="yellow"))
        return Group(*parts)


class PlainLines:
    """A line when a stage changes, and now and then one about its progress."""

    def __init__(self, console: Console) -> None:
        self._console, self._signs = console, symbols(console)
        self._phases: dict[str, str] = {}
        self._told: dict[str, tuple[float, str]] = {}
        self._stopping = False

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Every change has been printed already."""

    def show(self, view: RunView) -> None:
        """Print what is new."""
        if view.stopping and not self._stopping:
            self._stopping = True
            self._console.print("stopping after a checkpoint; press Ctrl-C again to stop at once")
        for line in lines_of(view):
            if line.phase == "Queued" and not line.message:
                continue  # it starts in a moment
            if line.phase != self._phases.get(line.name, "Pending"):
                self._print_phase(line)
            elif line.phase == "Running":
                self._print_progress(line)
            self._phases[line.name] = line.phase

    def tell(self, event: PlannedEvent) -> None:
        """Warnings get a line."""
        if event.type == "Warning" and event.reason not in TOLD_ANYWAY:
            self._console.print(f"{event.reason}: {event.message}")

    def _print_phase(self, line: StageLine) -> None:
        text = "runs" if line.phase == "Running" else line.outcome_text
        self._console.print(f"{phase_sign(line.phase, self._signs)} {line.name}: {text}")
        self._told[line.name] = (time.monotonic(), "")

    def _print_progress(self, line: StageLine) -> None:
        parts = [line.doing, f"{line.percentage} %" if line.percentage is not None else "", line.figures_text]
        if line.left_seconds is not None:
            parts.append(f"{clock(line.left_seconds)} left")
        if not line.doing:
            return
        when, before = self._told.get(line.name, (0.0, ""))
        if line.doing != before and time.monotonic() - when >= PLAIN_SECONDS:
            self._told[line.name] = (time.monotonic(), line.doing)
            self._console.print(f"{self._signs.running} {line.name}: {', '.join(p for p in parts if p)}")
