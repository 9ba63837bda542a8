"""Outputs: committed by one manifest, verified before use.

An output's files go to a folder of their own first; `manifest.json`, written only where none is yet, makes them the
output. Readers trust nothing that no manifest names, and nothing whose size or SHA-256 differs from what it says.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from plumbline_api import layout
from plumbline_api.base import Contract, Digest
from plumbline_api.online import ABORTED
from plumbline_api.stagerun import StageInput
from pydantic import AfterValidator, Field, ValidationError

from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.storage import uris
from plumbline_trainer.storage.objects import PARALLEL_OBJECTS, ObjectStore

if TYPE_CHECKING:
    from plumbline_trainer.context import StageContext, StageOutput

MISSING = "InputMissing"

RelativePath = Annotated[str, AfterValidator(uris.check_relative), Field(max_length=1024)]


class ManifestFile(Contract):
    """One file of an output."""

    path: RelativePath
    """Path below the manifest's folder."""
    size: Annotated[int, Field(ge=0)]
    """Bytes."""
    sha256: Digest
    """SHA-256 of the bytes."""


class ManifestStage(Contract):
    """The work that yielded an output."""

    type: str
    """Stage type."""
    name: str
    """Name of the stage in the pipeline that computed it first."""
    fingerprint: str
    """Identity of the work."""
    numerics_version: int
    """Numerics version of the type."""


class Parent(Contract):
    """An input that an output was made from: another output by its manifest, or an external input by its digest."""

    role: str
    """Field that named it, such as `model`."""
    name: str
    """What people call it."""
    kind: str
    """What it is."""
    type: str | None = None
    """Type of the stage that wrote it."""
    fingerprint: str | None = None
    """Fingerprint of the stage that wrote it."""
    manifest_digest: Digest | None = None
    """The manifest that was read."""
    uri: str | None = None
    """Location of an external input."""
    digest: str | None = None
    """Pinned digest of an external input."""
    settings: dict[str, Any] = {}
    """How an external input was read."""

    def to_input(self) -> StageInput:
        """The same as the input of a stage."""
        return StageInput(
            role=self.role,
            name=self.name,
            kind=self.kind,
            stage_type=self.type,
            fingerprint=self.fingerprint,
            uri=self.uri,
            digest=self.digest,
            settings=self.settings,
        )


