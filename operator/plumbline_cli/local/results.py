"""What a local run has left in storage: its model, its report and the figures that decide."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plumbline_api.layout import MANIFEST

from plumbline_cli.local.state import LocalState, RunFolder

SUMMARY = "summary.json"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The last policy of a run as files."""

    path: Path
    is_adapter: bool


def path_of(uri: str) -> Path:
    """The path of a file:// URI."""
    return Path(uri.removeprefix("file://"))


def find_model(state: LocalState) -> ModelFolder | None:
    """Where the weights of the last policy lie; None where there is none, or its manifest is gone."""
    if state.status.model is None:
        return None
    root = path_of(state.status.model.uri)
    manifest = _read_json(root / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("folder"), str):
        return None
    meta = manifest.get("meta")
    return ModelFolder(root / manifest["folder"], isinstance(meta, dict) and meta.get("form") == "adapter")


def find_report(state: LocalState) -> Path | None:
    """The report of a run, if it was written."""
    if state.status.report is None:
        return None
    path = path_of(state.status.report)
    return path if path.is_file() else None


def read_summary(folder: RunFolder) -> dict[str, Any] | None:
    """The figures that finalize wrote beside the report; None where it wrote none."""
    found = _read_json(folder.path / SUMMARY)
    return found if isinstance(found, dict) else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
