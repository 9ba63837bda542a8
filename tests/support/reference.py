"""A pipeline run on this machine by the command, as the measure of what runs on the cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tinypipeline import Manifest, tiny_manifest

Files = dict[str, str]
"""SHA-256 of every file of an output, by its path in it."""
SECONDS = 1800.0


@dataclass
class Reference:
    """A local run that nothing disturbs; it goes on beside the tests until one asks for it."""

    folder: Path
    process: subprocess.Popen[bytes]

    def status(self) -> dict[str, Any]:
        """Its status, once it has succeeded."""
        try:
            code = self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the local run did not end within {SECONDS:.0f} s\n{self._log()}") from None
        assert code == 0, self._log()
        [state] = self.folder.glob("runs/*/pipelines/*/*/state.json")
        found: dict[str, Any] = json.loads(state.read_text())["status"]
        return found

    def _log(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")[-4000:]

    def output(self, stage: str) -> dict[str, Any]:
        """The committed manifest of a stage."""
        entry = next(item for item in self.status()["stages"] if item["name"] == stage)
        [file] = self.folder.glob(f"runs/*/{entry['type']}/{entry['fingerprint']}/manifest.json")
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def fingerprint(self, stage: str) -> str:
        """Identity of a stage's work."""
        return str(next(item for item in self.status()["stages"] if item["name"] == stage)["fingerprint"])


def files_of(output: dict[str, Any]) -> Files:
    """Files of a committed manifest."""
    return {item["path"]: item["sha256"] for item in output["files"]}


def weights_of(output: dict[str, Any]) -> Files:
    """The weights of a policy's manifest."""
    found = {path: digest for path, digest in files_of(output).items() if path.endswith(".safetensors")}
    assert found, f"no weights in {sorted(files_of(output))}"
    return found


@contextmanager
def run_beside(folder: Path, manifest: Manifest) -> Iterator[Reference]:
    """Start a manifest in a folder, with one thread, as the pods on the cluster have it."""
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(manifest))
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "plumbline_cli.main", "run", "pipeline.yaml", "--storage", "runs"],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            yield Reference(folder, process)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


@pytest.fixture(scope="session")
def reference(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    """The tiny pipeline."""
    with run_beside(tmp_path_factory.mktemp("reference"), tiny_manifest("tiny", tiny_inputs.as_uri())) as found:
        yield found
