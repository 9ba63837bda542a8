"""A manifest as a local run sees it: files found beside it, what only a cluster has left out, with a word on that."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def localise(body: dict[str, Any], folder: Path, *, gpus: int) -> tuple[dict[str, Any], list[str]]:
    """A copy of a manifest for a run on this machine, and remarks about what was changed.

    Paths without a scheme, and `file://` with a relative path, are relative to `folder`, where the manifest lies;
    `~/` is the user's home. `spec.storage`, `spec.runtimeRef` and what asks for more than this machine has are left
    out. A body of the wrong shape is returned as it is; the schema check names what is wrong with it.
    """
    local: dict[str, Any] = copy.deepcopy(body)
    spec = local.get("spec")
    if not isinstance(spec, dict):
        return local, []
    notes: list[str] = []
    if "runtimeRef" in spec:
        reference = spec.pop("runtimeRef")
        name = reference.get("name") if isinstance(reference, dict) else None
        notes.append(f"spec.runtimeRef ({name}) is for clusters; stages run as processes of this machine")
    for dataset in _mappings(spec.get("datasets")):
        if isinstance(source := dataset.get("source"), str):
            dataset["source"] = _absolute(source if "://" in source else f"file://{source}", folder)
    for model in _models(spec):
        if isinstance(source := model.get("source"), str):
            model["source"] = _absolute(source, folder)
    for reward in _rewards(spec):
        if isinstance(uri := reward.get("model"), str):
            reward["model"] = _absolute(uri, folder)
    for stage in _mappings(spec.get("stages")):
        resources = stage.get("resources")
        if isinstance(resources, dict):
            notes += _fit(resources, str(stage.get("name")), gpus)
    return local, notes


def choose_storage(body: dict[str, Any], folder: Path, given: Path | None, default: Path) -> tuple[Path, list[str]]:
    """The folder that takes the results of a local run, and a remark where the manifest asks for another place.

    `--storage` counts first, then a `file://` storage of the manifest, then the default.
    """
    spec = body.get("spec")
    storage = spec.get("storage") if isinstance(spec, dict) else None
    uri = storage.get("uri") if isinstance(storage, dict) else None
    if not isinstance(uri, str):
        return (given or default).absolute(), []
    if uri.startswith("file://") and given is None:
        return Path(_absolute(uri, folder).removeprefix("file://")), []
    chosen = given or default
    return chosen.absolute(), [f"spec.storage ({uri}) is not used by a local run; results go to {chosen}"]


def _models(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if isinstance(model := spec.get("model"), dict):
        yield model
    for stage in _mappings(spec.get("stages")):
        evaluate = stage.get("evaluate")
        for suite in _mappings(evaluate.get("suites") if isinstance(evaluate, dict) else None):
            win_rate = suite.get("winRate")
            judge = win_rate.get("judge") if isinstance(win_rate, dict) else None
            judge_model = judge.get("model") if isinstance(judge, dict) else None
            if isinstance(judge_model, dict):
                yield judge_model


def _rewards(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for stage in _mappings(spec.get("stages")):
        for parameters in stage.values():
            if isinstance(parameters, dict):
                yield from _mappings(parameters.get("rewards"))


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        yield from (item for item in value if isinstance(item, dict))


def _absolute(source: str, folder: Path) -> str:
    scheme, _, rest = source.partition("://")
    if scheme != "file" or not rest:
        return source
    rest = str(Path(rest).expanduser()) + "/" * rest.endswith("/") if rest.startswith("~/") else rest
    # Joined and freed of `..`, not resolved: glob patterns and symbolic links stay what they are. `/`-rooted paths win
    # over the folder.
    path = os.path.normpath((folder / rest).absolute())
    return f"file://{path}/" if rest.endswith("/") else f"file://{path}"


def _fit(resources: dict[str, Any], stage: str, gpus: int) -> Iterator[str]:
    nodes = resources.get("nodes")
    if isinstance(nodes, int) and nodes > 1:
        resources["nodes"] = 1
        yield f"{stage} asks for {nodes} nodes; this machine is one"
    asked = resources.get("gpusPerNode")
    if isinstance(asked, int) and asked > gpus:
        if gpus:
            resources["gpusPerNode"] = gpus
        else:
            del resources["gpusPerNode"]
        yield f"{stage} asks for {asked} GPUs; this machine has {gpus or 'none'}"


def count_gpus() -> int:
    """Accelerators of this machine, counted by their device files so that no driver library has to load."""
    return sum(1 for _ in Path("/dev").glob("nvidia[0-9]*"))
