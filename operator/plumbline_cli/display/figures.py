"""The figures of an evaluation as a table: a row per metric, a column per model."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from plumbline_cli.display.words import number

STYLES = {"better": "green", "worse": "red"}


def figures_table(summary: dict[str, Any]) -> Table | None:
    """The table of a `summary.json`, with intervals where a figure has one; None where nothing was measured.

    Green and red only where the whole interval says better or worse than the baseline.
    """
    columns, rows = summary.get("columns"), summary.get("rows")
    if not isinstance(columns, list) or not isinstance(rows, list) or not rows:
        return None
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(str(column), no_wrap=True)
    for row in rows:
        values = row.get("values", {})
        table.add_row(f"  {row.get('label', '')}", *(_cell(values.get(column)) for column in columns))
    return table


def figure_notes(summary: dict[str, Any]) -> list[str]:
    """What the figures rest on: judges, sizes, the level of the intervals, what was measured in-sample."""
    notes: list[str] = []
    for row in summary.get("rows") or []:
        judge = f", judge: {row['judge']}" if "judge" in row else ""
        in_sample = f", in-sample: {', '.join(row['inSample'])}" if row.get("inSample") else ""
        level = f", {row['confidence']:.0%} intervals" if "confidence" in row else ""
        size = f"{row.get('prompts')} held-out prompts of {row.get('dataset')}"
        notes.append(f"{row.get('label')}: {size}{level}{judge}{in_sample}")
    return notes


def _cell(value: Any) -> Text:
    if not isinstance(value, dict) or not isinstance(value.get("value"), int | float):
        return Text("–", style="dim")
    text = Text(number(float(value["value"])), style=STYLES.get(str(value.get("direction")), ""))
    if "lower" in value and "upper" in value:
        text.append(f" [{number(float(value['lower']))}, {number(float(value['upper']))}]", style="dim")
    return text
