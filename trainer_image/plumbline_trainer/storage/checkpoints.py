"""Checkpoints on their way to storage and back. What is in them is the engine's business.

Each lies in a folder of its own, `<run root>/checkpoints/<step>-<nonce>/`, and counts once its `manifest.json` is
there. The newest one that is complete and undamaged is resumed from; older ones than the last two are deleted.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from plumbline_api import layout
from plumbline_api.base import Contract
from plumbline_api.fingerprint import canonical_json
from pydantic import Field, ValidationError

from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.storage import uris
from plumbline_trainer.storage.manifests import ManifestFile, download, node_lock
from plumbline_trainer.storage.objects import ObjectStore

if TYPE_CHECKING:
    import logging

    from plumbline_trainer.context import StageContext

KEEP = 2
"""Checkpoints kept: the newest, and one before it in case the newest is damaged."""
FOLDER = "checkpoints"
_NAME = re.compile(r"(\d{8})(?:\.(\d{6}))?-[0-9a-f]+")


class CheckpointManifest(Contract):
    """What a checkpoint consists of."""

    version: Literal[1] = 1
    """Version of this document."""
    step: Annotated[int, Field(ge=0)]
    """Optimizer steps done."""
    fingerprint: str
    """Identity of the work."""
    attempt: int
    """Attempt that wrote it."""
    files: list[ManifestFile]
    """Every file."""
    state: dict[str, Any] = {}
    """What the engine keeps as JSON: schedule, data position, random states."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint on this node."""

    step: int
    folder: Path
    state: dict[str, Any]


class CheckpointUploads:
    """Uploads beside training, one at a time and in order. A fault comes up at the next save or wait."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, work: Any, *arguments: Any) -> None:
        """Start an upload once the one before has ended."""
        self.wait()
        self._pending = self._pool.submit(work, *arguments)

    def wait(self) -> None:
        """Return when nothing is under way.

        Raises:
            InputError, TransientError: of the upload that failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def save_checkpoint(context: StageContext, step: int, folder: Path, state: dict[str, Any], part: int = 0) -> None:
    """Commit a folder of files as the checkpoint of a step, in the background. Call it on rank 0.

    The folder belongs to the upload from here on and is deleted after it. `state` must be JSON. A step that is long
    may have several checkpoints: the one of the highest part is the newest.
    """
    if context.uploads is None:
        context.uploads = CheckpointUploads()
    json.dumps(state, allow_nan=False)  # a mistake here must show in the stage, not in a thread later
    context.uploads.submit(_upload, context, step, part, folder, state)


def wait_for_uploads(context: StageContext) -> None:
    """Return when every saved checkpoint is committed; raise what prevented it."""
    if context.uploads is not None:
        context.uploads.wait()


def load_latest_checkpoint(context: StageContext) -> Checkpoint | None:
    """The newest complete and undamaged checkpoint of this run, downloaded once per node; None to start afresh.

    Figures reported after its step are forgotten, because the steps are taken again.
    """
    folder = context.scratch / "checkpoint"
    choice = folder.with_name("checkpoint.json")
    with node_lock(folder):
        if not choice.exists():
            found = _download_newest(context, folder)
            choice.write_bytes(canonical_json(found.to_wire()) if found is not None else b"")
        data = choice.read_bytes()
    manifest = CheckpointManifest.model_validate_json(data) if data else None
    if manifest is None:
        return None
    if context.is_main:
        context.progress.rewind(manifest.step)
    return Checkpoint(manifest.step, folder, dict(manifest.state))


def _upload(context: StageContext, step: int, part: int, folder: Path, state: dict[str, Any]) -> None:
    store, root = context.store, uris.join(context.run_root, FOLDER)
    name = f"{step:08d}.{part:06d}" if part else f"{step:08d}"
    place = uris.join(root, f"{name}-{secrets.token_hex(8)}")
    files = [
        ManifestFile(path=path, size=size, sha256=digest) for path, size, digest in store.put_folder(place, folder)
    ]
    manifest = CheckpointManifest(
        step=step, fingerprint=context.run.fingerprint, attempt=context.run.attempt, files=files, state=state
    )
    store.put_bytes(uris.join(place, layout.MANIFEST), canonical_json(manifest.to_wire()), if_absent=True)
    shutil.rmtree(folder, ignore_errors=True)
    _prune(store, root, place, (step, part), context.log)


def _prune(store: ObjectStore, root: str, newest: str, here: tuple[int, int], log: logging.Logger) -> None:
    """Delete what is older than the checkpoints to keep, and what earlier attempts left half uploaded."""
    complete, partial = _folders(store, root)
    older = sorted((name for name in complete if _order(name) <= here and uris.join(root, name) != newest), key=_order)
    try:
        for name in [*older[: max(len(older) - KEEP + 1, 0)], *(name for name in partial if _order(name) <= here)]:
            store.delete_prefix(uris.join(root, name))
        store.abort_uploads(root)
    except (InputError, TransientError, OSError) as error:
        # Room is lost, nothing else; the next save tries again.
        log.warning("old checkpoints were not deleted: %s", error)


def _folders(store: ObjectStore, root: str) -> tuple[list[str], list[str]]:
    """Names of complete checkpoints and of those without a manifest."""
    seen: dict[str, bool] = {}
    for info in store.list(root):
        name, _, path = info.uri.removeprefix(root).lstrip("/").partition("/")
        if _NAME.fullmatch(name):
            seen[name] = seen.get(name, False) or path == layout.MANIFEST
    return [name for name, done in seen.items() if done], [name for name, done in seen.items() if not done]


def _order(name: str) -> tuple[int, int]:
    """Step and part."""
    step, _, part = name.partition("-")[0].partition(".")
    return int(step), int(part or 0)


def _download_newest(context: StageContext, folder: Path) -> CheckpointManifest | None:
    store, root = context.store, uris.join(context.run_root, FOLDER)
    for name in sorted(_folders(store, root)[0], key=lambda name: (*(-number for number in _order(name)), name)):
        place = uris.join(root, name)
        try:
            manifest = CheckpointManifest.model_validate_json(store.get_bytes(uris.join(place, layout.MANIFEST)))
            download(store, place, manifest.files, folder)
        except (ValidationError, FileNotFoundError, InputError) as error:
            if isinstance(error, InputError) and error.reason not in ("InputMissing", "BadInput"):
                raise
            context.log.warning("checkpoint %s is damaged and skipped: %s", name, _first_line(error))
            shutil.rmtree(folder, ignore_errors=True)
            continue
        if manifest.fingerprint != context.run.fingerprint or manifest.step != _order(name)[0]:
            context.log.warning("checkpoint %s belongs to other work and is skipped", name)
            shutil.rmtree(folder, ignore_errors=True)
            continue
        context.log.info("resuming from step %d (checkpoint %s)", manifest.step, name)
        return manifest
    return None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
