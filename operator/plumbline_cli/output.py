"""Where text goes: consoles that honour NO_COLOR and pipes, and documents as JSON or YAML."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


class Format(StrEnum):
    """How a command prints its result."""

    TEXT = "text"
    JSON = "json"
    YAML = "yaml"


def out() -> Console:
    """The console for results."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=not sys.stdout.isatty())


def err() -> Console:
    """The console for remarks and errors, so that results can be piped."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_document(value: Any, format_: Format) -> None:
    """Print a value for programs."""
    if format_ is Format.YAML:
        import yaml

        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)
    else:
        import json

        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    sys.stdout.write(text)
