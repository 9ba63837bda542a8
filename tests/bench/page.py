"""The page of measured figures: every benchmark writes its own section between its own markers."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
INTRODUCTION = """# Benchmarks

Every figure here was measured by the command named above it and written by that command. Machines differ and are shared: speeds are
given as ratios within one run where something can be compared.
"""


def section(title: str, how: str, rows: Sequence[dict[str, str]], libraries: Sequence[str], *notes: str) -> str:
    """A heading, how it was measured, a table, notes, and where and when."""
    header = list(rows[0])
    lines = [f"## {title}", "", how, ""]
    lines += [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    lines += [f"| {' | '.join(row.get(key, '') for key in header)} |" for row in rows]
    for note in notes:
        lines += ["", note]
    shown = ", ".join(f"{name} {version(name)}" for name in libraries)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines += [
        "",
        f"{today}; {os.cpu_count()} cores ({platform.machine()}); Python {platform.python_version()}, {shown}.",
        "",
    ]
    return "\n".join(lines)


def replace(name: str, text: str, page: Path = PAGE) -> None:
    """Put a section between its markers; everything else on the page stays."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    whole = page.read_text(encoding="utf-8") if page.is_file() else INTRODUCTION
    block = f"{begin}\n{text}{end}\n"
    if begin in whole:
        head, _, rest = whole.partition(begin)
        whole = head + block + rest.partition(f"{end}\n")[2]
    else:
        whole = whole.rstrip("\n") + "\n\n" + block
    page.write_text(whole, encoding="utf-8")
