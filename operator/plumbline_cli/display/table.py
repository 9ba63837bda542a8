"""The stages as a table of a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from plumbline_cli.display.stages import StageLine
from plumbline_cli.display.words import Symbols, clock

BAR_WIDTHS = ((100, 24), (70, 12), (0, 6))
"""Width of a bar by the least width of the window."""
STYLES = {
    "Succeeded": "green",
    "Failed": "red",
    "Running": "cyan",
    "Queued": "yellow",
    "Suspended": "yellow",
    "Skipped": "dim",
    "Pending": "dim",
}


class StageTable:
    """A renderable: a line per stage, its bar as wide as the window allows."""

    def __init__(self, lines: Sequence[StageLine], signs: Symbols) -> None:
        self._lines, self._signs = lines, signs

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render for the width of the console."""
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        bar = next(width for least, width in BAR_WIDTHS if options.max_width >= least)
        for line in self._lines:
            style = STYLES.get(line.phase, "")
            name = Text(f"  {line.name}", style="dim" if line.phase in ("Pending", "Skipped") else "")
            table.add_row(name, self._running(line, bar) if line.phase == "Running" else self._ended(line, style))
        yield table

    def _ended(self, line: StageLine, style: str) -> Text:
        return Text.assemble((f"{phase_sign(line.phase, self._signs)} ", style), (line.outcome_text, _dimmed(line)))

    def _running(self, line: StageLine, width: int) -> Text:
        text = Text()
        if line.percentage is not None:
            halves = round(2 * width * line.percentage / 100)
            full, half = divmod(halves, 2)
            text.append(self._signs.bar * full + self._signs.half * half, style="cyan")
            text.append(self._signs.bar * (width - full - half), style="bright_black")
            text.append(f" {line.percentage:3d} %")
        else:
            text.append(f"{self._signs.running} ", style="cyan")
        parts = [line.doing, line.figures_text]
        if line.left_seconds is not None:
            parts.append(f"{clock(line.left_seconds)} left")
        elif line.seconds is not None:
            parts.append(f"{clock(line.seconds)} so far")
        text.append(("  " if line.percentage is not None else "") + "   ".join(part for part in parts if part))
        return text


def phase_sign(phase: str, signs: Symbols) -> str:
    """The character that stands for a phase."""
    return {
        "Succeeded": signs.succeeded,
        "Failed": signs.failed,
        "Running": signs.running,
        "Queued": signs.paused,
        "Suspended": signs.paused,
        "Skipped": signs.skipped,
    }.get(phase, signs.pending)


def _dimmed(line: StageLine) -> str:
    return "dim" if line.phase in ("Pending", "Skipped") else ""
