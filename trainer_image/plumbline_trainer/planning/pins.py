"""Digests of external inputs, computed once per content.

A digest is kept in storage under the input's URI together with size and ETag (for files: size, modification time and
inode) of every file, and is taken again while those are the same. It only says which content a run is pinned to: every
stage hashes the bytes that it actually reads and compares them.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plumbline_api.fingerprint import digest_of
from plumbline_api.online import FUNCTION_SCHEME
from plumbline_api.record import ExternalInput

from plumbline_trainer.data import hub
from plumbline_trainer.data.sources import (
    bundled_model,
    dataset_digest,
    dataset_objects,
    model_digest,
    model_objects,
)
from plumbline_trainer.rewards.functions import find_function, source_digest
from plumbline_trainer.storage import uris
from plumbline_trainer.storage.manifests import read_json
from plumbline_trainer.storage.objects import PARALLEL_OBJECTS, Objects

if TYPE_CHECKING:
    from plumbline_trainer.context import StageContext

CACHE_FOLDER = "digests"


@dataclass(frozen=True, slots=True)
class Pin:
    """What an external input is pinned to."""

    digest: str
    """SHA-256, hex."""
    files: int
    size: int
    """Bytes; 0 where only the digest is known."""
    from_cache: bool = False


def pin(context: StageContext, item: ExternalInput) -> Pin:
    """Find an external input and its digest; what is on the Hub is mirrored to storage.

    Raises:
        InputError: if it is not there or not readable.
    """
    if item.kind == "function":
        name = item.uri.removeprefix(FUNCTION_SCHEME)
        find_function(name)
        return Pin(source_digest(name), files=0, size=0)
    if item.kind == "endpoint":  # What it computes is only known by the version that its owners declare.
        return Pin(digest_of([item.name, item.settings]), files=0, size=0)
    if hub.is_hub(item.uri):
        kind = "dataset" if item.kind == "dataset" else "model"
        digest = hub.mirror_from_hub(context.store, context.namespace_root, item.uri, kind)
        return Pin(digest, files=0, size=0)
    if item.kind != "dataset":
        uri = f"file://{bundled_model(item.uri)}" if item.uri.startswith("bundled://") else item.uri
        objects = model_objects(context.store, uri)
    else:
        objects = dataset_objects(context.store, item.uri)
    hashes, from_cache = _hashes(context, item.uri, objects)
    if item.kind != "dataset":
        digest = model_digest([(uris.basename(info.uri), hashes[info.uri]) for info in objects])
    else:
        digest = dataset_digest([(info.uri, hashes[info.uri]) for info in objects])
    return Pin(digest, len(objects), sum(info.size for info in objects), from_cache)


def _hashes(context: StageContext, uri: str, objects: Objects) -> tuple[dict[str, str], bool]:
    """SHA-256 of every file, from the cache where nothing says that it changed."""
    place = uris.join(context.namespace_root, f"{CACHE_FOLDER}/{hashlib.sha256(uri.encode()).hexdigest()[:32]}.json")
    known = _known(read_json(context.store, place))
    marks = {info.uri: f"{info.size}/{info.etag}" for info in objects}
    missing = [info.uri for info in objects if known.get(info.uri, ("", ""))[0] != marks[info.uri]]
    with ThreadPoolExecutor(PARALLEL_OBJECTS) as pool:
        fresh = dict(zip(missing, (sha256 for sha256, _ in pool.map(context.store.hash, missing)), strict=True))
    found = {info.uri: fresh.get(info.uri) or known[info.uri][1] for info in objects}
    if missing:
        document = {"uri": uri, "files": {name: [marks[name], found[name]] for name in found}}
        context.store.put_bytes(place, json.dumps(document, indent=1).encode())
    return found, not missing


def _known(document: Any) -> dict[str, tuple[str, str]]:
    files = document.get("files") if isinstance(document, dict) else None
    if not isinstance(files, dict):
        return {}
    return {
        name: (entry[0], entry[1])
        for name, entry in files.items()
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
    }
