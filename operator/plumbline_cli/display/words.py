"""Numbers, durations and symbols as people read them; the same everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.console import Console


@dataclass(frozen=True, slots=True)
class Symbols:
    """One character for each phase, and those of a progress bar."""

    succeeded: str = "✔"
    failed: str = "✘"
    running: str = "▶"
    paused: str = "⏸"
    pending: str = "·"
    skipped: str = "–"
    bar: str = "━"
    half: str = "╸"
    dot: str = "·"


UNICODE = Symbols()
ASCII = Symbols(
    succeeded="+", failed="x", running=">", paused="=", pending=".", skipped="-", bar="#", half="#", dot="-"
)


def symbols(console: Console) -> Symbols:
    """Symbols that the console can print."""
    return UNICODE if console.encoding.lower().replace("-", "").startswith("utf") else ASCII


def duration(seconds: float) -> str:
    """`6 s`, `4 min 41 s`, `1 h 12 min`, `3 d 4 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def clock(seconds: float) -> str:
    """Time that is left: `0:34`, `12:05`, `1:02:00`."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"


def number(value: float) -> str:
    """Three figures that count: `1.84`, `0.61`, `131`, `12,300`."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 0.001:
        return f"{value:.2g}"
    digits = max(0, 2 - math.floor(math.log10(size))) if size >= 1 else 2 if size >= 0.01 else 4
    return f"{value:.{digits}f}"


def share(value: float) -> str:
    """A share of one with two digits: `0.61`."""
    return f"{value:.2f}"


def moment(text: str | None) -> datetime | None:
    """The moment that a time of the API names."""
    return None if text is None else datetime.fromisoformat(text).astimezone(UTC)


def plural(count: int, noun: str) -> str:
    """`1 stage`, `5 stages`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
