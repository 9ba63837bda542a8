"""From the status as stored and the status as wanted to the smallest merge patch between them."""

from __future__ import annotations

from typing import Any

Wire = dict[str, Any]


def merge_patch(stored: Wire, wanted: Wire) -> Wire:
    """A JSON merge patch (RFC 7386) that turns one into the other; empty where nothing differs.

    Fields that are no longer wanted become null. Lists are replaced whole, as merge patches do; the resourceVersion
    that goes with the patch makes sure that nobody else has changed them meanwhile.
    """
    patch: Wire = {name: None for name in stored if name not in wanted}
    for name, value in wanted.items():
        before = stored.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := merge_patch(before, value):
                patch[name] = inner
        elif name not in stored or before != value:
            patch[name] = value
    return patch
