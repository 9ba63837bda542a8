"""Kubernetes quantities and metav1 durations as numbers."""

from __future__ import annotations

import re
from decimal import Decimal

_SUFFIXES = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    **{s: Decimal(1000) ** (i + 1) for i, s in enumerate("kMGTP")},
    **{f"{s}i": Decimal(1024) ** (i + 1) for i, s in enumerate("KMGTP")},
}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_quantity(text: str) -> Decimal:
    """`16Gi` as 17179869184, `500m` as 0.5.

    Raises:
        ValueError: if the text is no quantity.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-zA-Z]*)", text)
    if match is None or match[2] not in _SUFFIXES:
        raise ValueError(f'"{text}" is not a quantity')
    return Decimal(match[1]) * _SUFFIXES[match[2]]


def parse_duration(text: str) -> float:
    """`1h30m` as 5400.0 seconds.

    Raises:
        ValueError: if the text is no duration.
    """
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)", text)
    if not parts or "".join(a + b for a, b in parts) != text:
        raise ValueError(f'"{text}" is not a duration; write such as 90s, 30m or 1h30m')
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)