class Manifest(Contract):
    """What an output consists of and came from."""

    version: Literal[1] = 1
    """Version of this document."""
    kind: str
    """Artifact kind."""
    stage: ManifestStage
    """The work that yielded it."""
    folder: RelativePath
    """Folder of the files, beside the manifest."""
    files: list[ManifestFile]
    """Every file."""
    parents: list[Parent] = []
    """What it was made from, in the order of the stage's inputs."""
    meta: dict[str, Any] = {}
    """What readers of the artifact must know."""
    metrics: dict[str, float] = {}
    """Figures of the stage."""
    tokens: int = 0
    """Tokens processed by the attempt that committed it."""
    first_step: int | None = None
    """Optimizer step that the committing attempt started from."""
    last_step: int | None = None
    """Optimizer step that it ended at."""

    def to_bytes(self) -> bytes:
        """JSON with the fields in their order: the first metrics are the ones that results show."""
        return json.dumps(self.to_wire(), ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()

    @property
    def aborted(self) -> str | None:
        """Why the stage stopped by its own abort rules, in words; None where it did not."""
        said = self.meta.get(ABORTED)
        return None if said is None else str(said)

    def parent(self, role: str) -> Parent | None:
        """The input of a role."""
        return next((parent for parent in self.parents if parent.role == role), None)


@dataclass(frozen=True, slots=True)
class FetchedOutput:
    """An output on this node, verified."""

    folder: Path
    manifest: Manifest
    digest: str


def manifest_uri(root_uri: str) -> str:
    """Where the manifest of an output lies."""
    return uris.join(root_uri, layout.MANIFEST)


def read_manifest(store: ObjectStore, root_uri: str) -> tuple[Manifest, str] | None:
    """The manifest below a root and its SHA-256; None where nothing is committed.

    Raises:
        InputError: reason InputMissing, for a manifest that cannot be read as one.
    """
    found = _read(store, root_uri)
    return None if found is None else found[1:]


def _read(store: ObjectStore, root_uri: str) -> tuple[bytes, Manifest, str] | None:
    uri = manifest_uri(root_uri)
    try:
        data = store.get_bytes(uri)
    except FileNotFoundError:
        return None
    try:
        return data, Manifest.model_validate_json(data), hashlib.sha256(data).hexdigest()
    except (ValidationError, InputError) as error:
        raise InputError(
            f"{uri} is damaged: it does not read as a manifest. Delete it, then retry", reason=MISSING
        ) from error


def _read_required(store: ObjectStore, root_uri: str) -> tuple[bytes, Manifest, str]:
    found = _read(store, root_uri)
    if found is None:
        raise InputError(
            f"{manifest_uri(root_uri)} is missing: the output of an earlier stage is gone. Retry that stage",
            reason=MISSING,
        )
    return found


def commit_output(context: StageContext, output: StageOutput) -> tuple[Manifest, str]:
    """Upload an output and make it the one of this piece of work; the manifest that holds and its SHA-256.

    Where another attempt committed first, its manifest holds and the files uploaded here are deleted.
    """
    store, run = context.store, context.run
    folder = f"out-{secrets.token_hex(8)}"
    files = store.put_folder(uris.join(context.output_root, folder), output.folder)
    manifest = Manifest(
        kind=output.kind,
        stage=ManifestStage(
            type=run.type, name=run.stage, fingerprint=run.fingerprint, numerics_version=run.numerics_version
        ),
        folder=folder,
        files=[ManifestFile(path=path, size=size, sha256=digest) for path, size, digest in files],
        parents=[_parent(context, item) for item in run.inputs],
        meta=output.meta,
        metrics=finite(output.metrics),
        tokens=output.tokens,
        first_step=output.first_step,
        last_step=output.last_step,
    )
    data = manifest.to_bytes()
    if store.put_bytes(manifest_uri(context.output_root), data, if_absent=True):
        return manifest, hashlib.sha256(data).hexdigest()
    return _settle_race(context, manifest, data)


def _settle_race(context: StageContext, manifest: Manifest, data: bytes) -> tuple[Manifest, str]:
    """Another manifest stands in our place. It holds if it was made from the same inputs and its files are sound.

    Else it is what an earlier run left, which was refused as a cache hit for the same reason, and ours replaces it.
    """
    try:
        winner = read_manifest(context.store, context.output_root)
        sound = (
            winner is not None
            and winner[0].parents == manifest.parents
            and not damage(context.store, context.output_root, winner[0])
        )
    except InputError:
        winner, sound = None, False
    if winner is not None and sound:
        context.log.warning("another attempt committed this output first; its result holds")
        context.store.delete_prefix(uris.join(context.output_root, manifest.folder))
        return winner
    context.log.warning("the output that was committed before is damaged or of other inputs; it is replaced")
    context.store.put_bytes(manifest_uri(context.output_root), data)
    return manifest, hashlib.sha256(data).hexdigest()


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """The figures that JSON can hold: NaN and infinity are left out."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _parent(context: StageContext, item: StageInput) -> Parent:
    digest = None
    if item.fingerprint is not None:
        root = context.root_of(item)
        digest = context.manifest_digests.get(root)
        if digest is None:
            found = read_manifest(context.store, root)
            digest = found[1] if found is not None else None
    return Parent(
        role=item.role,
        name=item.name,
        kind=item.kind,
        type=item.stage_type,
        fingerprint=item.fingerprint,
        manifest_digest=digest,
        uri=item.uri,
        digest=item.digest,
        settings=item.settings,
    )


def damage(store: ObjectStore, root_uri: str, manifest: Manifest) -> str | None:
    """What is wrong with an output in storage, every byte read; None if it is sound."""
    place = uris.join(root_uri, manifest.folder)

    def check(file: ManifestFile) -> str | None:
        try:
            found = store.hash(uris.join(place, file.path))
        except FileNotFoundError:
            return f"{file.path} is missing"
        return None if found == (file.sha256, file.size) else f"{file.path} is damaged"

    with ThreadPoolExecutor(PARALLEL_OBJECTS) as pool:
        return next((fault for fault in pool.map(check, manifest.files) if fault is not None), None)


def fetch_output(context: StageContext, root_uri: str, into: Path | None = None) -> FetchedOutput:
    """Download an output once per node and verify every file before anybody reads it.

    Raises:
        InputError: reason InputMissing, naming the file that is missing or damaged.
    """
    folder = into or context.scratch / "outputs" / hashlib.sha256(root_uri.encode()).hexdigest()[:16]
    with node_lock(folder):
        record = folder.with_name(folder.name + ".manifest")
        if record.exists():
            data = record.read_bytes()
            manifest, digest = Manifest.model_validate_json(data), hashlib.sha256(data).hexdigest()
        else:
            data, manifest, digest = _read_required(context.store, root_uri)
            download(context.store, uris.join(root_uri, manifest.folder), manifest.files, folder)
            record.write_bytes(data)
    context.manifest_digests[root_uri] = digest
    return FetchedOutput(folder, manifest, digest)


def download(
    store: ObjectStore,
    place: str,
    files: list[ManifestFile],
    folder: Path,
    *,
    remedy: str = "retry the stage that wrote it",
) -> None:
    """Download files and compare each with its size and SHA-256.

    Raises:
        InputError: reason InputMissing, naming the file that is missing or damaged; the folder is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def one(file: ManifestFile) -> None:
        source, target = uris.join(place, file.path), folder / file.path
        try:
            digest = store.get_file(source, target)
        except FileNotFoundError as error:
            raise InputError(f"{source} is missing; {remedy}", reason=MISSING) from error
        if digest != file.sha256:
            size = target.stat().st_size
            what = f"has {size} bytes instead of {file.size}" if size != file.size else "does not match its SHA-256"
            raise InputError(f"{source} is damaged: it {what}; {remedy}", reason=MISSING)

    try:
        with ThreadPoolExecutor(PARALLEL_OBJECTS) as pool:
            list(pool.map(one, files))
    except (InputError, TransientError):
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def node_lock(folder: Path) -> Iterator[None]:
    """Let one rank of a node work on a folder while the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def read_json(store: ObjectStore, uri: str) -> Any:
    """A JSON document; None where there is none or it is damaged (a cache is never worth a failure)."""
    try:
        return json.loads(store.get_bytes(uri))
    except (FileNotFoundError, ValueError):
        return None
