"""The figures of an evaluation as a table: a row per metric, a column per model."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def figures_table(summary: dict[str, Any]) -> Table | None:
    """The table of `summary.json`; None where nothing was measured."""
    return None
