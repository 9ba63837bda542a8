"""`plumbline version`."""

from __future__ import annotations

from typing import Any

from plumbline_cli.commands.options import Output
from plumbline_cli.output import Format, out, print_document


def installed_version() -> str:
    """The version of this software, as stages and records carry it."""
    from importlib import metadata

    return metadata.version("plumbline")


def version(output: Output = Format.TEXT) -> None:
    """Print the versions of plumbline and of its contract with the trainer."""
    import platform

    from plumbline_api.base import GROUP_VERSION
    from plumbline_api.record import CONTRACT_VERSION

    found: dict[str, Any] = {
        "plumbline": installed_version(),
        "api": GROUP_VERSION,
        "contract": CONTRACT_VERSION,
        "python": platform.python_version(),
    }
    if output is Format.TEXT:
        out().print("\n".join(f"{name} {value}" for name, value in found.items()))
    else:
        print_document(found, output)
