"""Times as the API writes them."""

from __future__ import annotations

from datetime import UTC, datetime


def format_time(moment: datetime) -> str:
    """RFC 3339 in UTC, whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime:
    """The moment that an RFC 3339 text names."""
    return datetime.fromisoformat(text)


def shorten(text: str, limit: int = 4096) -> str:
    """Text that fits a field of the API."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
