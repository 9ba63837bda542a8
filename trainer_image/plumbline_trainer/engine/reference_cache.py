"""Reference totals in storage: shared by the stages and runs of a namespace, and kept by each run for itself.

A *pack* is a folder with `totals.safetensors` (keys and totals) and a manifest that is written last and names its size
and SHA-256. Packs are only ever added. What is damaged or half written counts as not there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from plumbline_api import layout
from plumbline_api.base import Contract
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from plumbline_trainer.context import StageContext
from plumbline_trainer.errors import InputError
from plumbline_trainer.storage import uris
from plumbline_trainer.storage.manifests import MISSING, ManifestFile, download

FOLDER = "references"
TOTALS = "totals.safetensors"
SCORING_VERSION = 1
"""Raised when the same response would score otherwise under the same weights."""


@dataclass(frozen=True)
class ReferenceKey:
    """What a total depends on besides the ids and the mask of its response (ADR 73)."""

    weights: str
    """Identity of the reference policy's weights."""
    path: str
    precision: str
    device: str
    split: str
    """How work is cut: token budget, ranks and threads. Another cut rounds differently."""
    version: int = SCORING_VERSION

    def digest(self) -> str:
        """Name of the folder of packs."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


class PackManifest(Contract):
    """What makes a pack valid."""

    version: Literal[1] = 1
    """Version of this document."""
    files: list[ManifestFile]
    """Every file."""


class ReferenceCache:
    """Totals under one key."""

    def __init__(self, context: StageContext, key: ReferenceKey) -> None:
        self._context = context
        name = f"{FOLDER}/{key.digest()}"
        self._own = uris.join(context.run_root, name)
        self._shared = uris.join(context.namespace_root, name)

    def find(self, wanted: Iterable[bytes]) -> dict[bytes, Tensor]:
        """Totals that are in storage. What the run itself has used before comes first, so that a resumed run goes on
        with the same bits whatever others have added."""
        missing = set(wanted)
        found: dict[bytes, Tensor] = {}
        for root in (self._own, self._shared):
            for pack in self._packs(root) if missing else ():
                found |= {key: total for key, total in pack.items() if key in missing}
                missing -= found.keys()
        return found

    def keep(self, computed: Mapping[bytes, Tensor], used: Mapping[bytes, Tensor]) -> None:
        """Share what was computed here, and keep for this run all that it uses."""
        if computed:
            self._write(self._shared, computed)
        self._write(self._own, used)

    def _packs(self, root: str) -> Iterator[dict[bytes, Tensor]]:
        for info in self._context.store.list(root):
            folder, _, name = info.uri.rpartition("/")
            if name == layout.MANIFEST and (pack := self._read(folder)) is not None:
                yield pack

    def _read(self, place: str) -> dict[bytes, Tensor] | None:
        store, log = self._context.store, self._context.log
        folder = self._scratch("read")
        try:
            manifest = PackManifest.model_validate_json(store.get_bytes(uris.join(place, layout.MANIFEST)))
            download(store, place, manifest.files, folder)
            tensors = load_file(folder / TOTALS)
            keys, totals = tensors["keys"], tensors["totals"]
            if keys.shape != (len(totals), 32) or keys.dtype != torch.uint8 or totals.dtype != torch.float32:
                raise ValueError("its tensors have other shapes or types")
        except (FileNotFoundError, ValidationError, SafetensorError, KeyError, ValueError, InputError) as error:
            if isinstance(error, InputError) and error.reason not in (MISSING, InputError.reason):
                raise
            log.warning("reference values in %s are damaged and computed again: %s", place, str(error).splitlines()[0])
            return None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        raw = keys.numpy().tobytes()
        return {raw[32 * index : 32 * (index + 1)]: total for index, total in enumerate(totals)}

    def _write(self, root: str, totals: Mapping[bytes, Tensor]) -> None:
        """Write a pack; its name is its content, so that the same one is never there twice."""
        folder = self._scratch("write")
        order = sorted(totals)
        keys = torch.frombuffer(bytearray(b"".join(order)), dtype=torch.uint8).view(-1, 32)
        save_file({"keys": keys, "totals": torch.stack([totals[key] for key in order])}, folder / TOTALS)
        name = hashlib.sha256((folder / TOTALS).read_bytes()).hexdigest()[:32]
        place = uris.join(root, name)
        files = self._context.store.put_folder(place, folder)
        manifest = PackManifest(
            files=[ManifestFile(path=path, size=size, sha256=digest) for path, size, digest in files]
        )
        data = json.dumps(manifest.to_wire()).encode()
        self._context.store.put_bytes(uris.join(place, layout.MANIFEST), data)
        shutil.rmtree(folder)

    def _scratch(self, name: str) -> Path:
        folder = self._context.scratch / FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder
