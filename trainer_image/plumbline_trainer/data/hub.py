"""Models and datasets of the Hugging Face Hub.

Only preflight talks to the Hub: it resolves the revision to a commit and copies the files to storage, under their
digest. Stages read that mirror and run offline.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plumbline_api.stagerun import StageInput

from plumbline_trainer.data.records import SourceFile, data_files
from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.storage import uris
from plumbline_trainer.storage.manifests import ManifestFile, download, read_json
from plumbline_trainer.storage.objects import ObjectStore

if TYPE_CHECKING:
    from plumbline_trainer.context import StageContext

MIRROR = "mirror"
"""Folder of the namespace with what was copied from the Hub, by digest."""
MIRROR_MANIFEST = "mirror.json"
_REFERENCE = re.compile(
    r"hf://(?P<datasets>datasets/)?(?P<repo>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository of the Hub at a revision."""

    repo: str
    revision: str | None
    kind: str
    """`model` or `dataset`."""


def is_hub(uri: str) -> bool:
    """Whether a URI names a repository of the Hub."""
    return uri.startswith("hf://")


def parse_hub(uri: str) -> HubReference:
    """Take `hf://org/name@revision` or `hf://datasets/org/name@revision` apart.

    Raises:
        InputError: if it is neither.
    """
    found = _REFERENCE.fullmatch(uri)
    if found is None:
        raise InputError(f'"{uri}": write hf://org/name@revision, for datasets hf://datasets/org/name@revision')
    return HubReference(found["repo"], found["revision"], "dataset" if found["datasets"] else "model")


def mirror_from_hub(store: ObjectStore, namespace_root: str, uri: str, kind: str) -> str:
    """Copy a repository's files to storage, unless they are there; their digest. Only preflight calls it.

    Raises:
        InputError: if the repository, the revision or the permission is missing.
        TransientError: if the Hub does not answer.
    """
    reference = parse_hub(uri)
    if reference.kind != kind:
        raise InputError(f'"{uri}" is a {reference.kind}; a {kind} is needed here')
    commit = _resolve(reference, uri)
    pointer = uris.join(namespace_root, f"{MIRROR}/by-commit/{kind}/{reference.repo}/{commit}.json")
    known = read_json(store, pointer)
    if isinstance(known, dict) and isinstance(known.get("digest"), str):
        root = mirror_root(namespace_root, known["digest"])
        if store.exists(uris.join(root, MIRROR_MANIFEST)):
            return str(known["digest"])
    with tempfile.TemporaryDirectory(prefix="plumbline-hub-") as made:
        folder = _download(reference, commit, Path(made), uri)
        return _store(store, namespace_root, folder, kind=kind, uri=uri, commit=commit, pointer=pointer)


def mirror_root(namespace_root: str, digest: str) -> str:
    """Where the mirror of a digest lies."""
    return uris.join(namespace_root, f"{MIRROR}/{digest}")


def mirrored_model(context: StageContext, item: StageInput, folder: Path) -> tuple[Path, str]:
    """A mirrored model on this node, and its digest."""
    from plumbline_trainer.data.sources import model_digest

    files = _fetch(context, item, folder)
    return folder, model_digest([(file.path, file.sha256) for file in files])


def mirrored_dataset(context: StageContext, item: StageInput, folder: Path) -> list[SourceFile]:
    """The files of a mirrored dataset on this node."""
    from plumbline_trainer.data.sources import check_pin, dataset_digest

    files = _fetch(context, item, folder)
    check_pin(item, dataset_digest([(file.path, file.sha256) for file in files]))
    return [SourceFile(f"{item.uri}/{file.path}", folder / file.path) for file in files]


