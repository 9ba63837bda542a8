"""Which stages are already in storage, whole.

A hit has a manifest whose parents are the present manifests of its parents, themselves hits, and files whose every byte
is read now and matches: neither time stamps nor ETags are believed, because a flipped byte may leave them as they are.
That costs one read of each output per preflight, far less than computing it again.
"""

from __future__ import annotations

from dataclasses import dataclass

from plumbline_api import layout
from plumbline_api.record import RunRecord, StageRecord

from plumbline_trainer.errors import InputError
from plumbline_trainer.storage.manifests import Manifest, damage, read_manifest
from plumbline_trainer.storage.objects import ObjectStore


@dataclass(frozen=True, slots=True)
class Hit:
    """What was found of a stage."""

    fingerprint: str
    digest: str | None
    """Digest of the manifest, where one can be used."""
    why_not: str = ""
    """Why it is computed."""

    @property
    def found(self) -> bool:
        """Whether the stage need not be computed."""
        return self.digest is not None


def find_hits(store: ObjectStore, record: RunRecord, fingerprints: dict[str, str]) -> dict[str, Hit]:
    """Look every stage up, parents first."""
    found: dict[str, Hit] = {}

    def look(stage: StageRecord) -> Hit:
        if stage.name not in found:
            parents = [look(record.stage(ref.stage)) for ref in stage.inputs if ref.stage is not None]
            found[stage.name] = _look(store, record, stage, fingerprints[stage.name], parents)
        return found[stage.name]

    for stage in record.stages:
        look(stage)
    return found


def _look(store: ObjectStore, record: RunRecord, stage: StageRecord, fingerprint: str, parents: list[Hit]) -> Hit:
    root = layout.stage_root(record.storage.uri, record.pipeline.namespace, stage.type, fingerprint)
    try:
        read = read_manifest(store, root)
    except InputError as error:
        if error.reason != "InputMissing":
            raise
        return Hit(fingerprint, None, "its manifest is damaged")
    if read is None:
        return Hit(fingerprint, None, "not computed yet")
    manifest, digest = read
    return (
        Hit(fingerprint, None, fault) if (fault := _fault(store, root, manifest, parents)) else Hit(fingerprint, digest)
    )


def _fault(store: ObjectStore, root: str, manifest: Manifest, parents: list[Hit]) -> str | None:
    if not all(parent.found for parent in parents):
        return "an input is computed again"
    recorded = [parent.manifest_digest for parent in manifest.parents if parent.fingerprint is not None]
    if recorded != [parent.digest for parent in parents]:
        return "it was made from other outputs of its inputs"
    return damage(store, root, manifest)
