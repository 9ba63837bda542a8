"""The run record in the cluster: an owned ControllerRevision, whose data the API server never lets change.

Tenants' default roles can read ControllerRevisions and not write them, so a record can be trusted once owner, identity
and digest have been compared.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from plumbline_api.base import API_GROUP, GROUP_VERSION
from plumbline_api.names import LABEL_MANAGED_BY, LABEL_PIPELINE, LABEL_PIPELINE_UID, MANAGED_BY, record_name
from plumbline_api.record import RunRecord
from pydantic import ValidationError

from plumbline_operator.errors import AlreadyExistsError, NotFoundError, ReobserveError
from plumbline_operator.jobs import controller_of
from plumbline_operator.kube import RECORDS, Kube, Manifest

ANNOTATION_DIGEST = f"{API_GROUP}/record-digest"
KEPT_MAX = 1024


class ForeignRecordError(Exception):
    """Something that is not a record of ours has a record's name. It is never used and never overwritten."""


def render_record(record: RunRecord) -> Manifest:
    """The ControllerRevision that holds a record."""
    owner = record.pipeline
    return {
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": {
            "name": name_of(record),
            "namespace": owner.namespace,
            "labels": {
                LABEL_MANAGED_BY: MANAGED_BY,
                LABEL_PIPELINE: owner.name,
                LABEL_PIPELINE_UID: owner.uid,
            },
            "annotations": {ANNOTATION_DIGEST: record.digest()},
            "ownerReferences": [
                {
                    "apiVersion": GROUP_VERSION,
                    "kind": "AlignmentPipeline",
                    "name": owner.name,
                    "uid": owner.uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "revision": owner.generation,
        "data": record.to_wire(),
    }


def read_record(revision: Manifest, *, uid: str) -> RunRecord:
    """The record in a ControllerRevision.

    Raises:
        ForeignRecordError: if it is not ours, or not what was written.
    """
    metadata = revision["metadata"]
    label = f"ControllerRevision {metadata.get('namespace')}/{metadata.get('name')}"
    remedy = "It is not used. Delete it, or delete the pipeline and apply it again"
    owner = controller_of(metadata)
    if owner is None or owner.get("uid") != uid:
        raise ForeignRecordError(f"{label} has the name of this pipeline's run record but another owner. {remedy}")
    try:
        record = RunRecord.model_validate(revision.get("data"))
    except ValidationError as error:
        words = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:3])
        raise ForeignRecordError(
            f"{label} holds no run record that this version understands ({words}). {remedy}"
        ) from error
    written = (metadata.get("annotations") or {}).get(ANNOTATION_DIGEST)
    expected = (uid, revision.get("revision"), metadata.get("name"))
    if (record.pipeline.uid, record.pipeline.generation, name_of(record)) != expected or record.digest() != written:
        raise ForeignRecordError(f"{label} does not hold what was frozen in it. {remedy}")
    return record


def name_of(record: RunRecord) -> str:
    """Name of the ControllerRevision of a record."""
    owner = record.pipeline
    return record_name(pipeline=owner.name, uid=owner.uid, generation=owner.generation)


@dataclass(slots=True)
class RecordStore:
    """Reads and writes records. What was read once is kept, for it never changes."""

    kube: Kube
    _kept: OrderedDict[tuple[str, int], bytes] = field(default_factory=OrderedDict)

    async def load(self, *, namespace: str, pipeline: str, uid: str, generation: int) -> RunRecord | None:
        """The record of a generation; None where it has not been frozen.

        Raises:
            ForeignRecordError: if something else has its name.
        """
        kept = self._kept.get((uid, generation))
        if kept is not None:
            self._kept.move_to_end((uid, generation))
            return RunRecord.model_validate_json(kept)
        try:
            revision = await self.kube.get(
                RECORDS, record_name(pipeline=pipeline, uid=uid, generation=generation), namespace
            )
        except NotFoundError:
            return None
        record = read_record(revision, uid=uid)
        self._keep(record)
        return record

    async def load_before(self, *, namespace: str, uid: str, generation: int) -> RunRecord | None:
        """The record of the newest generation before one; what is not a record of ours is passed over."""
        found: list[Manifest] = []
        async for page in self.kube.pages(RECORDS, namespace, f"{LABEL_PIPELINE_UID}={uid}"):
            found += [item for item in page.items if _revision(item) < generation]
        for revision in sorted(found, key=_revision, reverse=True):
            try:
                return read_record(revision, uid=uid)
            except ForeignRecordError:
                continue
        return None

    async def freeze(self, record: RunRecord) -> None:
        """Write a record, once.

        Raises:
            ReobserveError: if another record of the same generation is there already.
            ForeignRecordError: if something else has its name.
        """
        owner = record.pipeline
        try:
            await self.kube.create(RECORDS, render_record(record), owner.namespace)
        except AlreadyExistsError:
            there = await self.load(
                namespace=owner.namespace, pipeline=owner.name, uid=owner.uid, generation=owner.generation
            )
            if there is None or there.digest() != record.digest():
                raise ReobserveError(f"another record of generation {owner.generation} is in place") from None
            return
        self._keep(record)

    def _keep(self, record: RunRecord) -> None:
        text = json.dumps(record.to_wire(), separators=(",", ":"), ensure_ascii=False).encode()
        self._kept[record.pipeline.uid, record.pipeline.generation] = text
        while len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)


def _revision(item: dict[str, Any]) -> int:
    return int(item.get("revision") or 0)
