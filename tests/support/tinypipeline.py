"""examples/03-tiny with a first stage that lasts long enough to be met while it runs; the same on a cluster as on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml
from support.tiny import save_model

Manifest = dict[str, Any]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "03-tiny"
LONG_STAGE, LONG_STEPS, CHECKPOINT_EVERY = "domain", 300, 20
STAGE_NAMES = ("domain", "sft", "dpo", "final", "exam")


def write_inputs(folder: Path) -> Path:
    """Model and data in a folder, `model/` and `data/`; the same bytes every time."""
    save_model(folder / "model")
    shutil.copytree(EXAMPLE / "data", folder / "data")
    return folder


def tiny_manifest(
    name: str, source: str, *, stages: tuple[str, ...] = STAGE_NAMES, seed: int = 7, **spec: Any
) -> Manifest:
    """The pipeline, or its stages of some names with the datasets that they read.

    Args:
        name: Name of the pipeline.
        source: URI of the place that holds what `write_inputs` wrote.
        stages: Names of the stages to keep.
        seed: Another seed is other work, that shares nothing in storage.
        spec: Further fields of the spec.
    """
    manifest: Manifest = yaml.safe_load((EXAMPLE / "pipeline.yaml").read_text(encoding="utf-8"))
    manifest["metadata"]["name"] = name
    manifest["spec"] |= {"seed": seed, **spec}
    manifest["spec"]["model"]["source"] = f"{source}/model"
    kept = [stage for stage in manifest["spec"]["stages"] if stage["name"] in stages]
    manifest["spec"]["stages"] = kept
    used = yaml.safe_dump(kept)
    manifest["spec"]["datasets"] = [
        {**dataset, "source": f"{source}/{dataset['source']}"}
        for dataset in manifest["spec"]["datasets"]
        if f"dataset: {dataset['name']}\n" in used
    ]
    if LONG_STAGE in stages:
        long = {"maxSteps": LONG_STEPS, "epochs": 1000, "checkpointEverySteps": CHECKPOINT_EVERY}
        stage_of(manifest, LONG_STAGE)["pretrain"]["training"] |= long
    return manifest


def stage_of(manifest: Manifest, name: str) -> dict[str, Any]:
    """A stage of a manifest, to be read or changed."""
    found: dict[str, Any] = next(stage for stage in manifest["spec"]["stages"] if stage["name"] == name)
    return found
