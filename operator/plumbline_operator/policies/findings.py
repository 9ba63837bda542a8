"""What preflight found: pins of the external inputs, and which stages are in storage."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from plumbline_api.record import RunRecord
from plumbline_api.stagerun import StageResult
from plumbline_api.status import InputPin

DIGEST_BYTES = 32
_REMEDY = "use the trainer image of the operator's release"


@dataclass(frozen=True, slots=True)
class Findings:
    """Findings of preflight by name."""

    pins: tuple[InputPin, ...]
    cached: frozenset[str]
    notes: tuple[str, ...]


def read_findings(result: StageResult | None, record: RunRecord) -> Findings | str:
    """The findings in a result, or what is wrong with them.

    Digests travel as base64url without padding and are kept as hex; both lists are in the order of the record.
    """
    found = result.preflight if result is not None else None
    if found is None:
        return f"the trainer's preflight returned no findings; {_REMEDY}"
    names = [item.name for item in record.external_inputs]
    if len(found.digests) != len(names) or len(found.cached) != len(record.stages):
        return (
            f"the trainer's preflight returned {len(found.digests)} digests and {len(found.cached)} stages; the record "
            f"has {len(names)} and {len(record.stages)}; {_REMEDY}"
        )
    try:
        digests = [base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)) for text in found.digests]
    except (binascii.Error, ValueError):
        digests = [b""]
    if any(len(digest) != DIGEST_BYTES for digest in digests):
        return f"the trainer's preflight returned a digest that is no SHA-256 in base64url; {_REMEDY}"
    return Findings(
        pins=tuple(InputPin(name=name, digest=digest.hex()) for name, digest in zip(names, digests, strict=True)),
        cached=frozenset(
            stage.name for stage, bit in zip(record.stages, found.cached, strict=True) if bit == "1" and stage.cache
        ),
        notes=tuple(found.notes),
    )


def known_pins(pins: list[InputPin], record: RunRecord) -> list[str] | None:
    """Digests in the record's order; None where the pins are not those of this record's inputs."""
    if [pin.name for pin in pins] != [item.name for item in record.external_inputs]:
        return None
    return [pin.digest for pin in pins]
