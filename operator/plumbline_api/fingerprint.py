"""Canonical JSON and the identity of a stage's work."""

from __future__ import annotations

import hashlib
import json
from typing import Any

REFERENCE_FIELDS = frozenset({"dataset", "reference", "baseline", "source", "stage", "base"})
"""Fields that name an input. Inputs enter a fingerprint by their content, so that a new name is not new work."""
OPERATIONAL_FIELDS = frozenset({"checkpointEverySteps", "gradientCheckpointing"})
"""Fields that change how a stage is run but no bit of what it yields."""


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, no white space and UTF-8, so that equal values have equal bytes.

    Raises:
        ValueError: for NaN and infinity, which JSON does not know.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def without_names(parameters: Any) -> Any:
    """Parameters without the fields that only name inputs or only steer the run."""
    if isinstance(parameters, dict):
        dropped = REFERENCE_FIELDS | OPERATIONAL_FIELDS
        return {key: without_names(value) for key, value in parameters.items() if key not in dropped}
    if isinstance(parameters, list):
        return [without_names(item) for item in parameters]
    return parameters