def _fetch(context: StageContext, item: StageInput, folder: Path) -> list[ManifestFile]:
    assert item.digest is not None
    root = mirror_root(context.namespace_root, item.digest)
    document = read_json(context.store, uris.join(root, MIRROR_MANIFEST))
    if not isinstance(document, dict):
        raise InputError(f"the mirror of {item.uri} is missing in {root}; retry from preflight", reason="InputChanged")
    files = [ManifestFile.model_validate(entry) for entry in document["files"]]
    if not all((folder / file.path).exists() for file in files):
        try:
            download(context.store, uris.join(root, "files"), files, folder, remedy="retry from preflight")
        except InputError as error:
            if error.reason != "InputMissing":
                raise
            # Without its manifest the mirror does not count, and the next preflight makes it anew.
            context.store.delete_prefix(root)
            raise InputError(f"the mirror of {item.uri}: {error}", reason="InputChanged") from error
    return files


def _store(
    store: ObjectStore, namespace_root: str, folder: Path, *, kind: str, uri: str, commit: str, pointer: str
) -> str:
    import json

    from plumbline_trainer.data.sources import dataset_digest, model_digest
    from plumbline_trainer.storage.files import file_digest

    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    pairs = [(name, file_digest(folder / name)) for name in names]
    digest = model_digest(pairs) if kind == "model" else dataset_digest(pairs)
    root = mirror_root(namespace_root, digest)
    stored = store.put_folder(uris.join(root, "files"), folder)
    document = {
        "uri": uri,
        "commit": commit,
        "files": [{"path": path, "size": size, "sha256": sha256} for path, size, sha256 in stored],
    }
    store.put_bytes(uris.join(root, MIRROR_MANIFEST), json.dumps(document).encode())
    store.put_bytes(pointer, json.dumps({"digest": digest}).encode())
    return digest


def _resolve(reference: HubReference, uri: str) -> str:
    with _Explained(uri):
        from huggingface_hub import HfApi

        info: Any = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).repo_info(
            reference.repo, revision=reference.revision, repo_type=reference.kind, timeout=30
        )
    return str(info.sha)


def _download(reference: HubReference, commit: str, folder: Path, uri: str) -> Path:
    """Only files that are data: safetensors, configuration and tokenizer, or rows."""
    from plumbline_trainer.data.sources import MODEL_FILES

    with _Explained(uri):
        from huggingface_hub import HfApi, snapshot_download

        endpoint = os.environ.get("HF_ENDPOINT")
        names = HfApi(endpoint=endpoint).list_repo_files(reference.repo, revision=commit, repo_type=reference.kind)
        if reference.kind == "model":
            wanted = [name for name in names if MODEL_FILES.fullmatch(name)]
        else:
            visible = [name for name in names if "/." not in f"/{name}" and not name.lower().endswith("readme.md")]
            wanted = data_files(visible)
        if not wanted or (reference.kind == "model" and not any(name.endswith(".safetensors") for name in wanted)):
            raise InputError(
                f'"{uri}" holds no {"safetensors" if reference.kind == "model" else "rows"} that can be read'
            )
        target = folder / "snapshot"
        snapshot_download(
            reference.repo,
            revision=commit,
            repo_type=reference.kind,
            endpoint=endpoint,
            allow_patterns=[re.sub(r"([*?\[])", r"[\1]", name) for name in wanted],
            local_dir=target,
        )
    # The library keeps its own notes beside the files.
    result = folder / "files"
    for name in wanted:
        (result / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).replace(result / name)
    return result


class _Explained:
    """Turn what the Hub says into what a person should do, or into an attempt that is repeated."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None or isinstance(error, InputError) or not isinstance(error, Exception):
            return
        name = type(error).__name__
        if name == "ModuleNotFoundError":
            raise error
        if name in ("RepositoryNotFoundError", "GatedRepoError", "DisabledRepoError"):
            raise InputError(
                f'"{self._uri}": the Hub knows no such repository, or does not let this token read it. Check the name, '
                "accept its terms, or set HF_TOKEN"
            ) from error
        if name in ("RevisionNotFoundError", "HFValidationError"):
            raise InputError(
                f'"{self._uri}": the Hub knows no such revision. Name a branch, a tag or a commit after @'
            ) from error
        raise TransientError(
            f'"{self._uri}": the Hub does not answer ({name}: {error}). See whether it can be '
            "reached from here (a proxy, or a mirror by HF_ENDPOINT or the runtime's hubEndpoint), or copy it to "
            "storage and name it there",
            reason="HubUnavailable",
        ) from error
