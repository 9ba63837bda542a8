"""Where a step's time goes, as a file and as a section of docs/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from bench import page

FILE = Path(__file__).parent / "parts.json"
COLUMNS = {
    "products": "matrix products",
    "attention": "attention",
    "elementwise": "element-wise, norms, softmax",
    "copies": "copies",
    "between": "between operations",
}
HOW = (
    "`make bench-trainer BENCH=--parts` (tests/bench/parts.py): the last step of each side under torch's profiler, which slows steps of "
    "many small operations; seconds, and the share of the step."
)
NOTE = (
    "Models, adapters and precision are those of the table above, trl at its best settings. A step has the same rows on both sides, without "
    "the reference pass. *Between operations* is Python, and what the profiler costs."
)


def read(file: Path = FILE) -> dict[str, dict[str, dict[str, float]]]:
    """Case → side → parts, as found so far."""
    found: dict[str, dict[str, dict[str, float]]] = (
        json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    )
    return found


def write(cases: Mapping[str, Mapping[str, Mapping[str, float]]], file: Path = FILE) -> None:
    """Keep what was found."""
    file.write_text(json.dumps(cases, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def section(cases: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The table with how it came about."""
    rows = [row_of(case, side, parts) for case in sorted(cases) for side, parts in cases[case].items()]
    return page.section("Where a training step's time goes", HOW, rows, ("torch", "transformers", "trl"), NOTE)


def row_of(case: str, side: str, parts: Mapping[str, float]) -> dict[str, str]:
    """One side of one case."""
    step = parts["step"]
    shown = {
        title: f"{parts.get(kind, 0.0):.2f} ({parts.get(kind, 0.0) / step:.0%})" for kind, title in COLUMNS.items()
    }
    return {"method": case, "side": side, "rows": f"{parts['rows']:.0f}", "step (s)": f"{step:.2f}", **shown}
